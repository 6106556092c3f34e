"""The benchmark of the timing's cost: ratios within rounds, and builds that disagree are not timed."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from support import networks
from support.threads import torch_threads

from benchmarks import instructions, profile_overhead
from memnet_fast import native
from memnet_fast.backends import cpu
from memnet_fast.packing import aligned_zeros
from memnet_fast.plan import lower


def test_ratios_are_taken_within_rounds(monkeypatch):
    """On a machine that becomes slower and slower: the ratios do not show it."""
    now = {"cpu": 0.0, "clock": 0.0, "runs": 0}
    monkeypatch.setattr(time, "process_time", lambda: now["cpu"])
    monkeypatch.setattr(time, "perf_counter", lambda: now["clock"])

    def lasts(seconds: float):
        def run() -> None:
            slowness = 1 + now["runs"] // 3
            now["runs"] += 1
            now["cpu"] += seconds * slowness
            now["clock"] += 2 * seconds * slowness

        return run

    found = profile_overhead.compare({"none": lasts(1.0), "off": lasts(1.0), "on": lasts(1.5)}, 4)
    for key, ratio in (("off_cpu", 1.0), ("on_cpu", 1.5), ("off_clock", 1.0), ("on_clock", 1.5)):
        assert set(found[key].values()) == {ratio}
    assert [row["cpu"] for row in found["seconds"]["none"]] == [1.0, 2.0, 3.0, 4.0]
    assert [row["clock"] for row in found["seconds"]["on"]] == [3.0, 6.0, 9.0, 12.0]


@pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "built")
def test_what_is_counted_is_the_network(tmp_path):
    """The program that valgrind runs reads a dumped plan and computes what the backend computes, bit for bit."""
    module = native.module()
    isa = module.isas()[0]
    x = networks.image(1, 1, 9, 11)
    with torch_threads(1):
        packed = cpu.CpuPacked(lower(networks.build(networks.SMALL)), "winograd", isa, compact=True)
        instructions.dump(tmp_path, packed, x.numpy())
        out, work = torch.empty(1, 1, 9, 11), torch.from_numpy(aligned_zeros((packed.workspace_bytes(1, 9, 11),), np.uint8))
        packed.run(x, out, work)
    command = [sys.executable, "-I", instructions.__file__, str(tmp_path), module.__file__, "2"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert torch.equal(torch.from_numpy(np.fromfile(tmp_path / "out.bin", np.float32)).view(1, 1, 9, 11), out)


def test_what_one_run_costs_is_the_difference_of_two(tmp_path, monkeypatch):
    said = {"1": "==7== I   refs:      1,000,500", "2": "==7== I   refs:      1,900,501"}
    code = [0]

    def run(command, **options):
        assert "cachegrind" in " ".join(command) and options["env"]["OMP_NUM_THREADS"] == "1"
        return subprocess.CompletedProcess(command, code[0], "", said[command[-1]])

    monkeypatch.setattr(subprocess, "run", run)
    assert instructions.count(tmp_path, tmp_path / "module.so") == 900_001
    code[0] = 1
    with pytest.raises(RuntimeError, match="valgrind ended with 1"):
        instructions.count(tmp_path, tmp_path / "module.so")


# Runs its command, counts 1000 instructions and 500 for each run of the network, and notes what Python makes of a text's hash.
FAKE_VALGRIND = """#!{python}
import subprocess, sys
command = sys.argv[next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--")):]
script = next(i for i, word in enumerate(command) if word.endswith(".py"))
with open(r"{hashes}", "a") as file:
    subprocess.run([*command[:script], "-c", "print(hash('memnet'))"], stdout=file, check=True)
subprocess.run(command, check=True)
print("==1== I   refs:      {{:,}}".format(1000 + 500 * int(command[-1])), file=sys.stderr)
"""


@pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "built")
def test_instructions_are_counted_and_stored(tmp_path, monkeypatch, capsys):
    """The whole command, but for the builds and valgrind itself."""
    valgrind, hashes, module = tmp_path / "bin/valgrind", tmp_path / "hashes", native.module()
    valgrind.parent.mkdir()
    valgrind.write_text(FAKE_VALGRIND.format(python=sys.executable, hashes=hashes))
    valgrind.chmod(0o755)
    monkeypatch.setenv("PATH", str(valgrind.parent), prepend=os.pathsep)
    monkeypatch.setattr(profile_overhead, "build", lambda folder, name, *flags: module)
    monkeypatch.setattr(profile_overhead, "results_folder", lambda: tmp_path)
    monkeypatch.setattr(instructions, "ISA", module.isas()[0])
    with torch_threads(1):
        assert profile_overhead.main(["--instructions", "--size", "9"]) == 0
    assert "off / none: 500 / 500 instructions = 1.000000, goal 1.01: ok" in capsys.readouterr().out
    stored = json.loads((tmp_path / "profile_instructions.json").read_text())
    assert (stored["none"], stored["off"], stored["ratio"]) == (500, 500, 1.0)
    assert stored["about"]["isa"] == instructions.ISA and stored["about"]["size"] == 9
    # The counts of two runs can only be compared where Python itself does the same in both.
    assert len(hashes.read_text().split()) == 4 and len(set(hashes.read_text().split())) == 1


def test_without_valgrind_nothing_is_built(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(profile_overhead, "build", lambda *arguments: pytest.fail("built"))
    with pytest.raises(SystemExit) as left:
        profile_overhead.main(["--instructions"])
    assert left.value.code == 2 and "valgrind is not installed" in capsys.readouterr().err


@pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "built")
def test_the_three_ways_are_one_network(monkeypatch):
    plan, x, module = lower(networks.build(networks.SMALL)), networks.image(1, 1, 9, 11), native.module()
    with torch_threads(1):
        runs = profile_overhead.ways(plan, x, module, module)
        assert set(runs) == {"none", "off", "on"} and native.module() is module
        for run in runs.values():
            run()

        class Wrong:
            """Computes something else in every call."""

            calls = 0

            def __getattr__(self, name):
                return getattr(module, name)

            def run(self, *arguments):
                module.run(*arguments)
                Wrong.calls += 1
                # The address of the result is the last but four of the arguments.
                ctypes.cast(arguments[-4], ctypes.POINTER(ctypes.c_float))[0] += Wrong.calls

        with pytest.raises(RuntimeError, match="different results"):
            profile_overhead.ways(plan, x, Wrong(), module)
    assert torch.get_num_threads() >= 1 and native.module() is module

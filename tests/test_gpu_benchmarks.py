"""The measurements made on a GPU are honest: checked here with a clock that the test drives, and with planted faults."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import faults, networks

from benchmarks import report
from benchmarks.gpu import cases, collect, network, ops, store, timing
from memnet_fast import backends
from memnet_fast.backends import cuda_tables
from memnet_fast.backends import torch as torch_backend
from memnet_fast.bench import clocks, gpu_peers, truth
from memnet_fast.config import MemNetConfig
from memnet_fast.plan import Recipe, State

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


# Timing --------------------------------------------------------------------------------------------------------------


class FakeClock:
    """Takes as long as a run says, and writes down who ran in which order. drift: every sample is slower than the last."""

    def __init__(self, drift: float = 1.0) -> None:
        self.order: list[str] = []
        self.factor, self.drift = 1.0, drift

    def sample(self, run):
        name, milliseconds = run()
        self.order.append(name)
        self.factor *= self.drift
        return milliseconds * self.factor


def variant(name, milliseconds, errors=None, limits=None):
    times = itertools.cycle(milliseconds if isinstance(milliseconds, list) else [milliseconds])
    return timing.Variant(name, lambda: (name, next(times)), lambda: errors or {}, limits or {}, {"precision": "fp16"})


def test_medians_quantiles_and_ratios():
    rows = timing.measure([variant("a", [10.0, 20.0, 30.0, 40.0, 50.0]), variant("b", 60.0)], FakeClock(), 0.0, "b")
    assert [r["variant"] for r in rows] == ["a", "b"] and all(r["status"] == "ok" for r in rows)
    a, b = rows
    assert a["rounds"] == timing.MIN_ROUNDS and a["precision"] == "fp16"
    assert (a["ms_q20"], a["ms"], a["ms_q80"]) == (18.0, 30.0, 42.0) and b["ms"] == 60.0
    assert a["ratio"] == 0.5 and b["ratio"] == 1.0 and a["subject"] == "b"


def test_rounds_are_interleaved_and_turn():
    clock = FakeClock()
    timing.measure([variant(n, 100.0) for n in "abc"], clock, 0.0)
    warm = 3 * timing._WARM_RUNS
    rounds = ["".join(clock.order[i : i + 3]) for i in range(warm, len(clock.order), 3)]
    assert rounds[:4] == ["abc", "bca", "cab", "abc"] and len(rounds) == timing.MIN_ROUNDS


def test_a_drifting_clock_keeps_the_ratios():
    rows = timing.measure([variant("a", 20.0), variant("b", 10.0)], FakeClock(drift=1.01), 0.0, "b")
    assert abs(rows[0]["ratio"] - 2.0) < 0.05
    assert rows[0]["ms"] > 21, "the times themselves do drift"


def test_time_buys_rounds_within_bounds():
    def rounds(seconds, milliseconds):
        return timing.measure([variant("a", milliseconds)], FakeClock(), seconds)[0]["rounds"]

    assert rounds(1.0, 50.0) == 20
    assert rounds(100.0, 50.0) == timing.MAX_ROUNDS
    assert rounds(0.0, 50.0) == timing.MIN_ROUNDS


@pytest.mark.parametrize("errors", [{"nsr": 1.1}, {"nsr": float("nan")}, {"nsr": float("inf")}, {}], ids=str)
def test_a_wrong_variant_is_not_timed(errors):
    clock = FakeClock()
    rows = timing.measure([variant("wrong", 1.0, errors, {"nsr": 1.0}), variant("right", 2.0)], clock, 0.0, "right")
    assert rows[0]["status"] == "refused" and "nsr" in rows[0]["reason"]
    assert not any(key.startswith(("ms", "ratio")) for key in rows[0])
    assert "wrong" not in clock.order and rows[1]["ms"] == 2.0


def test_a_wrong_subject_gives_no_ratios():
    rows = timing.measure(
        [variant("subject", 1.0, {"nsr": 2.0}, {"nsr": 1.0}), variant("peer", 2.0)], FakeClock(), 0.0, "subject"
    )
    assert "ratio" not in rows[1] and rows[1]["ms"] == 2.0


def _broken(*args):
    raise RuntimeError("no such kernel")


def test_a_variant_that_raises_costs_only_itself():
    checks, runs = variant("checks", 1.0), variant("runs", 1.0)
    broken = [
        timing.Variant("checks", checks.run, _broken, {}),
        timing.Variant("runs", _broken, runs.check, {}),
        variant("good", 3.0),
    ]
    rows = timing.measure(broken, FakeClock(), 0.0, "good")
    assert [r["status"] for r in rows] == ["failed", "failed", "ok"]
    assert all("no such kernel" in r["reason"] and "ms" not in r for r in rows[:2])


def test_names_are_unique():
    with pytest.raises(ValueError, match="one name"):
        timing.measure([variant("a", 1.0), variant("a", 1.0)], FakeClock(), 0.0)


@pytest.mark.gpu
def test_cuda_clock_measures_the_device():
    """A sleep of a known number of cycles, with a host that is much faster: twice the cycles, twice the time."""
    clock = clocks.CudaClock(torch.device("cuda", 0))
    short, long = (
        statistics.median(clock.sample(lambda n=n: torch.cuda._sleep(n)) for _ in range(9)) for n in (10**6, 2 * 10**6)
    )
    assert 1.7 < long / short < 2.3


# The gate of whole networks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    return truth.NetworkCase(networks.build(networks.SMALL), (2, 20, 230), CPU)


def test_the_right_network_passes(case):
    errors = case.errors(case.net)
    assert 0 < errors["nsr"] < truth.NSR["fp32"] and errors["line"] < truth.LINE * truth.NSR["fp32"]


def test_windows_cover_corners_and_ends():
    found = truth.windows(5, 1080, 1920)
    assert {w.image for w in found} == {0, 2, 4} and len(found) == 27
    assert max(w.top + w.height for w in found) == 1080 and max(w.left + w.width for w in found) == 1920
    assert len(truth.windows(1, 1, 7)) == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", faults.faults())
def test_planted_faults_are_refused(case, name, precision):
    fault = faults.faults()[name]
    faulty = timing.Variant(name, _broken, lambda: case.errors(lambda x: fault(case.net, x)), truth.limits(precision))
    (row,) = timing.measure([faulty], FakeClock(), 0.0)
    assert row["status"] == "refused"


def test_a_fault_in_the_last_row_of_a_large_image_is_refused():
    """The windows are 200 pixels; one row is a small part of one. A network without depth keeps this quick."""
    config = MemNetConfig(channels=4, num_memory_blocks=1, num_recursions=1)
    large = truth.NetworkCase(networks.build(config), (1, 430, 420), CPU)
    assert large.errors(large.net)["nsr"] < truth.NSR["fp32"]
    errors = large.errors(lambda x: faults.without_last_row(large.net, x))
    assert errors["line"] > truth.LINE * truth.NSR["bf16"]


def test_rows_of_whole_networks(case):
    """A dry run on the CPU with this package's backend and the peers that a CPU can run."""
    net = networks.build(networks.SMALL)
    rows = network.run_size(net, "tiny", (1, 20, 24), clocks.HostClock(), CPU, "fast", 0.01)
    by_name = {r["variant"]: r for r in rows}
    assert by_name["eager fp32"]["status"] == "ok" and by_name["eager fp32"]["ms"] > 0
    assert by_name["eager fp16 channels_last, CUDA graph"]["status"] == "failed"
    assert all(r["suite"] == "network" and r["size"] == "tiny" and (r["n"], r["h"], r["w"]) == (1, 20, 24) for r in rows)
    assert by_name["eager bf16 channels_last"]["errors"]["nsr"] > 100 * by_name["eager fp32"]["errors"]["nsr"]


def test_candidates_can_be_named(case):
    assert set(network.candidates(case, "slow")) >= {n for n, p in gpu_peers.GPU_PEERS.items() if p.slow}
    assert not set(network.candidates(case, "none")) & gpu_peers.GPU_PEERS.keys()
    assert list(network.candidates(case, "all", ["eager fp32"])) == ["eager fp32"]


# Single operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", cases.op_cases(), ids=lambda op: op.name)
@pytest.mark.parametrize("precision", backends.cuda.PRECISIONS)
def test_operations_are_packed_for_cuda(op, precision):
    """What the backend does with a plan before it needs a GPU."""
    recipes = {name: Recipe(tuple(weight.shape), (State(name),)) for name, weight in op.plan.weights.items()}
    for hopper in (True, False) if precision != "fp8" else (True,):
        assert cuda_tables.build(op.plan.ops, recipes, list(recipes), {}, precision, hopper, False).packed_bytes > 0


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "fp8"])
def test_operations_pass_their_gate_and_faults_do_not(precision, monkeypatch):
    for index, op in enumerate(cases.op_cases()):
        placed = ops.PlacedOp(op, "torch", precision, None, 17, 18, CPU)
        right, limit = placed.check()["relative"], ops.limit(precision)
        assert right <= limit, op.name
        with monkeypatch.context() as patch:
            patch.setattr(type(placed._packed), "run", lambda self, image, out, work: None)
            assert not placed.check()["relative"] <= limit, f"{index}: nothing was computed, and nobody saw it"


def test_a_lost_tap_is_refused():
    block = cases.op_cases()[0]
    plan = block.plan
    weight = plan.weights["a"].clone()
    weight[:, :, 0, 2] = 0
    packed = torch_backend.pack(type(plan)(plan.config, plan.ops, {**plan.weights, "a": weight}, plan.num_slots), CPU, "bf16")
    placed = ops.PlacedOp(block, "torch", "bf16", None, 17, 18, CPU)
    placed._packed = packed
    assert placed.check()["relative"] > 10 * ops.limit("bf16")


def test_costs_of_the_operations():
    """The arithmetic of the network: 5.775 MFLOP and 17.5 kB a pixel (M6R6, 16 bit)."""
    costs = {c.name: c for c in cases.op_cases(gates=tuple(range(7, 13)))}
    flop = 36 * costs["residual_block"].flop + sum(costs[f"gate_{k}"].flop for k in range(7, 13))
    assert abs(flop / 5.775e6 - 1) < 0.001
    gates = sum(costs[f"gate_{k}"].byte for k in range(7, 13))
    assert gates == 8064 and costs["residual_block"].byte == 256


def test_what_is_timed_beside_what_the_backends_take(monkeypatch):
    """On a Hopper: the residual block of sm_80, and gates of Triton that read by address. On an older GPU neither."""
    for module in (backends.cuda, backends.triton):
        monkeypatch.setattr(module, "why_not", lambda *args: None)
    for capability, expected in (((8, 0), set()), ((9, 0), {("residual_block", "capability", 80), ("gate", "tma", False)})):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, here=capability: here)
        ways = ops._ways(torch.device("cuda", 0))
        assert len({way.name for way in ways}) == len(ways) >= 7
        others = {(way.begins, *next(iter(way.other.items()))) for way in ways if way.other}
        assert others == expected
    plan = cases.op_cases()[0].plan
    packed = backends.triton.pack(plan, CPU, "fp16", "direct")
    assert packed._tile("gate").tma and not dataclasses.replace(packed, tma=False)._tile("gate").tma


def test_rows_of_operations():
    rows = ops.run_size("tiny", (1, 9, 10), clocks.HostClock(), CPU, 0.01)
    assert [r["suite"] for r in rows[:2]] == ["ceiling", "ceiling"] and rows[0]["tflops"] > 0 and rows[1]["tbps"] > 0
    block = next(r for r in rows if r.get("op") == "residual_block")
    assert block["status"] == "ok" and block["tflops"] > 0 and block["floor_ms"] > 0


# Files ---------------------------------------------------------------------------------------------------------------


def test_store_appends_and_keeps_the_first_about(tmp_path):
    path = tmp_path / "new" / "bench.json"
    store.add(path, {"commit": "a"}, [{"x": 1}])
    store.add(path, {"commit": "b"}, [{"x": 2}])
    assert store.read(path) == {"about": {"commit": "a"}, "rows": [{"x": 1}, {"x": 2}]}


def test_junit_becomes_json(tmp_path):
    (tmp_path / "a.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.test_x" name="t[1]" time="0.5"/>'
        '<testcase classname="tests.test_x" name="t[2]" time="1"><failure message="NSR 3 above 1">long</failure></testcase>'
        '<testcase classname="tests.test_x" name="t[3]" time="0"><skipped message="no GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    (tmp_path / "b.xml").write_text("<testsuites><testsu")
    assert collect.main(["parity", str(tmp_path / "a.xml"), str(tmp_path / "b.xml"), str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1} and "b.xml" in found["unreadable"][0]
    assert found["rows"][0] == {"test": "test_x::t[2]", "outcome": "failed", "seconds": 1.0, "message": "NSR 3 above 1"}


def test_sanitizer_logs_become_json(tmp_path):
    logs = {
        "memcheck": "hello\n========= ERROR SUMMARY: 0 errors\n",
        "racecheck": "========= Error: Race reported\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)\n",
        "synccheck": "Killed",
    }
    for name, text in logs.items():
        (tmp_path / f"{name}.log").write_text(text)
    rows = collect.sanitizer([tmp_path / f"{n}.log" for n in (*logs, "absent")])["rows"]
    assert [(r["tool"], r["errors"]) for r in rows] == [
        ("memcheck", 0),
        ("racecheck", 2),
        ("synccheck", None),
        ("absent", None),
    ]
    assert rows[1]["first"] and not rows[0]["first"]


def test_ncu_pages_become_json():
    page = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum"\n'
        '"","","us","Mbyte"\n'
        '"0","residual_block","412.5","1,234.5"\n'
        '"1","gate","n/a","2"\n'
    )
    found = collect.ncu(page)
    assert found["rows"][0] == {"kernel": "residual_block", "us": 412.5, "dram_read_bytes": 1234.5}
    assert found["rows"][1]["us"] is None and found["units"] == {"us": "us", "dram_read_bytes": "Mbyte"}
    assert collect.ncu("==ERROR== nothing")["rows"] == []


def test_long_logs_keep_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "_KEPT", 10)
    (tmp_path / "a.log").write_text("begin" + "x" * 1000 + "end")
    text = collect.log([tmp_path / "a.log"]).decode()
    assert "begin" in text and text.rstrip().endswith("end") and "988 bytes left out" in text


# The window ----------------------------------------------------------------------------------------------------------


def window(tmp_path, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MEMNET_", "PYTHON"))}
    env |= {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_window.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env | environment)
    steps = tmp_path / "out" / "steps.jsonl"
    lines = [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else []
    return done, {line["step"]: line["status"] for line in lines}


def test_window_dry_run(tmp_path):
    """Builds the package without its native parts, and runs from what it built."""
    done, steps = window(
        tmp_path, DRY_RUN="1", MEMNET_NO_NATIVE="1", STEPS="facts build smoke ops", PATH=_without_nvcc(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert steps == {"facts": 0, "build": 0, "build_micro": 127, "smoke": 0, "ops": 0}, done.stdout
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"steps.jsonl", "bench.json", "log.txt"}
    data = json.loads((out / "bench.json").read_text())
    assert data["about"]["torch"] == torch.__version__ and data["about"]["gpu"] is None
    assert any(r.get("op") == "residual_block" and r["status"] == "ok" for r in data["rows"])
    assert f"package: {tmp_path / 'work' / 'lib'}" in (out / "log.txt").read_text(), "the built package is the one that runs"


def _without_nvcc(tmp_path):
    """A PATH with what the script needs and without the compiler, which would take half a minute."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in (
        "bash",
        "env",
        "timeout",
        "nproc",
        "realpath",
        "dirname",
        "mkdir",
        "find",
        "rm",
        "cp",
        "cat",
        "tail",
        "cut",
        "sed",
        "stat",
        "git",
    ):
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(found)
    return str(folder)


def _script() -> str:
    return (ROOT / "benchmarks" / "gpu_window.sh").read_text()


def test_a_visit_fits_its_calls_by_the_limits_of_its_steps():
    """As the head of the script lists them: each call within the budget, all steps once, in the order of the script."""
    script = _script()
    listed = re.search(r"^declare -A LIMIT=\((.*?)\)$", script, re.MULTILINE | re.DOTALL)[1]
    limits = {k: int(v) for k, v in re.findall(r"\[(\w+)\]=(?:\$\{TRAIN_SECONDS:-)?(\d+)", listed)}
    every = re.search(r"^STEPS=\$\{STEPS:-(.*)\}$", script, re.MULTILINE)[1].split()
    assert sorted(limits) == sorted(every)
    calls = [call.split() for call in re.findall(r'^#   STEPS="(.*?)" benchmarks/gpu_window.sh', script, re.MULTILINE)]
    assert len(calls) == 3 and [step for call in calls for step in call] == [step for step in every if step != "train"]
    budget = int(re.search(r"^BUDGET=\$\{BUDGET:-(\d+)\}$", script, re.MULTILINE)[1])
    assert budget < 600
    for call in calls:
        at_once = min(limits["parity"], limits["sanitize"]) if {"parity", "sanitize"} <= set(call) else 0
        assert sum(limits[step] for step in call) - at_once <= budget, call
    # Nothing runs without a limit, and every limit is used.
    for name in every:
        assert re.search(rf"LIMIT\[{name}\]", script), name
    assert not re.search(r"^\s*(step|bounded|run_tests|network) \"?\w+\"? [^\d\"$]", script, re.MULTILINE)


def test_results_of_several_calls_become_one(tmp_path):
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    about = {"commit": "c", "torch": "2.13", "gpu": {"name": "NVIDIA H200", "nvidia_smi": {"driver_version": "580"}}}
    for i, path in enumerate(paths):
        store.write(path, {"about": {**about, "date": str(i)}, "rows": [{"x": i}]})
    out = tmp_path / "all.json"
    assert collect.main(["merge", *map(str, paths), str(out)]) == 0
    assert store.read(out) == {"about": {**about, "date": "0"}, "rows": [{"x": 0}, {"x": 1}, {"x": 2}]}
    out.unlink()
    for other in ({"commit": "d"}, {"gpu": {"name": "NVIDIA H100"}}, {"gpu": None}):
        store.write(paths[2], {"about": {**about, **other}, "rows": []})
        assert collect.main(["merge", *map(str, paths), str(out)]) == 2 and not out.exists()


def _with_nvidia_smi(tmp_path):
    """A PATH on which nvidia-smi answers."""
    folder = tmp_path / "tools"
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_call_without_the_build_of_these_sources_builds_first(tmp_path):
    """A machine may be a fresh one, or have the build of other sources. Without time nothing is done, only said."""
    path = _with_nvidia_smi(tmp_path)
    _, steps = window(tmp_path, STEPS="ops", BUDGET="0", PATH=path)
    assert list(steps) == ["build", "build_micro", "parity_triton", "ops"] and set(steps.values()) == {125}
    work = tmp_path / "work"
    assert not (work / "built").exists(), "what was not built is not taken for built"
    names = ("setup.py", "pyproject.toml", "csrc", "kernels", "memnet_fast")
    find = f"find {' '.join(names)} -type f ! -name '*.pyc' ! -name '*.so' ! -name _build_info.json -print0"
    command = f"cd {shlex.quote(str(ROOT))} && {find} | sort -z | xargs -0 sha256sum | sha256sum"
    state = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    (work / "built").write_text(state)
    _, steps = window(tmp_path, STEPS="ops", BUDGET="0", PATH=path)
    assert steps == {"ops": 125}
    (work / "built").write_text("of other sources")
    assert "build" in window(tmp_path, STEPS="ops", BUDGET="0", PATH=path)[1]


def test_window_step_that_hangs_costs_only_itself(tmp_path):
    done, steps = window(tmp_path, DRY_RUN="1", STEPS="facts train", TRAIN="echo begun; sleep 60", TRAIN_SECONDS="3")
    assert done.returncode == 0 and steps == {"facts": 0, "train": 124}
    assert "begun" in (tmp_path / "out" / "log.txt").read_text()


def test_window_goes_on_without_a_variant_that_took_the_gpu(tmp_path):
    """The program says so by its status, and finds in its journal what it has written there."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    program = f"""#!/bin/sh
case "$*" in *benchmarks.gpu.ops*)
  for last; do :; done
  cat "$last" >>{calls} 2>/dev/null; echo "$@" >>{calls}
  [ -e "$last" ] && exit 0
  echo "lost it" >"$last"; exit 7;;
esac
exec {sys.executable} "$@"
"""
    python.write_text(program)
    python.chmod(0o755)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "ops.journal").write_text("of another call")
    done, steps = window(tmp_path, DRY_RUN="1", STEPS="ops", PYTHON=str(python))
    assert done.returncode == 0 and steps == {"ops": 0}, done.stdout
    first, known, second = calls.read_text().splitlines()
    assert known == "lost it" and first == second and "--journal" in first


def test_window_budget(tmp_path):
    """What no time is left for is said, not begun."""
    done, steps = window(tmp_path, DRY_RUN="1", STEPS="train", TRAIN="echo begun", BUDGET="2")
    assert done.returncode == 0 and steps == {"train": 125}


def test_window_refusals(tmp_path):
    done, _ = window(tmp_path, STEPS="facts bild")
    assert done.returncode == 2 and "unknown step 'bild'" in done.stderr and len(done.stderr.splitlines()) == 1
    done, _ = window(tmp_path, PYTHON="no-such-python")
    assert done.returncode == 2 and "no-such-python" in done.stderr
    if not torch.cuda.is_available():
        done, _ = window(tmp_path)
        assert done.returncode == 5 and "DRY_RUN" in done.stderr


def test_micro_benchmarks_compile_clean(tmp_path):
    """No spill, no local memory, no serialised products; the 36 products of a row stand together."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    program = tmp_path / "micro"
    flags = ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-O3", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    source = ROOT / "benchmarks" / "gpu" / "micro.cu"
    done = subprocess.run([nvcc, *flags, "-o", str(program), str(source)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower() and "C75" not in done.stderr, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(frames) == 12 and set(frames) == {("0", "0", "0")}


# Tables --------------------------------------------------------------------------------------------------------------


def _gpu_results():
    about = {
        "gpu": {"name": "NVIDIA H200", "nvidia_smi": {"driver_version": "580.1"}},
        "commit": "c" * 40,
        "torch": "2.11",
        "cuda": "13.0",
    }
    about |= {"triton": "3.6", "date": "2026-11-22T00:00:00+00:00"}

    def row(name, ms, ratio, **more):
        numbers = {"ms": ms, "ms_q20": ms * 0.99, "ms_q80": ms * 1.01, "ratio": ratio, "ratio_q20": ratio, "ratio_q80": ratio}
        base = {"suite": "network", "size": "1080p", "n": 1, "h": 1080, "w": 1920, "variant": name, "precision": "fp16"}
        return {**base, "status": "ok", "errors": {"nsr": 7e-4, "line": 2e-3}, "peak_mib": 3400.0, **numbers, **more}

    refused = {"suite": "network", "size": "1080p", "variant": "triton fp16", "status": "refused", "reason": "nsr 1 above 0.01"}
    ceiling = {"suite": "ceiling", "variant": "gemm bfloat16 8192^3", "status": "ok", "ms": 1.4, "tflops": 790.0, "tbps": 0.0}
    op = {"suite": "op", "size": "1080p", "op": "residual_block", "variant": "cuda fp16", "status": "ok"}
    op |= {"ms": 0.42, "ms_q20": 0.41, "ms_q80": 0.43, "tflops": 728.0, "tbps": 1.3, "floor_ms": 0.387}
    rows = [row("cuda fp16", 19.6, 1.0), row("eager fp16 channels_last", 88.0, 4.49), refused, ceiling, op]
    return {"about": about, "rows": rows}


def test_report_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    path = tmp_path / "nvidia-h200" / "gpu.json"
    store.write(path, _gpu_results())
    table = report.gpu_table(path)
    assert "NVIDIA H200" in table and "cccccccccc" in table
    assert "| cuda fp16 | 19.60 (19.40 to 19.80) | 1.00 | 3400 | 7.0e-04 |" in table
    assert "| eager fp16 channels_last | 88.00 (87.12 to 88.88) | 4.49 | 3400 | 7.0e-04 |" in table
    assert (
        "triton fp16" in table
        and "refused" in table
        and "| residual_block | cuda fp16 | 0.420 | 728 | 1.30 | 0.387 | 92 % |" in table
    )
    assert "gemm bfloat16 8192^3" in table


def test_the_tables_of_a_gpu_appear_with_its_results(tmp_path, monkeypatch):
    """The README needs the markers only once there is something to show."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    assert "gpu" not in report.tables()
    store.write(tmp_path / "nvidia-h200" / "gpu.json", _gpu_results())
    assert "cuda fp16" in report.tables()["gpu"]


def test_window_runs_every_file_with_gpu_tests() -> None:
    tests = Path(__file__).parent
    script = (tests.parent / "benchmarks" / "gpu_window.sh").read_text()
    listed = re.search(r"^GPU_TESTS=\((.*)\)$", script, re.MULTILINE)
    assert listed is not None
    command = f"cd {shlex.quote(str(tests.parent))} && printf '%s\\n' {listed[1]}"
    files = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    marked = re.compile(r"mark\.gpu|import .*\bplaces\b|support\.places")
    expected = {f"tests/{path.name}" for path in tests.glob("test_*.py") if marked.search(path.read_text())}
    assert set(files) == expected - {"tests/test_gpu_on_twin.py"}  # which needs none


def test_every_gpu_test_is_of_some_step() -> None:
    """The steps choose by the names cuda and triton; the parametrised ones have them from their candidates and places."""
    for path in (ROOT / "tests").glob("test_*.py"):
        for name in re.findall(r"^@pytest\.mark\.gpu\n(?:@.*\n)*def (\w+)", path.read_text(), re.MULTILINE):
            assert "cuda" in name or "triton" in name, f"{path.name}: {name}"


def test_a_process_that_lost_the_gpu_ends(request, monkeypatch):
    """It would fail all tests that are left. A worker of xdist dies, so that another one takes its place."""
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    conftest.pytest_runtest_logfinish("one")

    def exits(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", exits)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", _broken)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(SystemExit):
        conftest.pytest_runtest_logfinish("two")
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    with pytest.raises(pytest.exit.Exception, match="since three"):
        conftest.pytest_runtest_logfinish("three")


def test_tests_that_hang_still_leave_their_results():
    """A worker that waits for a kernel hears no SIGINT; pytest writes its results when xdist has given it up."""
    manager = pytest.importorskip("xdist.workermanage").NodeManager
    calls = re.findall(r"^.*\bbash -c .*gpu_tests .*$", _script(), re.MULTILINE)
    assert len(calls) == 2
    for call in calls:
        patience = re.match(r" *PATIENCE=(\d+) ", call)
        assert patience and int(patience[1]) >= manager.EXIT_TIMEOUT + 5, call

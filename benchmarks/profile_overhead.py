"""What the timing in the native CPU code costs:  python -m benchmarks.profile_overhead [--instructions] [--size 128]

Builds the module twice, without any of it (MEMNET_NO_TIMING) and as it is, and runs a network in turns in three ways: "none"
(the first build), "off" (the second, an ordinary run), "on" (the second, a timed run). A ratio is taken within a round. CPU
time decides: other work on the machine then disturbs little, and instructions are what the timing costs.

--instructions: counts what "none" and "off" execute on one thread, by valgrind (instructions.py), in place of the rounds. The
counts are exact, so they decide "off" also where times differ by more than the goal for other reasons.

Writes benchmarks/results/<device>/profile_overhead.json, or profile_instructions.json. Goals: off / none at most 1.01, on /
none at most 1.05.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmarks import instructions
from benchmarks.device import results_folder
from memnet_fast import native, timing
from memnet_fast.backends import cpu
from memnet_fast.files import write_whole
from memnet_fast.models import create_model
from memnet_fast.packing import aligned_zeros
from memnet_fast.plan import FusedPlan, lower

_CSRC = Path(__file__).parents[1] / "csrc"
GOALS = {"off": 1.01, "on": 1.05}


def build(folder: Path, name: str, *flags: str) -> ModuleType:
    """The native CPU module with these compiler flags, apart from any other in the process."""
    import pybind11

    cmake, ninja = (shutil.which(t) or shutil.which(t, path=str(Path(sys.executable).parent)) for t in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        raise SystemExit("profile_overhead needs cmake and ninja; pip install cmake ninja")
    # A namespace of its own: pybind11 keeps one table of types for all modules of a process.
    flags = (f"-Dmemnet=memnet_{name}", *flags)
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_FLAGS": " ".join(flags),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "MEMNET_VERSION": name,
    }
    build = folder / name
    configure = [cmake, "-S", str(_CSRC), "-B", str(build), "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    for command in (configure, [cmake, "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the build '{name}' failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    path = str(build / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    loader = importlib.machinery.ExtensionFileLoader("_native", path)
    spec = importlib.util.spec_from_loader("_native", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextmanager
def _loaded(module: ModuleType) -> Iterator[None]:
    """Within: the backend runs this module."""
    before = native.module
    native.module = lambda: module  # type: ignore[assignment]
    try:
        yield
    finally:
        native.module = before


def ways(plan: FusedPlan, image: torch.Tensor, none: ModuleType, hooked: ModuleType) -> dict[str, Callable[[], object]]:
    """The three runs of one plan. Raises RuntimeError unless their results are equal, bit for bit."""
    n, _, h, w = image.shape
    names = timing.names(plan.ops)
    made: dict[str, Callable[[], object]] = {}
    results = {}
    for name, module in (("none", none), ("off", hooked), ("on", hooked)):
        with _loaded(module):
            packed = cpu.pack(plan, image.device, "fp32", "winograd")
            workspace = torch.from_numpy(aligned_zeros((packed.workspace_bytes(n, h, w),), np.uint8))
        out = torch.empty(n, plan.config.out_channels, h, w)

        def run(
            module: ModuleType = module, packed: Any = packed, out: Any = out, work: Any = workspace, on: bool = name == "on"
        ) -> None:
            with _loaded(module):
                if on:
                    packed.run_timed(image, out, work, names)
                else:
                    packed.run(image, out, work)

        made[name] = run
        run()
        results[name] = out.clone()
    if not all(torch.equal(results["none"], result) for result in results.values()):
        raise RuntimeError("the builds compute different results; their times mean nothing")
    return made


def compare(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Seconds of CPU and of the clock for each way and round, and the ratios to "none" within the rounds."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order = list(runs)
    for i in range(rounds):
        for k in range(len(order)):
            name = order[(i + k) % len(order)]
            start = time.process_time(), time.perf_counter()
            runs[name]()
            seconds[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    found: dict[str, Any] = {"seconds": {name: [{"cpu": c, "clock": w} for c, w in own] for name, own in seconds.items()}}
    for name in (n for n in runs if n != "none"):
        for j, kind in enumerate(("cpu", "clock")):
            ratios = [a[j] / b[j] for a, b in zip(seconds[name], seconds["none"], strict=True)]
            fifths = statistics.quantiles(ratios, n=5, method="inclusive") if len(ratios) > 1 else ratios * 4
            found[f"{name}_{kind}"] = {"median": statistics.median(ratios), "q20": fifths[0], "q80": fifths[3]}
    return found


def counted(folder: Path, plan: FusedPlan, image: torch.Tensor, none: ModuleType, hooked: ModuleType) -> dict[str, Any]:
    """Instructions of one run in each build, and their ratio. Raises RuntimeError where valgrind fails."""
    with _loaded(hooked):
        packed = cpu.CpuPacked(plan, "winograd", instructions.ISA, compact=True)
        instructions.dump(folder, packed, image.numpy())
    numbers = {}
    for name, module in (("none", none), ("off", hooked)):
        assert module.__file__ is not None
        numbers[name] = instructions.count(folder, Path(module.__file__))
    return {**numbers, "ratio": numbers["off"] / numbers["none"]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="height and width of the image")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="with more, CPU time counts waiting threads, too")
    parser.add_argument("--folder", type=Path, help="keep the builds here, for the next time")
    parser.add_argument("--instructions", action="store_true", help="count instructions; a size of 24 is enough")
    options = parser.parse_args(arguments)
    if options.instructions and (why := instructions.why_not()):
        parser.error(f"--instructions: {why}")
    torch.set_num_threads(options.threads)
    plan = lower(create_model("memnet_m6r6.denoise"))
    image = torch.rand(1, 1, options.size, options.size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as name:
        none, hooked = build(Path(name), "bare", "-DMEMNET_NO_TIMING"), build(Path(name), "hooked")
        about = {
            "size": options.size,
            "threads": 1 if options.instructions else cpu.num_threads(),
            "isa": instructions.ISA if options.instructions else hooked.isas()[0],
            "compiler": hooked.compiler(),
            "torch": torch.__version__,
            "commit": _commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "goals": GOALS,
        }
        if options.instructions:
            found = counted(Path(name), plan, image, none, hooked)
        else:
            found = compare(ways(plan, image, none, hooked), options.rounds)
            about["rounds"] = options.rounds
    if options.instructions:
        verdict = "ok" if found["ratio"] <= GOALS["off"] else "above the goal"
        print(
            f"off / none: {found['off']} / {found['none']} instructions = {found['ratio']:.6f}, goal {GOALS['off']}: {verdict}"
        )
        return _write("profile_instructions.json", {"about": about, **found})
    for way, goal in GOALS.items():
        ratio = found[f"{way}_cpu"]
        # Where other work on the machine moves the ratios by more than the goal leaves, they decide nothing.
        verdict = "ok" if ratio["q80"] <= goal else "above the goal" if ratio["q20"] > goal else "the spread hides it"
        print(f"{way:4} / none: {ratio['median']:.4f} ({ratio['q20']:.4f} to {ratio['q80']:.4f}), goal {goal}: {verdict}")
    return _write("profile_overhead.json", {"about": about, **found})


def _write(name: str, data: dict[str, Any]) -> int:
    path = results_folder() / name
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())
    print(f"wrote {path}")
    return 0


def _commit() -> str | None:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=_CSRC, capture_output=True, text=True)
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())

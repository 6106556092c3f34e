"""Training steps of the plain reference and of the memory-lean path (eager, compiled, native):  python -m benchmarks.training

Writes training.json (of a GPU: training-gpu.json) into benchmarks/results/<cpu>/. Each way runs in a process of its own, so
that its peak memory is its own (VmHWM on the CPU, the allocator's peak on a GPU); timed steps alternate between the processes,
so that a busy machine slows both. A step is forward, loss, backward and the optimiser's step, under autocast to bfloat16,
channels_last; the native kernels, for CPUs alone, compute in float32 all the same. On CPUs all but "plain" keep freed memory,
as `memnet train` does; "plain, pages kept" is the reference with that help.

    python -m benchmarks.training [DEVICE [BATCH [PATCH [ROUNDS]]]]
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import results_folder
from memnet_fast.bench.peers import KEEP_PAGES
from memnet_fast.config import MemNetConfig
from memnet_fast.files import write_whole
from memnet_fast.reference import MemNet
from memnet_fast.training import lean
from memnet_fast.training.losses import multi_supervised

WAYS = ("plain", "plain, pages kept", "lean", "lean compiled", "native")
_CPU_ALONE = ("plain, pages kept", "native")


def _peak_mib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell a process its peak memory")


def _worker(way: str, device: str, batch: int, patch: int) -> None:
    """Answers `step` with the seconds of one step (of the wall clock and of the CPUs), `memory` with MiB: before the first
    step, and at the peak."""
    torch.manual_seed(0)
    net = MemNet(MemNetConfig()).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    x = torch.rand(batch, 1, patch, patch, device=device).contiguous(memory_format=torch.channels_last)
    before = _peak_mib(device)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps({"before_mib": before, "peak_mib": _peak_mib(device)}), flush=True)
            continue
        start, start_cpu = time.perf_counter(), time.process_time()
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            plain = way.startswith("plain")
            heads = net.heads(x) if plain else lean.heads(net, x, way == "lean compiled", way == "native")
            loss = multi_supervised(heads, net.head_weights, x, "charbonnier")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
        print(json.dumps(seconds), flush=True)


def main(device: str = "cpu", batch: int = 8, patch: int = 64, rounds: int = 7) -> int:
    arguments = [device, str(batch), str(patch)]
    command = [sys.executable, "-m", "benchmarks.training", "--worker"]
    ways = [way for way in WAYS if way not in _CPU_ALONE or device == "cpu"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[1]}
    workers: dict[str, Any] = {}
    for way in ways:
        environment = {**os.environ, **({} if way == "plain" or device != "cpu" else KEEP_PAGES)}
        workers[way] = subprocess.Popen([*command, way, *arguments], env=environment, **pipes)  # type: ignore[call-overload]

    def ask(way: str, what: str) -> dict[str, float]:
        workers[way].stdin.write(what + "\n")
        workers[way].stdin.flush()
        return json.loads(workers[way].stdout.readline())

    for way in ways:  # the first step compiles, and makes its workspaces
        ask(way, "step")
    answers: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            answers[way].append(ask(way, "step"))
    rows = []
    for way in ways:
        memory = ask(way, "memory")
        workers[way].stdin.close()
        workers[way].wait()
        seconds = {w: torch.tensor([a["seconds"] for a in answers[w]]) for w in ways}
        cpu = {w: torch.tensor([a["cpu_seconds"] for a in answers[w]]) for w in ways}
        pairs = seconds["plain"] / seconds[way]
        row = {"way": way, "median_ms": 1000 * float(seconds[way].median()), "rounds": rounds, **memory}
        row["cpu_time_to_plain"] = float(cpu[way].median() / cpu["plain"].median())
        low, middle, high = torch.quantile(pairs, torch.tensor([0.2, 0.5, 0.8])).tolist()
        rows.append({**row, "throughput_to_plain": middle, "throughput_to_plain_q20_q80": [low, high]})
        print(json.dumps(rows[-1]))
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    about |= {"device": device if device == "cpu" else torch.cuda.get_device_name(device), "batch": batch, "patch": patch}
    about |= {"network": "memnet_m6r6", "precision": "bf16 autocast", "memory_format": "channels_last"}
    name = "training.json" if device == "cpu" else "training-gpu.json"
    write_whole(results_folder() / name, (json.dumps({"about": about, "rows": rows}, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        way, device, batch, patch = sys.argv[2:]
        _worker(way, device, int(batch), int(patch))
    else:
        sys.exit(main(*sys.argv[1:2], *map(int, sys.argv[2:])))  # type: ignore[arg-type]

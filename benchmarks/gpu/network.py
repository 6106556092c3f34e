"""Times and peak memory of whole networks on a GPU, this package beside plain PyTorch.

    python -m benchmarks.gpu.network OUT.json [--sizes 1080p,256x256] [--peers all|fast|slow|none] [--seconds 4]

Errors against float64 come first; a wrong result is not timed. Rows are appended to OUT.json after every size.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memnet_fast as mf
from benchmarks.gpu import facts, store
from benchmarks.gpu.cases import SIZES
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.timing import PATIENCE, Variant, measure
from memnet_fast import backends
from memnet_fast.bench.clocks import Clock, CudaClock, HostClock
from memnet_fast.bench.gpu_peers import GPU_PEERS, Run, graphed
from memnet_fast.bench.truth import NetworkCase, limits
from memnet_fast.reference import MemNet

# Larger images fill the card by themselves; a graph of them saves nothing and holds a second workspace.
_GRAPH_PIXELS = 1 << 18
# Every candidate keeps its memory while the others run. Beyond so many pixels only these run, for more would not fit together.
_LARGE_PIXELS = 1 << 22
_LARGE = ("cuda fp16", "cuda fp8", "triton fp16", "eager fp16 channels_last")
SUBJECTS = ("cuda fp16", "triton fp16")


def candidates(case: NetworkCase, peers: str, only: list[str] | None = None) -> dict[str, tuple[str, Callable[[], Run]]]:
    """name: (precision, how to make its function of an image). Only what can run on this device."""
    device, config, made = case.image.device, case.net.config, {}
    for name, module in backends.LADDER.items():
        for precision in module.PRECISIONS if name != "torch" else ():
            if module.why_not(config, device, precision, "direct") is None:
                made[f"{name} {precision}"] = (precision, _fused(case.net, name, precision))
    if case.image.numel() <= _GRAPH_PIXELS and device.type == "cuda":
        for name in [n for n in made if n.endswith("fp16")]:
            precision, make = made[name]
            made[f"{name}, caller's CUDA graph"] = (precision, lambda make=make: graphed(make(), case.image))
    for name, peer in GPU_PEERS.items():
        if peers == "all" or peers == ("slow" if peer.slow else "fast"):
            made[name] = (peer.precision, lambda peer=peer: peer.make(copy.deepcopy(case.net), case.image))
    if case.image.numel() > _LARGE_PIXELS:
        made = {n: m for n, m in made.items() if n in _LARGE}
    return {n: m for n, m in made.items() if only is None or any(part in n for part in only)}


def _fused(net: MemNet, backend: str, precision: str) -> Callable[[], Run]:
    def make() -> Run:
        fast = mf.fuse(copy.deepcopy(net), backend=backend, precision=precision, algorithm="direct")
        return lambda x: fast(x)

    return make


class _Made:
    """A candidate's function, made when its turn comes, and the memory that it took."""

    def __init__(self, make: Callable[[], Run], case: NetworkCase) -> None:
        self._make, self._case = make, case
        self.memory: dict[str, float] = {}
        self._run: Run | None = None

    def check(self) -> dict[str, float]:
        device = self._case.image.device
        before = _start_counting(device)
        self._run = self._make()
        with torch.inference_mode():
            for _ in range(2):  # the first call may try algorithms and hold their workspaces
                self._run(self._case.image)
                self.memory = _counted(device, before)
                _start_counting(device)
        return self._case.errors(self._run)

    def __call__(self) -> Tensor:
        assert self._run is not None
        with torch.inference_mode():
            return self._run(self._case.image)


def _start_counting(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 0, 0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


def _counted(device: torch.device, before: tuple[int, int]) -> dict[str, float]:
    """Peak MiB beyond what was there: of tensors, and of what the allocator took from the card (graphs hold such)."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    return {
        "peak_mib": (torch.cuda.max_memory_allocated(device) - before[0]) / 2**20,
        "reserved_mib": (torch.cuda.max_memory_reserved(device) - before[1]) / 2**20,
    }


def run_size(
    net: MemNet,
    size: str,
    shape: tuple[int, int, int],
    clock: Clock,
    device: torch.device,
    peers: str,
    seconds: float,
    only=None,
    journal: Journal | None = None,
) -> list[dict[str, Any]]:
    """Rows of one size: what measure() says, size and memory."""
    case = NetworkCase(net, shape, device)
    variants, made = [], {}
    for name, (precision, make) in candidates(case, peers, only).items():
        made[name] = _Made(make, case)
        patience = None if name in GPU_PEERS and GPU_PEERS[name].slow else PATIENCE
        about = {"precision": precision}
        variants.append(Variant(name, made[name], made[name].check, limits(precision), about, patience))
    names = [v.name for v in variants]
    rows = measure(variants, clock, seconds, next((s for s in SUBJECTS if s in names), None), journal, size)
    return [{**_about_size(size, shape), **row, **made[row["variant"]].memory} for row in rows]


def _about_size(size: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    return {"suite": "network", "size": size, **dict(zip("nhw", shape, strict=True))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", default=",".join(SIZES), help=", ".join(SIZES) + " or NxHxW")
    parser.add_argument("--peers", default="all", choices=("all", "fast", "slow", "none"))
    parser.add_argument("--only", help="names that contain one of these, separated by commas")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each size")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, whose times mean nothing")
    parser.add_argument("--journal", type=Path, help="to go on after a variant that took the GPU (benchmarks/gpu/journal.py)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device, 0 if options.device == "cuda" else None)
    about = facts.about()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # "eager fp32" means float32
    clock: Clock = CudaClock(device) if device.type == "cuda" else HostClock()
    net = mf.create_model("memnet_m6r6.denoise")
    only = options.only.split(",") if options.only else None
    for size in options.sizes.split(","):
        shape = SIZES.get(size) or tuple(int(s) for s in size.split("x"))
        fixed = _about_size(size, shape)
        journal = Journal(options.journal, lambda row, fixed=fixed: store.add(options.out, about, [{**fixed, **row}]))
        if journal.has("done", size):
            continue
        rows = run_size(net, size, shape, clock, device, options.peers, options.seconds, only, journal)
        store.add(options.out, about, rows)
        journal.write("done", size)
        for row in rows:
            time = f"{row['ms']:9.3f} ms  {row.get('ratio', float('nan')):6.2f}" if "ms" in row else row["reason"]
            print(f"{size:12} {row['variant']:48} {time}  {row.get('peak_mib', 0):8.0f} MiB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

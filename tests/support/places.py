"""Where a fused network runs in the tests that hold on every device: here on the CPU, and on a GPU in every way there is.

Each test body is written once. On the CPU it runs in every test run, so that a GPU meets no test code that never ran; what
only a GPU has (streams, graphs) has a stand-in here that keeps the meaning of the call.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import memnet_fast as mf
from memnet_fast import engine
from memnet_fast.config import MemNetConfig
from support import checks, layers, networks
from support.candidates import CPU, DIRECT, TORCH, Candidate, cuda_candidate, isas, triton_candidate

GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class Place:
    """A device and what computes on it."""

    name: str
    device: torch.device
    backend: str
    precision: str

    def fuse(self, net: mf.MemNet) -> mf.FusedMemNet:
        """A fused copy of net there; fast.reference is the copy."""
        options = {"algorithm": "direct"} if self.backend == "cpu" else {}
        return mf.fuse(copy.deepcopy(net).to(self.device), backend=self.backend, precision=self.precision, **options)

    def image(self, n: int, h: int, w: int, seed: int = 0, channels: int = 1) -> Tensor:
        return networks.image(n, channels, h, w, seed).to(self.device)

    @property
    def nsr_limit(self) -> float:
        return layers.NSR_LIMIT[self.precision] * checks.UNIT[self.precision]

    def require_close(self, y: Tensor, net: mf.MemNet, x: Tensor) -> None:
        """y is what this network makes of x, within the precision of this place."""
        checks.require_nsr(y.cpu(), networks.oracle(net.cpu(), x.cpu()), x.cpu(), self.nsr_limit)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes that tensors hold on the device; 0 where nobody counts."""
        return torch.cuda.memory_allocated(self.device) if self.is_gpu else 0

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Work inside goes to a stream of its own, after what was queued before; nothing waits for it."""
        if not self.is_gpu:
            yield
            return
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            yield

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records work(). Returns replay() and the tensor that every replay writes its result to."""
        if self.is_gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = work()
            graph.replay()
            return graph.replay, kept
        kept = work()

        def replay() -> None:
            kept.copy_(work())

        return replay, kept


def _gpu(name: str, backend: str, precision: str):
    return pytest.param(Place(name, GPU, backend, precision), marks=pytest.mark.gpu, id=name)


_HERE = Place("cpu-direct", CPU, "cpu", "fp32") if isas() else Place("torch-cpu", CPU, "torch", "fp32")
HERE = [pytest.param(_HERE, id=_HERE.name)]
CUDA_PLACES = [_gpu("cuda-fp16", "cuda", "fp16"), _gpu("cuda-bf16", "cuda", "bf16")]
TRITON_PLACES = [_gpu("triton-fp32", "triton", "fp32"), _gpu("triton-fp16", "triton", "fp16")]
PLACES = HERE + CUDA_PLACES + TRITON_PLACES


def on_gpu(candidates: list[Candidate]) -> list:
    return [pytest.param(c, marks=pytest.mark.gpu, id=c.name) for c in candidates]


# The device's own kernels, and on newer ones those of sm_80, which are also the fallback there.
CUDA = on_gpu([cuda_candidate(p, GPU, capability) for p in ("fp16", "bf16") for capability in (None, 80)])
TRITON = on_gpu([triton_candidate(p, GPU) for p in ("fp32", "tf32", "fp16", "bf16")])
# What their gates do where no descriptor can stand for the slots.
TRITON_BY_ADDRESS = on_gpu([triton_candidate(p, GPU, tma=False) for p in ("tf32", "fp16")])
# Convolutions in e4m3 between fp16 slots: neither integers nor the z-test of the other precisions fit it.
FP8 = on_gpu([cuda_candidate("fp8", GPU)])
ON_CPU = [pytest.param(c, id=c.name) for c in (DIRECT or TORCH)[:1]]
EVERYWHERE = ON_CPU + CUDA + TRITON


def workspaces(fast: mf.FusedMemNet) -> list[Tensor]:
    """The workspaces that the engine keeps for the next call, and those of its graphs."""
    running = engine.engine(fast._spec)
    return [*running._free.values(), *running.replays._workspaces.values()]


# Radius 4, and 64 channels, which nothing pads.
SHALLOW = MemNetConfig(num_memory_blocks=1, num_recursions=1)

"""What a forward pass can be run with: this package's backends and the best plain ways of PyTorch.

Every peer gets the same reference network with the same weights and returns a function [N, C, H, W] -> [N, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memnet_fast.fused import fuse
from memnet_fast.reference import MemNet

Run = Callable[[Tensor], Tensor]

# The one that the others are paired with.
SUBJECT = "memnet_fast cpu"

# glibc gives large blocks back to the system at every free, and the page faults that follow are half of PyTorch's time on
# large activations. Peers run with pages kept, their best; the "default allocator" peer shows what a user gets without it.
KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "67108864",
}


def _eager(net: MemNet) -> Run:
    return net


def _channels_last(net: MemNet) -> Run:
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda x: net(x.contiguous(memory_format=torch.channels_last))


def _compile(net: MemNet) -> Run:
    import torch._inductor.config as inductor

    inductor.freezing = True
    run = torch.compile(net.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    return lambda x: run(x.contiguous(memory_format=torch.channels_last))


# name: how to make it, environment of its process
PEERS: dict[str, tuple[Callable[[MemNet], Run], dict[str, str]]] = {
    SUBJECT: (lambda net: fuse(net, backend="cpu"), {}),
    "memnet_fast cpu direct": (lambda net: fuse(net, backend="cpu", algorithm="direct"), {}),
    "eager": (_eager, KEEP_PAGES),
    "eager channels_last": (_channels_last, KEEP_PAGES),
    "torch.compile": (_compile, KEEP_PAGES),
    "eager channels_last, default allocator": (_channels_last, {}),
}


# On a GPU ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuPeer:
    """Plain PyTorch on a GPU. make(net, image): net lies on the device and belongs to the peer; image [N, 1, H, W] float32 has
    the shape that run will get. slow: compiles for minutes.
    """

    precision: str
    make: Callable[[MemNet, Tensor], Run]
    slow: bool = False


def graphed(run: Run, image: Tensor) -> Run:
    """run on images of this shape as one CUDA graph. Each call returns the same memory."""
    static = image.clone()
    side = torch.cuda.Stream(image.device)
    side.wait_stream(torch.cuda.current_stream(image.device))
    with torch.cuda.stream(side):  # libraries choose and allocate before the capture
        for _ in range(3):
            run(static)
    torch.cuda.current_stream(image.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)

    def replay(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return out

    return replay


def _half(net: MemNet, dtype: torch.dtype) -> Run:
    net = net.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda x: net(x.to(dtype).contiguous(memory_format=torch.channels_last))


def _compiled(mode: str) -> Callable[[MemNet, Tensor], Run]:
    def make(net: MemNet, image: Tensor) -> Run:
        net = net.to(dtype=torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
        run = torch.compile(net, mode=mode, dynamic=False)
        return lambda x: run(x.half().contiguous(memory_format=torch.channels_last))

    return make


# With torch.backends.cudnn.benchmark on (benchmarks/gpu/network.py sets it).
GPU_PEERS: dict[str, GpuPeer] = {
    "eager fp32": GpuPeer("fp32", lambda net, image: net),
    "eager fp16 channels_last": GpuPeer("fp16", lambda net, image: _half(net, torch.float16)),
    "eager bf16 channels_last": GpuPeer("bf16", lambda net, image: _half(net, torch.bfloat16)),
    "eager fp16 channels_last, CUDA graph": GpuPeer("fp16", lambda net, image: graphed(_half(net, torch.float16), image)),
    "torch.compile fp16 channels_last": GpuPeer("fp16", _compiled("default"), slow=True),
    "torch.compile fp16 channels_last, max-autotune": GpuPeer("fp16", _compiled("max-autotune"), slow=True),
}

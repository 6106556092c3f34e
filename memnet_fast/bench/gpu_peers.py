"""The best plain ways of PyTorch on a GPU. Every peer gets the same reference network with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memnet_fast.reference import MemNet

Run = Callable[[Tensor], Tensor]


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


# With torch.backends.cudnn.benchmark on, which who runs them sets.
GPU_PEERS: dict[str, GpuPeer] = {
    "eager fp32": GpuPeer("fp32", lambda net, image: net),
    "eager fp16 channels_last": GpuPeer("fp16", lambda net, image: _half(net, torch.float16)),
    "eager bf16 channels_last": GpuPeer("bf16", lambda net, image: _half(net, torch.bfloat16)),
    "eager fp16 channels_last, CUDA graph": GpuPeer("fp16", lambda net, image: graphed(_half(net, torch.float16), image)),
    "torch.compile fp16 channels_last": GpuPeer("fp16", _compiled("default"), slow=True),
    "torch.compile fp16 channels_last, max-autotune": GpuPeer("fp16", _compiled("max-autotune"), slow=True),
}

"""What a forward pass can be run with: this package's backends and the best plain ways of PyTorch.

Every peer gets the same reference network with the same weights and returns a function [N, C, H, W] -> [N, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable

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

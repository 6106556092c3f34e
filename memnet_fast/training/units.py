"""BN-ReLU-convolution and its gradients by the native CPU kernels (csrc/cpu/training.h), for the memory-lean training path.

Everything is fp32, maps are [N, C, H, W] in channels_last with C a multiple of 16. 3x3 convolutions are Winograd F(6x6, 3x3) in
all three directions, and nothing between a feature map and the sums of a convolution is ever written to memory.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memnet_fast import native
from memnet_fast.reference import MemNet

_ISA = "auto"
_LANES = 16
_MOST_OUTPUTS = 3


def why_not(net: MemNet) -> str | None:
    """Why the native kernels cannot train a network where its parameters are, in one sentence; None where they can."""
    for name, t in (*net.named_parameters(), *net.named_buffers()):
        if t.device.type != "cpu":
            return f"the network's {name} is on {t.device}"
        if t.is_floating_point() and t.dtype != torch.float32:
            return f"the network's {name} is {str(t.dtype).removeprefix('torch.')}, not float32"
    if net.config.channels % _LANES:
        return f"the network's {net.config.channels} channels are no multiple of {_LANES}"
    return native.why_missing()


class Scratch(threading.local):
    """Memory for the kernels, as much as the largest unit has asked for, 64-byte aligned. Kept for one forward and backward
    pass: pages that the system has to hand out again cost as much time as a pass over a map. Each thread that computes a pass
    has its own."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def at_least(self, floats: int) -> int:
        """The address of so many floats."""
        if self._memory.numel() < floats + _LANES:
            self._memory = torch.empty(floats + _LANES)
        return -(-self._memory.data_ptr() // 64) * 64


def _map(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _new_map(like: Tensor) -> Tensor:
    """A map like another one, not initialised, 64-byte aligned.

    PyTorch asks the C library for aligned memory, and glibc (2.36) then never takes the place of a freed map of the same size:
    steps of M6R6 grew to half as much memory again. NumPy asks for memory alone.
    """
    n, c, h, w = like.shape
    memory = np.empty(like.numel() + _LANES, np.float32)
    start = -memory.ctypes.data % 64 // memory.itemsize
    return torch.from_numpy(memory[start : start + like.numel()].reshape(n, h, w, c).transpose(0, 3, 1, 2))


def _fields(weight: Tensor, maps: Sequence[Tensor], **tensors: Tensor | None) -> dict[str, Any]:
    n, c, h, w = maps[0].shape
    fields: dict[str, Any] = {"n": n, "h": h, "w": w, "c": c, "kernel": weight.shape[-1], "threads": torch.get_num_threads()}
    fields["outputs"] = 0 if weight.shape[0] == c else weight.shape[0]
    fields |= {"weight": weight.data_ptr(), "x": [x.data_ptr() for x in maps]}
    return fields | {name: t.data_ptr() for name, t in tensors.items() if t is not None}


def statistics(x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a map, [C] each."""
    x = _map(x)
    module, c = native.module(), x.shape[1]
    mean, var = torch.empty(c), torch.empty(c)
    pixels = x.numel() // c
    floats = module.statistics_scratch(pixels, c, _ISA)
    results = mean.data_ptr(), var.data_ptr()
    module.channel_statistics(
        x.data_ptr(), pixels, c, *results, scratch.at_least(floats), floats, torch.get_num_threads(), _ISA
    )
    return mean, var


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,  # [out, sources * C, k, k]
        bias: Tensor | None,  # [out]
        gamma: Tensor,  # [sources * C]
        beta: Tensor,
        skip: Tensor | None,  # [N, C, H, W]
        mean: Tensor,  # [sources * C]
        var: Tensor,
        eps: float,
        train: bool,
        scratch: Scratch,
        *slots: Tensor,  # [N, C, H, W]
    ) -> Tensor:
        maps = [_map(x) for x in slots]
        # As addresses are handed on, everything must lie in memory without gaps, whatever views parameters are of.
        weight, gamma, beta, mean = (t.contiguous() for t in (weight, gamma, beta, mean))
        invstd = (var + eps).rsqrt().contiguous()
        ctx.save_for_backward(weight, gamma, beta, mean, invstd, *maps)
        ctx.train, ctx.scratch = train, scratch
        n, c, h, w = maps[0].shape
        out = _new_map(maps[0]) if len(weight) == c else torch.empty(n, len(weight), h, w)
        own = torch.zeros(len(weight)) if bias is None else bias.contiguous()
        added = None if skip is None else _map(skip)
        norm = {"gamma": gamma, "beta": beta, "mean": mean, "invstd": invstd}
        unit = _fields(weight, maps, **norm, bias=own, skip=added, out=out)
        module = native.module()
        floats = module.unit_scratch(unit, False, _ISA)
        module.unit_forward(unit, scratch.at_least(floats), floats, _ISA)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gamma, beta, mean, invstd, *maps = ctx.saved_tensors
        grad = _map(grad) if len(weight) == maps[0].shape[1] else grad.contiguous()
        grads = {"grad_weight": torch.empty_like(weight), "grad_bias": torch.empty(len(weight))}
        grads |= {"grad_gamma": torch.empty_like(gamma), "grad_beta": torch.empty_like(beta)}
        norm = {"gamma": gamma, "beta": beta, "mean": mean, "invstd": invstd}
        unit = _fields(weight, maps, **norm, **grads, grad=grad)
        grad_x = [_new_map(x) for x in maps]
        unit |= {"grad_x": [x.data_ptr() for x in grad_x], "batch_statistics": int(ctx.train)}
        module = native.module()
        floats = module.unit_scratch(unit, True, _ISA)
        module.unit_backward(unit, ctx.scratch.at_least(floats), floats, _ISA)
        wanted = ctx.needs_input_grad
        of_parameters = (t if want else None for want, t in zip(wanted, grads.values(), strict=False))
        return (*of_parameters, grad if wanted[4] else None, *(None,) * 5, *grad_x)


def computes(conv: nn.Conv2d, maps: Sequence[Tensor]) -> bool:
    """Whether the kernels know a convolution of the concatenation of these maps, [N, C, H, W] each."""
    out, channels, kernel = *conv.weight.shape[:2], conv.weight.shape[-1]
    c = maps[0].shape[1]
    if c % _LANES or channels != len(maps) * c:
        return False
    return out == c and (kernel == 1 or len(maps) == 1) or out <= _MOST_OUTPUTS and len(maps) == 1


def unit(
    bn: nn.BatchNorm2d,
    conv: nn.Conv2d,
    maps: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    skip: Tensor | None,
    scratch: Scratch,
) -> Tensor:
    """skip + conv(relu(bn(concatenation of maps))), each [N, C, H, W] float32, where bn has this mean and (biased) variance
    ([sources * C]); in training mode, those are taken for the maps' own."""
    how = mean, var, bn.eps, bn.training, scratch
    return _Unit.apply(conv.weight, conv.bias, bn.weight, bn.bias, skip, *how, *maps)

"""The reference network's own function and gradients in a third of the memory: what is cheap to compute again is not kept.

Plain autograd keeps, for every convolution, its input after BN and ReLU beside the feature map it was made of, and for every
gate the concatenation of all its inputs and a second one after BN and ReLU. Here only the feature maps themselves are kept. A
gate adds up what its weights make of one input after the other, so that nothing is concatenated; the backward pass applies BN
and ReLU again (elementwise) and never repeats a convolution. The batch statistics of a feature map are taken once, however
many units read it (as the input of a recursion, of gates, of a reconstruction).

In 16 bit a gate rounds each of its partial sums, and adds them in float32; the concatenation rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memnet_fast.errors import InputError
from memnet_fast.reference import FLOATS, BNReLUConv, MemNet, MemoryBlock, check_input


@dataclass(frozen=True)
class _Slot:
    """A feature map x [N, C, H, W] with the mean and the (biased) variance of its channels, [C] each; None in eval mode."""

    x: Tensor
    mean: Tensor | None
    var: Tensor | None

    @classmethod
    def of(cls, x: Tensor, train: bool) -> _Slot:
        if not train:
            return cls(x, None, None)
        if x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        # Running statistics that nobody reads say that those of a 16-bit map are wanted in float32.
        wide = torch.promote_types(x.dtype, torch.float32)
        unread = torch.zeros(2, x.shape[1], dtype=wide, device=x.device)
        mean, var = torch.ops.aten.batch_norm_update_stats(x.detach(), unread[0], unread[1], 0.0)
        return cls(x, mean, var)


def _activate(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.batch_norm(x, gamma, beta, mean, var, False, 0.0, eps, False).relu_().to(dtype)


class _Unit(torch.autograd.Function):
    """skip + sum over slots of conv_s(relu(bn_s(x_s))) + bias, where each slot has its own columns of the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,  # [C_out, sum of C_s, k, k]
        bias: Tensor | None,
        gamma: Tensor,  # [sum of C_s]
        beta: Tensor,
        skip: Tensor | None,  # [N, C_out, H, W]
        mean: Tensor,  # [sum of C_s]
        var: Tensor,
        eps: float,
        train: bool,
        dtype: torch.dtype,
        *slots: Tensor,  # [N, C_s, H, W]
    ) -> Tensor:
        ctx.save_for_backward(weight, gamma, beta, mean, var, *slots)
        ctx.eps, ctx.train, ctx.dtype, ctx.has_bias = eps, train, dtype, bias is not None
        ctx.skip_dtype = None if skip is None else skip.dtype
        out: Tensor | None = None
        pad = weight.shape[-1] // 2
        for x, part in zip(slots, _parts(slots), strict=True):
            a = _activate(x, gamma[part], beta[part], mean[part], var[part], eps, dtype)
            own = bias.to(dtype) if out is None and bias is not None else None
            term = torch.conv2d(a, weight[:, part].to(dtype), own, padding=pad)
            if out is None:
                out = term.to(torch.promote_types(dtype, torch.float32)) if len(slots) > 1 else term
            else:
                out.add_(term)
        assert out is not None
        out = out.to(dtype)
        return out if skip is None else out.add_(skip) if skip.dtype == dtype else out + skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, gamma, beta, mean, var, *slots = ctx.saved_tensors
        need_weight, need_bias, need_gamma, need_beta, need_skip = ctx.needs_input_grad[:5]
        invstd = (var + ctx.eps).rsqrt()
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_gamma, grad_beta = torch.empty_like(gamma), torch.empty_like(beta)
        grad_bias = None
        grad_slots: list[Tensor | None] = []
        pad = weight.shape[-1] // 2
        narrow = g.to(ctx.dtype)
        for i, (x, part) in enumerate(zip(slots, _parts(slots), strict=True)):
            a = _activate(x, gamma[part], beta[part], mean[part], var[part], ctx.eps, ctx.dtype)
            wanted = ctx.needs_input_grad[10 + i]
            grad_bias_here = need_bias and i == 0
            ga, gw, gb = torch.ops.aten.convolution_backward(
                narrow,
                a,
                weight[:, part].to(ctx.dtype),
                [weight.shape[0]] if ctx.has_bias else None,
                [1, 1],
                [pad, pad],
                [1, 1],
                False,
                [0, 0],
                1,
                [wanted or need_gamma or need_beta, need_weight, grad_bias_here],
            )
            if grad_weight is not None:
                grad_weight[:, part] = gw
            if grad_bias_here:
                grad_bias = gb.to(weight.dtype)
            if ga is None:
                grad_slots.append(None)
                continue
            ga = torch.ops.aten.threshold_backward(ga.to(x.dtype), a.to(x.dtype), 0)
            gx, g_gamma, g_beta = torch.ops.aten.native_batch_norm_backward(
                ga, x, gamma[part], mean[part], var[part], mean[part], invstd[part], ctx.train, ctx.eps, [wanted, True, True]
            )
            grad_gamma[part], grad_beta[part] = g_gamma, g_beta
            grad_slots.append(gx if wanted else None)
        grad_skip = g.to(ctx.skip_dtype) if need_skip else None
        return grad_weight, grad_bias, grad_gamma, grad_beta, grad_skip, None, None, None, None, None, *grad_slots


def _parts(slots: Sequence[Tensor]) -> list[slice]:
    """Which channels of a concatenation each slot would have."""
    parts, start = [], 0
    for x in slots:
        parts.append(slice(start, start + x.shape[1]))
        start += x.shape[1]
    return parts


def _unit(bn: nn.BatchNorm2d, conv: nn.Conv2d, slots: Sequence[_Slot], skip: Tensor | None = None) -> Tensor:
    """What BNReLUConv(concatenation of slots) + skip computes, running statistics included."""
    device = conv.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else conv.weight.dtype
    x = slots[0].x
    if bn.training:
        mean = torch.cat([s.mean for s in slots if s.mean is not None])
        var = torch.cat([s.var for s in slots if s.var is not None])
        with torch.no_grad():
            _update_running(bn, mean, var, x.numel() // x.shape[1])
    else:
        assert bn.running_mean is not None and bn.running_var is not None
        mean, var = bn.running_mean, bn.running_var
    maps = (s.x for s in slots)
    return _Unit.apply(conv.weight, conv.bias, bn.weight, bn.bias, skip, mean, var, bn.eps, bn.training, dtype, *maps)


def _update_running(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
    bn.num_batches_tracked.add_(1)
    weight = 1 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), weight)
    bn.running_var.lerp_((var * (count / (count - 1))).to(bn.running_var.dtype), weight)


def _residual(block: MemoryBlock, h: _Slot, index: int) -> _Slot:
    conv = 0 if len(block.conv_a) == 1 else index
    train = block.training
    t = _Slot.of(_unit(block.bn_a[index], block.conv_a[conv], [h]), train)  # type: ignore[arg-type]
    return _Slot.of(_unit(block.bn_b[index], block.conv_b[conv], [t], skip=h.x), train)  # type: ignore[arg-type]


def _memory_block(block: MemoryBlock, long: list[_Slot]) -> _Slot:
    h, short = long[-1], []
    count = block.config.num_recursions
    for r in range(count):
        for i in range(count) if block.config.sharing == "chain" else (r,):
            h = _residual(block, h, i)
        short.append(h)
    order = long + short if block.config.gate_order == "long_short" else short + long
    return _Slot.of(_unit(block.gate.bn, block.gate.conv, order), block.training)


def heads(net: MemNet, x: Tensor) -> list[Tensor]:
    """What net.heads(x) returns, with the same gradients and the same effect on running statistics, in less memory.

    x: as for the network; under autocast the convolutions compute in its dtype, as they do in the reference. Not twice
    differentiable. Raises InputError for inputs that the network refuses, and for a network whose batch normalisations are
    no nn.BatchNorm2d with running statistics (nn.SyncBatchNorm: statistics here are those of one process), or are partly in
    training mode.
    """
    weight = net.first.conv.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    check_input(x, net.config, FLOATS if autocast else (weight.dtype,), weight.device)
    _check_norms(net)
    train = net.training
    long = [_Slot.of(_bn_relu_conv(net.first, x, train), train)]
    for block in net.blocks:
        long.append(_memory_block(block, long))  # type: ignore[arg-type]
    outputs = long[1:] if net.config.multi_supervised else long[-1:]
    bns = list(net.recon_bn) * (len(outputs) // len(net.recon_bn))
    return [x + _unit(bn, net.recon, [b]) for bn, b in zip(bns, outputs, strict=True)]  # type: ignore[arg-type]


def _bn_relu_conv(unit: BNReLUConv, x: Tensor, train: bool) -> Tensor:
    return _unit(unit.bn, unit.conv, [_Slot.of(x, train)])


def _check_norms(net: MemNet) -> None:
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            if type(module) is not nn.BatchNorm2d or not module.track_running_stats or not module.affine:
                raise InputError(f"the memory-lean path needs plain batch normalisations, and {name} is {module}")
            if module.training != net.training:
                raise InputError(f"the memory-lean path trains all batch normalisations or none, and {name} differs")

"""The reference network's own function and gradients in a third of the memory: what is cheap to compute again is not kept.

Plain autograd keeps, for every convolution, its input after BN and ReLU beside the feature map it was made of, and for every
gate the concatenation of all its inputs and a second one after BN and ReLU. Here only the feature maps themselves are kept. A
gate adds up what its weights make of one input after the other, so that nothing is concatenated; the backward pass applies BN
and ReLU again (elementwise) and never repeats a convolution. The batch statistics of a feature map are taken once, however
many units read it (as the input of a recursion, of gates, of a reconstruction).

In 16 bit a gate rounds each of its partial sums, and adds them in float32; the concatenation rounds once.

What lies between the convolutions are three functions of one feature map: its statistics, BN with ReLU, and their gradient.
The first is one pass over the map already; of the others `compiled` lets torch.compile make one kernel each where eager PyTorch
runs several, each of which reads and writes the map. Small graphs compile in seconds, the whole network takes minutes.

On CPUs, `native` has the package's own kernels compute whole units (training.units): Winograd forwards and backwards, with BN
and ReLU in its transforms, so that not even what BN and ReLU make of a map is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memnet_fast.errors import InputError
from memnet_fast.reference import FLOATS, BNReLUConv, MemNet, MemoryBlock, check_input
from memnet_fast.training import units


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel, in at least float32."""
    # Running statistics that nobody reads say that those of a 16-bit map are wanted in float32.
    unread = torch.zeros(2, x.shape[1], dtype=_wide(x), device=x.device)
    return torch.ops.aten.batch_norm_update_stats(x, unread[0], unread[1], 0.0)


def _activate(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """relu(bn(x)) in dtype."""
    return torch.batch_norm(x, gamma, beta, mean, var, False, 0.0, eps, False).relu_().to(dtype)


def _gradients(
    ga: Tensor, a: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `_activate`'s output a -> of x (in its dtype), gamma and beta. train: mean and var are those of x."""
    ga = torch.ops.aten.threshold_backward(ga.to(x.dtype), a.to(x.dtype), 0)
    invstd = (var + eps).rsqrt()
    every = [True, True, True]
    return torch.ops.aten.native_batch_norm_backward(ga, x, gamma, mean, var, mean, invstd, train, eps, every)


# The last two, written out for a compiler.


def _normalised(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (x.to(_wide(x)) - _by_channel(mean)) * _by_channel((var + eps).rsqrt())


def _activate_written(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return (_normalised(x, mean, var, eps) * _by_channel(gamma) + _by_channel(beta)).relu().to(dtype)


def _gradients_written(
    ga: Tensor, a: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = _normalised(x, mean, var, eps)
    # Where a is positive: to compute that again from x, which is read anyway, takes less time than to read a.
    g = torch.where(n * _by_channel(gamma) + _by_channel(beta) > 0, ga.to(n.dtype), 0.0)
    g_gamma, g_beta = (g * n).sum((0, 2, 3)), g.sum((0, 2, 3))
    if train:
        count = x.numel() // x.shape[1]
        g = g - (n * _by_channel(g_gamma) + _by_channel(g_beta)) / count
    gx = g * _by_channel(gamma * (var + eps).rsqrt())
    return gx.to(x.dtype), g_gamma, g_beta


def _by_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class _Pieces:
    statistics: Callable[[Tensor], tuple[Tensor, Tensor]] = _statistics
    activate: Callable[..., Tensor] = _activate
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] = _gradients
    scratch: units.Scratch | None = None  # then the native kernels compute what they can, and the rest is float32

    def of(self, x: Tensor) -> _Pieces:
        """The network's input has few channels: next to nothing to compute, but another shape to compile for."""
        return self if x.shape[1] > _FEW else _EAGER


_FEW = 3
_EAGER = _Pieces()


@functools.cache
def _compiled() -> _Pieces:
    # Each shape by itself: what is compiled for one must not depend on which came before, or a resumed training would
    # compute other bits than one that went through.
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    compile_ = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    return _Pieces(activate=compile_(_activate_written), gradients=compile_(_gradients_written))


# Stages differ in the size of patches; eight shapes, PyTorch's limit, would be few for a program that trains many recipes.
_SHAPES = 64


@dataclass(frozen=True)
class _Slot:
    """A feature map x [N, C, H, W] with the mean and the (biased) variance of its channels, [C] each; None in eval mode."""

    x: Tensor
    mean: Tensor | None
    var: Tensor | None

    @classmethod
    def of(cls, x: Tensor, train: bool, pieces: _Pieces) -> _Slot:
        if not train:
            return cls(x, None, None)
        if x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        return cls(x, *pieces.of(x).statistics(x.detach()))


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
        pieces: _Pieces,
        *slots: Tensor,  # [N, C_s, H, W]
    ) -> Tensor:
        ctx.save_for_backward(weight, gamma, beta, mean, var, *slots)
        ctx.eps, ctx.train, ctx.dtype, ctx.has_bias, ctx.pieces = eps, train, dtype, bias is not None, pieces
        ctx.skip_dtype = None if skip is None else skip.dtype
        out: Tensor | None = None
        pad = weight.shape[-1] // 2
        for x, part in zip(slots, _parts(slots), strict=True):
            norm = (t.detach()[part] for t in (gamma, beta, mean, var))
            a = pieces.of(x).activate(x.detach(), *norm, eps, dtype)
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
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_gamma, grad_beta = torch.empty_like(gamma), torch.empty_like(beta)
        grad_bias = None
        grad_slots: list[Tensor | None] = []
        pad = weight.shape[-1] // 2
        narrow = g.to(ctx.dtype)
        for i, (x, part) in enumerate(zip(slots, _parts(slots), strict=True)):
            pieces, x = ctx.pieces.of(x), x.detach()
            norm = [t.detach()[part] for t in (gamma, beta, mean, var)]
            a = pieces.activate(x, *norm, ctx.eps, ctx.dtype)
            wanted = ctx.needs_input_grad[11 + i]
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
            gx, g_gamma, g_beta = pieces.gradients(ga, a, x, *norm, ctx.eps, ctx.train)
            grad_gamma[part], grad_beta[part] = g_gamma, g_beta
            grad_slots.append(gx if wanted else None)
        grad_skip = g.to(ctx.skip_dtype) if need_skip else None
        return grad_weight, grad_bias, grad_gamma, grad_beta, grad_skip, *(None,) * 6, *grad_slots


def _parts(slots: Sequence[Tensor]) -> list[slice]:
    """Which channels of a concatenation each slot would have."""
    parts, start = [], 0
    for x in slots:
        parts.append(slice(start, start + x.shape[1]))
        start += x.shape[1]
    return parts


def _unit(bn: nn.BatchNorm2d, conv: nn.Conv2d, slots: Sequence[_Slot], pieces: _Pieces, skip: Tensor | None = None) -> Tensor:
    """What BNReLUConv(concatenation of slots) + skip computes, running statistics included."""
    x = slots[0].x
    if bn.training:
        mean = torch.cat([s.mean for s in slots if s.mean is not None])
        var = torch.cat([s.var for s in slots if s.var is not None])
        with torch.no_grad():
            _update_running(bn, mean, var, x.numel() // x.shape[1])
    else:
        assert bn.running_mean is not None and bn.running_var is not None
        mean, var = bn.running_mean, bn.running_var
    maps = [s.x for s in slots]
    if pieces.scratch is not None and units.computes(conv, maps):
        return units.unit(bn, conv, maps, mean, var, skip, pieces.scratch)
    device = conv.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else conv.weight.dtype
    how = bn.eps, bn.training, dtype, pieces
    return _Unit.apply(conv.weight, conv.bias, bn.weight, bn.bias, skip, mean, var, *how, *maps)


def _update_running(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
    bn.num_batches_tracked.add_(1)
    weight = 1 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), weight)
    bn.running_var.lerp_((var * (count / (count - 1))).to(bn.running_var.dtype), weight)


def _residual(block: MemoryBlock, h: _Slot, index: int, pieces: _Pieces) -> _Slot:
    conv = 0 if len(block.conv_a) == 1 else index
    train = block.training
    t = _Slot.of(_unit(block.bn_a[index], block.conv_a[conv], [h], pieces), train, pieces)  # type: ignore[arg-type]
    return _Slot.of(_unit(block.bn_b[index], block.conv_b[conv], [t], pieces, h.x), train, pieces)  # type: ignore[arg-type]


def _memory_block(block: MemoryBlock, long: list[_Slot], pieces: _Pieces) -> _Slot:
    h, short = long[-1], []
    count = block.config.num_recursions
    for r in range(count):
        for i in range(count) if block.config.sharing == "chain" else (r,):
            h = _residual(block, h, i, pieces)
        short.append(h)
    order = long + short if block.config.gate_order == "long_short" else short + long
    return _Slot.of(_unit(block.gate.bn, block.gate.conv, order, pieces), block.training, pieces)


def heads(net: MemNet, x: Tensor, compiled: bool = False, native: bool = False) -> list[Tensor]:
    """What net.heads(x) returns, with the same gradients and the same effect on running statistics, in less memory.

    x: as for the network; under autocast the convolutions compute in its dtype, as they do in the reference. Not twice
    differentiable. compiled: with kernels of torch.compile, see above; `check_compiler` says beforehand whether there is one.
    native: with the package's own kernels, see above; then autocast changes nothing.
    Raises InputError for inputs that the network refuses, and for a network whose batch normalisations are
    no nn.BatchNorm2d with running statistics (nn.SyncBatchNorm: statistics here are those of one process), or are partly in
    training mode; with native, also for a network that those kernels cannot train.
    """
    missing = ("torch.compile makes others" if compiled else units.why_not(net)) if native else None
    if missing:
        raise InputError(f"the native kernels cannot train this network: {missing}")
    weight = net.first.conv.weight
    device = weight.device.type
    autocast = torch.is_autocast_enabled(device)
    check_input(x, net.config, FLOATS if autocast else (weight.dtype,), weight.device)
    _check_norms(net)
    if not native:
        return _heads(net, x, _compiled() if compiled else _EAGER)
    scratch = units.Scratch()
    statistics = functools.partial(units.statistics, scratch=scratch)
    with torch.autocast(device, enabled=False):
        return _heads(net, x.to(weight.dtype), _Pieces(statistics, scratch=scratch))


def _heads(net: MemNet, x: Tensor, pieces: _Pieces) -> list[Tensor]:
    train = net.training
    first = _bn_relu_conv(net.first, x, pieces)
    if pieces.scratch is not None:  # else every unit that reads it would convert it, and keep a copy of its own
        first = first.contiguous(memory_format=torch.channels_last)
    long = [_Slot.of(first, train, pieces)]
    count, bns = len(net.blocks), list(net.recon_bn)
    outputs: list[Tensor] = []
    for m, block in enumerate(net.blocks):
        long.append(_memory_block(block, long, pieces))  # type: ignore[arg-type]
        if net.config.multi_supervised or m + 1 == count:
            # As soon as it can be: its gradient is computed when the block's is about to be, and waits for nothing.
            bn = bns[len(outputs) % len(bns)]
            outputs.append(x + _unit(bn, net.recon, [long[-1]], pieces))  # type: ignore[arg-type]
    return outputs


def _bn_relu_conv(unit: BNReLUConv, x: Tensor, pieces: _Pieces) -> Tensor:
    return _unit(unit.bn, unit.conv, [_Slot.of(x, unit.training, pieces)], pieces)


def check_compiler(device: str | torch.device) -> None:
    """Raises InputError, in one line, where torch.compile cannot make a kernel for a device (no C++ compiler, no Triton)."""
    try:
        x, values = torch.ones(1, _FEW + 1, 1, 2, device=device), torch.ones(_FEW + 1, device=device)
        _compiled().activate(x, values, values, values, values, 1.0, x.dtype)
    except Exception as error:  # whatever compilers, drivers and PyTorch raise
        reason = " ".join(str(error).split())[:200] or repr(error)
        needs = "a C++ compiler" if torch.device(device).type == "cpu" else "Triton and a C compiler"
        raise InputError(f"torch.compile does not work here ({reason}); it needs {needs}, or compile = false") from error


def _check_norms(net: MemNet) -> None:
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            if type(module) is not nn.BatchNorm2d or not module.track_running_stats or not module.affine:
                raise InputError(f"the memory-lean path needs plain batch normalisations, and {name} is {module}")
            if module.training != net.training:
                raise InputError(f"the memory-lean path trains all batch normalisations or none, and {name} differs")

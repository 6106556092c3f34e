"""Wrong implementations, numbered: each must be noticed by at least one layer (test_harness.py).

Most are an `Interpreter` with one step spoiled; some spoil the lowering, the plan, or what happens around a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memnet_fast.plan import FusedPlan, Gate, Op, Reconstruct, ResidualBlock, lower, lower_state
from memnet_fast.reference import MemNet
from support.candidates import Candidate
from support.interpreter import Interpreter


@dataclass
class Host:
    """Runs an interpreter as a candidate's runner, in fp32 or with the roundings of another precision."""

    interpreter: Interpreter

    def run(self, image: Tensor, slots: dict[int, Tensor] | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        given = {k: v.clone().to(self.interpreter.compute) for k, v in (slots or {}).items()}
        # Memory that nobody wrote is NaN, as in a real workspace.
        missing = torch.full((image.shape[0], self.interpreter.plan.config.channels, *image.shape[2:]), float("nan"))
        self.interpreter.slots = {i: given.get(i, missing) for i in range(self.interpreter.plan.num_slots)}
        out = self.interpreter.run_ops(self.interpreter.plan.ops, image.to(self.interpreter.compute))
        return (image if out is None else out.float()), {k: v.clone() for k, v in self.interpreter.slots.items()}


def host(
    name: str,
    kind: type[Interpreter] = Interpreter,
    precision: str = "fp32",
    lowering: Callable[[MemNet], FusedPlan] = lower,
    wrap: Callable[[Host], Any] = lambda runner: runner,
) -> Candidate:
    return Candidate(name, precision, lambda plan: wrap(Host(kind(plan, precision))), lowering, "direct")


# Spoiled arithmetic --------------------------------------------------------------------------------------------------


def _weights(change: Callable[[Tensor], Tensor]) -> type[Interpreter]:
    """Spoils the 3x3 weights [out, in, 3, 3] of residual blocks on their way."""

    class _Mutant(Interpreter):
        def rounded_weight(self, name: str) -> Tensor:
            weight = super().rounded_weight(name)
            return change(weight.clone()) if weight.ndim == 4 else weight

    return _Mutant


def _entry(factor: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        # The largest weight of one output channel: an entry that is zero anyway would be no fault.
        flat = weight[weight.shape[0] // 2].view(-1)
        flat[flat.abs().argmax()] *= factor
        return weight

    return change


def _zero(*index: Any) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight[index] = 0
        return weight

    return change


def _swap_channels(weight: Tensor) -> Tensor:
    order = torch.arange(weight.shape[1])
    order[[1, 2]] = order[[2, 1]]
    return weight[:, order]


def _convolution(convolve: Callable[[Tensor, Tensor], Tensor]) -> type[Interpreter]:
    """Spoils every 3x3 convolution of 3x3-sized kernels."""

    class _Mutant(Interpreter):
        def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
            return convolve(x, weight) if weight.shape[-1] == 3 else super().convolve(x, weight)

    return _Mutant


def _padded(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode), weight)

    return convolve


def _reflect(x: Tensor, weight: Tensor) -> Tensor:
    if min(x.shape[2:]) < 2:
        return F.conv2d(x, weight, padding=1)
    return _padded("reflect")(x, weight)


def _wrap_row(x: Tensor, weight: Tensor) -> Tensor:
    """The right neighbour of the last pixel is the first of the next row, as in memory."""
    padded = F.pad(x, (1, 1, 1, 1))
    padded[:, :, 1:-2, -1] = x[:, :, 1:, 0]
    return F.conv2d(padded, weight)


def _one_corner(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x, (1, 1, 1, 1))
    padded[:, :, 0, 0] = x[:, :, 0, 0]
    return F.conv2d(padded, weight)


def _seam(lost: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Computes in tiles of 16 columns; the halo of each lacks a column, or is read one pixel off."""

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        strips = []
        for left in range(0, x.shape[3], 16):
            strip = padded[..., left : left + min(16, x.shape[3] - left) + 2].clone()
            if left + 16 < x.shape[3]:
                strip[..., -1] = 0 if lost else strip[..., -2]
            strips.append(F.conv2d(strip, weight))
        return torch.cat(strips, 3)

    return convolve


def _half_sums(x: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(())
    for tap in range(9):
        part = torch.zeros_like(weight)
        part[:, :, tap // 3, tap % 3] = weight[:, :, tap // 3, tap % 3]
        total = (total + F.conv2d(x, part, padding=1)).half().float()
    return total


class _BiasDropped(Interpreter):
    def bias(self, y: Tensor, bias: Tensor) -> Tensor:
        return y


class _BiasTwice(Interpreter):
    def bias(self, y: Tensor, bias: Tensor) -> Tensor:
        return super().bias(super().bias(y, bias), bias)


class _SkipDropped(Interpreter):
    def skip(self, op: ResidualBlock, x: Tensor, y: Tensor) -> Tensor:
        return y


class _SkipActivated(Interpreter):
    def skip(self, op: ResidualBlock, x: Tensor, y: Tensor) -> Tensor:
        return self.activate(x, self.weight(op.scale), self.weight(op.shift)) + y


def _activation(activate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> type[Interpreter]:
    class _Mutant(Interpreter):
        def activate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return activate(x, scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1))

    return _Mutant


class _PadBefore(Interpreter):
    """Pads the raw map: relu(shift) stands at the border instead of 0."""

    def pre_convolve(self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        pad = weight.shape[-1] // 2
        return F.conv2d(self.operand(self.activate(F.pad(x, (pad,) * 4), scale, shift)), weight)


class _Truncating(Interpreter):
    """Stores by cutting the low bits."""

    def store(self, value: Tensor) -> Tensor:
        mask = {"bf16": ~0xFFFF, "fp16": ~0x1FFF}[self.precision]
        return (value.contiguous().view(torch.int32) & mask).view(torch.float32)


class _SilentTf32(Interpreter):
    def operand(self, value: Tensor) -> Tensor:
        return (value.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class _NanSwallowed(Interpreter):
    """max(NaN, 0) is 0, as CUDA's fmaxf has it."""

    def activate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.nan_to_num(super().activate(x, scale, shift), nan=0.0)


# Spoiled stores ------------------------------------------------------------------------------------------------------


def _stored(change: Callable[[Tensor, Tensor], Tensor]) -> type[Interpreter]:
    """Spoils what reaches a slot. change(new value, what the slot held)."""

    class _Mutant(Interpreter):
        def write(self, slot: int, value: Tensor) -> None:
            before = self.slots.get(slot, torch.full_like(value, float("nan")))
            super().write(slot, change(value.clone(), torch.nan_to_num(before)))

    return _Mutant


def _last_row_stale(value: Tensor, before: Tensor) -> Tensor:
    value[:, :, -1] = before[:, :, -1]
    return value


def _last_column_zero(value: Tensor, before: Tensor) -> Tensor:
    value[..., -1] = 0
    return value


def _last_row_twice(value: Tensor, before: Tensor) -> Tensor:
    if value.shape[2] > 1:
        value[:, :, -1] = value[:, :, -2]
    return value


def _first_image_again(value: Tensor, before: Tensor) -> Tensor:
    return value[:1].expand_as(value).clone()


def _some_lost(value: Tensor, before: Tensor) -> Tensor:
    """One element of ten thousand, and at least one of each map, keeps what was there."""
    flat, old = value.view(-1), before.reshape(-1)
    chosen = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(1))[: max(1, flat.numel() // 10_000)]
    flat[chosen] = old[chosen]
    return value


def _one_zeroed(value: Tensor, before: Tensor) -> Tensor:
    flat = value[0].view(-1)
    flat[flat.abs().argmax()] = 0
    return value


def _last_channel(value: Tensor, before: Tensor) -> Tensor:
    value[:, -1] = 0
    return value


# Spoiled lowering ----------------------------------------------------------------------------------------------------


def _lower_with(change: Callable[[dict[str, Tensor], dict[str, float]], None]) -> Callable[[MemNet], FusedPlan]:
    def lowering(net: MemNet) -> FusedPlan:
        state = {k: v.clone() for k, v in net.state_dict().items()}
        eps = {n: m.eps for n, m in net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
        change(state, eps)
        return lower_state(net.config, state, eps)

    return lowering


def _eps(value: float) -> Callable[[dict, dict], None]:
    def change(state: dict[str, Tensor], eps: dict[str, float]) -> None:
        for name in eps:
            eps[name] = value

    return change


def _replace(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict, dict], None]:
    """Spoils one tensor of every batch normalisation."""

    def change(state: dict[str, Tensor], eps: dict[str, float]) -> None:
        for name in eps:
            state[f"{name}.{key}"] = value(state[f"{name}.{key}"])

    return change


def _no_root(state: dict[str, Tensor], eps: dict[str, float]) -> None:
    for name in eps:
        state[f"{name}.running_var"] = (state[f"{name}.running_var"] + eps[name]) ** 2 - eps[name]


def _norm_off_by_one(state: dict[str, Tensor], eps: dict[str, float]) -> None:
    for key in ("weight", "bias", "running_mean", "running_var"):
        for m in range(2):
            last = state[f"blocks.{m}.bn_a.1.{key}"].clone()
            state[f"blocks.{m}.bn_a.1.{key}"] = state[f"blocks.{m}.bn_a.0.{key}"]
            state[f"blocks.{m}.bn_a.0.{key}"] = last


def _other_block(state: dict[str, Tensor], eps: dict[str, float]) -> None:
    for conv in ("conv_a", "conv_b"):
        state[f"blocks.1.{conv}.0.weight"] = state[f"blocks.0.{conv}.0.weight"]


def _batch_statistics(net: MemNet) -> FusedPlan:
    """Statistics of a batch in place of the running ones."""
    other = MemNet(net.config).train()
    other.load_state_dict(net.state_dict())
    for module, original in zip(other.modules(), net.modules(), strict=True):
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum, module.eps = 1.0, original.eps
    with torch.no_grad():
        other(torch.rand(2, net.config.in_channels, 24, 24, generator=torch.Generator().manual_seed(1)))
    return lower(other.eval())


# Spoiled plans -------------------------------------------------------------------------------------------------------


def _plan_with(change: Callable[[FusedPlan, list[Op]], None]) -> Callable[[MemNet], FusedPlan]:
    def lowering(net: MemNet) -> FusedPlan:
        plan = lower(net)
        ops = list(plan.ops)
        plan = dataclasses.replace(plan, weights=dict(plan.weights))
        change(plan, ops)
        return dataclasses.replace(plan, ops=tuple(ops))

    return lowering


def _each(kind: type, change: Callable[[FusedPlan, Any], Op]) -> Callable[[FusedPlan, list[Op]], None]:
    def apply(plan: FusedPlan, ops: list[Op]) -> None:
        for i, op in enumerate(ops):
            if isinstance(op, kind):
                ops[i] = change(plan, op)

    return apply


def _source(old: int, new: int) -> Callable[[FusedPlan, Gate], Gate]:
    return lambda plan, op: dataclasses.replace(op, srcs=tuple(new if s == old else s for s in op.srcs))


def _gate_order(plan: FusedPlan, op: Gate) -> Gate:
    """Short-term memories in place of long-term ones and the other way round."""
    r = plan.config.num_recursions
    return dataclasses.replace(op, srcs=op.srcs[r:] + op.srcs[:r])


def _previous_block(plan: FusedPlan, ops: list[Op]) -> None:
    """The first recursion of the last block starts from the block before the one it should."""
    first = [i for i, op in enumerate(ops) if isinstance(op, ResidualBlock)][-plan.config.num_recursions]
    ops[first] = dataclasses.replace(ops[first], src=ops[first].src - 1)


def _rotate_heads(plan: FusedPlan, op: Reconstruct) -> Reconstruct:
    plan.weights[op.head] = plan.weights[op.head].roll(1)
    return op


def _no_global_skip(plan: FusedPlan, op: Reconstruct) -> Reconstruct:
    plan.weights[op.skip] = torch.zeros_like(plan.weights[op.skip])
    return op


def _last_head_only(plan: FusedPlan, op: Reconstruct) -> Reconstruct:
    head = torch.zeros_like(plan.weights[op.head])
    head[-1] = 1
    plan.weights[op.head], plan.weights[op.skip] = head, torch.ones_like(plan.weights[op.skip])
    return op


class _InputClamped(Interpreter):
    def reconstruct(self, op: Reconstruct, image: Tensor, sources: list[Tensor]) -> Tensor:
        return super().reconstruct(op, image.clamp(0.1, 0.9), sources)


# Around a run --------------------------------------------------------------------------------------------------------


@dataclass
class _Wrapped:
    runner: Host

    def run(self, image: Tensor, slots: dict[int, Tensor] | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        out, after = self.runner.run(image, slots)
        return self.change(image, out), after

    def change(self, image: Tensor, out: Tensor) -> Tensor:
        return out


class _ReturnsInput(_Wrapped):
    def change(self, image: Tensor, out: Tensor) -> Tensor:
        return image.expand_as(out).clone()


class _ReturnsZeros(_Wrapped):
    def change(self, image: Tensor, out: Tensor) -> Tensor:
        return torch.zeros_like(out)


class _ReturnsNan(_Wrapped):
    def change(self, image: Tensor, out: Tensor) -> Tensor:
        return torch.full_like(out, float("nan"))


class _LastRowSkipped(_Wrapped):
    def change(self, image: Tensor, out: Tensor) -> Tensor:
        out[:, :, -1] = 0
        return out


class _FirstResultAgain(_Wrapped):
    """Keeps results by shape, as a cache by address does when the allocator hands the same memory out again."""

    def change(self, image: Tensor, out: Tensor) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept: dict[tuple[int, ...], Tensor] = {}
        return self.kept.setdefault(tuple(out.shape), out)


class _DependsOnBatch(_Wrapped):
    def change(self, image: Tensor, out: Tensor) -> Tensor:
        return out + 1e-7 * image.mean()


def _c(name: str, kind: type[Interpreter], precision: str = "fp32") -> Candidate:
    return host(name, kind, precision)


def _w(name: str, change: Callable[[Tensor], Tensor]) -> Candidate:
    return host(name, _weights(change))


def _l(name: str, change: Callable[[dict, dict], None]) -> Candidate:
    return host(name, lowering=_lower_with(change))


def _p(name: str, change: Callable[[FusedPlan, list[Op]], None]) -> Candidate:
    return host(name, lowering=_plan_with(change))


def _r(name: str, wrapper: type[_Wrapped]) -> Candidate:
    return host(name, wrap=wrapper)


# The number of a mutant is its place here; new ones go to the end.
MUTANTS: list[Candidate] = [
    _w("flip x", lambda w: w.flip(3)),
    _w("flip y", lambda w: w.flip(2)),
    _w("taps transposed", lambda w: w.transpose(2, 3)),
    _w("in and out swapped", lambda w: w.transpose(0, 1)),
    _w("one tap dropped", _zero(slice(None), slice(None), 2, 0)),
    _w("one tap dropped for the last 8 channels", _zero(slice(-8, None), slice(None), 0, 1)),
    _c("last channel dropped", _stored(_last_channel)),
    _w("channel pair swapped", _swap_channels),
    _w("one weight doubled", _entry(2.0)),
    _w("one weight a tenth larger", _entry(1.1)),
    _c("padding before BN-ReLU", _PadBefore),
    _c("replicate padding", _convolution(_padded("replicate"))),
    _c("reflect padding", _convolution(_reflect)),
    _c("wrap into the next row", _convolution(_wrap_row)),
    _c("one corner padded", _convolution(_one_corner)),
    _c("halo lacks a column at the seam", _convolution(_seam(1))),
    _c("halo off by one", _convolution(_seam(0))),
    _c("bias dropped", _BiasDropped),
    _c("bias added twice", _BiasTwice),
    _c("skip dropped", _SkipDropped),
    _c("skip taken after BN-ReLU", _SkipActivated),
    _c("ReLU missing", _activation(lambda x, s, t: x * s + t)),
    _c("leaky ReLU", _activation(lambda x, s, t: F.leaky_relu(x * s + t, 0.01))),
    _c("ReLU before BN", _activation(lambda x, s, t: torch.relu(x) * s + t)),
    _l("eps 0", _eps(0.0)),
    _l("eps 1e-3", _eps(1e-3)),
    _l("root missing", _no_root),
    host("batch statistics", lowering=_batch_statistics),
    _l("mean ignored", _replace("running_mean", torch.zeros_like)),
    _l("beta ignored", _replace("bias", torch.zeros_like)),
    _l("gamma ignored", _replace("weight", torch.ones_like)),
    _c("last row stale", _stored(_last_row_stale)),
    _c("last column zero", _stored(_last_column_zero)),
    _c("last row duplicated", _stored(_last_row_twice)),
    _c("batch index 0 reused", _stored(_first_image_again)),
    _c("1e-4 of the elements lost", _stored(_some_lost)),
    _c("one element zeroed", _stored(_one_zeroed)),
    _c("fp16 accumulation", _convolution(_half_sums), "fp16"),
    _c("truncating store bf16", _Truncating, "bf16"),
    _c("truncating store fp16", _Truncating, "fp16"),
    _c("silent TF32", _SilentTf32),
    _p("gate order swapped", _each(Gate, _gate_order)),
    _p("stale slot: the last short-term memory is the one before", _each(Gate, _source(2, 1))),
    _p("stale slot: H1 is H2", _each(Gate, _source(0, 1))),
    _p("output of the block before reused", _previous_block),
    _l("weights of the wrong block", _other_block),
    _l("BN index off by one", _norm_off_by_one),
    _p("global skip dropped", _each(Reconstruct, _no_global_skip)),
    _p("ensemble weights rotated", _each(Reconstruct, _rotate_heads)),
    _p("last output only", _each(Reconstruct, _last_head_only)),
    _c("input clamped", _InputClamped),
    _c("NaN swallowed by the ReLU", _NanSwallowed),
    _r("returns its input", _ReturnsInput),
    _r("returns zeros", _ReturnsZeros),
    _r("returns NaN", _ReturnsNan),
    _r("last row of the result skipped", _LastRowSkipped),
    _r("returns the first result again", _FirstResultAgain),
    _r("depends on the batch", _DependsOnBatch),
]

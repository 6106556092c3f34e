"""Lowering: any MemNet in eval mode becomes a `FusedPlan`, a short list of operations over numbered slots.

Everything that tells one member of the family from another (sharing, gate order, chains, supervision) ends here; a backend
sees operations. Batch normalisation is folded to scale and shift in float64, and nothing is rounded: a backend rounds once,
when it packs.

A slot is one feature map [N, H, W, C]. Short-term memories H^1..H^R hold slots 0..R-1 and are reused by every block; the
long-term B_m holds slot R + m. So gate m reads the contiguous slots 0..R+m-1 and no concatenation ever exists. Other
intermediate maps (only chains have them) take the lowest slot that is free during their lifetime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError
from memnet_fast.reference import MemNet


@dataclass(frozen=True)
class FirstConv:
    """slot[dst] = bias + conv3x3(relu(image * scale + shift))

    scale, shift: [C_in]; weight: [C, C_in, 3, 3]; bias: [C] (names of entries of `FusedPlan.weights`).
    """

    dst: int
    scale: str
    shift: str
    weight: str
    bias: str


@dataclass(frozen=True)
class ResidualBlock:
    """slot[dst] = x + bias_b + conv3x3(relu(bias_a + conv3x3(relu(x * scale + shift), weight_a)), weight_b),  x = slot[src]

    The second batch normalisation is inside weight_a and bias_a. dst differs from src.
    scale, shift, bias_a, bias_b: [C]; weight_a, weight_b: [C, C, 3, 3].
    """

    src: int
    dst: int
    scale: str
    shift: str
    weight_a: str
    bias_a: str
    weight_b: str
    bias_b: str


@dataclass(frozen=True)
class Gate:
    """slot[dst] = bias + sum_j weight[:, j] @ relu(slot[srcs[j]] * scale[j] + shift[j])

    scale, shift: [K, C]; weight: [C, K, C] (out, source, in); bias: [C]. dst is none of srcs.
    """

    srcs: tuple[int, ...]
    dst: int
    scale: str
    shift: str
    weight: str
    bias: str


@dataclass(frozen=True)
class Reconstruct:
    """out = skip * image + sum_m head[m] * (bias + conv(relu(slot[srcs[m]] * scale[m] + shift[m]))), clamped to [0, 1] if asked

    scale, shift: [K, C]; weight: [C_out, C, k, k]; bias: [C_out]; head: [K]; skip: [1], the sum of head.
    """

    srcs: tuple[int, ...]
    scale: str
    shift: str
    weight: str
    bias: str
    head: str
    skip: str


Op = FirstConv | ResidualBlock | Gate | Reconstruct


def reads(op: Op) -> tuple[int, ...]:
    """The slots that an operation reads."""
    if isinstance(op, ResidualBlock):
        return (op.src,)
    return () if isinstance(op, FirstConv) else op.srcs


def writes(op: Op) -> int | None:
    """The slot that an operation writes; None: the image."""
    return None if isinstance(op, Reconstruct) else op.dst


@dataclass(frozen=True)
class FusedPlan:
    """The operations of one MemNet in order, their weights in float64 on the CPU by name, and the number of slots they need."""

    config: MemNetConfig
    ops: tuple[Op, ...]
    weights: Mapping[str, Tensor]
    num_slots: int


def batch_norm_eps(reference: MemNet) -> dict[str, float]:
    """The eps of every batch normalisation by module name."""
    return {name: m.eps for name, m in reference.named_modules() if isinstance(m, nn.BatchNorm2d)}


def lower(reference: MemNet) -> FusedPlan:
    """The plan of a reference network, from its parameters and running statistics as they are now.

    Raises InputError where the network is not the plain one (hooks, parametrisations, replaced modules): what they do would
    be lost.
    """
    require_plain(reference)
    return lower_state(reference.config, reference.state_dict(), batch_norm_eps(reference))


def require_plain(reference: MemNet) -> None:
    """Raises InputError if the network holds anything that lowering would ignore."""
    if type(reference) is not MemNet:
        raise InputError(f"only a MemNet can be fused, not {type(reference).__name__}")
    for name, module in reference.named_modules():
        where = name or "the network"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise InputError(f"{where} has hooks (or weight norm, or pruning), which fusing would ignore; remove them first")
        if "parametrizations" in module._modules:
            raise InputError(f"{where} is parametrised, which fusing would ignore; call remove_parametrizations first")


def require_structure(reference: MemNet) -> None:
    """Raises InputError if a submodule is not the one that the configuration builds (replaced, quantised, other stride)."""
    with torch.device("meta"):
        expected = dict(MemNet(reference.config).named_modules())
    actual = dict(reference.named_modules())
    for name in expected.keys() | actual.keys():
        a, b = actual.get(name), expected.get(name)
        same = type(a) is type(b)
        if same and isinstance(a, nn.Conv2d):
            same = all(
                getattr(a, key) == getattr(b, key)
                for key in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
            )
        if same and isinstance(a, nn.BatchNorm2d):
            same = a.affine and a.track_running_stats
        if not same:
            raise InputError(f"{name}: not the module that the configuration describes; fusing would ignore the difference")


class _Builder:
    """Collects operations whose slots are still names of values, and the weights."""

    def __init__(self, state: Mapping[str, Tensor], eps: Mapping[str, float]) -> None:
        self.state = state
        self.eps = eps
        self.weights: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        return self.state[name].detach().to("cpu", torch.float64)

    def add(self, name: str, value: Tensor) -> str:
        self.weights[name] = value.contiguous()
        return name

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        """Scale and shift of a batch normalisation in eval mode."""
        scale = self.tensor(f"{name}.weight") / torch.sqrt(self.tensor(f"{name}.running_var") + self.eps[name])
        return scale, self.tensor(f"{name}.bias") - self.tensor(f"{name}.running_mean") * scale

    def conv(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self.tensor(f"{name}.weight")
        if f"{name}.bias" in self.state:
            return weight, self.tensor(f"{name}.bias")
        return weight, torch.zeros(weight.shape[0], dtype=torch.float64, device="cpu")


def lower_state(config: MemNetConfig, state: Mapping[str, Tensor], eps: Mapping[str, float]) -> FusedPlan:
    """As `lower`, from a configuration, a state_dict and the eps of each batch normalisation."""
    b = _Builder(state, eps)
    m_count, r_count = config.num_memory_blocks, config.num_recursions
    ops: list[Op] = []
    # Values that are neither H^r nor B_m get negative numbers here and slots below.
    temporary = -1

    scale, shift = b.norm("first.bn")
    weight, bias = b.conv("first.conv")
    ops.append(
        FirstConv(
            r_count,
            b.add("first.scale", scale),
            b.add("first.shift", shift),
            b.add("first.weight", weight),
            b.add("first.bias", bias),
        )
    )
    for m in range(m_count):
        source = r_count + m
        for r in range(r_count):
            chain = config.num_convs_in_chain
            for i in range(chain):
                index = i if config.sharing == "chain" else r
                if i == chain - 1:
                    target = r
                else:
                    target, temporary = temporary, temporary - 1
                ops.append(_residual_block(b, config, m, index, source, target))
                source = target
        ops.append(_gate(b, config, m))
    heads = range(m_count) if config.multi_supervised else [m_count - 1]
    norms = [b.norm(f"recon_bn.{0 if config.share_recon_bn or not config.multi_supervised else m}") for m in heads]
    weight, bias = b.conv("recon")
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    head = b.tensor("head_weights") if config.multi_supervised else one
    ops.append(
        Reconstruct(
            tuple(r_count + 1 + m for m in heads),
            b.add("recon.scale", torch.stack([n[0] for n in norms])),
            b.add("recon.shift", torch.stack([n[1] for n in norms])),
            b.add("recon.weight", weight),
            b.add("recon.bias", bias),
            b.add("recon.head", head),
            b.add("recon.skip", head.sum().reshape(1)),
        )
    )
    placed, num_slots = _assign_slots(ops)
    return FusedPlan(config, tuple(placed), b.weights, num_slots)


def _residual_block(b: _Builder, config: MemNetConfig, m: int, index: int, src: int, dst: int) -> ResidualBlock:
    block, name = f"blocks.{m}", f"blocks.{m}.{index}"
    conv = 0 if config.sharing == "conv" else index
    if f"{name}.weight_a" not in b.weights:
        scale, shift = b.norm(f"{block}.bn_a.{index}")
        b.add(f"{name}.scale", scale)
        b.add(f"{name}.shift", shift)
        # bn_b(conv_a(x)) = scale_b * conv_a(x) + shift_b is itself a convolution.
        scale_b, shift_b = b.norm(f"{block}.bn_b.{index}")
        weight, bias = b.conv(f"{block}.conv_a.{conv}")
        b.add(f"{name}.weight_a", weight * scale_b[:, None, None, None])
        b.add(f"{name}.bias_a", bias * scale_b + shift_b)
    shared = f"{block}.conv_b.{conv}"
    if f"{shared}.weight" not in b.weights:
        weight, bias = b.conv(shared)
        b.add(f"{shared}.weight", weight)
        b.add(f"{shared}.bias", bias)
    return ResidualBlock(
        src,
        dst,
        f"{name}.scale",
        f"{name}.shift",
        f"{name}.weight_a",
        f"{name}.bias_a",
        f"{shared}.weight",
        f"{shared}.bias",
    )


def _gate(b: _Builder, config: MemNetConfig, m: int) -> Gate:
    r_count, c = config.num_recursions, config.channels
    long, short = m + 1, r_count
    scale, shift = b.norm(f"blocks.{m}.gate.bn")
    weight, bias = b.conv(f"blocks.{m}.gate.conv")
    # Sources in order of slot: H^1..H^R, then B_0..B_m.
    order = list(range(long + short))
    if config.gate_order == "long_short":
        order = order[long:] + order[:long]
    name = f"blocks.{m}.gate"
    return Gate(
        tuple(range(short + long)),
        r_count + m + 1,
        b.add(f"{name}.scale", scale.reshape(-1, c)[order]),
        b.add(f"{name}.shift", shift.reshape(-1, c)[order]),
        b.add(f"{name}.weight", weight.reshape(c, -1, c)[:, order]),
        b.add(f"{name}.bias", bias),
    )


def _assign_slots(ops: list[Op]) -> tuple[list[Op], int]:
    """Gives temporaries (negative numbers) the lowest slot that no other value holds while they live."""
    intervals: list[tuple[int, int, int]] = []  # slot or temporary, operation that writes it, last that reads it
    open_value: dict[int, int] = {}
    for i, op in enumerate(ops):
        for slot in reads(op):
            index = open_value[slot]
            intervals[index] = (slot, intervals[index][1], i)
        target = writes(op)
        if target is not None:
            open_value[target] = len(intervals)
            intervals.append((target, i, i))
    fixed = [v for v in intervals if v[0] >= 0]
    count = 1 + max(v[0] for v in fixed)
    chosen: dict[int, int] = {}
    # From the last to the first: the last map of a chain stands beside the fixed slot that its result goes to, and the ones
    # before it can then alternate between the two. The other way round an even chain needs one slot more.
    for value, first, last in reversed([v for v in intervals if v[0] < 0]):
        slot = 0
        # Closed intervals: a value read by an operation and the one it writes must not share a slot.
        while any(s == slot and first <= b and a <= last for s, a, b in fixed):
            slot += 1
        chosen[value] = slot
        fixed.append((slot, first, last))
        count = max(count, slot + 1)

    def place(op: Op) -> Op:
        if isinstance(op, ResidualBlock):
            return replace(op, src=chosen.get(op.src, op.src), dst=chosen.get(op.dst, op.dst))
        return op

    return [place(op) for op in ops], count

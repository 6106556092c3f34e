"""Lowering: any MemNet in eval mode becomes a `FusedPlan`, a short list of operations over numbered slots.

Everything that tells one member of the family from another (sharing, gate order, chains, supervision) ends here; a backend
sees operations. Batch normalisation is folded to scale and shift in float64, and nothing is rounded: a backend rounds once,
when it packs. The operations depend on the configuration alone (`outline`); each weight is a `Recipe` over the state_dict.

A slot is one feature map [N, H, W, C]. Short-term memories H^1..H^R hold slots 0..R-1 and are reused by every block; the
long-term B_m holds slot R + m. So gate m reads the contiguous slots 0..R+m-1 and no concatenation ever exists. Other
intermediate maps (only chains have them) take the lowest slot that is free during their lifetime.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
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
    range_a, range_b: [1], the largest value to expect of what each convolution reads, for precisions that need a scale: eight
    standard deviations above the mean of the batch normalisation before it, the largest over the channels.
    """

    src: int
    dst: int
    scale: str
    shift: str
    weight_a: str
    bias_a: str
    weight_b: str
    bias_b: str
    range_a: str = ""
    range_b: str = ""


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
    modules = reference.named_modules(remove_duplicate=False)
    return {name: m.eps for name, m in modules if isinstance(m, nn.BatchNorm2d)}


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
    # One module in two places has two names.
    actual = dict(reference.named_modules(remove_duplicate=False))
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


@dataclass(frozen=True)
class State:
    """A tensor of the state_dict, flat."""

    name: str


@dataclass(frozen=True)
class NormScale:
    """What a batch normalisation multiplies with in eval mode: weight / sqrt(running_var + eps)."""

    norm: str


@dataclass(frozen=True)
class NormShift:
    """What it then adds: bias - running_mean * scale."""

    norm: str


@dataclass(frozen=True)
class NormRange:
    """One value: the largest to expect behind a batch normalisation, the greatest bias + 8 |weight| of its channels."""

    norm: str


@dataclass(frozen=True)
class Total:
    """One value: the sum of a tensor of the state_dict, added from its first element to its last."""

    name: str


@dataclass(frozen=True)
class Constant:
    value: float
    count: int


Vector = State | NormScale | NormShift | NormRange | Total | Constant


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a weight follows from a state_dict: v[index] * scale + shift, in float64, every step rounded by itself.

    v: the vectors `sources`, one behind the other. index: int64 [elements] into v; None: all of v in order.
    scale, shift: one value for each entry of the first dimension of the weight; None: not applied.
    A backend that packs weights on its own device follows the same recipes.
    """

    shape: tuple[int, ...]
    sources: tuple[Vector, ...]
    index: np.ndarray | None = None
    scale: Vector | None = None
    shift: Vector | None = None


@dataclass(frozen=True, eq=False)
class Outline:
    """A plan without numbers: what `FusedPlan` is, with recipes in place of weights."""

    config: MemNetConfig
    ops: tuple[Op, ...]
    recipes: Mapping[str, Recipe]
    num_slots: int


class _Vectors:
    """The vectors of recipes, float64 on the CPU."""

    def __init__(self, state: Mapping[str, Tensor], eps: Mapping[str, float]) -> None:
        self._state = state
        self._eps = eps
        self._known: dict[Vector, Tensor] = {}

    def __getitem__(self, vector: Vector) -> Tensor:
        if vector not in self._known:
            self._known[vector] = self._value(vector)
        return self._known[vector]

    def _tensor(self, name: str) -> Tensor:
        # A copy: a plan does not change with the network.
        return self._state[name].detach().to("cpu", torch.float64, copy=True).reshape(-1)

    def _value(self, vector: Vector) -> Tensor:
        match vector:
            case State(name):
                return self._tensor(name)
            case NormScale(norm):
                return self._tensor(f"{norm}.weight") / torch.sqrt(self._tensor(f"{norm}.running_var") + self._eps[norm])
            case NormShift(norm):
                return self._tensor(f"{norm}.bias") - self._tensor(f"{norm}.running_mean") * self[NormScale(norm)]
            case NormRange(norm):
                return (self._tensor(f"{norm}.bias") + 8 * self._tensor(f"{norm}.weight").abs()).amax().reshape(1)
            case Total(name):
                # Not Tensor.sum(), whose order is nobody's promise.
                return functools.reduce(torch.add, self._tensor(name).unbind()).reshape(1)
            case Constant(value, count):
                return torch.full((count,), value, dtype=torch.float64, device="cpu")


def _follow(recipe: Recipe, vectors: _Vectors) -> Tensor:
    value = torch.cat([vectors[source] for source in recipe.sources])
    if recipe.index is not None:
        value = value[torch.from_numpy(recipe.index)]
    value = value.reshape(recipe.shape)
    along_first = (-1, *(1,) * (len(recipe.shape) - 1))
    if recipe.scale is not None:
        value = value * vectors[recipe.scale].view(along_first)
    if recipe.shift is not None:
        value = value + vectors[recipe.shift].view(along_first)
    return value


def lower_state(config: MemNetConfig, state: Mapping[str, Tensor], eps: Mapping[str, float]) -> FusedPlan:
    """As `lower`, from a configuration, a state_dict and the eps of each batch normalisation."""
    drawn, vectors = outline(config), _Vectors(state, eps)
    weights = {name: _follow(recipe, vectors) for name, recipe in drawn.recipes.items()}
    return FusedPlan(config, drawn.ops, weights, drawn.num_slots)


@functools.lru_cache(maxsize=16)
def outline(config: MemNetConfig) -> Outline:
    """The operations of every network of this configuration, and the recipes of their weights."""
    recipes: dict[str, Recipe] = {}
    c, m_count, r_count = config.channels, config.num_memory_blocks, config.num_recursions
    ops: list[Op] = []
    # Values that are neither H^r nor B_m get negative numbers here and slots below.
    temporary = -1

    def add(name: str, recipe: Recipe) -> str:
        recipes[name] = recipe
        return name

    ops.append(
        FirstConv(
            r_count,
            add("first.scale", Recipe((config.in_channels,), (NormScale("first.bn"),))),
            add("first.shift", Recipe((config.in_channels,), (NormShift("first.bn"),))),
            add("first.weight", Recipe((c, config.in_channels, 3, 3), (State("first.conv.weight"),))),
            add("first.bias", Recipe((c,), (_bias(config, "first.conv", c),))),
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
                ops.append(_residual_block(recipes, config, m, index, source, target))
                source = target
        ops.append(_gate(recipes, config, m))
    heads = range(m_count) if config.multi_supervised else [m_count - 1]
    norms = [f"recon_bn.{0 if config.share_recon_bn or not config.multi_supervised else m}" for m in heads]
    planes, kernel = config.out_channels, config.recon_kernel
    one = Constant(1.0, 1)
    ops.append(
        Reconstruct(
            tuple(r_count + 1 + m for m in heads),
            add("recon.scale", Recipe((len(norms), c), tuple(NormScale(n) for n in norms))),
            add("recon.shift", Recipe((len(norms), c), tuple(NormShift(n) for n in norms))),
            add("recon.weight", Recipe((planes, c, kernel, kernel), (State("recon.weight"),))),
            add("recon.bias", Recipe((planes,), (_bias(config, "recon", planes),))),
            add("recon.head", Recipe((len(heads),), (State("head_weights") if config.multi_supervised else one,))),
            add("recon.skip", Recipe((1,), (Total("head_weights") if config.multi_supervised else one,))),
        )
    )
    placed, num_slots = _assign_slots(ops)
    return Outline(config, tuple(placed), recipes, num_slots)


def _bias(config: MemNetConfig, conv: str, channels: int) -> Vector:
    return State(f"{conv}.bias") if config.bias else Constant(0.0, channels)


def _residual_block(recipes: dict[str, Recipe], config: MemNetConfig, m: int, index: int, src: int, dst: int) -> ResidualBlock:
    c, block, name = config.channels, f"blocks.{m}", f"blocks.{m}.{index}"
    conv = 0 if config.sharing == "conv" else index
    norm_a, norm_b = f"{block}.bn_a.{index}", f"{block}.bn_b.{index}"
    conv_a, conv_b = f"{block}.conv_a.{conv}", f"{block}.conv_b.{conv}"
    recipes[f"{name}.scale"] = Recipe((c,), (NormScale(norm_a),))
    recipes[f"{name}.shift"] = Recipe((c,), (NormShift(norm_a),))
    # bn_b(conv_a(x)) = scale_b * conv_a(x) + shift_b is itself a convolution.
    recipes[f"{name}.weight_a"] = Recipe((c, c, 3, 3), (State(f"{conv_a}.weight"),), scale=NormScale(norm_b))
    recipes[f"{name}.bias_a"] = Recipe((c,), (_bias(config, conv_a, c),), scale=NormScale(norm_b), shift=NormShift(norm_b))
    recipes[f"{conv_b}.weight"] = Recipe((c, c, 3, 3), (State(f"{conv_b}.weight"),))
    recipes[f"{conv_b}.bias"] = Recipe((c,), (_bias(config, conv_b, c),))
    recipes[f"{name}.range_a"] = Recipe((1,), (NormRange(norm_a),))
    recipes[f"{name}.range_b"] = Recipe((1,), (NormRange(norm_b),))
    return ResidualBlock(
        src,
        dst,
        f"{name}.scale",
        f"{name}.shift",
        f"{name}.weight_a",
        f"{name}.bias_a",
        f"{conv_b}.weight",
        f"{conv_b}.bias",
        f"{name}.range_a",
        f"{name}.range_b",
    )


def _gate(recipes: dict[str, Recipe], config: MemNetConfig, m: int) -> Gate:
    r_count, c = config.num_recursions, config.channels
    long, short = m + 1, r_count
    count = long + short
    # Sources in order of slot: H^1..H^R, then B_0..B_m.
    order = list(range(count))
    if config.gate_order == "long_short":
        order = order[long:] + order[:long]
    name = f"blocks.{m}.gate"
    of_norm = np.arange(count * c).reshape(count, c)[order].reshape(-1)
    of_weight = np.arange(c * count * c).reshape(c, count, c)[:, order].reshape(-1)
    recipes[f"{name}.scale"] = Recipe((count, c), (NormScale(f"{name}.bn"),), of_norm)
    recipes[f"{name}.shift"] = Recipe((count, c), (NormShift(f"{name}.bn"),), of_norm)
    recipes[f"{name}.weight"] = Recipe((c, count, c), (State(f"{name}.conv.weight"),), of_weight)
    recipes[f"{name}.bias"] = Recipe((c,), (_bias(config, f"{name}.conv", c),))
    return Gate(tuple(range(count)), r_count + m + 1, f"{name}.scale", f"{name}.shift", f"{name}.weight", f"{name}.bias")


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

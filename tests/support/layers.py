"""The layers of the parity suite as functions of a candidate; each raises ParityError for a wrong one.

The tests hold every backend against them, and the harness's own tests hold every mutant against them.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from memnet_fast.config import MemNetConfig
from memnet_fast.plan import FirstConv, FusedPlan, Gate, Op, Reconstruct, ResidualBlock
from memnet_fast.reference import MemNet
from support import checks, integer, networks
from support.candidates import Candidate, pmr
from support.checks import ROUNDED, STORE, SUMS, UNIT, Limits, ParityError, require
from support.interpreter import Interpreter, round_to

# M3R3 has stale slots of both kinds, several heads and gates of several widths; radius 1 + 18 + 1 = 20.
NETWORK = MemNetConfig(channels=16, num_memory_blocks=3, num_recursions=3)

# NSR in units of u for the whole network. Winograd has a larger constant of its own: measured over the presets,
# every variant of support.networks and every instruction set it is at most 386u = 2.3e-5 (M6R6 213u, M10R10 276u, M6R6 without
# sharing 386u); the limit is half as much again.
NSR_LIMIT = {"fp32": 60.0, "tf32": 12.0, "fp16": 12.0, "bf16": 12.0}
NSR_LIMIT_WINOGRAD = 580.0
# Winograd's errors as multiples of those of the policy-matched reference (total, worst line, largest): at most 7.1, 8.5
# and 11.9 over the same networks.
RATIOS_WINOGRAD = (9.0, 11.0, 15.0)
# z-test of the first convolution, whose nine terms are too few for a bound to lie far above the error: measured
# 0.74 / 3.9 / 0.81 / 1.0, and a mean of 21 where oneDNN sums (one-sided, 0.6 sigma).
SHORT = Limits(1.0, 5.2, 1.1, 1.35, 28.0, relative=False)
# z-test of winograd's residual block: at most 4.7 / 39 / 8.7 / 5.5 / 23 over instruction sets, 16 and 64 channels, two
# sizes and three seeds.
SUMS_WINOGRAD = Limits(6.0, 50.0, 11.0, 7.0, 30.0, relative=False)


def plan_of(config: MemNetConfig, op: Op, weights: dict[str, Tensor], num_slots: int) -> FusedPlan:
    """A plan of one operation."""
    return FusedPlan(config, (op,), {k: v.double() for k, v in weights.items()}, num_slots)


# L0 ------------------------------------------------------------------------------------------------------------------


def impulse_plans(channels: int) -> list[tuple[FusedPlan, int]]:
    """Plans in which one tap of one channel pair carries everything, and the slot to read afterwards."""
    config = MemNetConfig(channels=channels)
    zero, one = torch.zeros(channels), torch.ones(channels)
    identity = torch.zeros(channels, channels, 3, 3)
    identity[range(channels), range(channels), 1, 1] = 1
    plans = []
    pairs = [(0, 0), (3, channels - 1), (channels - 1, 4), (1, 2)]
    for tap, (source, target) in itertools.product(range(9), pairs):
        lone = torch.zeros(channels, channels, 3, 3)
        lone[target, source, tap // 3, tap % 3] = 0.75
        for a, b in ((lone, identity), (identity, lone)):
            weights = {"s": one, "t": zero, "a": a, "ba": zero, "b": b, "bb": zero}
            op = ResidualBlock(0, 1, "s", "t", "a", "ba", "b", "bb")
            plans.append((plan_of(config, op, weights, 2), 1))
        first = torch.zeros(channels, 1, 3, 3)
        first[target, 0, tap // 3, tap % 3] = 0.75
        weights = {"s": one[:1], "t": zero[:1], "w": first, "b": zero}
        plans.append((plan_of(config, FirstConv(1, "s", "t", "w", "b"), weights, 2), 1))
        recon = torch.zeros(1, channels, 3, 3)
        recon[0, source, tap // 3, tap % 3] = 0.75
        weights = {"s": one[None], "t": zero[None], "w": recon, "b": zero[:1], "h": one[:1], "k": one[:1]}
        plans.append((plan_of(config, Reconstruct((0,), "s", "t", "w", "b", "h", "k"), weights, 2), -1))
    for source, target in pairs:
        for j in range(3):
            gate = torch.zeros(channels, 3, channels)
            gate[target, j, source] = 0.75
            weights = {"s": one.expand(3, -1), "t": zero.expand(3, -1), "w": gate, "b": zero}
            plans.append((plan_of(config, Gate((0, 1, 2), 3, "s", "t", "w", "b"), weights, 4), 3))
    return plans


def l0_impulse(candidate: Candidate, channels: int = 16) -> None:
    """One non-zero tap and an image of a few lone pixels: every index is right, or a bit is wrong."""
    h, w = 9, 21
    slots = {i: torch.zeros(1, channels, h, w) for i in range(4)}
    for i in range(3):
        for y, x in ((0, 0), (8, 20), (0, 20), (4, 15), (5, 16), (8, 3)):
            slots[i][0, :, y, x] = torch.arange(1, channels + 1) * 0.25 + i
    image = torch.zeros(1, 1, h, w)
    image[0, 0, [0, 8, 4], [0, 20, 16]] = torch.tensor([1.0, 2.0, 3.0])
    for plan, read in impulse_plans(channels):
        given = {i: v for i, v in slots.items() if i < plan.num_slots}
        out, after = candidate.make(plan).run(image, given)
        twin = Interpreter(plan)
        twin.slots = {i: v.double() for i, v in given.items()}
        result = twin.run_ops(plan.ops, image.double())
        expected = result if read < 0 else twin.slots[read]
        got = out if read < 0 else after[read]
        if candidate.algorithm == "winograd":
            # Transforms of powers of two are not exact in fp32: the impulse is at its place, and nothing is anywhere else.
            error = float((got.double() - expected).abs().max() / expected.abs().max())
            require(error <= 1e-5, f"impulse of {type(plan.ops[0]).__name__}: {error}")
        else:
            checks.equal(got, expected)


# L1 ------------------------------------------------------------------------------------------------------------------


def l1_integer(candidate: Candidate, config: MemNetConfig = NETWORK, seed: int = 0, size: tuple[int, int] = (19, 23)) -> None:
    net, x, truth = integer.case(config, 2, *size, seed)
    out, _ = candidate.build(net).run(x)
    checks.equal(out, truth)


# L2 ------------------------------------------------------------------------------------------------------------------


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def _activate(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """relu(scale * x + shift) and the variance of its rounding in fp32, both [N, C, H, W]"""
    scaled = x * scale.view(1, -1, 1, 1)
    a = torch.relu(scaled + shift.view(1, -1, 1, 1))
    return a, 2 * (0.41 * UNIT["fp32"]) ** 2 * torch.maximum(scaled.square(), a.square()) * (a > 0)


def _spread(a: Tensor, error: Tensor, weight: Tensor, unit: float, length: int) -> Tensor:
    """Variance of a convolution: rounded operands, errors that the operands bring along, and the fp32 sum."""
    size = (0.41 * unit) ** 2 + UNIT["fp32"] ** 2 * length / 4
    return _conv(error + size * a.square(), weight.square())


def _drift(start: Tensor, end: Tensor, length: int) -> Tensor:
    """Variance of the roundings of a sum of `length` terms that walks steadily from its bias to its end.

    The n/4 rule supposes sums around zero, as 576 terms make them; short sums (first convolution, gates, one output channel)
    have partial sums as large as the result.
    """
    b = start.view(1, -1, 1, 1)
    return (0.41 * UNIT["fp32"]) ** 2 * length * (b.square() + b * end + end.square()) / 3


def sigma_of(plan: FusedPlan, slots: dict[int, Tensor], image: Tensor, precision: str, truth: Tensor) -> Tensor:
    """Expected standard deviation of the result of a plan of one operation (layer L2), [N, C, H, W] float64."""
    op, w = plan.ops[0], plan.weights
    unit, store = UNIT[precision], STORE[precision]
    if isinstance(op, FirstConv):
        a, error = _activate(image.double(), w[op.scale], w[op.shift])
        length = 9 * image.shape[1]
        variance = _spread(a, error, w[op.weight], UNIT["fp32"], length) + _drift(w[op.bias], truth, length)
    elif isinstance(op, ResidualBlock):
        weight = w[op.weight_a]
        length = weight.shape[1] * 9
        a, error = _activate(slots[op.src].double(), w[op.scale], w[op.shift])
        mid = _conv(a, weight) + w[op.bias_a].view(1, -1, 1, 1)
        error = _spread(a, error, weight, unit, length) * (mid > 0)
        variance = _spread(torch.relu(mid), error, w[op.weight_b], unit, length)
    elif isinstance(op, Gate):
        length = len(op.srcs) * truth.shape[1]
        variance = _drift(w[op.bias], truth, length)
        for j, s in enumerate(op.srcs):
            a, error = _activate(slots[s].double(), w[op.scale][j], w[op.shift][j])
            variance = variance + _spread(a, error, w[op.weight][:, j, :, None, None], unit, length)
    else:
        store = UNIT["fp32"]
        variance = torch.zeros_like(truth)
        for j, s in enumerate(op.srcs):
            a, error = _activate(slots[s].double(), w[op.scale][j], w[op.shift][j])
            length = w[op.weight][0].numel()
            variance += w[op.head][j] ** 2 * _spread(a, error, w[op.weight], UNIT["fp32"], length)
        # One addition for each head and the skip.
        variance = variance + len(op.srcs) * (0.41 * store) ** 2 * (truth.square() + image.double().square())
    return (variance + (0.41 * store) ** 2 * truth.square()).sqrt()


def kernel_cases(
    precision: str, channels: int, h: int, w: int, seed: int = 0, scattered: bool = True
) -> list[tuple[str, FusedPlan, dict, Tensor]]:
    """(name, plan of one operation, slots, image): normal activations, weights rounded to the precision, three channels
    whose batch normalisation amplifies, as a tiny variance does. scattered: the heads are not in slots next to each other."""
    g = networks.generator(seed)
    config = MemNetConfig(channels=channels)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * spread).float()

    def norm(k: int | None = None) -> tuple[Tensor, Tensor]:
        scale = normal(*([channels] if k is None else [k, channels]), spread=0.3) + 1
        scale[..., :3] = 300.0
        return scale, normal(*scale.shape, spread=0.4)

    def stored(x: Tensor) -> Tensor:
        x[:, :3] *= 1 / 300
        return round_to(x, precision) if precision in ("bf16", "fp16") else x

    def weight(*shape: int, fan_in: int) -> Tensor:
        return round_to(normal(*shape, spread=(2 / fan_in) ** 0.5), precision)

    image = torch.rand(1, 1, h, w, generator=g)
    slots = {i: stored(normal(1, channels, h, w)) for i in range(4)}
    c = channels
    cases = []
    scale, shift = norm()
    cases.append(
        (
            "residual_block",
            plan_of(
                config,
                ResidualBlock(2, 0, "s", "t", "a", "ba", "b", "bb"),
                {
                    "s": scale,
                    "t": shift,
                    "a": weight(c, c, 3, 3, fan_in=9 * c),
                    "ba": normal(c, spread=0.2),
                    "b": weight(c, c, 3, 3, fan_in=9 * c),
                    "bb": normal(c, spread=0.2),
                },
                4,
            ),
        )
    )
    scale, shift = norm(3)
    gate = {"s": scale, "t": shift, "w": weight(c, 3, c, fan_in=3 * c), "b": normal(c, spread=0.2)}
    cases.append(("gate", plan_of(config, Gate((0, 1, 2), 3, "s", "t", "w", "b"), gate, 4)))
    first = {"s": normal(1) + 2, "t": normal(1, spread=0.3), "w": normal(c, 1, 3, 3, spread=0.4), "b": normal(c, spread=0.2)}
    cases.append(("first_conv", plan_of(config, FirstConv(1, "s", "t", "w", "b"), first, 4)))
    scale, shift = norm(3)
    recon = {
        "s": scale,
        "t": shift,
        "w": normal(1, c, 3, 3, spread=(2 / (9 * c)) ** 0.5),
        "b": normal(1, spread=0.2),
        "h": torch.tensor([0.25, -0.5, 1.25]),
        "k": torch.tensor([1.0]),
    }
    heads = (0, 1, 3) if scattered else (1, 2, 3)
    cases.append(("reconstruct", plan_of(config, Reconstruct(heads, "s", "t", "w", "b", "h", "k"), recon, 4)))
    return [(name, plan, slots, image) for name, plan in cases]


def l2_kernels(candidate: Candidate, channels: int = 64, size: tuple[int, int] = (17, 19), seed: int = 0) -> dict[str, dict]:
    """The z-test on each operation alone. Returns the figures by operation."""
    figures = {}
    for name, plan, slots, image in kernel_cases(candidate.precision, channels, *size, seed, candidate.scattered):
        out, after = candidate.make(plan).run(image, dict(slots))
        twin = Interpreter(plan)
        twin.slots = {i: v.double() for i, v in slots.items()}
        result = twin.run_ops(plan.ops, image.double())
        op = plan.ops[0]
        truth, got = (result, out) if isinstance(op, Reconstruct) else (twin.slots[op.dst], after[op.dst])
        # Operations on the one-channel path never round their operands.
        rounded = candidate.precision != "fp32" and not isinstance(op, FirstConv | Reconstruct)
        limits = ROUNDED if rounded else SUMS
        if isinstance(op, FirstConv):
            limits = ROUNDED if candidate.precision in ("bf16", "fp16") else SHORT  # the store rounds, or nothing does
        if candidate.algorithm == "winograd" and isinstance(op, ResidualBlock):
            limits = SUMS_WINOGRAD
        try:
            figures[name] = checks.z_test(got, truth, sigma_of(plan, slots, image, candidate.precision, truth), limits)
        except ParityError as error:
            raise ParityError(f"{name}: {error}") from error
    return figures


# L3 ------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def network_case(config: MemNetConfig, n: int, h: int, w: int, seed: int) -> tuple[MemNet, Tensor, Tensor]:
    """(network with three channels of tiny variance in every normalisation, image, oracle)"""
    net = networks.build(config, seed, tiny_variance=True)
    x = networks.image(n, config.in_channels, h, w, seed + 1)
    return net, x, networks.oracle(net, x)


@lru_cache(maxsize=32)
def _pmr_output(precision: str, config: MemNetConfig, n: int, h: int, w: int, seed: int) -> tuple[Tensor, Tensor]:
    """Output of the policy-matched reference, and the oracle with its weights rounded as that precision rounds them."""
    net, x, truth = network_case(config, n, h, w, seed)
    chosen = pmr(precision)
    if precision != "fp32":
        plan = chosen.lower(net)
        big = {f for op in plan.ops for f in _rounded_names(op)}
        weights = {k: round_to(v.float(), precision).double() if k in big else v for k, v in plan.weights.items()}
        truth = Interpreter(dataclasses.replace(plan, weights=weights))(x)
    return chosen.build(net).run(x)[0], truth


def _rounded_names(op: Op) -> tuple[str, ...]:
    if isinstance(op, ResidualBlock):
        return op.weight_a, op.weight_b
    return (op.weight,) if isinstance(op, Gate) else ()


def l3_network(
    candidate: Candidate, config: MemNetConfig = NETWORK, size: tuple[int, int] = (33, 29), seed: int = 0, n: int = 2
) -> dict[str, float]:
    """The whole network against the oracle, and its errors against those of the policy-matched reference."""
    net, x, _ = network_case(config, n, *size, seed)
    reference, truth = _pmr_output(candidate.precision, config, n, *size, seed)
    y, _ = candidate.build(net).run(x)
    limit = NSR_LIMIT_WINOGRAD if candidate.algorithm == "winograd" else NSR_LIMIT[candidate.precision]
    checks.require_nsr(y, truth, x, limit * UNIT[candidate.precision])
    checks.require_ratios(y, reference, truth, *(RATIOS_WINOGRAD if candidate.algorithm == "winograd" else ()))
    return {"nsr/u": checks.nsr(y, truth, x) / UNIT[candidate.precision], **checks.ratios(y, reference, truth)}


# L4 ------------------------------------------------------------------------------------------------------------------


def l4_footprint(
    candidate: Candidate, config: MemNetConfig = networks.SMALL, size: tuple[int, int] = (37, 45), seed: int = 0
) -> None:
    """NaN in one pixel of image 1 of 3: exactly its receptive field is NaN, and nothing else changes by a bit."""
    net = networks.build(config, seed)
    x = networks.image(3, config.in_channels, *size, seed)
    runner = candidate.build(net)
    clean, _ = runner.run(x)
    # Winograd spreads NaN over its tiles and must compute that image again directly: other bits, the same NaN.
    direct = candidate.algorithm != "winograd"
    for at in ((size[0] // 2, size[1] // 2), (0, size[1] - 1), (size[0] - 1, 3)):
        bad = x.clone()
        bad[1, :, at[0], at[1]] = float("nan")
        y, _ = runner.run(bad)
        mask = checks.footprint(y.shape, 1, *at, config.receptive_radius)
        checks.require_footprint(y, clean, mask, exact=direct)
        if not direct:
            checks.equal(y[[0, 2]], clean[[0, 2]].double())


# L5 ------------------------------------------------------------------------------------------------------------------


def l5_invariance(
    candidate: Candidate, config: MemNetConfig = networks.SMALL, size: tuple[int, int] = (37, 45), seed: int = 0
) -> None:
    """A result depends neither on the batch, nor on the place in it, nor on what ran before; direct: nor on the crop."""
    net = networks.build(config, seed)
    x = networks.image(5, config.in_channels, *size, seed)
    runner = candidate.build(net)
    whole, _ = runner.run(x)
    for i in range(5):
        alone, _ = runner.run(x[i : i + 1])
        checks.equal(alone, whole[i : i + 1].double())
    checks.equal(runner.run(x.flip(0))[0], whole.flip(0).double())
    checks.equal(runner.run(x)[0], whole.double())
    if candidate.name.startswith("torch") or candidate.algorithm == "winograd":
        return  # oneDNN and Winograd place their blocks from the corner of the image
    halo = config.receptive_radius
    for top, left, h, w in ((0, 0, 25, 30), (7, 11, 30, 31), (12, 3, 25, 42)):
        crop, _ = runner.run(x[:, :, top : top + h, left : left + w])
        y0, y1 = (top + halo if top else 0), (top + h - halo if top + h < size[0] else size[0])
        x0, x1 = (left + halo if left else 0), (left + w - halo if left + w < size[1] else size[1])
        require(y1 > y0 and x1 > x0, "the crop has no core")
        checks.equal(crop[:, :, y0 - top : y1 - top, x0 - left : x1 - left], whole[:, :, y0:y1, x0:x1].double())

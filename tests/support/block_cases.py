"""Inputs for one residual block, and what its result may differ by from float64."""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from support.checks import UNIT, require, same_frame

_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def normal(g: torch.Generator, *shape: int, spread: float = 1.0) -> Tensor:
    """float64 values that fp32 holds exactly."""
    return (torch.randn(*shape, generator=g) * spread).double()


def block_parameters(g: torch.Generator) -> dict[str, Tensor]:
    spread = (2 / 576) ** 0.5
    return {
        "scale": normal(g, 64, spread=0.3) + 1,
        "shift": normal(g, 64, spread=0.3),
        "weight_a": normal(g, 64, 64, 3, 3, spread=spread),
        "bias_a": normal(g, 64, spread=0.2),
        "weight_b": normal(g, 64, 64, 3, 3, spread=spread),
        "bias_b": normal(g, 64, spread=0.2),
    }


def integer_block(g: torch.Generator, n: int, h: int, w: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An input and parameters whose block is exact in every precision: integers of at most 256 all the way."""

    def integers(*shape: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g).double()

    def sparse() -> Tensor:
        return (integers(64, 64, 3, 3, low=0, high=1) * 2 - 1) * (torch.rand(64, 64, 3, 3, generator=g) < 0.01)

    parameters = {"scale": integers(64, low=1, high=2), "shift": integers(64, low=-2, high=2)}
    parameters |= {"weight_a": sparse(), "bias_a": integers(64, low=-3, high=3)}
    parameters |= {"weight_b": sparse(), "bias_b": integers(64, low=-3, high=3)}
    return integers(n, 64, h, w, low=-3, high=3), parameters


def fp8_parameters(g: torch.Generator) -> dict[str, Tensor]:
    """Operands that fill e4m3's range, and a few that leave it."""

    def e4m3(*shape: int) -> Tensor:
        return rounded(normal(g, *shape, spread=120), "fp8")

    return {
        "scale": normal(g, 64, spread=30) + 120,
        "shift": normal(g, 64, spread=30),
        "weight_a": e4m3(64, 64, 3, 3),
        "gain_a": normal(g, 64, spread=1e-4).abs() + 2e-4,
        "bias_a": normal(g, 64, spread=30),
        "weight_b": e4m3(64, 64, 3, 3),
        "gain_b": normal(g, 64, spread=1e-6).abs() + 2e-6,
        "bias_b": normal(g, 64, spread=0.2),
    }


def rounded(value: Tensor, precision: str) -> Tensor:
    """As an operand of a product: e4m3 saturates, the 16-bit types become infinite."""
    if precision == "fp8":
        return value.clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
    return value.to(_DTYPE[precision]).double()


def block(x: Tensor, p: dict[str, Tensor], precision: str) -> Tensor:
    """The residual block in float64, rounded where the kernels round but for its result."""

    def convolve(a: Tensor, name: str) -> Tensor:
        y = F.conv2d(rounded(a, precision), rounded(p[f"weight_{name}"], precision), padding=1)
        return p.get(f"gain_{name}", torch.ones(64)).view(-1, 1, 1) * y + p[f"bias_{name}"].view(-1, 1, 1)

    a = torch.relu(x * p["scale"].view(-1, 1, 1) + p["shift"].view(-1, 1, 1))
    return x + convolve(torch.relu(convolve(a, "a")), "b")


def neighbours(value: Tensor, error: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """The value rounded, and how far its neighbourhood reaches then."""
    low, high = (rounded(value + sign * error, precision) for sign in (-1, 1))
    return rounded(value, precision), high - low


def uncertainty(x: Tensor, p: dict[str, Tensor], precision: str) -> Tensor:
    """What sums in fp32 may change of a block's result before its last rounding, [N, 64, H, W].

    They move a sum by some of its own roundings, and where that crosses the middle between two operands, the next convolution
    takes the other neighbour.
    """

    def convolve(a: Tensor, moved: Tensor, name: str) -> tuple[Tensor, Tensor]:
        weight = rounded(p[f"weight_{name}"], precision)
        gain, bias = (value.view(-1, 1, 1) for value in (p.get(f"gain_{name}", torch.ones(64)), p[f"bias_{name}"]))
        size = gain * F.conv2d(a.abs(), weight.abs(), padding=1) + bias.abs()
        # 36 to 576 roundings, each at most half a unit of a sum no larger than this one: 16 are beyond what chance allows.
        error = gain * F.conv2d(moved, weight.abs(), padding=1) + 16 * UNIT["fp32"] * size
        return gain * F.conv2d(a, weight, padding=1) + bias, error

    scaled = x * p["scale"].view(-1, 1, 1)
    a = torch.relu(scaled + p["shift"].view(-1, 1, 1))
    a, moved = neighbours(a, 2 * UNIT["fp32"] * torch.maximum(scaled.abs(), a), precision)
    mid, error = convolve(a, moved, "a")
    mid, moved = neighbours(torch.relu(mid), error * (mid > -error), precision)
    return convolve(mid, moved, "b")[1] + 2 * UNIT["fp32"] * x.abs()


def require_rounded_once(y: Tensor, reference: Tensor, precision: str, allowed: Tensor) -> None:
    """y is the reference, which may be off by `allowed`, rounded to the nearest 16-bit value."""
    precision = "bf16" if precision == "bf16" else "fp16"
    same_frame(y, reference)
    # Half a unit in the last place is at most so much, also below the normal numbers of fp16.
    smallest = 2.0**-14 if precision == "fp16" else 0.0
    own = UNIT[precision] * (reference.abs() + allowed).clamp(min=smallest)
    ratio = float(((y - reference).abs() / (own + allowed)).max())
    require(ratio <= 1, f"{ratio} of what one rounding and sums in fp32 may change")

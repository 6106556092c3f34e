"""Comparisons. Shape, dtype and the pattern of NaN come first, then the elements; the worst one is named.

Every limit is written as `not (value <= limit)`, because a NaN satisfies no comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Unit roundoff of what a precision multiplies.
UNIT = {"fp32": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
# Unit roundoff of what it stores.
STORE = UNIT | {"tf32": 2.0**-24}


class ParityError(AssertionError):
    """A result is not the one that the specification asks for."""


def require(good: bool, message: str) -> None:
    """Also where assertions are compiled out."""
    if not good:
        raise ParityError(message)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def same_frame(y: Tensor, reference: Tensor) -> None:
    """Equal shape, dense strides, and NaN and infinities at the same places."""
    require(y.shape == reference.shape, f"shape {list(y.shape)}, expected {list(reference.shape)}")
    for name, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        wrong = test(y) != test(reference)
        if bool(wrong.any()):
            raise ParityError(f"{name} differs at {int(wrong.sum())} places, first {_first(wrong)}")


def _first(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist()


def equal(y: Tensor, reference: Tensor) -> None:
    """Bit equality of values: y may have a smaller dtype than the reference."""
    same_frame(y, reference)
    wrong = ~((y.double() == reference.double()) | torch.isnan(reference))
    if bool(wrong.any()):
        at = tuple(_first(wrong))
        raise ParityError(f"{int(wrong.sum())} of {wrong.numel()} differ, first {list(at)}: {y[at]} for {reference[at]}")


def nsr(y: Tensor, truth: Tensor, image: Tensor) -> float:
    """Noise-to-signal ratio: RMS(error) / RMS(output - input). "Return the input" has 1, whatever its PSNR."""
    same_frame(y, truth)
    if truth.numel() == 0:
        return 0.0
    return rms(y.double() - truth) / max(rms(truth - image.double()), 1e-300)


def require_nsr(y: Tensor, truth: Tensor, image: Tensor, limit: float) -> None:
    value = nsr(y, truth, image)
    require(value <= limit, f"NSR {value:.3e} above {limit:.3e}")


@dataclass(frozen=True)
class Limits:
    """Limits of the z-test of layer L2."""

    total: float
    largest: float
    line: float
    channel: float
    mean: float
    relative: bool = True  # statistical slack for small samples

    def slack(self, limit: float, count: float) -> float:
        return max(limit, 1.05 + 4 / math.sqrt(2 * count)) if self.relative else limit


# Two-sided: operands and stores rounded to 16 or 19 bits, where sigma is a true standard deviation.
ROUNDED = Limits(1.15, 7.0, 1.35, 1.3, 8.0)
# fp32 sums: the accumulation term is an upper bound, so everything must lie well below it.
SUMS = Limits(0.6, 4.0, 0.7, 0.8, 12.0, relative=False)


def z_test(y: Tensor, truth: Tensor, sigma: Tensor, limits: Limits) -> dict[str, float]:
    """Holds the errors of one operation against their expected spread. y, truth, sigma: [N, C, H, W]. Returns the figures.

    Rows, columns and channels are tested as groups: a fault that sits on one of them hides in the total.
    """
    require(y.shape == truth.shape, f"shape {list(y.shape)}, expected {list(truth.shape)}")
    require(bool(torch.isfinite(y).all()), "the result is not finite")
    z = (y.double() - truth) / sigma
    count = z.numel()

    def groups(keep: int) -> tuple[Tensor, int]:
        flat = z.transpose(0, keep).reshape(z.shape[keep], -1) if keep else z.reshape(z.shape[0], -1)
        return flat, flat.shape[1]

    lines = {}
    for name, axis in (("row", 2), ("column", 3), ("channel", 1)):
        flat, size = groups(axis)
        lines[name] = (float(flat.square().mean(1).sqrt().max()), size, flat)
    channel_mean = float((lines["channel"][2].mean(1).abs() * math.sqrt(lines["channel"][1])).max())
    figures = {
        "rms": rms(z),
        "max": float(z.abs().max()),
        "row": lines["row"][0],
        "column": lines["column"][0],
        "channel": lines["channel"][0],
        "mean": channel_mean,
    }
    allowed = {
        "rms": limits.slack(limits.total, count),
        "max": limits.largest,
        "row": limits.slack(limits.line, lines["row"][1]),
        "column": limits.slack(limits.line, lines["column"][1]),
        "channel": limits.slack(limits.channel, lines["channel"][1]),
        "mean": limits.mean,
    }
    for name, value in figures.items():  # figures is complete here: a failure shows all of them
        require(value <= allowed[name], f"z-test: {name} {value:.3f} above {allowed[name]:.3f}; all: {figures}")
    return figures


def ratios(y: Tensor, pmr: Tensor, truth: Tensor) -> dict[str, float]:
    """Errors of y as multiples of the errors of the policy-matched reference: total, worst row or column, largest."""
    same_frame(y, truth)
    ours, theirs = (y.double() - truth).abs(), (pmr.double() - truth).abs()

    def lines(error: Tensor) -> Tensor:
        square = error.square()
        return torch.cat([square.mean((0, 1, 3)).sqrt(), square.mean((0, 1, 2)).sqrt()])

    return {
        "rms": rms(ours) / rms(theirs),
        "line": float(lines(ours).max() / lines(theirs).max()),
        "max": float(ours.max() / theirs.max()),
    }


def require_ratios(y: Tensor, pmr: Tensor, truth: Tensor, total: float = 1.25, line: float = 1.6, largest: float = 2.0) -> None:
    figures = ratios(y, pmr, truth)
    for name, limit in (("rms", total), ("line", line), ("max", largest)):
        require(figures[name] <= limit, f"error against the reference of this precision: {name} of {figures}")


def footprint(shape: tuple[int, ...], n: int, y: int, x: int, radius: int) -> Tensor:
    """Mask [N, C, H, W] of the pixels that see pixel (y, x) of image n."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[n, :, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = True
    return mask


def require_footprint(y: Tensor, clean: Tensor, mask: Tensor, exact: bool = True) -> None:
    """NaN exactly on the mask, and every other value bit-equal to the clean run (exact=False: only not NaN)."""
    require(y.shape == clean.shape, f"shape {list(y.shape)}, expected {list(clean.shape)}")
    wrong = torch.isnan(y) != mask
    require(not bool(wrong.any()), f"NaN set differs from the receptive field at {int(wrong.sum())} places")
    if exact:
        moved = (y != clean) & ~mask
        require(not bool(moved.any()), f"{int(moved.sum())} values outside the receptive field changed")

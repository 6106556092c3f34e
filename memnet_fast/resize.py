"""Bicubic resampling as MATLAB's imresize defines it: what super-resolution is trained on, and where it starts from.

Keys' kernel with a = -0.5. To make an image smaller, the kernel is stretched by 1 / scale (antialias); beyond its border the
image is mirrored with the border pixel repeated (symmetric). Weights are computed and applied in float64.

Output pixel i (from 0) lies at u = (i + 0.5) / scale - 0.5 of the input. A window of the output has the bits of the same
window of the whole output: every pixel is a sum of the same products in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from memnet_fast.errors import InputError


@dataclass(frozen=True)
class Taps:
    """One axis: output[i] = sum over p of weights[i, p] * input[indices[i, p]].

    indices: int64 [out, P], inside the input; weights: float64 [out, P], each row sums to 1. scale: output over input.
    """

    indices: np.ndarray
    weights: np.ndarray
    scale: float

    def part(self, start: int, stop: int) -> tuple[slice, Taps]:
        """Which part of the input the output [start, stop) needs, and the taps from that part to this output."""
        indices = self.indices[start:stop]
        low = int(indices.min())
        return slice(low, int(indices.max()) + 1), Taps(indices - low, self.weights[start:stop], self.scale)


@lru_cache(maxsize=8)  # those of a large image are large
def taps(length: int, out_length: int, scale: float) -> Taps:
    """Taps from an axis of `length` pixels to one of `out_length`. scale is that of the pixel grid, which differs from
    out_length / length where MATLAB rounds a size up. The arrays are shared: do not write to them."""
    stretch = min(scale, 1.0)
    width = 4 / stretch
    at = np.arange(1, out_length + 1) / scale + 0.5 * (1 - 1 / scale)  # counted from 1, as in MATLAB, for its rounding
    indices = np.floor(at - width / 2)[:, None] + np.arange(math.ceil(width) + 2)
    weights = stretch * _cubic(stretch * (at[:, None] - indices))
    weights /= weights.sum(1, keepdims=True)
    used = weights.any(0)
    mirrored = (indices[:, used].astype(np.int64) - 1) % (2 * length)
    mirrored = np.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)
    result = Taps(mirrored, np.ascontiguousarray(weights[:, used]), scale)
    result.indices.flags.writeable = result.weights.flags.writeable = False
    return result


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def axes(shape: tuple[int, int], scale: float | None = None, size: tuple[int, int] | None = None) -> tuple[Taps, Taps]:
    """Taps of rows and columns for an image of this shape [H, W], with one of scale and size.

    scale: for both axes; the output has ceil(scale * length) pixels. size: (H, W) of the output; each axis has its own scale.
    Raises InputError for an empty image or output.
    """
    if (scale is None) == (size is None):
        raise InputError("give either the scale or the size of the resized image")
    if min(shape) < 1:
        raise InputError(f"the image has no pixels: {shape[1]} x {shape[0]}")
    if scale is not None:
        if not (math.isfinite(scale) and scale > 0):
            raise InputError(f"the scale must be a positive number, got {scale!r}")
        size = (math.ceil(scale * shape[0]), math.ceil(scale * shape[1]))
    assert size is not None
    if min(size) < 1:
        raise InputError(f"the resized image has no pixels: {size[1]} x {size[0]}")
    rows, cols = (taps(n, out, float(scale) if scale is not None else out / n) for n, out in zip(shape, size, strict=True))
    return rows, cols


def resample(image: Tensor, rows: Taps, cols: Taps) -> Tensor:
    """image: [..., H, W] floats -> [..., H', W'], same dtype and device; computed in float64."""
    # MATLAB's order: the axis that shrinks more comes first, rows first if both are equal.
    wide = image.to(torch.float64)
    if rows.scale <= cols.scale:
        wide = _along_cols(_along_rows(wide, rows), cols)
    else:
        wide = _along_rows(_along_cols(wide, cols), rows)
    return wide.to(image.dtype).contiguous()


def _along_rows(image: Tensor, axis: Taps) -> Tensor:
    indices = torch.tensor(axis.indices, device=image.device)
    weights = torch.tensor(axis.weights, device=image.device)[..., None]
    out = image.index_select(-2, indices[:, 0]).mul_(weights[:, 0])
    for p in range(1, indices.shape[1]):
        # Two roundings, not one: a fused multiply-add would depend on how the loop over a row is cut into vectors.
        out += image.index_select(-2, indices[:, p]).mul_(weights[:, p])
    return out


def _along_cols(image: Tensor, axis: Taps) -> Tensor:
    # Turned: whole rows are gathered several times as fast as single pixels.
    return _along_rows(image.mT.contiguous(), axis).mT


def imresize(image: Tensor, scale: float | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """MATLAB's imresize(image, scale) or imresize(image, size) with its default, antialiased bicubic kernel.

    image: [..., H, W], float16, bfloat16, float32 or float64 on any device; results are neither clipped nor rounded except to
    that dtype. scale: a number; size: (H, W) of the output. Returns [..., H', W'], dtype and device of image.
    Raises InputError for other dtypes, fewer than two axes, or no pixels.
    """
    if image.ndim < 2 or not image.is_floating_point():
        raise InputError(f"expected a float image [..., H, W], got {image.dtype} {list(image.shape)}")
    h, w = image.shape[-2:]
    return resample(image, *axes((h, w), scale, size))

"""Which planes of an image the network sees, and how its results go back into the image.

Full-range YCbCr of JFIF, without rounding between: Y = 0.299 R + 0.587 G + 0.114 B, Cb = (B - Y) / 1.772,
Cr = (R - Y) / 1.402. When Y changes by d while Cb and Cr stay, R, G and B all change by exactly d. So chroma is kept by adding
the change of luma to every channel, and is never computed.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from memnet_fast.errors import InputError

ColorMode = Literal["y", "rgb", "gray"]
COLOR_MODES: tuple[str, ...] = get_args(ColorMode)
LUMA = (0.299, 0.587, 0.114)
# Channels of pixels [H, W, C] -> how many of them are colour; the one after them is alpha.
_COLOUR_CHANNELS = {1: 1, 2: 1, 3: 3, 4: 3}


def colour_channels(channels: int) -> int:
    """1 for gray (with or without alpha), 3 for RGB (with or without alpha). Raises InputError for other counts."""
    if channels not in _COLOUR_CHANNELS:
        raise InputError(f"expected 1 to 4 channels (gray, gray+alpha, RGB, RGBA), got {channels}")
    return _COLOUR_CHANNELS[channels]


def luma(rgb: np.ndarray) -> np.ndarray:
    """rgb: [..., 3] floats -> [...]."""
    # Element by element in a fixed order: a matrix product may sum differently for a window than for the whole image.
    return LUMA[0] * rgb[..., 0] + LUMA[1] * rgb[..., 1] + LUMA[2] * rgb[..., 2]


def full_scale(dtype: np.dtype) -> int:
    """The sample value that stands for 1.0."""
    return np.iinfo(dtype).max if dtype.kind == "u" else 1


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """pixels: [h, w, C] -> the colour channels [h, w, 1 or 3] as native float32 (float64 for float64), 0..1 for integers."""
    colour = pixels[..., : colour_channels(pixels.shape[-1])]
    if pixels.dtype.kind == "f":
        return colour.astype(np.float64 if pixels.dtype.itemsize == 8 else np.float32)
    return colour.astype(np.float32) / np.float32(full_scale(pixels.dtype))


def planes(unit: np.ndarray, color: str) -> np.ndarray:
    """unit: [h, w, 1 or 3] -> what the network restores, float32 [K, h, w]: K = 3 for RGB with color "rgb", else 1."""
    if unit.shape[-1] == 1 or color == "rgb":
        return np.ascontiguousarray(np.moveaxis(unit, -1, 0), np.float32)
    return np.ascontiguousarray(luma(unit)[None], np.float32)


def alpha_plane(pixels: np.ndarray) -> np.ndarray:
    """pixels: [h, w, 2 or 4] -> alpha [h, w] as `to_unit` gives colour."""
    alpha = pixels[..., -1]
    if pixels.dtype.kind == "f":
        return alpha.astype(np.float64 if pixels.dtype.itemsize == 8 else np.float32)
    return alpha.astype(np.float32) / np.float32(full_scale(pixels.dtype))


def merge(unit: np.ndarray | None, seen: np.ndarray, restored: np.ndarray) -> np.ndarray:
    """The restored colour channels, [h, w, 1 or 3].

    unit: [h, w, 3] if luma alone was restored of colour that is kept, else None; seen: [K, h, w], the planes that the network
    saw; restored: [K, h, w], what it made of those.
    """
    if unit is not None:
        change, result = (restored - seen)[0], np.empty_like(unit)
        for c in range(3):  # twice as fast as one sum whose innermost axis has length 3
            np.add(unit[..., c], change, out=result[..., c])
        return result
    return np.moveaxis(restored, 0, -1)


def to_samples(colour: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Integers: clipped to their range and rounded half to even, the only rounding. Floats are neither clipped nor rounded."""
    if dtype.kind == "f":
        return colour.astype(dtype)
    samples = np.clip(colour, 0, 1)
    samples *= full_scale(dtype)
    return np.rint(samples, out=samples).astype(dtype)

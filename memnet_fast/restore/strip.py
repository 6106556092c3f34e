"""Pictures side by side with their names, to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memnet_fast.errors import InputError
from memnet_fast.restore.color import full_scale, to_samples

_GAP = 8
_BACKGROUND, _TEXT = 255, 0


def comparison_strip(panels: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """One picture, uint8 [H, W, 1 or 3], of images side by side, a label above each.

    panels: (label, [h, w] or [h, w, C]), uint8, uint16 or floats in [0, 1]. Alpha is left out, and 16 bits and floats are shown
    as 8. An image that is a whole number of times smaller than the largest is shown with its pixels repeated. Raises InputError
    for other sizes.
    """
    arrays = [np.asarray(p) for _, p in panels]
    shown = [_to_8_bit(p[..., None] if p.ndim == 2 else p) for p in arrays]
    height, width = max(p.shape[0] for p in shown), max(p.shape[1] for p in shown)
    shown = [_enlarged(p, height, width) for p in shown]
    channels = max(p.shape[2] for p in shown)
    font = ImageFont.load_default()
    line = int(font.getbbox("Ag")[3]) + 6
    cell = max(width, *(int(font.getlength(label)) for label, _ in panels))
    strip = np.full((height + line, len(panels) * (cell + _GAP) - _GAP, channels), _BACKGROUND, np.uint8)
    for i, ((label, _), picture) in enumerate(zip(panels, shown, strict=True)):
        left = i * (cell + _GAP)
        name = Image.new("L", (cell, line), _BACKGROUND)
        ImageDraw.Draw(name).text((0, 2), label, fill=_TEXT, font=font)
        strip[:line, left : left + cell] = np.asarray(name)[..., None]
        strip[line:, left : left + width] = picture
    return strip


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """[h, w, C] -> uint8 [h, w, 1 or 3]."""
    colour = pixels[..., : 1 if pixels.shape[-1] < 3 else 3]
    if pixels.dtype == np.uint8:
        return colour
    return to_samples(colour.astype(np.float32) / full_scale(pixels.dtype), np.dtype(np.uint8))


def _enlarged(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    times, rest = divmod(height, pixels.shape[0])
    if rest or times * pixels.shape[1] != width:
        sizes = f"{pixels.shape[1]} x {pixels.shape[0]} and {width} x {height}"
        raise InputError(f"only images of one size, or a multiple of it, stand side by side, got {sizes}")
    return pixels.repeat(times, 0).repeat(times, 1) if times > 1 else pixels

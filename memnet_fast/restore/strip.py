"""Pictures side by side with their names, to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memnet_fast.errors import InputError

_GAP = 8
_BACKGROUND, _TEXT = 255, 0


def comparison_strip(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """One picture, mode L or RGB, of equally large images in modes L, LA, RGB, RGBA or I;16, a label above each.

    Alpha is left out, and 16 bits are shown as 8. Raises InputError for images of different sizes.
    """
    if len({image.size for _, image in panels}) != 1:
        raise InputError(f"only images of one size stand side by side, got {[image.size for _, image in panels]}")
    shown = [_to_8_bit(image) for _, image in panels]
    mode = "L" if all(image.mode == "L" for image in shown) else "RGB"
    width, height = shown[0].size
    font = ImageFont.load_default()
    line = font.getbbox("Ag")[3] + 6
    cell = max(width, *(int(font.getlength(label)) for label, _ in panels))
    strip = Image.new(mode, (len(panels) * (cell + _GAP) - _GAP, height + int(line)), (_BACKGROUND,) * len(mode))
    draw = ImageDraw.Draw(strip)
    for i, (label, image) in enumerate(zip([label for label, _ in panels], shown, strict=True)):
        left = i * (cell + _GAP)
        draw.text((left, 2), label, fill=(_TEXT,) * len(mode), font=font)
        strip.paste(image, (left, int(line)))
    return strip


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return image.convert("L" if image.mode in ("L", "LA") else "RGB")

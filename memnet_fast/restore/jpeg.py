"""How strongly a JPEG was compressed, as its quantisation tables tell."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

# Table K.1 of ITU-T T.81, for luminance, row by row: nearly every encoder scales it by its quality.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61)
    + (12, 12, 14, 19, 26, 58, 60, 55)
    + (14, 13, 16, 24, 40, 57, 69, 56)
    + (14, 17, 22, 29, 51, 87, 80, 62)
    + (18, 22, 37, 56, 68, 109, 103, 77)
    + (24, 35, 55, 64, 81, 104, 113, 92)
    + (49, 64, 78, 87, 103, 121, 120, 101)
    + (72, 92, 95, 98, 112, 100, 103, 99)
)


@cache
def _tables() -> np.ndarray:
    """Row q - 1: the table that libjpeg uses for quality q, [100, 64]."""
    quality = np.arange(1, 101)
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((np.array(_LUMINANCE) * percent[:, None] + 50) // 100, 1, 255)


def quality_of_table(table: Any) -> int:
    """table: 64 steps for luminance, row by row -> the quality 1..100 whose table is nearest to it.

    Distances are of logarithms: at high qualities a step of 1 or 2 is the whole difference, at low ones it is nothing.
    """
    steps = np.maximum(np.asarray(table, np.float64), 1)
    return int(np.argmin(np.abs(np.log(_tables()) - np.log(steps)).sum(1))) + 1


def quality_of(image: Any) -> int | None:
    """image: as PIL opened it. None if it is no JPEG."""
    tables, layers = getattr(image, "quantization", None), getattr(image, "layer", None)
    if not tables or not layers or layers[0][3] not in tables:
        return None
    return quality_of_table(tables[layers[0][3]])

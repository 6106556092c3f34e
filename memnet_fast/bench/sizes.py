"""Image sizes by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from memnet_fast.errors import InputError

# name: images, height, width
NAMED: dict[str, tuple[int, int, int]] = {"1080p": (1, 1080, 1920), "4k": (1, 2160, 3840)}
_MOST_PIXELS = 1 << 28


def parse_sizes(text: str | Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """ "256,1080p,16x64x64" -> {"256x256": (1, 256, 256), "1080p": (1, 1080, 1920), "16x64x64": (16, 64, 64)}

    One number is a square, two are height and width, three are images, height and width. Raises InputError.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    found = {}
    for part in (p.strip().lower() for p in parts):
        shape = NAMED.get(part)
        if shape is None:
            numbers = part.split("x")
            if not 1 <= len(numbers) <= 3 or not all(re.fullmatch("0*[1-9][0-9]{0,5}", n) for n in numbers):
                raise InputError(f"unknown size '{part}'; give 256, 480x640, 16x64x64, {' or '.join(NAMED)}")
            values = [int(n) for n in numbers]
            values = values * 2 if len(values) == 1 else values
            shape = (values[0], values[1], values[2]) if len(values) == 3 else (1, values[0], values[1])
            if shape[0] * shape[1] * shape[2] > _MOST_PIXELS:
                raise InputError(f"size '{part}' has more than {_MOST_PIXELS} pixels")
        found[part if part in NAMED else name_of(shape)] = shape
    return found


def name_of(shape: tuple[int, int, int]) -> str:
    n, h, w = shape
    return f"{h}x{w}" if n == 1 else f"{n}x{h}x{w}"

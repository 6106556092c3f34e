"""PNG files made by hand, to hold what no encoder would write."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 0, end: bool = True, extra: bytes = b""
) -> bytes:
    """data: scan lines. colour: 0 gray, 2 RGB, 4 gray with alpha, 6 RGB with alpha. extra: chunks before the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), extra, chunk(b"IDAT", zlib.compress(data))]
    return b"".join(parts) + (chunk(b"IEND", b"") if end else b"")


def rows(pixels: np.ndarray) -> bytes:
    """Unfiltered scan lines."""
    return b"".join(b"\0" + row.tobytes() for row in pixels)

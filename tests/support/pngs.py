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


def animated(frames: list[np.ndarray], *, colour: int) -> bytes:
    """An APNG of frames [H, W, C] of one shape, uint8 or uint16, 10 ms each."""
    height, width = frames[0].shape[:2]
    big_endian = [frame.astype(frame.dtype.newbyteorder(">")) for frame in frames]
    extra = chunk(b"acTL", struct.pack(">II", len(frames), 0))
    first, last = png(width, height, rows(big_endian[0]), depth=8 * frames[0].itemsize, colour=colour, extra=extra), b""
    for i, frame in enumerate(big_endian):
        control = struct.pack(">IIIIIHHBB", max(0, 2 * i - 1), width, height, 0, 0, 1, 100, 0, 0)
        if i == 0:
            first = first.replace(extra, extra + chunk(b"fcTL", control))
        else:
            data = struct.pack(">I", 2 * i) + zlib.compress(rows(frame))
            last += chunk(b"fcTL", control) + chunk(b"fdAT", data)
    end = chunk(b"IEND", b"")
    return first.removesuffix(end) + last + end

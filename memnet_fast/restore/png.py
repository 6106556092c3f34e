"""PNG with 16-bit colour, which Pillow would cut to 8 bits: through imagecodecs (extra "io"), with Pillow's chunks around."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import BinaryIO

import numpy as np
from PIL import PngImagePlugin

from memnet_fast.errors import MissingExtra
from memnet_fast.restore.metadata import Metadata

_HEADER = 8 + 25  # signature and the chunk IHDR
_PIECE = 1 << 20
XMP = "XML:com.adobe.xmp"


def imagecodecs() -> ModuleType:
    """The package. Raises MissingExtra with what to install."""
    try:
        import imagecodecs
    except ImportError as error:
        raise MissingExtra(f"PNG with 16-bit colour needs imagecodecs ({error}); pip install 'memnet-fast[io]'") from error
    return imagecodecs


def require_all_rows(file: BinaryIO, pixels: np.ndarray, interlaced: bool) -> None:
    """Raises ValueError if the pixels of a file end before its last row, which Pillow leaves black without a word.

    pixels: [H, W, C], what Pillow made of it. Only where they could be such rows is the file inflated once more, and counted.
    """
    if not interlaced and pixels[-1].any():
        return
    needed = left = 0
    inflater = zlib.decompressobj()
    for name, size in _chunks(file):
        if name == b"IHDR":
            needed = left = _bytes_of_rows(file.read(size))
        elif name == b"IDAT":
            data = file.read(size)
            while data and left > 0:
                left -= len(inflater.decompress(data, _PIECE))
                data = inflater.unconsumed_tail
        elif name == b"IEND" or left <= 0:
            break
    if left > 0:
        raise ValueError(f"its pixels end {left} bytes before their {needed}")


def has_end(file: BinaryIO) -> bool:
    """Whether the last chunk, IEND, is there. Pixels may be complete without it."""
    return any(name == b"IEND" for name, _ in _chunks(file))


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Name and size of each chunk; meanwhile the file is at its body."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        body = file.tell()
        yield name, size
        file.seek(body + size + 4)  # a checksum follows


def _bytes_of_rows(header: bytes) -> int:
    """Bytes of all scan lines with their filter types, from the body of IHDR."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    # Adam7: where each pass starts, and its steps.
    steps = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    total = 0
    for top, left, down, right in steps if interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-(height - top) // down), -(-(width - left) // right)
        if rows > 0 and columns > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def decode(data: bytes) -> np.ndarray:
    """A file of 16-bit samples -> uint16 [H, W, C]; one transparent colour becomes alpha. Raises ValueError."""
    codecs = imagecodecs()
    try:
        pixels = codecs.png_decode(data)
    except codecs.PngError as error:
        raise ValueError(str(error)) from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def encode(pixels: np.ndarray, level: int, metadata: Metadata) -> bytes:
    """pixels: uint16 [H, W, C]."""
    data = imagecodecs().png_encode(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), level=level)
    chunks = io.BytesIO()
    if metadata.icc:
        PngImagePlugin.putchunk(chunks, b"iCCP", b"ICC Profile\0\0" + zlib.compress(metadata.icc))
    if metadata.dpi:
        per_metre = [round(v / 0.0254) for v in metadata.dpi]
        PngImagePlugin.putchunk(chunks, b"pHYs", struct.pack(">IIB", *per_metre, 1))
    if metadata.xmp:
        PngImagePlugin.putchunk(chunks, b"iTXt", XMP.encode() + b"\0\0\0\0\0" + metadata.xmp)
    if metadata.exif:
        PngImagePlugin.putchunk(chunks, b"eXIf", metadata.exif.removeprefix(b"Exif\0\0"))
    return data[:_HEADER] + chunks.getvalue() + data[_HEADER:]

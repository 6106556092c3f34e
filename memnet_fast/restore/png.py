"""PNG with 16-bit colour, which Pillow would cut to 8 bits: through imagecodecs (extra "io"), with Pillow's chunks around."""

from __future__ import annotations

import io
import struct
import zlib
from types import ModuleType

import numpy as np
from PIL import PngImagePlugin

from memnet_fast.errors import MissingExtra
from memnet_fast.restore.metadata import Metadata

_HEADER = 8 + 25  # signature and the chunk IHDR
XMP = "XML:com.adobe.xmp"


def imagecodecs() -> ModuleType:
    """The package. Raises MissingExtra with what to install."""
    try:
        import imagecodecs
    except ImportError as error:
        raise MissingExtra(f"PNG with 16-bit colour needs imagecodecs ({error}); pip install 'memnet-fast[io]'") from error
    return imagecodecs


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

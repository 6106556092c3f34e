"""TIFF pages: what each one holds, those that Pillow cannot decode without loss, and the writing of all.

Pillow reads up to 8 bits, and 16-bit gray. 16-bit colour, 16-bit gray where white is 0, gray with alpha multiplied into it,
and floats come through tifffile and imagecodecs (extra "io"). Everything is written here, because no library writes 16-bit
colour and floats with EXIF: strips with Adobe's deflate, integers as differences along a row, in the byte order "II". Alpha
that was multiplied into the colour is divided out, and written as straight alpha.
"""

from __future__ import annotations

import logging
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin, TiffTags

from memnet_fast.errors import ImageCorrupt, ImageUnsupported, MissingExtra, OutputError
from memnet_fast.restore.metadata import STORAGE_TAGS, Metadata

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_COUNTS = 273, 277, 278, 279
_PLANAR, _PREDICTOR, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _DEPTH = 284, 317, 338, 339, 32997
_WHITE_IS_0, _BLACK_IS_0, _RGB = range(3)
_PREMULTIPLIED, _STRAIGHT = 1, 2
_UNSIGNED, _FLOAT = 1, 3
_DEFLATE, _DIFFERENCES = 8, 2
# Lossless codes of tifffile: none, LZW, deflate (two numbers), PackBits, LZMA, Zstandard.
_LOSSLESS = (1, 5, 8, 32946, 32773, 34925, 50000)
_STRIP_BYTES = 1 << 20
_LEVEL = 6  # of deflate
_MOST_BYTES = (1 << 32) - (1 << 24)  # offsets have 32 bits; the rest is for directories


@dataclass(frozen=True)
class Page:
    """One directory of a TIFF. offset: where it lies; tags: as Pillow parses them."""

    offset: int
    tags: Any

    def _values(self, tag: int, default: int) -> tuple[int, ...]:
        value = self.tags.get(tag, default)
        return value if isinstance(value, tuple) else (value,)

    def _value(self, tag: int, default: int) -> int:
        return self._values(tag, default)[0]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self._value(_WIDTH, 0), self._value(_HEIGHT, 0)

    @property
    def photometric(self) -> int:
        return self._value(_PHOTOMETRIC, _BLACK_IS_0)

    @property
    def bits(self) -> int:
        return max(self._values(_BITS, 1))

    @property
    def sample_format(self) -> int:
        return self._value(_SAMPLE_FORMAT, _UNSIGNED)

    @property
    def extra(self) -> tuple[int, ...]:
        """What the channels after the colour are."""
        return self._values(_EXTRA_SAMPLES, 0) if _EXTRA_SAMPLES in self.tags else ()

    @property
    def by_pillow(self) -> bool:
        if self.sample_format == _FLOAT or self.bits > 16:
            return False
        if self.extra[:1] == (_PREMULTIPLIED,) and self._value(_SAMPLES, 1) == 2 and self.bits == 8:
            return False  # older versions of Pillow do not know this kind
        return self.bits <= 8 or (self._value(_SAMPLES, 1) == 1 and self.photometric == _BLACK_IS_0)

    @property
    def is_preview(self) -> bool:
        """A smaller copy of an image that stands elsewhere, as camera raw files (DNG, NEF, ARW) begin with."""
        return bool(self._value(_SUBFILE, 0) & 1)

    def refusal(self) -> str | None:
        """Why the page is not restored, as far as its tags tell; Pillow may have more reasons."""
        bits, kind, samples = self._values(_BITS, 1), self.sample_format, self._value(_SAMPLES, 1)
        if len(set(bits)) > 1:
            return f"channels of different depths, {', '.join(map(str, bits))} bits"
        if kind not in (_UNSIGNED, _FLOAT):
            return f"signed or complex numbers of {self.bits} bits as pixels"
        if self.bits not in ((16, 32, 64) if kind == _FLOAT else (1, 2, 4, 8, 16)):
            return f"{self.bits} bits for each channel; 8, 16 and floats are restored"
        if any(e not in (_PREMULTIPLIED, _STRAIGHT, 999) for e in self.extra) or len(self.extra) > 1:  # 999: Corel's alpha
            return "channels beyond colour that are no alpha"
        if self._value(_DEPTH, 1) != 1:
            return "a volume instead of an image"
        compression = self._value(_COMPRESSION, 1)
        if compression not in (TiffImagePlugin.COMPRESSION_INFO if self.by_pillow else _LOSSLESS):
            return f"compression {compression} with {self.bits} bits for each channel"
        if self.by_pillow:
            return None
        colour = {_WHITE_IS_0: 1, _BLACK_IS_0: 1, _RGB: 3}.get(self.photometric)
        if colour is None or samples not in (colour, colour + 1):
            return f"{self.bits} bits for each of {samples} channels with photometric interpretation {self.photometric}"
        if self.photometric == _WHITE_IS_0 and kind == _FLOAT:
            return "floats in which white is 0"
        return None


def pages(file: BinaryIO) -> list[Page]:
    """All directories of a file, in order. Raises ImageCorrupt, and what Pillow meets in damaged ones."""
    file.seek(0)
    head = file.read(16)
    found: list[Page] = []
    tags = TiffImagePlugin.ImageFileDirectory_v2(head[:16] if head[2] == 43 or head[3] == 43 else head[:8])
    offset, seen = tags.next, set()
    while offset:
        if offset in seen:
            raise ImageCorrupt("its directories form a loop")
        seen.add(offset)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head[:16] if head[2] == 43 or head[3] == 43 else head[:8])
        file.seek(offset)
        tags.load(file)
        found.append(Page(offset, tags))
        offset = tags.next
    return found


def tifffile() -> ModuleType:
    """The package. Raises MissingExtra with what to install."""
    try:
        import imagecodecs  # noqa: F401  (tifffile needs it for most compressions, and says so only when it decodes)
        import tifffile
    except ImportError as error:
        raise MissingExtra(f"TIFF with 16-bit colour or floats needs more ({error}); pip install 'memnet-fast[io]'") from error
    # What it logs about damaged files is said by our errors; a host that listens still hears it.
    log = logging.getLogger("tifffile")
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    return tifffile


def decode(file: BinaryIO, index: int, page: Page) -> np.ndarray:
    """A page that Pillow does not decode -> [H, W, C], uint16, float16, float32 or float64, alpha straight.

    Raises MissingExtra, ImageCorrupt (a part is missing), and whatever the decoders meet in damaged data.
    """
    package = tifffile()
    end = file.seek(0, 2)
    file.seek(0)
    with package.TiffFile(file, name="image") as opened:
        found = opened.pages[index]
        offsets, counts = found.dataoffsets, found.databytecounts
        if len(offsets) != len(counts) or len(offsets) < math.prod(found.chunked):
            raise ImageCorrupt("strips or tiles are missing")
        if any(count < 1 or offset + count > end for offset, count in zip(offsets, counts, strict=True)):
            raise ImageCorrupt("strips or tiles lie beyond its end")
        if found.axes not in ("YX", "YXS", "SYX"):
            raise ImageUnsupported(f"the axes {found.axes} are not those of an image")
        pixels = found.asarray(maxworkers=1)
    if found.axes == "YX":
        pixels = pixels[..., None]
    elif found.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    if page.extra[:1] == (_PREMULTIPLIED,):
        pixels = _straight(pixels)
    if page.photometric == _WHITE_IS_0:  # which is not said of alpha
        pixels = np.concatenate([np.iinfo(pixels.dtype).max - pixels[..., :1], pixels[..., 1:]], -1)
    return np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("="), copy=False))


def _straight(pixels: np.ndarray) -> np.ndarray:
    """Alpha divided out of the colour; colour below alpha 0 becomes 0."""
    alpha = pixels[..., -1:].astype(np.float64)
    scale = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1.0
    colour = pixels[..., :-1] * np.divide(scale, alpha, out=np.zeros_like(alpha), where=alpha > 0)
    if pixels.dtype.kind == "u":
        colour = np.rint(np.minimum(colour, scale))
    return np.concatenate([colour.astype(pixels.dtype), pixels[..., -1:]], -1)


def encode(frames: Sequence[np.ndarray], metadata: Metadata) -> memoryview:
    """frames: [H, W, C] each, uint8, uint16 or floats -> the file. Metadata stands on the first page.

    Raises OutputError above 4 GiB; ValueError, struct.error and others for EXIF that cannot be written.
    """
    file = bytearray()
    for i, pixels in enumerate(frames):
        strips, rows = _strips(pixels)
        if len(file) + sum(map(len, strips)) > _MOST_BYTES:
            raise OutputError("the result is larger than the 4 GiB that a TIFF can hold; write PNG instead")
        tags = _tags(pixels, metadata if i == 0 else Metadata())
        tags[_ROWS_PER_STRIP] = rows
        tags.tagtype[_STRIP_OFFSETS] = tags.tagtype[_STRIP_COUNTS] = TiffTags.LONG
        tags[_STRIP_COUNTS] = tuple(map(len, strips))
        tags[_STRIP_OFFSETS] = tuple(np.cumsum([0, *map(len, strips[:-1])]).tolist())  # its writer adds where they begin
        if i == 0:
            file += struct.pack("<2sHI", b"II", 42, 8)
        start = len(file)
        directory = tags.tobytes(start)
        file += directory
        for strip in strips:
            file += strip
        file += b"\0" * (len(file) % 2)
        if i + 1 < len(frames):
            (count,) = struct.unpack_from("<H", directory)
            struct.pack_into("<I", file, start + 2 + 12 * count, len(file))
    return memoryview(file)


def _strips(pixels: np.ndarray) -> tuple[list[bytes], int]:
    """Compressed strips, and the rows of each but the last."""
    h, w, channels = pixels.shape
    rows = max(1, min(h, _STRIP_BYTES // (w * channels * pixels.itemsize)))
    strips = []
    for top in range(0, h, rows):
        part = np.array(pixels[top : top + rows], pixels.dtype.newbyteorder("<"))
        if part.dtype.kind == "u":
            part[:, 1:] -= pixels[top : top + rows, :-1]
        strips.append(zlib.compress(part.tobytes(), _LEVEL))
    return strips, rows


def _tags(pixels: np.ndarray, metadata: Metadata) -> Any:
    h, w, channels = pixels.shape
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    if metadata.exif:
        exif = Image.Exif()
        exif.load(metadata.exif)
        for tag in list(exif):
            if tag not in STORAGE_TAGS:
                tags[tag] = exif.get_ifd(tag) if tag in TiffTags.TAGS_V2_GROUPS else exif[tag]
    floats = pixels.dtype.kind == "f"
    tags[_WIDTH], tags[_HEIGHT] = w, h
    tags[_BITS] = (pixels.itemsize * 8,) * channels
    tags[_SAMPLES] = channels
    tags[_SAMPLE_FORMAT] = (_FLOAT if floats else _UNSIGNED,) * channels
    tags[_PHOTOMETRIC] = _BLACK_IS_0 if channels < 3 else _RGB
    tags[_COMPRESSION], tags[_PLANAR] = _DEFLATE, 1
    if not floats:
        tags[_PREDICTOR] = _DIFFERENCES
    if channels in (2, 4):
        tags[_EXTRA_SAMPLES] = _STRAIGHT
    if metadata.dpi:
        tags[282], tags[283], tags[296] = *metadata.dpi, 2
    for tag, value in ((700, metadata.xmp), (34675, metadata.icc)):
        if value:
            tags.tagtype[tag] = TiffTags.UNDEFINED if tag == 34675 else TiffTags.BYTE
            tags[tag] = value
    return tags

"""What an image file says about its pixels, and how it reaches the file of the result.

EXIF, XMP, ICC profile and resolution are kept as they are, and so are the times of an animation. After super-resolution the
resolution stays (the print becomes larger), and the image size that EXIF states is set right.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, TiffImagePlugin

# Tags of a TIFF that describe how its pixels are stored, not what they show; a new file has its own.
STORAGE_TAGS = frozenset(
    (254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293)
    + (301, 317, 320, 321, 322, 323, 324, 325, 330, 338, 339, 340, 341, 342, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521)
    + (529, 530, 531, 532, 700, 33723, 34377, 34675)
)
ORIENTATION = 274
_EXIF_IFD = 34665
_EXIF_NAME = b"Exif\0\0"
# Width and height: of the EXIF part, and of the main part, which few cameras fill.
_SIZE_TAGS = {40962: 0, 40963: 1, 256: 0, 257: 1}
_SHORT, _LONG = 3, 4


@dataclass(frozen=True)
class Animation:
    """durations: milliseconds of each frame. loop: 0 for ever. default_image: the first frame is no part of it (APNG)."""

    durations: tuple[float, ...]
    loop: int = 0
    default_image: bool = False


@dataclass(frozen=True)
class Metadata:
    """What travels from an input file to its output. exif: with its name in front, as in a JPEG. lossless: a WebP stays so."""

    exif: bytes | None = None
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    xmp: bytes | None = None
    animation: Animation | None = None
    lossless: bool = False

    def fitting(self, width: int, height: int, channels: int) -> Metadata:
        """For an image of this size and number of channels: EXIF states its size, and the profile of another colour space
        (a colour profile for a result in gray) is left out."""
        space = b"GRAY" if channels < 3 else b"RGB "
        other = self.icc is not None and self.icc[16:20] in (b"GRAY", b"RGB ", b"CMYK") and self.icc[16:20] != space
        exif = self.exif and _with_size(self.exif, (width, height))
        return replace(self, icc=None if other else self.icc, exif=exif)


def metadata_of(image: Any) -> Metadata:
    """EXIF, ICC profile, XMP and resolution of a loaded PIL image."""
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    exif = exif_bytes(image.getexif()) if is_tiff else image.info.get("exif") or None
    if exif and not exif.startswith(_EXIF_NAME):
        exif = _EXIF_NAME + exif  # WebP files have it without its name, and Pillow would write that into a JPEG
    return Metadata(exif, _bytes(image.info.get("icc_profile")), _dpi(image.info.get("dpi")), _bytes(image.info.get("xmp")))


def exif_bytes(exif: Image.Exif) -> bytes | None:
    """The directory of a TIFF without the tags that describe its storage, as EXIF."""
    for tag in [t for t in exif if t in STORAGE_TAGS]:
        del exif[tag]
    return exif.tobytes() if len(exif) else None


def tiff_metadata(file: Any, header: bytes, tags: Any, offset: int) -> Metadata:
    """Metadata of a TIFF page whose pixels Pillow does not decode. tags: its directory, which lies at offset of the file."""
    exif = Image.Exif()
    exif.endian = "<" if header[:2] == b"II" else ">"
    exif.load_from_fp(file, offset)
    dpi = None
    if 282 in tags and 283 in tags:
        per_unit = {1: 0.0, 2: 1.0, 3: 2.54}.get(tags.get(296, 2), 0.0)  # none, inch, centimetre
        dpi = _dpi((tags[282] * per_unit, tags[283] * per_unit))
    return Metadata(exif_bytes(exif), _bytes(tags.get(34675)), dpi, _bytes(tags.get(700)))


def _bytes(value: Any) -> bytes | None:
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        value = value.encode()
    return bytes(value) if isinstance(value, bytes | bytearray) and value else None


def _dpi(value: Any) -> tuple[float, float] | None:
    try:
        dpi = (float(value[0]), float(value[1])) if value else None
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return None
    return dpi if dpi is not None and all(0 < v < 1e6 for v in dpi) else None


def _with_size(exif: bytes, size: tuple[int, int]) -> bytes:
    """The same bytes with the image size set right where it is stated.

    In place: written anew, EXIF would lose its thumbnail, and the offsets in a camera's private notes would no longer hold.
    """
    skip = 6 if exif.startswith(_EXIF_NAME) else 0
    body = bytearray(exif[skip:])
    if body[:2] not in (b"II", b"MM") or len(body) < 8:
        return exif
    order = "<" if body[:2] == b"II" else ">"
    (first,) = struct.unpack_from(order + "I", body, 4)
    second = _set_size(body, order, first, size)
    if second is not None and second != first:
        _set_size(body, order, second, size)
    return exif[:skip] + bytes(body)


def _set_size(body: bytearray, order: str, at: int, size: tuple[int, int]) -> int | None:
    """In the directory at this place; returns where its EXIF part lies."""
    if at + 2 > len(body):
        return None
    part = None
    (count,) = struct.unpack_from(order + "H", body, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(body) - 11), 12):
        tag, kind, values = struct.unpack_from(order + "HHI", body, entry)
        if tag == _EXIF_IFD and values == 1:
            (part,) = struct.unpack_from(order + "I", body, entry + 8)
        elif tag in _SIZE_TAGS and values == 1 and kind in (_SHORT, _LONG):
            now = size[_SIZE_TAGS[tag]]
            if kind == _SHORT and now < 1 << 16:
                struct.pack_into(order + "HH", body, entry + 8, now, 0)
            else:
                struct.pack_into(order + "HHII", body, entry, tag, _LONG, 1, now)
    return part

"""Image files: what is read, what is refused, and what is written.

Formats: PNG, JPEG, WebP, TIFF, BMP, recognised by content. No other parser of Pillow is ever started.

| mode of the file | restored as |
|---|---|
| L, LA, RGB, RGBA, I;16 (16-bit gray) | the same mode; alpha is kept bit by bit, colour below alpha 0 restored |
| 1 | L: the grey levels are kept, not thresholded again |
| P | RGB, or RGBA where the palette has transparency: the result is not reduced to a palette again |
| 1, L or RGB with one transparent colour | LA or RGBA |
| CMYK, YCCK, Lab, HSV, I, F, 16-bit colour, I;16 with a transparent colour, several frames | refused: ImageUnsupported |

EXIF, ICC profile and resolution are kept. Pixels stay in their stored order and the orientation tag stays with them; a TIFF is
turned upright by its decoder, and then has no such tag any more. Bit errors that leave a JPEG decodable cannot be noticed.

The limit on pixels is checked on the header, before anything is decoded. Pillow's own `Image.MAX_IMAGE_PIXELS` is neither
read nor changed: the decoders are called directly, below the function that would look at it. (Two
exceptions, met only where a host lowers that number: Pillow's WebP decoder and the tiles of a TIFF look at it themselves.)
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from memnet_fast.errors import ImageCorrupt, ImageError, ImageTooLarge, ImageUnsupported, InputError, OutputError
from memnet_fast.files import make_folder, write_whole

MAX_PIXELS = 1_000_000_000
EXTENSIONS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
_OPEN: dict[str, Callable[[BinaryIO], Any]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.jpeg_factory,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
_WRITABLE_MODES = {
    "PNG": ("L", "LA", "RGB", "RGBA", "I;16", "I;16B"),
    "TIFF": ("L", "LA", "RGB", "RGBA", "I;16", "I;16B"),
    "WEBP": ("L", "LA", "RGB", "RGBA"),
    "JPEG": ("L", "RGB"),
    "BMP": ("L", "RGB"),  # a fourth channel is written, but not read back as alpha
}
# Tags of a TIFF that describe how its pixels are stored, not what they show; a new file has its own.
_STORAGE_TAGS = frozenset(
    (254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293)
    + (301, 317, 320, 321, 322, 323, 324, 325, 330, 338, 339, 340, 341, 342, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521)
    + (529, 530, 531, 532, 700, 33723, 34377, 34675)
)
_ORIENTATION = 274


@dataclass(frozen=True)
class Metadata:
    """What travels from an input file to its output."""

    exif: bytes | None = None
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None


@dataclass(frozen=True)
class Encoding:
    """How results are written. quality: 1..100 for JPEG (colour without subsampling) and lossy WebP; png_level: 0..9."""

    quality: int = 95
    png_level: int = 6

    def __post_init__(self) -> None:
        for name, low, high in (("quality", 1, 100), ("png_level", 0, 9)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


@dataclass(frozen=True)
class Source:
    """A decoded file: the image in one of the modes L, LA, RGB, RGBA, I;16, I;16B."""

    image: Image.Image
    format: str
    metadata: Metadata


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Source:
    """Decodes a file to its last pixel.

    Raises ImageCorrupt, ImageUnsupported, ImageTooLarge (before decoding), ImageError (cannot be read at all).
    """
    with open_image(path) as file:
        return decode_image(path, file, max_pixels)


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """An ordinary file, open for reading. Raises ImageError, also for what goes wrong while it is read."""
    try:
        # Non-blocking, so that a FIFO without a writer does not hang.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError(f"{path} is not a file")
            yield file
    except MemoryError as error:
        raise ImageTooLarge(f"{path} does not fit into memory") from error
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}") from error


def decode_image(path: object, file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Source:
    """As read_image, from the start of an open file; path: its name in messages."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise InputError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this program, so truncated files would pass for whole ones; unset it"
        )
    head = file.read(64)
    kind = _format_of(head)
    if kind is None:
        what = "is empty" if not head else "is not a PNG, JPEG, WebP, TIFF or BMP image"
        raise ImageUnsupported(f"{path} {what}")
    if kind == "WEBP":
        _check_size(path, _webp_size(head), max_pixels)  # its decoder allocates the canvas when it opens
    file.seek(0)
    try:
        with warnings.catch_warnings():
            # Oddities of metadata are no reason to print, and never an error, whatever filter the host has set.
            warnings.simplefilter("ignore")
            image = _OPEN[kind](file)
            _check_size(path, image.size, max_pixels)
            _check_supported(path, image)
            image.load()
            metadata = metadata_of(image)
            return Source(plain_mode(image, str(path)), kind, metadata)
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{path}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ImageCorrupt(f"{path} is damaged or cut off: {_one_line(error)}") from error
    except (IndexError, KeyError, TypeError, OverflowError, AttributeError, NotImplementedError, AssertionError) as error:
        # Pillow's parsers meet a damaged header with whatever exception comes first.
        raise ImageCorrupt(f"{path} has a header that cannot be read: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _format_of(head: bytes) -> str | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    return "BMP" if head[:2] == b"BM" else None


def _webp_size(head: bytes) -> tuple[int, int]:
    """Canvas of a WebP file (RFC 9649) from its first 30 bytes; (1, 1) where they hold none, which the decoder will refuse."""
    chunk, data = head[12:16], head[20:30]
    if chunk == b"VP8X" and len(data) == 10:
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if chunk == b"VP8L" and len(data) >= 5:
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and len(data) == 10:
        return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF
    return 1, 1


def _check_size(path: object, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageCorrupt(f"{path} has no pixels: {width} x {height}")
    if width * height > max_pixels:
        raise ImageTooLarge(f"{path} has {width} x {height} pixels, more than the limit of {max_pixels}")


def _check_supported(name: object, image: Any) -> None:
    """What can be said before decoding."""
    if getattr(image, "n_frames", 1) > 1:
        raise ImageUnsupported(f"{name} has {image.n_frames} frames; only single images are restored")
    if image.mode.startswith("I") or image.mode == "F":
        return
    # Pillow would reduce 16-bit colour to 8 bits without a word; the decoder's raw mode or the TIFF tag gives it away.
    raw = [tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0] for tile in getattr(image, "tile", ()) or ()]
    bits = getattr(image, "tag_v2", {}).get(258, ()) if isinstance(image, TiffImagePlugin.TiffImageFile) else ()
    if any(isinstance(r, str) and ";16" in r for r in raw) or max(bits, default=8) > 8:
        raise ImageUnsupported(f"{name} has more than 8 bits for each channel; that is restored for gray only (mode I;16)")


def plain_mode(image: Image.Image, name: str = "image") -> Image.Image:
    """The image in mode L, LA, RGB, RGBA, I;16 or I;16B, by the rules in this module's table; loads it.

    Raises ImageUnsupported for other modes and for several frames.
    """
    _check_supported(name, image)
    mode, clear = image.mode, "transparency" in image.info
    if mode in ("I;16", "I;16L", "I;16B") and not clear:
        return image
    if mode in ("L", "LA", "RGB", "RGBA") and not clear:
        return image
    if mode == "P":
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if mode in ("1", "L"):
        return image.convert("LA" if clear else "L")
    if mode in ("LA", "RGB", "RGBA"):
        return image.convert("LA" if mode == "LA" else "RGBA")
    what = f"mode {mode}" + (" with a transparent colour" if clear else "")
    raise ImageUnsupported(f"{name} has {what}, which is not restored; convert it to L, LA, RGB, RGBA or I;16")


def metadata_of(image: Any) -> Metadata:
    """EXIF, ICC profile and resolution of a loaded image."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        kept = image.getexif()
        for tag in [t for t in kept if t in _STORAGE_TAGS]:
            del kept[tag]
        exif = kept.tobytes() if len(kept) else None
    else:
        exif = image.info.get("exif") or None
    dpi = image.info.get("dpi")
    try:
        dpi = (float(dpi[0]), float(dpi[1])) if dpi else None
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        dpi = None
    if dpi is not None and not all(0 < v < 1e6 for v in dpi):
        dpi = None
    return Metadata(exif, image.info.get("icc_profile") or None, dpi)


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels [H, W, C] of an image in a plain mode: uint8, or uint16 of either byte order."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def from_array(pixels: np.ndarray) -> Image.Image:
    """pixels: [H, W, C], as `to_array` gives them -> a new image in mode L, LA, RGB, RGBA, I;16 or I;16B."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


_DEFAULT_ENCODING, _NO_METADATA = Encoding(), Metadata()


def encode(image: Image.Image, format: str, encoding: Encoding = _DEFAULT_ENCODING, metadata: Metadata = _NO_METADATA) -> bytes:
    """The bytes of a file. format: a value of EXTENSIONS. Raises ImageUnsupported for a mode that the format cannot hold
    (WebP has no gray: it is written as equal channels), OutputError if the encoder fails."""
    if image.mode not in _WRITABLE_MODES[format]:
        what = {"JPEG": "PNG, TIFF or WebP", "WEBP": "PNG or TIFF", "BMP": "PNG or TIFF"}.get(format, "PNG")
        if image.mode.startswith("I;16"):
            what = "PNG or TIFF"
        raise ImageUnsupported(f"{format} cannot hold mode {image.mode}; write {what} instead")
    values: dict[str, Any] = {}
    if format == "JPEG":
        values = {"quality": encoding.quality, "subsampling": 0}
    elif format == "WEBP":
        values = {"quality": encoding.quality}
    elif format == "PNG":
        values = {"compress_level": encoding.png_level}
    elif format == "TIFF":
        # libtiff, which compresses, cannot write the directories that EXIF consists of.
        values = {"compression": "raw" if metadata.exif else "tiff_adobe_deflate"}
    if metadata.icc and format != "BMP":
        values["icc_profile"] = metadata.icc
    if metadata.dpi and format != "WEBP":
        values["dpi"] = metadata.dpi
    if metadata.exif and format != "BMP":
        values["exif"] = _exif_for(metadata.exif, format)
    bare = image.copy()
    bare.info = {}  # what is written is what stands in `values`
    buffer = io.BytesIO()
    try:
        bare.save(buffer, format, **values)
    except (OSError, ValueError, RuntimeError, struct.error, KeyError, TypeError) as error:
        raise OutputError(f"cannot encode the result as {format}: {_one_line(error)}") from error
    return buffer.getvalue()


def _exif_for(exif: bytes, format: str) -> Any:
    """EXIF as the writer of a format wants it. The pixels of a TIFF come out of its decoder upright, whatever its tag says;
    for all other programs the tag holds, so it is kept there too."""
    if format != "TIFF":
        return exif
    values = Image.Exif()
    values.load(exif)
    for tag in [t for t in values if t in _STORAGE_TAGS]:
        del values[tag]
    return values


def write_image(
    path: Path,
    image: Image.Image,
    format: str,
    encoding: Encoding = _DEFAULT_ENCODING,
    metadata: Metadata = _NO_METADATA,
) -> None:
    """Writes a file whole or not at all; makes its folder. Raises OutputError and ImageUnsupported."""
    data = encode(image, format, encoding, metadata)
    make_folder(path.parent)
    write_whole(path, data)

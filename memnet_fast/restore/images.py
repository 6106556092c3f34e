"""Image files: what is read, what is refused, and what is written.

Formats: PNG, JPEG, WebP, TIFF, BMP, recognised by content. No other parser is ever started. Pixels are arrays [H, W, C] of
uint8, uint16 or floats; C is 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA).

| in the file | restored as |
|---|---|
| gray, RGB, with or without alpha, 8 or 16 bits | the same; alpha is kept bit by bit, colour below alpha 0 restored like any other |
| float TIFF, 16, 32 or 64 bits, gray or RGB, with or without alpha | the same; 0 is black and 1 white, values beyond are legal up to a magnitude of 8 and not clipped; NaN, infinity and larger values are refused |
| 1, 2 or 4 bits | 8-bit gray: the grey levels are kept, not thresholded again |
| palette | RGB, or RGBA where the palette has transparency: the result is not reduced to a palette again |
| gray or RGB with one transparent colour | gray or RGB with alpha |
| TIFF with alpha multiplied into the colour | straight alpha: the colour is divided by it |
| several pages or frames (TIFF, APNG, WebP) | refused, or with pages="all" each one |
| CMYK, YCCK, Lab, HSV, signed or 32-bit integers, 12 bits, channels that are no alpha, several pictures in a JPEG (MPO) | refused: ImageUnsupported |

16-bit colour, float TIFF and gray TIFF with alpha multiplied into it need the extra "io". EXIF, XMP, ICC profile and resolution
are kept. Pixels stay in their stored order and the orientation tag stays with them; a TIFF that Pillow decodes is turned upright
by it, and then has no such tag any more. Bit errors that leave a JPEG decodable cannot be noticed.

The limit on pixels, of all frames together, is checked on the headers, before anything is decoded. Pillow's own
`Image.MAX_IMAGE_PIXELS` is neither read nor changed: the decoders are called directly, below the function that would look at
it. (One exception: Pillow's WebP decoder refuses more than twice that number itself, 179 megapixels unless a host changes it.)
"""  # noqa: E501 (a table)

from __future__ import annotations

import contextlib
import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from memnet_fast.errors import ImageCorrupt, ImageError, ImageTooLarge, ImageUnsupported, InputError, MemNetError
from memnet_fast.restore import jpeg, png, tiff
from memnet_fast.restore.encoding import EXTENSIONS, Encoding, encode, write_image
from memnet_fast.restore.metadata import ORIENTATION, Animation, Metadata, metadata_of, tiff_metadata

_log = logging.getLogger("memnet_fast")

__all__ = [
    "EXTENSIONS",
    "MAX_PIXELS",
    "Encoding",
    "Metadata",
    "Source",
    "decode_image",
    "encode",
    "from_array",
    "jpeg_quality",
    "open_image",
    "plain_mode",
    "read_image",
    "to_array",
    "write_image",
]

MAX_PIXELS = 1_000_000_000
PAGES = ("single", "all")
_LARGEST_FLOAT = 8.0


class _Tiff(TiffImagePlugin.TiffImageFile):
    """Without Pillow's own limit, which is not the one that a caller sets here."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.core.new(self.mode, self._tile_size)
        super().load_prepare()


_OPEN: dict[str, Callable[[BinaryIO], Any]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.jpeg_factory,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": _Tiff,
    "BMP": BmpImagePlugin.BmpImageFile,
}
# What a file may be instead: its first bytes, where they stand, and its name in the message that refuses it.
_OTHERS = (
    (b"\xff\xd8\xff\xf7", 0, "JPEG-LS"),
    (b"SPIFF\0", 6, "SPIFF"),  # a JPEG by its first bytes, which holds JPEG-LS
    (b"GIF8", 0, "GIF"),
    (b"8BPS", 0, "PSD"),
    (b"%PDF", 0, "PDF"),
    (b"%!PS", 0, "PostScript"),
    (b"\xff\x4f\xff\x51", 0, "JPEG 2000"),
    (b"jP  \r\n", 4, "JPEG 2000"),
    (b"\xff\x0a", 0, "JPEG XL"),
    (b"JXL \r\n", 4, "JPEG XL"),
    (b"ftypavif", 4, "AVIF"),
    (b"ftypavis", 4, "AVIF"),
    (b"ftyphei", 4, "HEIC"),
    (b"ftypmif1", 4, "HEIF"),
    (b"\x76\x2f\x31\x01", 0, "OpenEXR"),
)
_BAND_BYTES = 1 << 24


@dataclass(frozen=True)
class Source:
    """A decoded file. frames: [H, W, C] each, one unless all pages were asked for. format: a value of EXTENSIONS.
    jpeg_quality: estimated from the tables of a JPEG, else None."""

    frames: tuple[np.ndarray, ...]
    format: str
    metadata: Metadata
    jpeg_quality: int | None = None

    @property
    def pixels(self) -> np.ndarray:
        """The only frame, [H, W, C]. Raises InputError if there are several."""
        if len(self.frames) != 1:
            raise InputError(f"the file has {len(self.frames)} frames, not one")
        return self.frames[0]


def read_image(
    path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, *, pages: str = "single", gray: bool = False
) -> Source:
    """Decodes a file to its last pixel.

    pages: "single" refuses a file of several pages or frames, "all" decodes each. gray: a colour JPEG is decoded straight to
    its luma; files of other formats are not changed by it.
    Raises ImageCorrupt, ImageUnsupported, ImageTooLarge (before decoding), ImageError (cannot be read at all), MissingExtra.
    """
    with open_image(path) as file:
        return decode_image(path, file, max_pixels, pages=pages, gray=gray)


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


def decode_image(
    path: object, file: BinaryIO, max_pixels: int = MAX_PIXELS, *, pages: str = "single", gray: bool = False
) -> Source:
    """As read_image, from the start of an open file; path: its name in messages."""
    if pages not in PAGES:
        raise InputError(f"unknown choice '{pages}' for pages; choose from {', '.join(PAGES)}")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise InputError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this program, so truncated files would pass for whole ones; unset it"
        )
    head = file.read(64)
    kind = _format_of(head)
    if kind is None:
        raise ImageUnsupported(f"{path} {_what_else(head)}")
    if kind == "WEBP":
        _check_size(path, _webp_size(head), max_pixels)  # its decoder allocates the canvas when it opens
    file.seek(0)
    with _errors_of(path):
        if kind == "TIFF":
            return _decode_tiff(path, file, max_pixels, pages)
        image = _OPEN[kind](file)
        count = getattr(image, "n_frames", 1)
        _check_size(path, image.size, max_pixels, count)
        if kind == "JPEG":
            return _decode_jpeg(path, image, gray)
        _check_frames(path, count, pages)
        if kind == "PNG" and _is_deep(image):
            return _decode_deep_png(path, file, image)
        _check_mode(path, image)
        frames, animation = _frames(path, image, count)
        if kind == "PNG":
            png.require_all_rows(file, frames[0], interlaced=bool(image.info.get("interlace")))
            _tell_missing_end(path, file)
        lossless = kind == "WEBP" and _webp_is_lossless(file)
        return Source(frames, kind, replace(metadata_of(image), animation=animation, lossless=lossless))


@contextlib.contextmanager
def _errors_of(path: object) -> Iterator[None]:
    """Whatever a decoder raises -> an error that names the file."""
    try:
        with warnings.catch_warnings():
            # Oddities of metadata are no reason to print, and never an error, whatever filter the host has set.
            warnings.simplefilter("ignore")
            yield
    except ImageError as error:
        text = str(error)
        raise type(error)(text if str(path) in text else f"{path}: {text}") from error
    except MemNetError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{path}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, RuntimeError) as error:
        text = _one_line(error)
        if text.startswith("cannot handle"):  # a JPEG of 12 bits, or of 2 channels
            raise ImageUnsupported(f"{path}: {text.removeprefix('cannot handle ')} of JPEG are not restored") from error
        if text == "unknown pixel mode":  # of a TIFF
            raise ImageUnsupported(f"{path} has a kind of pixels that is not restored; convert it to gray or RGB") from error
        raise ImageCorrupt(f"{path} is damaged or cut off: {text}") from error
    except (IndexError, KeyError, TypeError, OverflowError, AttributeError, ArithmeticError, AssertionError) as error:
        # Parsers meet a damaged header with whatever exception comes first.
        raise ImageCorrupt(f"{path} has a header that cannot be read: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# Formats -------------------------------------------------------------------------------------------------------------


def _format_of(head: bytes) -> str | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff") and head[3:4] != b"\xf7" and head[6:12] != b"SPIFF\0":
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    return "BMP" if head[:2] == b"BM" else None


def _what_else(head: bytes) -> str:
    if not head:
        return "is empty"
    other = next((name for magic, at, name in _OTHERS if head[at:].startswith(magic)), None)
    return f"is not a PNG, JPEG, WebP, TIFF or BMP image{f', but {other}' if other else ''}"


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


def _webp_is_lossless(file: BinaryIO) -> bool:
    """Whether the first picture of a WebP file that could be decoded is stored without loss."""
    at = 12
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return False
        if head[:4] == b"ANMF":
            at += 8 + 16  # what the frame consists of follows its header
            continue
        if head[:4] in (b"VP8L", b"VP8 "):
            return head[:4] == b"VP8L"
        size = int.from_bytes(head[4:], "little")
        at += 8 + size + size % 2


def _check_size(path: object, size: tuple[int, int], max_pixels: int, count: int = 1) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageCorrupt(f"{path} has no pixels: {width} x {height}")
    if width * height * count > max_pixels:
        each = f"{count} frames of " if count > 1 else ""
        raise ImageTooLarge(f"{path} has {each}{width} x {height} pixels, more than the limit of {max_pixels}")


def _check_frames(path: object, count: int, pages: str) -> None:
    if count > 1 and pages != "all":
        raise ImageUnsupported(f"{path} has {count} frames; pages 'all' restores each of them, 'single' none")


def _check_mode(name: object, image: Any) -> None:
    """What can be said of one frame before decoding it."""
    if image.mode == "La":
        return
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16L", "I;16B"):
        raise ImageUnsupported(f"{name} has mode {image.mode}, which is not restored; convert it to gray or RGB")


# Decoding ------------------------------------------------------------------------------------------------------------


def _decode_jpeg(path: object, image: Any, gray: bool) -> Source:
    if getattr(image, "n_frames", 1) > 1:
        raise ImageUnsupported(f"{path} holds {image.n_frames} frames as MPO, several pictures in a JPEG; extract them first")
    _check_mode(path, image)
    if gray:
        image.draft("L", None)
    image.load()
    return Source((to_array(image),), "JPEG", metadata_of(image), jpeg.quality_of(image))


def _is_deep(image: Any) -> bool:
    """Whether a PNG has samples of 16 bits that Pillow would cut to 8."""
    raw = [tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0] for tile in image.tile or ()]
    clear = image.mode.startswith("I") and "transparency" in image.info
    return clear or (not image.mode.startswith("I") and any(isinstance(r, str) and ";16" in r for r in raw))


def _decode_deep_png(path: object, file: BinaryIO, image: Any) -> Source:
    if getattr(image, "n_frames", 1) > 1:
        raise ImageUnsupported(f"{path} is animated with 16 bits for each channel, which is not restored")
    png.imagecodecs()
    image.load()  # metadata may stand behind the pixels
    file.seek(0)
    pixels = png.decode(file.read())
    if pixels.dtype != np.uint16 or pixels.shape[:2] != image.size[::-1]:
        raise ImageCorrupt(f"two decoders disagree: {list(pixels.shape)} {pixels.dtype}")
    _tell_missing_end(path, file)
    return Source((pixels,), "PNG", metadata_of(image))


def _tell_missing_end(path: object, file: BinaryIO) -> None:
    if not png.has_end(file):
        _log.warning("%s: its end is missing (IEND), but none of its pixels", path)


def _frames(path: object, image: Any, count: int) -> tuple[tuple[np.ndarray, ...], Animation | None]:
    """All frames of a PNG, WebP or BMP, of one kind."""
    if count == 1:
        image.load()
        return (to_array(plain_mode(image, str(path))),), None
    found, durations = [], []
    loop, default = int(image.info.get("loop", 0)), bool(image.info.get("default_image", False))
    for i in range(count):
        image.seek(i)
        image.load()
        found.append(plain_mode(image.copy(), str(path)))  # a copy no longer knows of other frames
        # An APNG's default image has no time.
        durations.append(float(image.info.get("duration", 0) or 0))
    modes = {frame.mode for frame in found}
    widest = next(mode for mode in ("RGBA", "RGB", "LA", "L", *modes) if mode in modes)
    if widest == "RGB" and "LA" in modes:
        widest = "RGBA"
    frames = tuple(to_array(frame if frame.mode == widest else frame.convert(widest)) for frame in found)
    return frames, Animation(tuple(durations), loop, default)


def _decode_tiff(path: object, file: BinaryIO, max_pixels: int, pages: str) -> Source:
    found = tiff.pages(file)
    if not found:
        raise ImageCorrupt(f"{path} has no directory")
    if found[0].is_preview:
        raise ImageUnsupported(f"{path} begins with a preview, as camera raw files do; develop it first")
    total = 0
    for page in found:
        _check_size(path, page.size, max_pixels)
        total += page.size[0] * page.size[1]
    _check_frames(path, len(found), pages)
    if total > max_pixels:
        raise ImageTooLarge(f"{path} has {len(found)} pages of {total} pixels together, more than the limit of {max_pixels}")
    for i, page in enumerate(found):
        reason = page.refusal()
        if reason:
            where = f" on page {i + 1}" if len(found) > 1 else ""
            raise ImageUnsupported(f"{path} has {reason}{where}; convert it first")
    frames, metadata = [], None
    for i, page in enumerate(found):
        if page.by_pillow:
            file.seek(0)
            image: Any = _OPEN["TIFF"](file)
            image.seek(i)
            # The size that Pillow will allocate must be the one that was checked.
            if image.size not in (page.size, page.size[::-1]):
                raise ImageCorrupt(f"{path} has directories that contradict each other")
            _check_mode(path, image)
            turned = image.tag_v2.get(ORIENTATION, 1) in (5, 6, 7, 8)
            image.load()
            frames.append(to_array(plain_mode(image.copy() if len(found) > 1 else image, str(path))))
            own = metadata_of(image) if i == 0 else None
            if own is not None and own.dpi is not None and turned:
                own = replace(own, dpi=own.dpi[::-1])
        else:
            pixels = tiff.decode(file, i, page)
            if pixels.shape[:2] != page.size[::-1]:
                raise ImageCorrupt(f"{path} has pixels of another size than its directory says")
            if pixels.dtype.kind == "f":
                _check_floats(path, pixels)
            frames.append(pixels)
            file.seek(0)
            own = tiff_metadata(file, file.read(8), page.tags, page.offset) if i == 0 else None
        metadata = metadata or own
    return Source(tuple(frames), "TIFF", metadata or Metadata())


def _check_floats(path: object, pixels: np.ndarray) -> None:
    low, high = float(pixels.min()), float(pixels.max())  # both hand NaN on
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageUnsupported(f"{path} contains NaN or infinity")
    if max(-low, high) > _LARGEST_FLOAT:
        raise ImageUnsupported(
            f"{path} has values from {low:.4g} to {high:.4g}; floats are images with black at 0 and white at 1: scale it first"
        )


# PIL images and arrays -----------------------------------------------------------------------------------------------


def plain_mode(image: Image.Image, name: str = "image") -> Image.Image:
    """The image in mode L, LA, RGB, RGBA, I;16 or I;16B, by the rules in this module's table; loads it.

    Raises ImageUnsupported for other modes and for several frames.
    """
    count = getattr(image, "n_frames", 1)
    if count > 1:
        raise ImageUnsupported(f"{name} has {count} frames; give them one by one")
    _check_mode(name, image)
    if (isinstance(image, PngImagePlugin.PngImageFile) and _is_deep(image)) or max(
        getattr(image, "tag_v2", {}).get(258, ()), default=8
    ) > (16 if image.mode.startswith("I") else 8):
        raise ImageUnsupported(
            f"{name} has more than 8 bits for each channel, which PIL cuts off; read the file with read_image"
        )
    mode, clear = image.mode, "transparency" in image.info
    if mode in ("I;16", "I;16L", "I;16B"):
        if clear:
            raise ImageUnsupported(f"{name} has mode {mode} with a transparent colour, which is not restored")
        return image
    if mode in ("L", "LA", "RGB", "RGBA") and not clear:
        return image
    if mode in ("P", "PA"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if mode in ("1", "L"):
        return image.convert("LA" if clear else "L")
    return image.convert("LA" if mode in ("LA", "La") else "RGBA")


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels [H, W, C] of an image in a plain mode: uint8, or native uint16."""
    # In bands: PIL hands pixels out through copies, of the whole image three at once.
    step = max(1, min(image.height, _BAND_BYTES // (4 * max(1, image.width))))
    band = Image.new(image.mode, (image.width, step))
    first = np.asarray(band)
    out = np.empty((image.height, image.width, *first.shape[2:]), first.dtype.newbyteorder("="))
    for top in range(0, image.height, step):
        band.paste(image, (0, -top))  # not crop, which asks for Pillow's limit
        out[top : top + step] = np.asarray(band)[: image.height - top]
    return out[..., None] if out.ndim == 2 else out


def from_array(pixels: np.ndarray) -> Image.Image:
    """pixels: [H, W, C], uint8, or uint16 with one channel -> a new image in mode L, LA, RGB, RGBA or I;16."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def jpeg_quality(image: str | os.PathLike[str] | Image.Image) -> int | None:
    """The quality 1..100 of a JPEG on the usual scale (libjpeg's), estimated from its quantisation table for luma; exact where
    the encoder scales the standard's table. Nothing is decoded.

    image: a path, or an image that PIL opened. None for an image of another format. Raises ImageError for a path that cannot be
    read, ImageCorrupt for a damaged header.
    """
    if isinstance(image, Image.Image):
        return jpeg.quality_of(image)
    with open_image(image) as file:
        if _format_of(file.read(64)) != "JPEG":
            return None
        file.seek(0)
        with _errors_of(image):
            return jpeg.quality_of(_OPEN["JPEG"](file))

"""Results as image files."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from memnet_fast.errors import ImageUnsupported, InputError, OutputError
from memnet_fast.files import make_folder, write_whole
from memnet_fast.restore import png, tiff
from memnet_fast.restore.metadata import Animation, Metadata

EXTENSIONS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
# Channels and kinds of samples (as numpy names them) that a format holds.
_HOLDS = {
    "PNG": ((1, 2, 3, 4), ("u1", "u2")),
    "TIFF": ((1, 2, 3, 4), ("u1", "u2", "f2", "f4", "f8")),
    "WEBP": ((1, 2, 3, 4), ("u1",)),
    "JPEG": ((1, 3), ("u1",)),
    "BMP": ((1, 3), ("u1",)),  # a fourth channel is written, but not read back as alpha
}
_ANIMATED = ("PNG", "WEBP")
_COLOURS = {1: "gray", 2: "gray with alpha", 3: "RGB", 4: "RGB with alpha"}
_SAMPLES = {"u1": "8-bit ", "u2": "16-bit ", "f2": "float ", "f4": "float ", "f8": "float "}


@dataclass(frozen=True)
class Encoding:
    """How results are written. quality: 1..100 for JPEG (colour without subsampling) and lossy WebP; png_level: 0..9.
    A WebP that was lossless stays so."""

    quality: int = 95
    png_level: int = 6

    def __post_init__(self) -> None:
        for name, low, high in (("quality", 1, 100), ("png_level", 0, 9)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


_DEFAULT_ENCODING, _NO_METADATA = Encoding(), Metadata()


def encode(
    pixels: np.ndarray | Sequence[np.ndarray],
    format: str,
    encoding: Encoding = _DEFAULT_ENCODING,
    metadata: Metadata = _NO_METADATA,
) -> bytes | memoryview:
    """The bytes of a file.

    pixels: [H, W] or [H, W, C], uint8, uint16 or floats, or a sequence of them (TIFF: pages; PNG and WebP: frames of one size).
    format: a value of EXTENSIONS. WebP has no gray: it is written as equal channels; colour below alpha 0 is kept, except in an
    animated WebP, whose encoder has no such choice.
    Raises ImageUnsupported for what the format cannot hold, OutputError if the encoder fails, MissingExtra.
    """
    frames = [np.asarray(p) for p in ((pixels,) if isinstance(pixels, np.ndarray) else pixels)]
    frames = [p.astype(p.dtype.newbyteorder("="), copy=False) for p in frames]
    frames = [p[..., None] if p.ndim == 2 else p for p in frames]
    for p in frames:
        _check_holds(format, p)
    if len(frames) > 1 and format not in (*_ANIMATED, "TIFF"):
        raise ImageUnsupported(f"{format} cannot hold {len(frames)} frames; write TIFF, PNG or WebP instead")
    h, w, channels = frames[0].shape
    metadata = metadata.fitting(w, h, channels)
    try:
        if format == "TIFF":
            return tiff.encode(frames, metadata)
        deep = format == "PNG" and frames[0].dtype.itemsize == 2
        if deep and len(frames) > 1:  # of gray, Pillow would write the first frame alone, without a word
            raise ImageUnsupported("PNG cannot hold an animation of 16 bits here; write TIFF instead")
        if deep and channels > 1:
            return png.encode(frames[0], encoding.png_level, metadata)
        return _by_pillow(frames, format, encoding, metadata)
    except (OSError, ValueError, RuntimeError, struct.error, KeyError, TypeError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        text = " ".join(str(error).split())[:200]
        raise OutputError(f"cannot encode the result as {format}: {text}") from error


def _check_holds(format: str, pixels: np.ndarray) -> None:
    channels, samples = _HOLDS[format]
    if pixels.ndim != 3 or pixels.shape[-1] not in _COLOURS or pixels.dtype.str[1:] not in _SAMPLES or pixels.size == 0:
        raise InputError(f"expected an image [H, W, 1 to 4], uint8, uint16 or floats, got {list(pixels.shape)} {pixels.dtype}")
    count, kind = pixels.shape[-1], pixels.dtype.str[1:]
    if count in channels and kind in samples:
        return
    instead = [name for name, (c, s) in _HOLDS.items() if count in c and kind in s and name not in ("BMP", format)]
    text = " or ".join(", ".join(instead).replace("WEBP", "WebP").rsplit(", ", 1))
    raise ImageUnsupported(f"{format} cannot hold {_SAMPLES[kind]}{_COLOURS[count]}; write {text} instead")


def _by_pillow(frames: Sequence[np.ndarray], format: str, encoding: Encoding, metadata: Metadata) -> memoryview:
    values: dict[str, Any] = {}
    if format == "JPEG":
        values = {"quality": encoding.quality, "subsampling": 0}
    elif format == "WEBP":
        # exact: colour below alpha 0 is kept, as in the other formats.
        values = {"quality": encoding.quality, "lossless": metadata.lossless, "exact": True}
    elif format == "PNG":
        values = {"compress_level": encoding.png_level}
    if format != "BMP":
        values |= {"icc_profile": metadata.icc, "exif": metadata.exif, "xmp": metadata.xmp}
    if format != "WEBP":
        values["dpi"] = metadata.dpi
    values = {name: value for name, value in values.items() if value is not None}
    if format == "PNG" and metadata.xmp:
        # Pillow would leave it out.
        info = PngImagePlugin.PngInfo()
        info.add(b"iTXt", png.XMP.encode() + b"\0\0\0\0\0" + metadata.xmp)
        values["pnginfo"] = info
    if len(frames) > 1:
        values |= _animation(frames, format, metadata.animation)
    buffer = io.BytesIO()
    _image(frames[0]).save(buffer, format, **values)
    return buffer.getbuffer()


def _animation(frames: Sequence[np.ndarray], format: str, animation: Animation | None) -> dict[str, Any]:
    animation = animation or Animation((100.0,) * len(frames))
    if len({p.shape for p in frames}) > 1:
        raise ImageUnsupported(f"{format} cannot hold frames of different sizes; write TIFF instead")
    rest = [_image(p) for p in frames[1:]]
    values: dict[str, Any] = {"save_all": True, "append_images": rest, "loop": animation.loop}
    durations = list(animation.durations)
    if format == "PNG" and animation.default_image:
        values["default_image"], durations = True, durations[1:]
    values["duration"] = durations
    return values


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def write_image(
    path: Path,
    pixels: np.ndarray | Sequence[np.ndarray],
    format: str,
    encoding: Encoding = _DEFAULT_ENCODING,
    metadata: Metadata = _NO_METADATA,
) -> None:
    """Writes a file whole or not at all; makes its folder. Arguments and errors as for `encode`, and OutputError."""
    data = encode(pixels, format, encoding, metadata)
    make_folder(path.parent)
    write_whole(path, data)

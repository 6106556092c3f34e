"""EXIF, XMP, ICC profile and resolution, from every format to every format."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from support.restoring import picture, small_net

from memnet_fast.restore import Restorer, images
from memnet_fast.restore.metadata import Metadata

_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF>\xc3\xbc</rdf:RDF></x:xmpmeta>'
_ORIENTATION, _ARTIST, _EXPOSURE, _WIDTH, _HEIGHT, _NOTE = 274, 315, 33434, 40962, 40963, 37500


def profile(space: bytes) -> bytes:
    return bytes(16) + space + bytes(range(200)) * 2


def exif(width: int = 30, height: int = 20, orientation: int = 1) -> bytes:
    made, loaded = Image.Exif(), Image.Exif()
    made[_ARTIST], made[_ORIENTATION] = "somebody", orientation
    part = made.get_ifd(34665)
    part[_EXPOSURE] = TiffImagePlugin.IFDRational(1, 250)
    part[_WIDTH], part[_HEIGHT], part[_NOTE] = width, height, b"private notes"
    loaded.load(made.tobytes())
    return loaded.tobytes()


def reread(pixels: np.ndarray, format: str, metadata: Metadata) -> images.Source:
    return images.decode_image("a", io.BytesIO(images.encode(pixels, format, metadata=metadata)))


def parts(data: bytes | None) -> tuple:
    values = Image.Exif()
    values.load(data or b"")
    part = values.get_ifd(34665)
    return values.get(_ARTIST), part.get(_EXPOSURE), part.get(_NOTE)


@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [(a, b, np.uint8) for a in ("PNG", "TIFF", "JPEG", "WEBP") for b in ("PNG", "TIFF", "JPEG", "WEBP")]
    + [(a, b, np.uint16) for a in ("PNG", "TIFF") for b in ("PNG", "TIFF")],
)
def test_everything_goes_from_format_to_format(first, second, dtype):
    if dtype is np.uint16:
        pytest.importorskip("tifffile")
    pixels = picture((20, 30, 3), dtype)
    made = Metadata(exif(), profile(b"RGB "), (300.0, 200.0), _XMP)
    once = reread(pixels, first, made)
    kept = reread(pixels, second, once.metadata).metadata
    assert kept.xmp == _XMP and kept.icc == profile(b"RGB ")
    assert parts(kept.exif) == ("somebody", TiffImagePlugin.IFDRational(1, 250), b"private notes")
    if "WEBP" not in (first, second):  # it has no resolution
        assert kept.dpi == pytest.approx((300, 200), abs=0.02)
    if "TIFF" not in (first, second):
        assert kept.exif == made.exif, "byte by byte"


@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("kind", ["short", "long"])
def test_the_size_in_exif_follows_the_image_and_nothing_else_changes(kind, order):
    o = "<" if order == "little" else ">"
    code, width = (3, struct.pack(o + "HH", 30, 0)) if kind == "short" else (4, struct.pack(o + "I", 30))
    note = b"notes with offsets"
    main = struct.pack(o + "HHHI", 1, 34665, 4, 1) + struct.pack(o + "II", 26, 0)
    part = struct.pack(o + "HHHI", 2, _NOTE, 7, len(note)) + struct.pack(o + "I", 26 + 2 + 24 + 4)
    part += struct.pack(o + "HHI", _WIDTH, code, 1) + width + struct.pack(o + "I", 0) + note
    data = b"Exif\0\0" + (b"II*\0" if order == "little" else b"MM\0*") + struct.pack(o + "I", 8) + main + part + b"thumbnail"
    changed = Metadata(data).fitting(70_000, 20, 3).exif
    assert changed is not None and len(changed) == len(data) and changed.endswith(note + b"thumbnail")
    values = Image.Exif()
    values.load(changed)
    assert values.get_ifd(34665)[_WIDTH] == 70_000 and values.get_ifd(34665)[_NOTE] == note
    assert Metadata(data).fitting(30, 20, 3).exif == data


@pytest.mark.parametrize("size", range(0, 60, 7))
def test_damaged_exif_is_left_as_it_is(size):
    broken = exif()[:size]
    assert Metadata(broken).fitting(99, 99, 3).exif == broken or size > 14
    loop = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 34665, 4, 1, 8) + bytes(4)
    assert Metadata(loop).fitting(9, 9, 3).exif == loop


def test_after_super_resolution_exif_states_the_new_size_and_the_resolution_stays():
    metadata = Metadata(exif(), None, (300.0, 300.0), None)
    large = Restorer("sr", scale=2, model=small_net())(picture((20, 30, 3)))
    kept = reread(large, "JPEG", metadata).metadata
    values = Image.Exif()
    values.load(kept.exif)
    assert (values.get_ifd(34665)[_WIDTH], values.get_ifd(34665)[_HEIGHT]) == (60, 40) and values[_ARTIST] == "somebody"
    assert kept.dpi == (300, 300)


@pytest.mark.parametrize(("space", "channels", "kept"), [(b"RGB ", 1, False), (b"GRAY", 3, False), (b"GRAY", 1, True)])
def test_a_profile_of_another_colour_space_is_not_attached(space, channels, kept):
    result = reread(picture((5, 6, channels)), "PNG", Metadata(icc=profile(space))).metadata
    assert result.icc == (profile(space) if kept else None)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_the_resolution_of_a_tiff_turns_with_it(orientation):
    file = io.BytesIO()
    tags = Image.Exif()
    tags[_ORIENTATION] = orientation
    Image.fromarray(picture((12, 20, 3))).save(file, "TIFF", exif=tags, dpi=(300, 100))
    file.seek(0)
    source = images.decode_image("a", file)
    assert source.pixels.shape == (20, 12, 3) and source.metadata.dpi == (100, 300)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_16_bit_tiff_keeps_its_order_and_its_tag(orientation):
    """So it looks upright once, like an 8-bit one, which is turned."""
    tifffile = pytest.importorskip("tifffile")
    pixels, file = picture((12, 20, 3), np.uint16), io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", extratags=[(_ORIENTATION, 3, 1, orientation, True)])
    file.seek(0)
    source = images.decode_image("a", file)
    assert np.array_equal(source.pixels, pixels)
    again = reread(source.pixels, "TIFF", source.metadata)
    assert np.array_equal(again.pixels, pixels)
    values = Image.Exif()
    values.load(again.metadata.exif or b"")
    assert values.get(_ORIENTATION, 1) == orientation


def test_lossless_webp_stays_lossless_with_hidden_colour():
    pixels = picture((20, 30, 4))
    pixels[:5, :, 3] = 0
    source = reread(pixels, "WEBP", Metadata(lossless=True))
    assert source.metadata.lossless and np.array_equal(source.pixels, pixels)
    lossy = reread(pixels, "WEBP", Metadata())
    assert not lossy.metadata.lossless and np.array_equal(lossy.pixels[..., 3], pixels[..., 3])


def test_pil_images_carry_xmp_and_the_new_size():
    image = Image.fromarray(picture((20, 30, 3)))
    image.info.update(xmp=_XMP, exif=exif(), dpi=(72, 72))
    result = Restorer("sr", scale=3, model=small_net())(image)
    assert result.size == (90, 60) and result.info["xmp"] == _XMP and result.info["dpi"] == (72, 72)
    values = Image.Exif()
    values.load(result.info["exif"])
    assert values.get_ifd(34665)[_WIDTH] == 90

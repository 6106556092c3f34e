"""16-bit colour and floats: PNG and TIFF read and written bit by bit, held against tifffile and libpng."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pngs import chunk, png, rows
from support.restoring import picture, small_net

from memnet_fast.errors import ImageCorrupt, ImageTooLarge, ImageUnsupported, MissingExtra, OutputError
from memnet_fast.restore import Restorer, images, tiff

tifffile = pytest.importorskip("tifffile")
imagecodecs = pytest.importorskip("imagecodecs")

_GRAY, _RGB = {"photometric": "minisblack"}, {"photometric": "rgb"}


def tif(pixels: np.ndarray, **options) -> io.BytesIO:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file


def read(file: io.BytesIO | bytes, **options) -> images.Source:
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    file.seek(0)
    return images.decode_image("x", file, **options)


def noise(shape: tuple[int, ...], dtype: type = np.uint16) -> np.ndarray:
    """All values of the type, also 0 and its largest."""
    return np.random.default_rng(5).integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png_keeps_all_bits(colour, channels):
    pixels = noise((6, 5, channels))
    source = read(png(5, 6, rows(pixels.astype(">u2")), depth=16, colour=colour))
    assert source.pixels.dtype == np.uint16 and np.array_equal(source.pixels, pixels)
    data = bytes(images.encode(pixels, "PNG"))
    assert data[24:26] == bytes([16, colour]), "depth and colour type"
    assert np.array_equal(imagecodecs.png_decode(data).reshape(pixels.shape), pixels)
    assert np.array_equal(read(data).pixels, pixels)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_a_transparent_colour_of_16_bits_becomes_alpha(colour, channels):
    pixels = noise((6, 5, channels))
    clear = struct.pack(f">{channels}H", *pixels[2, 3].tolist())
    result = read(png(5, 6, rows(pixels.astype(">u2")), depth=16, colour=colour, extra=chunk(b"tRNS", clear))).pixels
    assert np.array_equal(result[..., :channels], pixels)
    assert result[2, 3, -1] == 0 and (result[..., -1] == 65535).sum() == 29


def test_png_level_of_16_bit_colour():
    flat = np.tile(np.arange(64, dtype=np.uint16)[:, None], (64, 1, 3))
    sizes = [len(images.encode(flat, "PNG", images.Encoding(png_level=level))) for level in (0, 9)]
    assert sizes[0] > 2 * sizes[1]


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize(
    "options",
    [{}, {"tile": (16, 16)}, {"rowsperstrip": 5}, {"planarconfig": "separate"}, {"byteorder": ">"}, {"bigtiff": True}],
)
def test_16_bit_tiff_of_another_program(compression, options):
    pixels = noise((37, 41, 3))
    stored = np.moveaxis(pixels, -1, 0) if "planarconfig" in options else pixels
    for predictor in (False, True) if compression in ("zlib", "lzw", "zstd", "lzma") else (False,):
        source = read(tif(stored, compression=compression, predictor=predictor, **_RGB, **options))
        assert source.pixels.dtype == np.uint16 and np.array_equal(source.pixels, pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (700, 1), (33, 29)])
def test_every_kind_is_written_as_tiff_that_others_read(size, channels, dtype):
    pixels = noise((*size, channels), dtype) if np.dtype(dtype).kind == "u" else picture((*size, channels), dtype) * 3 - 1
    data = bytes(images.encode(pixels, "TIFF"))
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        page = opened.pages[0]
        other = page.asarray().reshape(pixels.shape)
        assert other.dtype == pixels.dtype and np.array_equal(other, pixels)
        assert page.photometric == (1 if channels < 3 else 2)
        assert [int(e) for e in page.extrasamples] == ([2] if channels in (2, 4) else [])
    if np.dtype(dtype).kind == "u" and (np.dtype(dtype).itemsize == 1 or channels == 1):
        with Image.open(io.BytesIO(data)) as opened:
            assert np.array_equal(np.asarray(opened).reshape(pixels.shape), pixels)
    result = read(data).pixels
    assert result.dtype == pixels.dtype and np.array_equal(result, pixels)


def test_strips_of_a_large_tiff_join():
    pixels = noise((700, 1000, 3))
    assert np.array_equal(read(bytes(images.encode(pixels, "TIFF"))).pixels, pixels)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_float_tiff_is_restored_without_clipping(channels, dtype):
    pixels = picture((20, 21, channels), dtype)
    pixels[3, 4, 0], pixels[5, 6, 0] = -0.25, 1.25
    extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    stored = pixels[..., 0] if channels == 1 else pixels
    source = read(tif(stored, compression="zlib", **(_GRAY if channels == 1 else _RGB), **extra))
    assert source.pixels.dtype == dtype and np.array_equal(source.pixels, pixels)
    restored = Restorer(model=small_net())(source.pixels)
    assert np.array_equal(read(bytes(images.encode(restored, "TIFF"))).pixels, restored)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused(value):
    pixels = picture((5, 6, 3), np.float32)
    pixels[4, 5, 2] = value
    with pytest.raises(ImageUnsupported, match="NaN or infinity"):
        read(tif(pixels, **_RGB))


def test_floats_of_0_to_255_are_refused_by_their_range():
    with pytest.raises(ImageUnsupported, match=r"values from 51\.\d+ to 203\.\d+; floats are images with black at 0"):
        read(tif(picture((50, 60), np.float32) * 255, **_GRAY))


def test_white_is_0():
    for dtype in (np.uint8, np.uint16):
        pixels = noise((7, 9), dtype)
        assert np.array_equal(read(tif(pixels, photometric="miniswhite")).pixels[..., 0], np.iinfo(dtype).max - pixels)
    with pytest.raises(ImageUnsupported, match="floats in which white is 0"):
        read(tif(picture((7, 9), np.float32), photometric="miniswhite"))


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_alpha_is_not_turned_where_white_is_0(kind):
    pixels = noise((7, 9, 2))
    pixels[..., 1] = 65535
    pixels[2, 3, 1] = 0
    pixels[2, 3, 0] = 0
    source = read(tif(pixels, photometric="miniswhite", planarconfig="contig", extrasamples=[kind]))
    assert np.array_equal(source.pixels, np.stack([65535 - pixels[..., 0], pixels[..., 1]], -1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [2, 4])
def test_premultiplied_alpha_is_divided_out_and_alpha_keeps_its_bits(channels, dtype):
    scale = 1 if dtype is np.float32 else np.iinfo(dtype).max
    straight = np.full((6, 8, channels), 0.5 * scale)
    straight[..., -1] = np.linspace(0, scale, 8)
    stored = straight.copy()
    stored[..., :-1] *= straight[..., -1:] / scale
    if scale > 1:
        stored = np.rint(stored)
    file = tif(stored.astype(dtype), extrasamples=["assocalpha"], planarconfig="contig", **(_RGB if channels == 4 else _GRAY))
    result = read(file).pixels
    assert result.shape == stored.shape and np.array_equal(result[..., -1], stored[..., -1].astype(dtype))
    assert (result[:, 0, :-1] == 0).all(), "nothing is known of colour below alpha 0"
    bright = result[:, 1:, :-1].astype(np.float64) / scale
    assert np.abs(bright - 0.5).max() < {np.uint8: 0.02, np.uint16: 1e-4, np.float32: 1e-6}[dtype]


@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (noise((9, 7, 4)), {"photometric": "separated"}, "4 channels with photometric interpretation 5"),
        (noise((9, 7, 4)), {**_RGB, "extrasamples": ["unspecified"]}, "channels beyond colour that are no alpha"),
        (noise((9, 7, 4), np.uint8), {**_RGB, "extrasamples": ["unspecified"]}, "channels beyond colour"),
        (noise((9, 7, 5)), {**_RGB, "extrasamples": ["unassalpha", "unspecified"]}, "channels beyond colour"),
        (noise((9, 7, 2), np.uint8), {"photometric": "miniswhite", "extrasamples": ["unassalpha"]}, "a kind of pixels"),
        (noise((9, 7)).astype(np.int16), {}, "signed"),
        (noise((9, 7), np.uint8).astype(np.int8), {}, "signed"),
        (noise((9, 7)).astype(np.uint32), {}, "32 bits"),
        (noise((9, 7)).astype(np.complex64), {}, "complex"),
        (noise((16, 32, 32)), {"volumetric": True, "tile": (16, 16, 16)}, "a volume"),
        (noise((9, 7, 3)), {**_RGB, "compression": "jpeg2000"}, "compression 34712 with 16 bits"),
        (noise((9, 7, 3), np.uint8), {**_RGB, "compression": "jpeg2000"}, "compression 34712 with 8 bits"),
    ],
)
def test_tiff_that_would_lose_something_is_refused(pixels, options, reason):
    with pytest.raises(ImageUnsupported, match=reason):
        read(tif(pixels, **options))


def test_camera_raw_is_not_restored_as_its_preview():
    file = tif(noise((9, 7, 3), np.uint8), subfiletype=1, **_RGB)
    for pages in ("single", "all"):
        with pytest.raises(ImageUnsupported, match="begins with a preview"):
            read(file, pages=pages)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for kind in (0, 1):
            writer.write(noise((9, 7, 3)), subfiletype=kind, **_RGB)
    assert len(read(file, pages="all").frames) == 2, "a smaller copy behind the image is a page like any other"


def test_big_endian_arrays_are_written_like_others():
    pixels = noise((6, 5, 3))
    for format in ("PNG", "TIFF"):
        assert np.array_equal(read(bytes(images.encode(pixels.astype(">u2"), format))).pixels, pixels)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.97])
def test_truncated_16_bit_tiff_is_corrupt(compression, keep):
    data = tif(noise((37, 41, 3)), compression=compression, **_RGB).getvalue()
    with pytest.raises(ImageCorrupt, match="x"):
        read(data[: int(len(data) * keep)])


def _with_strip(strip: bytes) -> bytes:
    """A file of 4 x 4 pixels, 16 bits, whose only strip is replaced."""
    data = bytearray(images.encode(noise((4, 4, 3)), "TIFF"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as opened:
        tags = opened.pages[0].tags
    struct.pack_into("<I", data, tags[273].valueoffset, len(data))
    struct.pack_into("<I", data, tags[279].valueoffset, len(strip))
    return bytes(data) + strip


def test_strips_that_hold_too_little_or_far_too_much_are_corrupt():
    assert read(_with_strip(zlib.compress(bytes(96)))).pixels.shape == (4, 4, 3)
    for strip in (zlib.compress(bytes(50)), zlib.compress(bytes(300_000_000))):
        with pytest.raises(ImageCorrupt):
            read(_with_strip(strip))


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99])
def test_damaged_16_bit_png_is_corrupt(keep):
    data = bytes(images.encode(noise((64, 64, 3)), "PNG"))
    with pytest.raises(ImageCorrupt):
        read(data[: int(len(data) * keep)])
    flipped = bytearray(data)
    flipped[int(len(data) * keep)] ^= 16
    with pytest.raises(ImageCorrupt):
        read(bytes(flipped))


def test_limits_hold_for_16_bits_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(images.png, "decode", lambda data: pytest.fail("decoded"))
    monkeypatch.setattr(tiff, "decode", lambda *a: pytest.fail("decoded"))
    with pytest.raises(ImageTooLarge, match="40000 x 30000"):
        read(png(40_000, 30_000, b"", depth=16, colour=2))
    with pytest.raises(ImageTooLarge, match="21 x 20 pixels, more than the limit of 400"):
        read(tif(noise((20, 21, 3)), **_RGB), max_pixels=400)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_damage_anywhere_gives_an_error_of_ours_or_an_image(kind):
    data = bytes(images.encode(noise((16, 16, 3)), kind.upper()))
    random, refused = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(data)
        for at in random.integers(2, min(len(data), 400), 4):
            damaged[at] = random.integers(256)
        try:
            read(bytes(damaged[: random.integers(8, len(data) + 1)]), max_pixels=1 << 20)
        except (ImageCorrupt, ImageUnsupported, ImageTooLarge):
            refused += 1
    assert refused > 75


def test_a_missing_extra_is_named(monkeypatch):
    deep_png, deep_tiff = png(5, 6, rows(noise((6, 5, 3), ">u2")), depth=16, colour=2), tif(noise((6, 5, 3)), **_RGB)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    for file in (deep_png, deep_tiff):
        with pytest.raises(MissingExtra, match=r"pip install 'memnet-fast\[io\]'"):
            read(file)
    with pytest.raises(MissingExtra, match=r"\[io\]"):
        images.encode(noise((6, 5, 3)), "PNG")
    assert len(images.encode(noise((6, 5)), "PNG")) and len(images.encode(noise((6, 5, 3)), "TIFF")), "these need nothing more"


def test_more_than_a_tiff_can_hold_is_an_output_error(monkeypatch):
    monkeypatch.setattr(tiff, "_strips", lambda pixels: ([_Huge()], len(pixels)))
    with pytest.raises(OutputError, match="larger than the 4 GiB"):
        images.encode(np.zeros((4, 4, 3), np.uint16), "TIFF")


class _Huge(bytes):
    def __len__(self) -> int:
        return 1 << 32


def test_a_file_is_16_bit_from_end_to_end(tmp_path: Path):
    pixels = picture((20, 24, 3), np.uint16)
    images.write_image(tmp_path / "a.png", pixels, "PNG")
    restored = Restorer(model=small_net())(images.read_image(tmp_path / "a.png").pixels)
    images.write_image(tmp_path / "b.tif", restored, "TIFF")
    assert np.array_equal(images.read_image(tmp_path / "b.tif").pixels, Restorer(model=small_net())(pixels))

"""Hostile and odd image files (rows I01 to I39 of the project's list), from file to file: the right result, or our error."""

from __future__ import annotations

import io
import itertools
import os
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from support.pngs import chunk, png, rows
from support.restoring import picture, small_net

from memnet_fast.errors import ImageCorrupt, ImageError, ImageTooLarge, ImageUnsupported, InputError
from memnet_fast.restore import Restorer, images

_ORIENTATION = 274


@pytest.fixture(scope="module")
def restorer():
    return Restorer(model=small_net())


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(data: bytes, **options) -> images.Source:
    return images.decode_image("a", io.BytesIO(data), **options)


def photograph(shape: tuple[int, ...] = (64, 64, 3), seed: int = 0) -> Image.Image:
    return Image.fromarray(picture(shape, seed=seed))


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("cut", ["half", "last two bytes"])
def test_i01_truncated_jpeg(cut, gray, progressive):
    data = encoded(photograph(), "JPEG", progressive=progressive)
    with pytest.raises(ImageCorrupt, match="damaged or cut off"):
        read(data[: len(data) // 2 if cut == "half" else -2], gray=gray)


@pytest.mark.parametrize("depth", [8, 16])
def test_i02_truncated_png(depth, caplog):
    if depth == 16:
        pytest.importorskip("imagecodecs")
    pixels = picture((64, 64, 3), ">u2" if depth == 16 else np.uint8)
    whole = png(64, 64, rows(pixels), depth=depth, colour=2)
    with pytest.raises(ImageCorrupt):
        read(whole[: len(whole) // 2])
    assert np.array_equal(read(whole + b"and more").pixels, pixels) and not caplog.messages
    assert np.array_equal(read(png(64, 64, rows(pixels), depth=depth, colour=2, end=False)).pixels, pixels)
    assert [m.partition(": ")[2] for m in caplog.messages] == ["its end is missing (IEND), but none of its pixels"]
    with pytest.raises(ImageCorrupt):
        read(png(64, 64, rows(pixels[:-1]), depth=depth, colour=2))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 8])
def test_i02_a_png_whose_pixels_end_early_is_not_filled_with_black(depth, interlaced):
    """Pillow reports nothing if whole rows are missing and the compressed data end as they should."""
    row = 1 + (21 * depth + 7) // 8
    passes = [(2, 3), (2, 3), (2, 6), (4, 5), (3, 11), (7, 10), (6, 21)] if interlaced else [(13, 21)]
    whole = sum(height * (1 + (width * depth + 7) // 8) for height, width in passes)
    for fill in (b"\0", b"\1"):  # black; and rows that grow from left to right
        for short in (0, 1, row, 3 * row):
            file = bytearray(png(21, 13, fill * (whole - short), depth=depth))
            file[28] = interlaced
            file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
            if not short:
                assert read(bytes(file)).pixels.shape == (13, 21, 1)
                continue
            with pytest.raises(ImageCorrupt, match="damaged or cut off" if short == 1 else f"end {short} bytes before their"):
                read(bytes(file))


def test_i03_flipped_bits_in_a_png():
    data = encoded(photograph(), "PNG")
    at = data.index(b"IDAT")
    for i in range(at + 8, len(data) - 16, 997):
        damaged = bytearray(data)
        damaged[i] ^= 1
        with pytest.raises(ImageCorrupt):
            read(bytes(damaged))


def test_i04_flipped_bits_in_a_jpeg_may_pass_but_never_crash():
    data = encoded(photograph(), "JPEG")
    start, passed = data.index(b"\xff\xda"), 0
    for i in range(start + 20, len(data) - 2, 61):
        damaged = bytearray(data)
        damaged[i] ^= 0x10
        try:
            assert read(bytes(damaged)).pixels.shape == (64, 64, 3)
            passed += 1
        except ImageCorrupt:
            pass
    assert passed > 0, "a limit of the format, which the documentation states"


# Modes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "shape"), [("1", (16, 17, 1)), ("L", (16, 17, 1)), ("LA", (16, 17, 2)), ("P", (16, 17, 3)), ("RGBA", (16, 17, 4))]
)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_i07_modes(restorer, mode, shape, format):
    image = photograph((16, 17, 4)).convert("RGB").quantize(16) if mode == "P" else photograph((16, 17, 4)).convert(mode)
    pixels = read(encoded(image, format)).pixels
    assert pixels.shape == shape and pixels.dtype == np.uint8
    shown = image.convert({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[shape[2]])
    assert np.array_equal(pixels, np.asarray(shown).reshape(shape)), "what every program shows"
    result = restorer(pixels)
    with Image.open(io.BytesIO(images.encode(result, format))) as back:
        assert back.mode == shown.mode and np.array_equal(np.asarray(back).reshape(shape), result)


@pytest.mark.parametrize(("depth", "levels"), [(1, 2), (2, 4), (4, 16)])
def test_i07_gray_of_few_bits_covers_the_full_range(depth, levels):
    line = np.arange(levels, dtype=np.uint8)
    packed = np.packbits(np.unpackbits(line[:, None], axis=1)[:, -depth:].reshape(-1))
    pixels = read(png(levels, 1, b"\0" + packed.tobytes(), depth=depth)).pixels
    assert pixels.ravel().tolist() == [round(255 * i / (levels - 1)) for i in range(levels)]


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_i07_palette_with_transparency(transparency):
    image = photograph((20, 20, 3)).quantize(8)
    pixels = read(encoded(image, "PNG", transparency=transparency)).pixels
    alpha = np.full(256, 255)
    alpha[: 1 if transparency == 0 else 3] = [0] if transparency == 0 else list(transparency)
    assert np.array_equal(pixels[..., 3], alpha[np.asarray(image)])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_i08_alpha_is_kept_bit_by_bit_and_hidden_colour_is_restored(restorer, format):
    pixels = picture((16, 16, 4))
    pixels[..., 3] = np.arange(256).reshape(16, 16)
    source = read(bytes(images.encode(pixels, format)))
    result = restorer(source.pixels)
    back = read(bytes(images.encode(result, format))).pixels
    assert np.array_equal(back[..., 3], pixels[..., 3])
    assert np.array_equal(result[..., :3], restorer(np.ascontiguousarray(source.pixels[..., :3]))), "alpha 0 or not"


def _with_adobe(data: bytes, transform: int) -> bytes:
    """A JPEG whose Adobe marker, which says how its colours are coded, is replaced."""
    at = data.index(b"Adobe\0")
    return data[: at + 11] + bytes([transform]) + data[at + 12 :]


@pytest.mark.parametrize("transform", [0, 2])
def test_i09_cmyk_ycck_and_their_inverted_jpegs_are_refused(transform):
    data = _with_adobe(encoded(photograph().convert("CMYK"), "JPEG"), transform)
    for gray in (False, True):
        with pytest.raises(ImageUnsupported, match="mode CMYK, which is not restored; convert it to gray or RGB"):
            read(data, gray=gray)
    with pytest.raises(ImageUnsupported, match="mode CMYK"):
        read(encoded(photograph().convert("CMYK"), "TIFF"))


def test_i11_a_dark_16_bit_image_stays_16_bit(restorer):
    dark = picture((20, 21)).astype(np.uint16)
    for format in ("PNG", "TIFF"):
        pixels = read(bytes(images.encode(dark, format))).pixels
        assert pixels.dtype == np.uint16 and np.array_equal(pixels[..., 0], dark)
        assert np.array_equal(restorer(pixels)[..., 0], restorer(dark)) and restorer(dark).max() < 2000


@pytest.mark.parametrize("channels", [1, 3])
def test_i12_float_tiff(restorer, channels):
    pytest.importorskip("tifffile")
    pixels = picture((12, 13, channels), np.float32)
    pixels[0, 0], pixels[1, 1] = -0.5, 1.4
    result = restorer(read(bytes(images.encode(pixels, "TIFF"))).pixels)
    assert result.dtype == np.float32 and result.min() < -0.3 and result.max() > 1.2, "neither clipped nor rounded"
    for bad, message in ((np.nan, "NaN"), (np.inf, "NaN or infinity"), (200.0, "black at 0 and white at 1")):
        pixels[5, 5] = bad
        with pytest.raises(ImageUnsupported, match=message):
            read(bytes(images.encode(pixels, "TIFF")))


@pytest.mark.parametrize("format", ["TIFF", "PNG", "WEBP", "GIF"])
def test_i13_several_frames_are_never_silently_the_first(format):
    frames = [photograph(seed=i) for i in range(3)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageUnsupported, match="but GIF" if format == "GIF" else "3 frames"):
        read(data)
    if format != "GIF":
        assert len(read(data, pages="all").frames) == 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_i14_looks_upright_once(restorer, format, orientation):
    """A viewer that obeys the tag shows the result as it shows the input."""
    shown = np.tile(np.linspace(60, 200, 24, dtype=np.uint8), (16, 1))
    shown = np.stack([shown, shown // 2, 255 - shown], -1)
    turns = [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM]
    turns += [Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270]
    stored = Image.fromarray(shown)
    stored = stored.transpose(turns[orientation - 2]) if orientation > 1 else stored
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    source = read(encoded(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {})))
    data = bytes(images.encode(source.pixels, format, metadata=source.metadata))
    from PIL import ImageOps

    with Image.open(io.BytesIO(data)) as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened))
    assert upright.shape == shown.shape and np.abs(upright.astype(int) - shown).max() <= (20 if format == "JPEG" else 0)


# Formats -------------------------------------------------------------------------------------------------------------


def _codec(name: str, pixels: np.ndarray, **options) -> bytes:
    codecs = pytest.importorskip("imagecodecs")
    try:
        return getattr(codecs, f"{name}_encode")(pixels, **options)
    except (ImportError, AttributeError, RuntimeError) as error:
        pytest.skip(f"no encoder {name} here: {error}")


@pytest.mark.parametrize(
    ("codec", "named"),
    [("jpeg2k", "JPEG 2000"), ("avif", "AVIF"), ("jpegxl", "JPEG XL"), ("jpegls", "SPIFF"), ("qoi", "not a PNG")],
)
def test_i16_formats_that_are_not_read_are_named(codec, named):
    with pytest.raises(ImageUnsupported, match=named):
        read(_codec(codec, picture((32, 32, 3))))


def test_i16_heic_is_named():
    with pytest.raises(ImageUnsupported, match="HEIC"):
        read(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))


def test_i16_kinds_of_jpeg():
    pixels = picture((20, 30, 3))
    assert read(encoded(Image.fromarray(pixels), "JPEG", progressive=True)).pixels.shape == (20, 30, 3)
    lossless = read(_codec("jpeg", pixels, lossless=True))
    assert np.array_equal(lossless.pixels, pixels)
    twelve = np.random.default_rng(0).integers(0, 4096, (20, 30)).astype(np.uint16)
    with pytest.raises(ImageUnsupported, match="12-bit layers of JPEG are not restored"):
        read(_codec("jpeg", twelve, bitspersample=12))
    head = bytearray(encoded(Image.fromarray(pixels), "JPEG"))
    head[head.index(b"\xff\xc0") + 9] = 2
    with pytest.raises(ImageUnsupported, match="2-layer images of JPEG"):
        read(bytes(head))


def _arithmetic_jpeg(frame: int, data: bytes) -> bytes:
    """A gray JPEG of 16 x 8 whose entropy coding is arithmetic. frame: the marker of its kind, SOF9 or SOF10."""
    last = 0 if frame == 0xCA else 63  # a progressive one may hold the mean of each block alone
    parts = [(0xDB, b"\0" + bytes([1] * 64)), (frame, struct.pack(">BHHB", 8, 8, 16, 1) + bytes([1, 0x11, 0]))]
    parts.append((0xDA, bytes([1, 1, 0, 0, last, 0])))
    body = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(part) + 2) + part for marker, part in parts)
    return b"\xff\xd8" + body + data + b"\xff\xd9"


@pytest.mark.parametrize("frame", [0xC9, 0xCA])
@pytest.mark.parametrize("data", [b"", bytes(40), bytes(range(254))])
def test_i16_arithmetic_coding_is_decoded_or_refused(frame, data):
    """Some builds of libjpeg have it. Without a coded bit every mean is 128, which makes the flat picture a valid one."""
    try:
        pixels = read(_arithmetic_jpeg(frame, data)).pixels
    except ImageError as error:
        assert "\n" not in str(error) and str(error).startswith("a ")
        return
    assert pixels.shape == (8, 16, 1) and pixels.dtype == np.uint8
    if frame == 0xCA and not any(data):
        assert (pixels == 128).all()


def test_i16_an_arithmetic_jpeg_without_its_end_is_corrupt():
    with pytest.raises(ImageCorrupt):
        read(_arithmetic_jpeg(0xCA, b"")[:-2])


def test_i16_lossless_webp_stays_lossless(restorer):
    pixels = picture((20, 30, 3))
    source = read(encoded(Image.fromarray(pixels), "WEBP", lossless=True))
    assert np.array_equal(source.pixels, pixels)
    result = restorer(source.pixels)
    assert np.array_equal(read(bytes(images.encode(result, "WEBP", metadata=source.metadata))).pixels, result)


@pytest.mark.parametrize(
    ("inside", "extension"), list(itertools.product(["PNG", "JPEG", "WEBP", "TIFF", "BMP"], ["png", "jpg"]))
)
def test_i17_the_content_counts(tmp_path, inside, extension):
    (tmp_path / f"a.{extension}").write_bytes(encoded(photograph(), inside))
    assert images.read_image(tmp_path / f"a.{extension}").format == inside


@pytest.mark.parametrize(
    "head", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.7\n", b"8BPS\0\1", b"\x12\xaf", b"GIF89a", b"P6\n1 1\n255\n"]
)
def test_i18_no_other_parser_is_started(tmp_path, head, monkeypatch):
    for name, _ in list(Image.OPEN.items()):
        monkeypatch.setitem(Image.OPEN, name, (lambda *a: pytest.fail("started"), lambda prefix: True))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    (tmp_path / "a.png").write_bytes(head + bytes(200))
    with pytest.raises(ImageUnsupported, match="is not a PNG, JPEG, WebP, TIFF or BMP image"):
        images.read_image(tmp_path / "a.png")


def test_i19_bombs_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    wide = zlib.compress(bytes(1 << 20))
    for data in (
        png(20_000, 20_000, wide, colour=2),
        png(2**31 - 1, 2**31 - 1, b""),
        png(2**31 - 1, 1, b"", depth=16, colour=6),
    ):
        with pytest.raises(ImageTooLarge, match="more than the limit of 100000000"):
            read(data, max_pixels=100_000_000)
    huge = bytearray(encoded(photograph(), "BMP"))
    struct.pack_into("<ii", huge, 18, 1 << 20, 1 << 20)
    with pytest.raises(ImageTooLarge):
        read(bytes(huge))


def test_i21_a_small_file_of_144_megapixels_takes_its_pixels_and_no_more(tmp_path):
    """Decoded by PIL and handed out in bands: twice the image, and a margin; a copy at once would take four times."""
    lines = zlib.compressobj()
    data = b"".join(lines.compress(bytes(12_001)) for _ in range(12_000)) + lines.flush()
    head = png(12_000, 12_000, b"")
    at = head.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(head[:at] + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    assert (tmp_path / "a.png").stat().st_size < 200_000
    code = (
        "import sys\nfrom memnet_fast.restore import images\n"
        "def peak():\n    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "before = peak()\npixels = images.read_image(sys.argv[1]).pixels\n"
        "assert pixels.shape == (12000, 12000, 1) and pixels.max() == 0\nprint(peak() - before)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2.7 * 144_000, f"{int(done.stdout) / 1000:.0f} MB"


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_i22_text_bombs(name):
    packed = zlib.compress(bytes(200_000_000), 9)
    body = {b"zTXt": b"a\0\0", b"iCCP": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[name] + packed
    data = png(4, 4, rows(picture((4, 4))), extra=chunk(name, body))
    try:
        source = read(data)
    except ImageCorrupt:
        return
    assert source.metadata.icc is None or len(source.metadata.icc) < 10_000_000


@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (10_000, 1), (2, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_i23_extreme_sizes(restorer, shape, channels):
    pixels = picture((*shape, channels))
    result = restorer(read(bytes(images.encode(pixels, "PNG"))).pixels)
    assert result.shape == pixels.shape
    assert read(bytes(images.encode(result, "TIFF"))).pixels.shape == pixels.shape


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_i23_no_pixels(size):
    with pytest.raises(ImageCorrupt):
        read(png(*size, b""))
    for format in ("PNG", "TIFF", "JPEG"):
        with pytest.raises(InputError, match="expected an image"):
            images.encode(np.zeros((size[1], size[0], 3), np.uint8), format)


@pytest.mark.parametrize(
    "name",
    [
        "für Elise 日本 \N{PILE OF POO}",
        " spaces  ",
        "new\nline",
        "-i",
        "x" * 251,
        os.fsdecode(b"bytes\xff\xfe"),
        unicodedata.normalize("NFC", "é"),
        unicodedata.normalize("NFD", "é"),
        "'\"$(touch x);&|",
    ],
)
def test_i24_names(tmp_path, name):
    path = tmp_path / f"{name}.png"
    pixels = picture((5, 6))
    try:
        images.write_image(path, pixels, "PNG")
    except ImageError as error:
        pytest.fail(str(error))
    assert os.listdir(tmp_path) == [f"{name}.png"]
    assert np.array_equal(images.read_image(path).pixels[..., 0], pixels)
    path.write_bytes(b"")
    with pytest.raises(ImageUnsupported, match="is empty"):
        images.read_image(path)


def test_i37_the_numbers_of_the_host_are_neither_obeyed_nor_changed(monkeypatch):
    data = {format: encoded(photograph(), format) for format in ("PNG", "JPEG", "BMP", "TIFF")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for each in data.values():
        assert read(each).pixels.shape == (64, 64, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageTooLarge):
        read(png(40_000, 30_000, b""))
    assert Image.MAX_IMAGE_PIXELS is None
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(InputError, match="LOAD_TRUNCATED_IMAGES"):
        read(data["PNG"])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_i38_arrays_follow_the_rules_of_files(restorer, channels, dtype):
    if dtype is np.float32 or (dtype is np.uint16 and channels > 1):
        pytest.importorskip("tifffile")
    base = picture((26, 30, channels), dtype)
    pixels = np.ascontiguousarray(base[::-2, 1::2])
    from_file = restorer(read(bytes(images.encode(pixels, "TIFF"))).pixels)
    assert np.array_equal(from_file, restorer(base[::-2, 1::2]))
    if dtype is np.uint8:
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        assert np.array_equal(np.asarray(restorer(image)).reshape(pixels.shape), from_file)


def test_i39_a_sequence_has_the_bits_of_its_frames(restorer):
    frames = [picture((20, 30, 4), seed=i) for i in range(4)]
    alone = [restorer(frame) for frame in frames]
    for order in ([3, 1, 0, 2], [0, 0, 3]):
        for i, result in zip(order, restorer.restore_many([frames[i] for i in order]), strict=True):
            assert np.array_equal(result.image, alone[i])
    matte = np.dstack([frames[0][..., 3]] * 3)
    assert restorer(matte).shape == matte.shape, "a matte or mask is an image like any other"

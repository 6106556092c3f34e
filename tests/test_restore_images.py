"""Image files: every mode, metadata, damaged and hostile files, whole writing."""

from __future__ import annotations

import errno
import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin
from support.pngs import chunk, png, rows
from support.restoring import picture, small_net

from memnet_fast.errors import ImageCorrupt, ImageError, ImageTooLarge, ImageUnsupported, InputError, OutputError
from memnet_fast.restore import Restorer, images

_ORIENTATION, _ARTIST = 274, 315


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def seen(path: Path, **options) -> np.ndarray:
    """What is read of a file: [H, W] for one channel, else [H, W, C]."""
    pixels = images.read_image(path, **options).pixels
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


@pytest.mark.parametrize("extension", ["png", "tiff"])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_lossless_formats_give_every_mode_back(tmp_path, mode, extension):
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "I;16": ()}[mode]
    pixels = picture((19, 23, *channels), np.uint16 if mode == "I;16" else np.uint8)
    path = tmp_path / f"a.{extension}"
    images.write_image(path, pixels, images.EXTENSIONS[path.suffix])
    assert images.read_image(path).format == images.EXTENSIONS[path.suffix]
    assert seen(path).dtype == pixels.dtype and np.array_equal(seen(path), pixels)
    with Image.open(path) as other:
        assert other.mode == mode and np.array_equal(np.asarray(other), pixels), "as any other program reads it"
    restored = Restorer(model=small_net())(images.read_image(path).pixels)
    if len(channels) and channels[0] in (2, 4):
        assert np.array_equal(restored[..., -1], pixels[..., -1])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_bmp_gives_its_modes_back(tmp_path, mode):
    pixels = picture((9, 7, *{"L": (), "RGB": (3,)}[mode]))
    images.write_image(tmp_path / "a.bmp", pixels, "BMP")
    assert images.read_image(tmp_path / "a.bmp").format == "BMP" and np.array_equal(seen(tmp_path / "a.bmp"), pixels)


def test_alpha_keeps_all_its_values_and_hidden_colour_is_restored():
    pixels = picture((16, 16, 4))
    pixels[..., 3] = np.arange(256, dtype=np.uint8).reshape(16, 16)
    restorer = Restorer(model=small_net())
    result = np.asarray(restorer(Image.fromarray(pixels)))
    assert np.array_equal(result[..., 3], pixels[..., 3])
    assert np.array_equal(result[..., :3], restorer(np.ascontiguousarray(pixels[..., :3])))


def test_bilevel_becomes_gray(tmp_path):
    bits = Image.fromarray(picture((20, 20)) > 128)
    assert bits.mode == "1"
    pixels = seen(saved(tmp_path / "a.png", bits))
    assert pixels.shape == (20, 20) and set(np.unique(pixels)) == {0, 255}
    assert len(np.unique(Restorer(model=small_net())(pixels))) > 2, "not thresholded again"


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_are_expanded(tmp_path, transparent):
    colour = Image.fromarray(picture((20, 21, 3)))
    paletted = colour.quantize(16)
    options = {"transparency": 3} if transparent else {}
    pixels = seen(saved(tmp_path / "a.png", paletted, **options))
    assert pixels.shape == (20, 21, 4 if transparent else 3)
    assert np.array_equal(pixels[..., :3], np.asarray(paletted.convert("RGB")))
    if transparent:
        assert np.array_equal(pixels[..., 3] == 0, np.asarray(paletted) == 3)


@pytest.mark.parametrize(("mode", "clear", "expected"), [("L", 7, 2), ("RGB", (1, 2, 3), 4)])
def test_one_transparent_colour_becomes_alpha(tmp_path, mode, clear, expected):
    image = Image.fromarray(picture((9, 9, 3))).convert(mode)
    image.putpixel((4, 4), clear)
    pixels = seen(saved(tmp_path / "a.png", image, transparency=clear))
    assert pixels.shape[-1] == expected
    alpha = pixels[..., -1]
    assert alpha[4, 4] == 0 and alpha[0, 0] == 255


def test_big_endian_16_bit_tiff_is_restored_in_16_bits(tmp_path):
    pixels = picture((14, 15), np.uint16)
    path = saved(tmp_path / "a.tif", Image.fromarray(pixels.astype(">u2")))
    assert seen(path).dtype == np.uint16 and np.array_equal(seen(path), pixels)
    images.write_image(tmp_path / "b.png", Restorer(model=small_net())(seen(path)), "PNG")
    assert np.array_equal(seen(tmp_path / "b.png"), Restorer(model=small_net())(pixels))


@pytest.mark.parametrize(("mode", "reason"), [("CMYK", "mode CMYK"), ("LAB", "mode LAB"), ("I", "signed")])
def test_modes_that_are_not_restored_are_refused(tmp_path, mode, reason):
    with pytest.raises(ImageUnsupported, match=reason):
        images.read_image(saved(tmp_path / "a.tif", Image.new(mode, (5, 5))))


def test_cmyk_jpeg_is_refused_and_never_inverted(tmp_path):
    with pytest.raises(ImageUnsupported, match="mode CMYK"):
        images.read_image(saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 8))))


@pytest.mark.parametrize(("name", "options"), [("a.tif", {}), ("a.webp", {"lossless": True}), ("a.png", {})])
def test_several_frames_are_refused_and_never_silently_the_first(tmp_path, name, options):
    frames = [Image.new("RGB", (8, 8), (i * 90, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with pytest.raises(ImageUnsupported, match="3 frames"):
        images.read_image(tmp_path / name)
    with Image.open(tmp_path / name) as opened, pytest.raises(ImageUnsupported, match="3 frames"):
        Restorer(model=small_net())(opened)


@pytest.mark.parametrize(
    "head", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"8BPS\0\1", b"GIF89a", b"%PDF-1.7", b"\0\0\0\x0cjP  \r\n", b"hello", b""]
)
def test_other_formats_are_refused_by_content_before_any_parser(tmp_path, head, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("Image.open would try every parser"))
    (tmp_path / "a.png").write_bytes(head + b"\0" * 100 if head else b"")
    with pytest.raises(ImageUnsupported, match="is empty" if not head else "is not a PNG, JPEG, WebP, TIFF or BMP image"):
        images.read_image(tmp_path / "a.png")


def test_the_content_counts_and_not_the_extension(tmp_path):
    Image.fromarray(picture((9, 9, 3))).save(tmp_path / "a.png", "JPEG")
    assert images.read_image(tmp_path / "a.png").format == "JPEG"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp"])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_truncated_files_are_corrupt(tmp_path, name, keep):
    path = saved(tmp_path / name, Image.fromarray(picture((64, 64, 3))))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ImageCorrupt, match=name):
        images.read_image(path)


def test_a_jpeg_without_its_last_two_bytes_is_corrupt(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(picture((64, 64, 3))))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ImageCorrupt, match="cut off"):
        images.read_image(path)


def test_a_png_with_all_pixels_but_no_end_chunk_is_accepted(tmp_path):
    pixels = picture((9, 11))
    (tmp_path / "a.png").write_bytes(png(11, 9, rows(pixels), end=False))
    assert np.array_equal(seen(tmp_path / "a.png"), pixels)


def test_flipped_bits_in_png_data_are_noticed(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(picture((64, 64))))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))
    with pytest.raises(ImageCorrupt):
        images.read_image(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp"])
def test_damage_anywhere_gives_an_image_error_or_an_image(tmp_path, name):
    path = saved(tmp_path / name, Image.fromarray(picture((16, 16, 3))))
    data, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for at in random.integers(2, min(len(data), 400), 4):
            damaged[at] = random.integers(256)
        path.write_bytes(bytes(damaged[: random.integers(8, len(data) + 1)]))
        try:
            images.read_image(path, max_pixels=1 << 20)
        except ImageError:
            refused += 1
    assert refused > 75


def test_the_global_that_lets_truncated_files_pass_is_not_accepted(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.fromarray(picture((9, 9))))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(InputError, match="LOAD_TRUNCATED_IMAGES"):
        images.read_image(path)


def test_bombs_are_refused_from_the_header(tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(40_000, 30_000, b""))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageTooLarge, match="40000 x 30000 pixels, more than the limit of 1000000000"):
        images.read_image(bomb)
    bomb.write_bytes(png(2**31 - 1, 2**31 - 1, b""))
    with pytest.raises(ImageTooLarge, match="2147483647"):
        images.read_image(bomb)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp"])
def test_the_limit_can_be_set_and_is_ours_alone(tmp_path, name, monkeypatch):
    path = saved(tmp_path / name, Image.fromarray(picture((30, 20, 3))))
    with pytest.raises(ImageTooLarge, match="20 x 30 pixels, more than the limit of 599"):
        images.read_image(path, max_pixels=599)
    if name != "a.webp":  # this decoder looks at Pillow's number itself, as documented
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert seen(path, max_pixels=600).shape == (30, 20, 3)


@pytest.mark.parametrize(
    "options", [{"lossless": True}, {"quality": 50}, {"quality": 50, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}]
)
def test_webp_sizes_are_read_before_its_decoder_starts(tmp_path, options, monkeypatch):
    path = saved(tmp_path / "a.webp", Image.fromarray(picture((33, 517, 3))), **options)
    monkeypatch.setitem(images._OPEN, "WEBP", lambda file: pytest.fail("the decoder was started"))
    with pytest.raises(ImageTooLarge, match="517 x 33"):
        images.read_image(path, max_pixels=100)


def test_a_text_bomb_is_refused(tmp_path):
    body = b"Comment\0\0" + zlib.compress(b"a" * 200_000_000, 9)
    (tmp_path / "a.png").write_bytes(png(4, 4, rows(picture((4, 4))), extra=chunk(b"zTXt", body)))
    with pytest.raises(ImageCorrupt):
        images.read_image(tmp_path / "a.png")


def test_no_pixels_is_corrupt(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0, 5, b""))
    with pytest.raises(ImageCorrupt):
        images.read_image(tmp_path / "a.png")


def test_what_is_not_a_file_is_an_error_and_does_not_hang(tmp_path):
    with pytest.raises(ImageError, match="cannot read"):
        images.read_image(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="is not a file"):
        images.read_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_stays_with_pixels_in_stored_order(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[_ORIENTATION], exif[_ARTIST] = orientation, "somebody"
    source = images.read_image(saved(tmp_path / name, Image.fromarray(picture((12, 20, 3))), exif=exif))
    assert source.pixels.shape == (12, 20, 3)
    restored = Restorer(model=small_net())(source.pixels)
    images.write_image(tmp_path / ("b" + name), restored, source.format, metadata=source.metadata)
    with Image.open(tmp_path / ("b" + name)) as result:
        assert result.size == (20, 12)
        kept = result.getexif()
        assert kept[_ORIENTATION] == orientation and kept[_ARTIST] == "somebody"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_tiff_is_turned_upright_once(tmp_path, orientation):
    pixels = picture((12, 20, 3))
    exif = Image.Exif()
    exif[_ORIENTATION], exif[_ARTIST] = orientation, "somebody"
    path = saved(tmp_path / "a.tif", Image.fromarray(pixels), exif=exif)
    upright = np.rot90(pixels, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    source = images.read_image(path)
    assert np.array_equal(source.pixels, upright)
    for name in ("b.tif", "b.png"):
        images.write_image(tmp_path / name, source.pixels, images.EXTENSIONS[name[1:]], metadata=source.metadata)
        with Image.open(tmp_path / name) as result:
            assert result.getexif().get(_ORIENTATION, 1) == 1 and result.getexif()[_ARTIST] == "somebody"
            assert np.array_equal(np.asarray(result), upright)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_icc_profile_and_resolution_are_kept(tmp_path, name):
    profile = bytes(range(200)) * 3
    source = images.read_image(saved(tmp_path / name, Image.fromarray(picture((8, 9, 3))), icc_profile=profile, dpi=(300, 200)))
    images.write_image(tmp_path / ("b" + name), source.pixels, source.format, metadata=source.metadata)
    with Image.open(tmp_path / ("b" + name)) as result:
        assert result.info["icc_profile"] == profile
        assert result.info["dpi"] == pytest.approx((300, 200), abs=0.02)


def test_exif_goes_from_jpeg_to_tiff_and_from_tiff_to_jpeg(tmp_path):
    made, exif = Image.Exif(), Image.Exif()
    made[_ARTIST] = "somebody"
    made.get_ifd(34665)[33434] = TiffImagePlugin.IFDRational(1, 250)
    exif.load(made.tobytes())
    image = Image.fromarray(picture((8, 9, 3)))
    for first, second in (("a.jpg", "b.tif"), ("c.tif", "d.jpg")):
        source = images.read_image(saved(tmp_path / first, image, exif=exif))
        images.write_image(tmp_path / second, source.pixels, images.EXTENSIONS[second[1:]], metadata=source.metadata)
        with Image.open(tmp_path / second) as result:
            result.load()
            kept = result.getexif()
            assert kept[_ARTIST] == "somebody" and kept.get_ifd(34665)[33434] == TiffImagePlugin.IFDRational(1, 250)
            assert result.size == (9, 8)


def test_jpeg_has_no_subsampling_and_obeys_the_quality():
    noise = picture((64, 64, 3))
    sizes = {q: len(images.encode(noise, "JPEG", images.Encoding(quality=q))) for q in (30, 95)}
    assert sizes[30] * 2 < sizes[95]
    with Image.open(io.BytesIO(images.encode(noise, "JPEG"))) as result:
        assert all(layer[1:3] == (1, 1) for layer in result.layer)


def test_png_level_changes_the_size_and_not_the_pixels():
    image = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    encoded = [images.encode(image, "PNG", images.Encoding(png_level=level)) for level in (0, 9)]
    assert len(encoded[0]) > 2 * len(encoded[1])
    for data in encoded:
        with Image.open(io.BytesIO(data)) as result:
            assert np.array_equal(np.asarray(result), image)


@pytest.mark.parametrize(
    ("field", "value"), [("quality", 0), ("quality", 101), ("quality", 9.5), ("png_level", 10), ("png_level", True)]
)
def test_bad_encodings_are_refused(field, value):
    with pytest.raises(InputError, match=field):
        images.Encoding(**{field: value})


@pytest.mark.parametrize(
    ("format", "kind", "instead"),
    [
        ("JPEG", "8-bit RGB with alpha", "PNG, TIFF or WebP"),
        ("JPEG", "8-bit gray with alpha", "PNG, TIFF or WebP"),
        ("JPEG", "16-bit gray", "PNG or TIFF"),
        ("WEBP", "16-bit RGB", "PNG or TIFF"),
        ("PNG", "float RGB", "TIFF"),
        ("BMP", "8-bit gray with alpha", "PNG, TIFF or WebP"),
        ("BMP", "8-bit RGB with alpha", "PNG, TIFF or WebP"),
    ],
)
def test_a_format_that_would_lose_something_is_refused(tmp_path, format, kind, instead):
    depth, _, colours = kind.partition(" ")
    channels = {"gray": 1, "gray with alpha": 2, "RGB": 3, "RGB with alpha": 4}[colours]
    pixels = np.zeros((4, 4, channels), {"8-bit": np.uint8, "16-bit": np.uint16, "float": np.float32}[depth])
    with pytest.raises(ImageUnsupported, match=f"{format} cannot hold {kind}; write {instead} instead"):
        images.write_image(tmp_path / "a", pixels, format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(tmp_path, call, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match="No space left"):
        images.write_image(path, np.zeros((4, 4), np.uint8), "PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["pipe", "stream"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, kind):
    """As root, a rename would replace /dev/null and /dev/stdout for the whole machine. The stream here has a file behind it."""
    path = tmp_path / "a.png"
    with open(tmp_path / "behind", "wb") as behind:
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(f"/proc/self/fd/{behind.fileno()}")
        before = os.lstat(path)
        with pytest.raises(OutputError, match="a.png: it is no regular file"):
            images.write_image(path, np.zeros((4, 4), np.uint8), "PNG")
        assert os.path.samestat(os.lstat(path), before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "behind"] and not (tmp_path / "behind").stat().st_size


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot make the folder"):
        images.write_image(tmp_path / "file" / "a.png", np.zeros((4, 4), np.uint8), "PNG")


def test_exif_that_does_not_fit_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot encode"):
        images.write_image(
            tmp_path / "a.jpg", np.zeros((4, 4), np.uint8), "JPEG", metadata=images.Metadata(exif=b"Exif\0\0" + b"x" * 70_000)
        )
    assert not list(tmp_path.iterdir())

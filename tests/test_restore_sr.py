"""Super-resolution, deblocking and the tasks of `Restorer`: what the network sees, and what becomes of the rest."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support.restoring import picture, small_net

from memnet_fast.errors import ImageCorrupt, ImageError, InputError
from memnet_fast.resize import imresize
from memnet_fast.restore import Restorer, images, jpeg_quality
from memnet_fast.restore.color import LUMA
from memnet_fast.restore.strip import comparison_strip

DIRECT = {"algorithm": "direct"}


@pytest.fixture(scope="module")
def net():
    return small_net()


def enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """[H, W, C] -> float64, by the resampling that is tested for itself."""
    plane = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels.astype(np.float64), -1, 0)))
    return np.moveaxis(imresize(plane, scale).numpy(), 0, -1)


def through(net, plane: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(plane.astype(np.float32))[None, None])[0, 0].double().numpy()


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 3), (17, 13, 1), (17, 13, 2), (12, 19, 3), (12, 19, 4)])
def test_luma_goes_through_the_network_and_the_rest_is_bicubic(net, shape, dtype, scale):
    image = picture(shape, dtype)
    result = Restorer("sr", scale=scale, model=net)(image)
    assert result.shape == (shape[0] * scale, shape[1] * scale, shape[2]) and result.dtype == dtype
    one = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    large = enlarged(image, scale) / one
    if shape[2] <= 2:
        expected = through(net, large[..., 0])[..., None]
    else:
        y = large[..., :3] @ np.array(LUMA)
        expected = large[..., :3] + (through(net, y) - y)[..., None]
    if shape[2] in (2, 4):
        expected = np.concatenate([expected, np.clip(large[..., -1:], 0, 1)], -1)
    if one > 1:
        assert np.abs(result - np.clip(expected, 0, 1) * one).max() <= 0.5 + 2e-5 * one
    else:
        assert np.abs(result - expected).max() < 2e-5
    if shape == (12, 19, 3):
        assert np.abs(result / one - large).max() > 0.01, "this network must change the image"


@pytest.mark.parametrize("color", ["y", "rgb", "gray"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiles_of_an_enlarged_image_equal_the_whole(net, channels, color):
    image = picture((29, 37, channels))
    whole = Restorer("sr", scale=3, model=net, color=color, tile=0, **DIRECT)(image)
    tiled = Restorer("sr", scale=3, model=net, color=color, tile=32, batch=2, **DIRECT).restore(image)
    assert tiled.tiled.windows > 4 and np.array_equal(tiled.image, whole)
    assert whole.shape == (87, 111, {"gray": 1 + (channels == 4)}.get(color, channels))


def test_color_rgb_enlarges_each_channel_alone(net):
    image = picture((9, 11, 3))
    result = Restorer("sr", scale=2, model=net, color="rgb", **DIRECT)(image)
    for c in range(3):
        assert np.array_equal(result[..., c], Restorer("sr", scale=2, model=net, **DIRECT)(image[..., c]))


def test_all_kinds_grow(net):
    restorer = Restorer("sr", scale=2, model=net)
    assert restorer(picture((5, 7))).shape == (10, 14)
    assert restorer(torch.rand(5, 7)).shape == (10, 14)
    assert restorer(torch.rand(3, 5, 7)).shape == (3, 10, 14)
    assert restorer(torch.rand(2, 4, 5, 7)).shape == (2, 4, 10, 14)
    assert restorer(torch.rand(0, 3, 5, 7)).shape == (0, 3, 10, 14)
    for mode in ("L", "LA", "RGB", "RGBA", "I;16", "I;16B"):
        result = restorer(Image.new(mode, (7, 5)))
        assert result.mode == mode and result.size == (14, 10)
    batch = torch.rand(3, 3, 8, 9)
    for one, together in zip(batch, restorer(batch), strict=True):
        assert torch.equal(restorer(one), together)


def test_transparency_stays_within_its_range(net):
    """Bicubic resampling overshoots at an edge; alpha must not wrap or leave its range."""
    image = picture((12, 12, 4), np.float32)
    image[..., 3] = np.arange(12)[None] >= 6
    alpha = Restorer("sr", scale=4, model=net)(image)[..., 3]
    assert alpha.min() == 0 and alpha.max() == 1 and 0.2 < alpha[20, 23] < 0.8
    bits = Restorer("sr", scale=4, model=net)((image * 255).astype(np.uint8))[..., 3]
    assert np.abs(bits - alpha * 255.0).max() <= 0.51


def test_the_tasks_and_their_options(net):
    for task in ("denoise", "deblock"):
        restorer = Restorer(task, model=net)
        image = picture((20, 21, 3))
        assert restorer.scale == 1 and np.array_equal(restorer(image), Restorer(model=net)(image))
    restorer = Restorer("sr", scale=4, model=net, tile=64, overlap=16, tta=True, color="gray")
    chosen = {"backend": restorer.backend, "precision": "fp32", "algorithm": restorer.algorithm}
    asked = {"task": "sr", "scale": 4, "color": "gray", "tta": True, "tile": 64, "overlap": 16}
    assert restorer.options == asked | chosen


@pytest.mark.parametrize("task", ["deblock", "sr"])
def test_a_missing_bundled_model_is_named(task, monkeypatch):
    monkeypatch.setattr("memnet_fast.restore.restorer.list_models", lambda pretrained=False: [])
    with pytest.raises(InputError, match=f"the weights memnet_m6r6.{task} are not bundled"):
        Restorer(task, scale=2 if task == "sr" else None)


def test_the_sum_over_eight_ways_is_the_same_for_every_batch_and_tile(net):
    images_ = torch.rand(3, 1, 41, 29)
    expected = [Restorer("sr", scale=2, model=net, tta=True, tile=0, batch=1, **DIRECT)(image) for image in images_]
    for options in ({"tile": 0, "batch": 3}, {"tile": 40, "batch": 1}, {"tile": 33, "batch": "auto"}):
        got = Restorer("sr", scale=2, model=net, tta=True, **options, **DIRECT)(images_)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_turned_image_gives_the_turned_result_with_tta(net):
    """To rounding: the eight results are summed in another order."""
    image = torch.rand(30, 22)
    restorer = Restorer(model=net, tta=True, **DIRECT)
    turned = torch.rot90(restorer(torch.rot90(image)), -1)
    torch.testing.assert_close(turned, restorer(image), atol=1e-6, rtol=0)
    plain = Restorer(model=net, **DIRECT)
    assert (torch.rot90(plain(torch.rot90(image)), -1) - plain(image)).abs().max() > 1e-3


# JPEG ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_quality_of_a_jpeg_is_read_from_its_tables(tmp_path, mode):
    image = Image.fromarray(picture((24, 24, 3))).convert(mode)
    for quality in range(1, 101):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, progressive=quality % 2 == 0)
        with Image.open(file) as opened:
            assert jpeg_quality(opened) == quality
        if quality % 20 == 0:
            (tmp_path / "a.jpg").write_bytes(file.getvalue())
            assert jpeg_quality(tmp_path / "a.jpg") == quality == images.read_image(tmp_path / "a.jpg").jpeg_quality


def test_tables_of_other_encoders_get_the_nearest_quality():
    tables = []
    for quality in (30, 75, 95):
        file = io.BytesIO()
        Image.fromarray(picture((24, 24))).save(file, "JPEG", quality=quality)
        with Image.open(file) as opened:
            tables.append((quality, [max(1, step + (1 if i % 2 else -1)) for i, step in enumerate(opened.quantization[0])]))
    for quality, table in tables:
        file = io.BytesIO()
        Image.fromarray(picture((24, 24))).save(file, "JPEG", qtables=[table])
        with Image.open(file) as opened:
            assert abs(jpeg_quality(opened) - quality) <= 3


def test_what_is_no_jpeg_has_no_quality(tmp_path):
    images.write_image(tmp_path / "a.png", picture((4, 4)), "PNG")
    assert jpeg_quality(tmp_path / "a.png") is None
    assert jpeg_quality(Image.new("L", (4, 4))) is None
    assert images.read_image(tmp_path / "a.png").jpeg_quality is None
    (tmp_path / "a.txt").write_bytes(b"text")
    assert jpeg_quality(tmp_path / "a.txt") is None
    with pytest.raises(ImageError, match="cannot read"):
        jpeg_quality(tmp_path / "none.jpg")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff\xdb")
    with pytest.raises(ImageCorrupt, match="b.jpg"):
        jpeg_quality(tmp_path / "b.jpg")


def test_gray_decodes_a_jpeg_straight_to_its_luma(tmp_path):
    pixels = picture((40, 33, 3))
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=90, subsampling=2)
    colour, gray = images.read_image(tmp_path / "a.jpg"), images.read_image(tmp_path / "a.jpg", gray=True)
    assert gray.pixels.shape == (40, 33, 1) and gray.jpeg_quality == 90
    with Image.open(tmp_path / "a.jpg") as opened:
        coded = np.asarray(opened.convert("YCbCr"))[..., 0].astype(int)
    # Colour was rounded and clipped to RGB in between; luma was not.
    assert np.abs(gray.pixels[..., 0] - coded).max() <= 3 and np.abs(gray.pixels[..., 0] - coded).mean() < 0.6
    assert np.abs(gray.pixels[..., 0] - colour.pixels @ np.array(LUMA)).mean() < 0.6
    for name, shape in (("b.png", (40, 33, 3)), ("c.jpg", (40, 33, 1))):
        images.write_image(tmp_path / name, picture(shape), images.EXTENSIONS[name[1:]])
        assert images.read_image(tmp_path / name, gray=True).pixels.shape == shape


# Comparison ----------------------------------------------------------------------------------------------------------


def test_the_strip_shows_a_small_image_as_large_as_its_result():
    small, large = picture((10, 12, 3)), picture((20, 24, 3), seed=1)
    strip = comparison_strip([("input", small), ("restored", large)])
    assert strip.dtype == np.uint8 and strip.shape[2] == 3
    top = strip.shape[0] - 20
    assert np.array_equal(strip[top:, :24], small.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(strip[top:, -strip.shape[1] // 2 + 4 :][:, :24], large)
    assert (strip[:top] < 128).any(), "labels"


def test_the_strip_shows_every_kind_in_8_bits():
    deep, gray = np.full((6, 5, 2), 32896, np.uint16), np.full((6, 5), 0.25, np.float32)
    strip = comparison_strip([("a", deep), ("b", gray), ("c", np.zeros((6, 5, 1), np.uint8))])
    assert strip.shape[2] == 1 and strip[-1, 0, 0] == 128 and (strip[-1] == 64).sum() == 5
    with pytest.raises(InputError, match="5 x 6 and 12 x 12"):
        comparison_strip([("a", deep), ("b", np.zeros((12, 12, 1), np.uint8))])

"""Resampling: MATLAB's definition, windows, and what cannot be resized."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from memnet_fast.errors import InputError
from memnet_fast.resize import axes, imresize, resample


def matlab(image: np.ndarray, scale: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """imresize.m, pixel by pixel: contributions() and one pass along each axis, the smaller scale first."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    def along_rows(image: np.ndarray, s: float, count: int) -> np.ndarray:
        n, out = len(image), np.zeros((count, image.shape[1]))
        mirror = [*range(1, n + 1), *range(n, 0, -1)]
        shrink = min(s, 1.0)
        for x in range(1, count + 1):
            u = x / s + 0.5 * (1 - 1 / s)
            left = math.floor(u - 4 / shrink / 2)
            places = [left + p for p in range(math.ceil(4 / shrink) + 2)]
            weights = [shrink * kernel(shrink * (u - p)) for p in places]
            for p, weight in zip(places, weights, strict=True):
                out[x - 1] += weight / sum(weights) * image[mirror[(p - 1) % (2 * n)] - 1]
        return out

    if scale[0] <= scale[1]:
        return along_rows(along_rows(image, scale[0], size[0]).T, scale[1], size[1]).T
    return along_rows(along_rows(image.T, scale[1], size[1]).T, scale[0], size[0])


@pytest.mark.parametrize("scale", [2, 3, 4, 1 / 2, 1 / 3, 1 / 4, 0.7, 1.5, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 3), (13, 8), (24, 17)])
def test_it_is_matlabs_definition(shape, scale):
    image = np.random.default_rng(0).random(shape)
    size = (math.ceil(scale * shape[0]), math.ceil(scale * shape[1]))
    result = imresize(torch.from_numpy(image), scale)
    assert tuple(result.shape) == size
    np.testing.assert_allclose(result.numpy(), matlab(image, (scale, scale), size), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [(7, 30), (30, 7), (5, 5), (11, 40)])
def test_a_size_gives_each_axis_its_scale(size):
    image = np.random.default_rng(1).random((12, 19))
    expected = matlab(image, (size[0] / 12, size[1] / 19), size)
    np.testing.assert_allclose(imresize(torch.from_numpy(image), size=size).numpy(), expected, rtol=0, atol=1e-13)


def test_values_known_from_the_kernel():
    """Doubling: the four taps at a quarter of a pixel are -9, 111, 29, -3 of 128; a linear ramp stays one away from borders."""
    impulse = torch.zeros(9, 9, dtype=torch.float64)
    impulse[:, 4] = 1
    row = imresize(impulse, 2)[8]
    np.testing.assert_allclose(row[4:14].numpy() * 128, [0, -3, -9, 29, 111, 111, 29, -9, -3, 0], atol=1e-12)
    ramp = torch.arange(12, dtype=torch.float64).expand(12, 12)
    np.testing.assert_allclose(imresize(ramp, 0.5)[3, 2:4].numpy(), [4.5, 6.5], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_kept_and_float64_computes(dtype):
    image = torch.rand(2, 3, 11, 10).to(dtype)
    assert torch.equal(imresize(image, 3), imresize(image.double(), 3).to(dtype))


def test_images_of_a_batch_have_their_own_bits():
    batch = torch.rand(3, 2, 21, 33)
    together = imresize(batch, 1 / 3)
    for i in range(3):
        assert torch.equal(together[i], imresize(batch[i], 1 / 3))


@pytest.mark.parametrize("scale", [2, 3, 4, 0.5, 1 / 3])
def test_a_window_has_the_bits_of_the_whole(scale):
    image = torch.rand(57, 71)
    whole = imresize(image, scale)
    rows, cols = axes((57, 71), scale)
    for top, left in ((0, 0), (3, 8), (whole.shape[0] - 9, whole.shape[1] - 13)):
        r, row_taps = rows.part(top, top + 9)
        c, col_taps = cols.part(left, left + 13)
        assert r.stop - r.start < 57 and c.stop - c.start < 71, "only the neighbourhood is read"
        assert torch.equal(resample(image[r, c], row_taps, col_taps), whole[top : top + 9, left : left + 13])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4,), {"scale": 2}, "float image"),
        ((0, 4), {"scale": 2}, "no pixels: 4 x 0"),
        ((4, 4), {}, "either the scale or the size"),
        ((4, 4), {"scale": 2, "size": (8, 8)}, "either the scale or the size"),
        ((4, 4), {"size": (0, 8)}, "resized image has no pixels: 8 x 0"),
        ((4, 4), {"scale": 0}, "positive number"),
        ((4, 4), {"scale": -1}, "positive number"),
        ((4, 4), {"scale": float("nan")}, "positive number"),
        ((4, 4), {"scale": float("inf")}, "positive number"),
    ],
)
def test_what_cannot_be_resized_is_refused(shape, options, message):
    with pytest.raises(InputError, match=message):
        imresize(torch.zeros(shape), **options)


def test_integers_are_refused():
    with pytest.raises(InputError, match="torch.uint8"):
        imresize(torch.zeros(4, 4, dtype=torch.uint8), 2)

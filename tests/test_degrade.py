"""Degradations against their definitions."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from memnet_fast import degrade
from memnet_fast.errors import InputError


def _matlab_axis(length: int, out: int) -> np.ndarray:
    """MATLAB's imresize along one axis as a matrix [out, length], from its definition: Keys' cubic of a = -0.5, stretched
    when the image shrinks, normalised, symmetric padding."""
    scale = out / length
    stretch = min(scale, 1.0)
    matrix = np.zeros((out, length))
    for i in range(out):
        centre = (i + 0.5) / scale - 0.5
        taps = {}
        for j in range(int(np.floor(centre - 2 / stretch)), int(np.ceil(centre + 2 / stretch)) + 1):
            x = abs(centre - j) * stretch
            if x <= 1:
                taps[j] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                taps[j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        total = sum(taps.values())
        for j, weight in taps.items():
            k = j
            while not 0 <= k < length:  # mirrored at the border between pixels, as often as needed
                k = -1 - k if k < 0 else 2 * length - 1 - k
            matrix[i, k] += weight / total
    return matrix


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(12, 24), (36, 60), (4, 3), (1, 2)])
def test_bicubic_is_down_and_up_by_the_definition(scale: int, size: tuple[int, int]) -> None:
    h, w = size[0] * scale, size[1] * scale
    image = torch.rand(2, 1, h, w, dtype=torch.float64)
    rows = _matlab_axis(size[0], h) @ _matlab_axis(h, size[0])
    columns = _matlab_axis(size[1], w) @ _matlab_axis(w, size[1])
    expected = rows @ image.numpy() @ columns.T
    np.testing.assert_allclose(degrade.bicubic(image, scale).numpy(), expected, rtol=0, atol=1e-13)


def test_bicubic_keeps_dtype_and_refuses_what_does_not_divide() -> None:
    assert degrade.bicubic(torch.rand(3, 8, 6), 2).dtype == torch.float32
    cropped = degrade.modcrop(torch.rand(1, 1, 13, 7), 3)
    assert cropped.shape == (1, 1, 12, 6)
    for image, scale in ((torch.rand(1, 1, 13, 6), 3), (torch.rand(6, 6), 0), (torch.rand(6, 6), 2.0), (torch.rand(6), 2)):
        with pytest.raises(InputError):
            degrade.bicubic(image, scale)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no part"):
        degrade.modcrop(torch.rand(1, 1, 2, 7), 3)


def test_noise_has_the_asked_level_and_is_not_clipped() -> None:
    clean = torch.zeros(2, 1, 200, 200)
    sigma = torch.tensor([10.0, 50.0]).view(2, 1, 1, 1)
    noisy = degrade.gaussian(clean, sigma, torch.Generator().manual_seed(0))
    assert noisy.min() < 0
    # The standard error of a standard deviation over 40,000 values is 0.35 %.
    assert torch.allclose(255 * noisy.std((1, 2, 3)), sigma.flatten(), rtol=0.02)
    again = degrade.gaussian(clean, sigma.double(), torch.Generator().manual_seed(0))
    assert again.dtype == torch.float32 and torch.equal(again, noisy)


def _through_a_file(levels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8), (17, 13), (33, 40)])
def test_jpeg_gives_what_the_file_holds_with_a_quality_for_each_image(size: tuple[int, int]) -> None:
    levels = torch.randint(0, 256, (3, 1, *size), dtype=torch.uint8)
    quality = torch.tensor([5, 40, 100]).view(3, 1, 1, 1)
    coded = degrade.jpeg(levels.double() / 255, quality)
    assert coded.dtype == torch.float64 and coded.shape == levels.shape
    for image, q, result in zip(levels[:, 0].numpy(), (5, 40, 100), coded[:, 0], strict=True):
        np.testing.assert_array_equal((result * 255).round().numpy(), _through_a_file(image, q))


def test_jpeg_depends_on_quality_clips_and_keeps_the_shape() -> None:
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")
    image = 0.5 + 0.7 * torch.sin(x / 3) * torch.cos(y / 5)  # beyond [0, 1] on both sides
    errors = [float((degrade.jpeg(image, q) - image.clamp(0, 1)).square().mean()) for q in (5, 20, 60, 95)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 4 * errors[-1]
    assert torch.equal(degrade.jpeg(image, 20), degrade.jpeg(image.clamp(0, 1), 20))
    assert degrade.jpeg(image.half(), 20).dtype == torch.float16
    assert degrade.jpeg(torch.empty(0, 1, 8, 8), 20).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("jpeg", [degrade.jpeg, degrade.jpeg_blocks])
@pytest.mark.parametrize("quality", [0, 101, 10.5, True])
def test_jpeg_refuses_other_qualities(quality: float, jpeg: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(InputError, match="quality"):
        jpeg(torch.rand(8, 8), quality)


@pytest.mark.parametrize("jpeg", [degrade.jpeg, degrade.jpeg_blocks])
def test_jpeg_refuses_what_is_no_image(jpeg: Callable[..., torch.Tensor]) -> None:
    for image in (torch.zeros(8, 8, dtype=torch.uint8), torch.rand(8), torch.rand(3, 0, 8)):
        with pytest.raises(InputError, match="float image"):
            jpeg(image, 10)


def test_jpeg_of_nan() -> None:
    """A file cannot hold it; without one it takes its block, and no other, with it."""
    image = torch.rand(2, 20, 21, generator=torch.Generator().manual_seed(0))
    good = degrade.jpeg_blocks(image, 40)
    image[1, 3, 10] = image[0, 19, 20] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        degrade.jpeg(image, 40)
    result = degrade.jpeg_blocks(image, 40)
    lost = torch.zeros(2, 20, 21, dtype=torch.bool)
    lost[1, :8, 8:16] = lost[0, 16:, 16:] = True
    assert torch.equal(result.isnan(), lost) and torch.equal(result[~lost], good[~lost])
    infinite = torch.tensor([[torch.inf, -torch.inf]])
    assert torch.equal(degrade.jpeg(infinite, 100), torch.tensor([[1.0, 0.0]])), "clipped, as every value out of range"


def _scene(h: int, w: int) -> torch.Tensor:
    """Slopes, edges, texture and some noise: every coefficient is in use, and few lie at a tie as those of a pattern may."""
    y, x = torch.meshgrid(torch.arange(float(h)), torch.arange(float(w)), indexing="ij")
    waves = 0.5 + 0.3 * torch.sin(x / 9 + y / 23) * torch.cos(y / 11) + 0.15 * ((x // 37 + y // 29) % 2)
    noise = torch.randn(h, w, generator=torch.Generator().manual_seed(7))
    return waves + 0.08 * torch.sin(x * 1.3) * (y > h / 2) + 0.02 * noise


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8), (7, 23), (160, 203)])
def test_jpeg_without_a_file_gives_what_a_file_holds(size: tuple[int, int]) -> None:
    """But for rare roundings, by one step of a coefficient of a block. Degraded images are as far from the original."""
    image = _scene(*size)
    for quality in (5, 10, 20, 37, 50, 60):
        exact, blocks = degrade.jpeg(image, quality), degrade.jpeg_blocks(image, quality)
        assert blocks.shape == exact.shape and blocks.dtype == exact.dtype
        levels = blocks * 255
        assert (
            float((levels - levels.round()).abs().max()) < 1e-4 and 0 <= float(levels.min()) <= float(levels.max()) <= 255.001
        )
        difference = (blocks - exact).abs() * 255
        assert float(difference.mean()) < 0.1, quality
        if image.numel() > 10_000:
            assert float((difference > 0.5).float().mean()) < 0.08, quality
            loss = [10 * torch.log10((d - image.clamp(0, 1)).square().mean()) for d in (exact, blocks)]
            assert abs(float(loss[0] - loss[1])) < 0.01, quality
            # What a wrong table, scale or offset would give: another quality is far away.
            assert float((degrade.jpeg(image, quality + 3) - exact).abs().mean() * 255) > 0.15


def test_jpeg_without_a_file_takes_each_image_with_its_own_quality_also_under_autocast() -> None:
    images, quality = torch.stack([_scene(17, 31), _scene(17, 31).flip(1)]).unsqueeze(1), torch.tensor([5, 60]).view(2, 1, 1, 1)
    together = degrade.jpeg_blocks(images, quality)
    for image, q, result in zip(images, (5, 60), together, strict=True):
        assert torch.equal(degrade.jpeg_blocks(image, q), result)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(degrade.jpeg_blocks(images, quality), together)
    assert degrade.jpeg_blocks(images.double(), 20).dtype == torch.float64
    assert degrade.jpeg_blocks(torch.empty(0, 1, 8, 8), 20).shape == (0, 1, 8, 8)
    white = torch.ones(3, 9)
    assert torch.equal(degrade.jpeg_blocks(white, 50), white) and torch.equal(degrade.jpeg_blocks(0 * white, 50), 0 * white)

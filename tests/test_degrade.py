"""Degradations against their definitions."""

from __future__ import annotations

import io

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


@pytest.mark.parametrize("quality", [0, 101, 10.5, True])
def test_jpeg_refuses_other_qualities(quality: float) -> None:
    with pytest.raises(InputError, match="quality"):
        degrade.jpeg(torch.rand(8, 8), quality)  # type: ignore[arg-type]


def test_jpeg_refuses_what_is_no_image() -> None:
    for image in (torch.zeros(8, 8, dtype=torch.uint8), torch.rand(8), torch.rand(3, 0, 8)):
        with pytest.raises(InputError, match="float image"):
            degrade.jpeg(image, 10)

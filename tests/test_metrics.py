"""PSNR and SSIM by the published protocols."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.restoring import picture

from memnet_fast import metrics
from memnet_fast.errors import InputError
from memnet_fast.metrics import MissingExtra, Protocol, psnr, ssim

pytest.importorskip("skimage")


def plain_psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 20 * math.log10(255 / math.sqrt(((a.astype(float) - b.astype(float)) ** 2).mean()))


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, window by window: 11x11 Gaussian of sigma 1.5, windows inside the image."""
    t = np.arange(11) - 5
    g = np.exp(-(t**2) / (2 * 1.5**2))
    w = np.outer(g, g) / np.outer(g, g).sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, cov = (w * p * p).sum() - mp**2, (w * q * q).sum() - mq**2, (w * p * q).sum() - mp * mq
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_psnr_is_the_definition_and_infinite_for_equal_images():
    a, b = picture((20, 30), seed=1), picture((20, 30), seed=2)
    assert psnr(a, b) == pytest.approx(plain_psnr(a, b), abs=1e-9)
    assert psnr(a, a) == math.inf


def test_ssim_is_the_definition():
    a = picture((24, 19), np.float64, seed=1)
    b = a + np.random.default_rng(0).normal(0, 0.1, a.shape)
    assert ssim(a, b) == pytest.approx(plain_ssim(a * 255, b * 255), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1)


def test_all_kinds_of_images_give_one_number():
    a, b = picture((16, 18, 3), seed=1), picture((16, 18, 3), seed=2)
    expected = psnr(a, b)
    kinds = [
        [Image.fromarray(x) for x in (a, b)],
        [x.astype(np.uint16) * 257 for x in (a, b)],
        [x.astype(np.float64) / 255 for x in (a, b)],
        [torch.from_numpy(x).permute(2, 0, 1) for x in (a, b)],
        [torch.from_numpy(x).permute(2, 0, 1)[None].double() / 255 for x in (a, b)],
    ]
    for x, y in kinds:
        assert psnr(x, y) == pytest.approx(expected, abs=1e-9)
        assert ssim(x, y) == pytest.approx(ssim(a, b), abs=1e-9)


def test_the_mean_is_over_images_and_not_over_pixels():
    a = torch.rand(2, 1, 16, 16)
    b = a + torch.tensor([0.1, 0.001]).view(2, 1, 1, 1)
    assert psnr(a, b) == pytest.approx((20 + 60) / 2, abs=0.01)


def test_denoising_is_measured_on_matlab_gray_without_rounding_or_clipping():
    protocol = Protocol.paper("denoise")
    assert protocol == Protocol("gray", shave=0, rounded=False)
    clean = picture((12, 14, 3), np.float64)
    noisy = clean + np.random.default_rng(0).normal(0, 0.5, clean.shape)
    # MATLAB: inv([1 .956 .621; 1 -.272 -.647; 1 -1.106 1.703]), first row.
    weights = np.linalg.inv([[1, 0.956, 0.621], [1, -0.272, -0.647], [1, -1.106, 1.703]])[0]
    assert psnr(noisy, clean, protocol) == pytest.approx(plain_psnr(noisy @ weights * 255, clean @ weights * 255), abs=1e-6)
    gray = picture((12, 14), np.float64)
    assert psnr(gray + 0.7, gray, protocol) == pytest.approx(-20 * math.log10(0.7), abs=1e-9)


def test_super_resolution_is_measured_on_rounded_y_without_its_border():
    protocol = Protocol.paper("sr", scale=3)
    a, b = picture((20, 22, 3), seed=1), picture((20, 22, 3), seed=2)

    def y(rgb):
        return np.floor(rgb @ np.array([65.481, 128.553, 24.966]) / 255 + 16 + 0.5)[3:-3, 3:-3]

    assert psnr(a, b, protocol) == pytest.approx(plain_psnr(y(a), y(b)), abs=1e-9)
    gray = np.full((9, 9), 100.4) / 255
    assert psnr(gray, np.full((9, 9), 99.6) / 255, protocol) == math.inf
    assert psnr(np.full((9, 9), 2.0), np.ones((9, 9)), protocol) == math.inf, "clipped to 255"


def test_deblocking_is_measured_on_y_as_it_is():
    protocol = Protocol.paper("deblock")
    a, b = picture((12, 14, 3), seed=1), picture((12, 14, 3), seed=2)
    w = np.array([65.481, 128.553, 24.966]) / 255
    assert psnr(a, b, protocol) == pytest.approx(plain_psnr(a @ w, b @ w), abs=1e-9)
    white = np.ones((4, 4, 3))
    assert metrics._seen(white * 255, protocol)[0, 0, 0] == pytest.approx(235)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Protocol.paper("paint"), "choose from denoise, deblock, sr"),
        (lambda: Protocol.paper("sr"), "scale goes with"),
        (lambda: Protocol.paper("denoise", scale=2), "scale goes with"),
        (lambda: Protocol.paper("sr", scale=0), "at least 1"),
        (lambda: Protocol("hue"), "channel must be one of"),
        (lambda: Protocol(shave=-1), "shave must be"),
        (lambda: psnr(np.zeros((4, 4)), np.zeros((4, 5))), "one shape"),
        (lambda: psnr(np.zeros((4, 4), np.int32), np.zeros((4, 4), np.int32)), "got int32"),
        (lambda: psnr(np.zeros((4, 4, 4)), np.zeros((4, 4, 4))), "1 or 3 planes"),
        (lambda: psnr("a", "b"), "got str"),
        (lambda: psnr(np.zeros((4, 4)), np.zeros((4, 4)), Protocol(shave=2)), "nothing is left"),
        (lambda: psnr(torch.zeros(0, 1, 4, 4), torch.zeros(0, 1, 4, 4)), "no image to compare"),
        (lambda: ssim(np.zeros((10, 40)), np.zeros((10, 40))), "at least 11 x 11 pixels, got 40 x 10"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_without_scikit_image_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(MissingExtra, match=r"pip install 'memnet-fast\[demo\]'") as caught:
        psnr(np.zeros((4, 4)), np.ones((4, 4)))
    assert isinstance(caught.value, ImportError)

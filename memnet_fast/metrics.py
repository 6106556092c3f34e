"""PSNR and SSIM by the published protocols. A number without its protocol says little: on Y alone they differ by up to 1.3 dB.

scikit-image computes both; it comes with the extras `demo`, `train` and `test`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memnet_fast.errors import InputError, MissingExtra

Channel = Literal["all", "gray", "y"]
# MATLAB: rgb2gray, and rgb2ycbcr's Y (16..235) of values in 0..1.
_MATLAB_GRAY = (0.298936021293775, 0.587043074451121, 0.114020904255103)
_MATLAB_Y, _MATLAB_Y_OFFSET = (65.481, 128.553, 24.966), 16.0
SSIM_WINDOW = 11


def scikit_image(module: str) -> ModuleType:
    """`skimage.<module>`. Raises MissingExtra with what to install."""
    import importlib

    try:
        return importlib.import_module(f"skimage.{module}")
    except ImportError as error:
        raise MissingExtra(f"this needs scikit-image ({error}); pip install 'memnet-fast[demo]'") from error


@dataclass(frozen=True)
class Protocol:
    """What is compared, in grey levels of 0..255.

    channel: "all" planes as they are, "gray" (MATLAB rgb2gray) or "y" (MATLAB rgb2ycbcr, 16..235) of RGB; images of one plane
    are compared as they are. shave: pixels left out at each border. rounded: both are rounded and clipped to 0..255 first.
    """

    channel: Channel = "all"
    shave: int = 0
    rounded: bool = False

    def __post_init__(self) -> None:
        if self.channel not in get_args(Channel):
            raise InputError(f"channel must be one of {', '.join(get_args(Channel))}, got {self.channel!r}")
        if isinstance(self.shave, bool) or not isinstance(self.shave, int) or self.shave < 0:
            raise InputError(f"shave must be a whole number of at least 0, got {self.shave!r}")

    @classmethod
    def paper(cls, task: str, scale: int | None = None) -> Protocol:
        """The protocol of the official test scripts: "denoise", "deblock", or "sr" with its scale."""
        if (task == "sr") != (scale is not None):
            raise InputError("scale goes with the task 'sr', and with it alone")
        if task == "denoise":
            return cls("gray")
        if task == "deblock":
            return cls("y")
        if task == "sr":
            if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
                raise InputError(f"scale must be a whole number of at least 1, got {scale!r}")
            return cls("y", shave=scale, rounded=True)
        raise InputError(f"unknown task '{task}'; choose from denoise, deblock, sr")


PLAIN = Protocol()


def psnr(a: Any, b: Any, protocol: Protocol = PLAIN) -> float:
    """20 log10(255 / rmse) in dB; infinite for equal images. Of a batch: the mean over its images.

    a, b: both arrays [H, W] or [H, W, C], or PIL images, or tensors [H, W], [C, H, W] or [N, C, H, W], of one shape, C 1 or 3;
    uint8, uint16, or floats in [0, 1]. Raises InputError for anything else, MissingExtra without scikit-image.
    """
    metrics = scikit_image("metrics")
    values = []
    for x, y in _pairs(a, b, protocol):
        same = np.array_equal(x, y)
        values.append(math.inf if same else float(metrics.peak_signal_noise_ratio(x, y, data_range=255)))
    return float(np.mean(values))


def ssim(a: Any, b: Any, protocol: Protocol = PLAIN) -> float:
    """Mean SSIM: Gaussian window of 11x11 and sigma 1.5, K 0.01 and 0.03, over windows that lie inside the image, as MATLAB's.

    Arguments and errors as for `psnr`; both sides at least 11 pixels after shaving. Planes are averaged.
    """
    metrics = scikit_image("metrics")
    values = []
    for x, y in _pairs(a, b, protocol):
        if min(x.shape[:2]) < SSIM_WINDOW:
            raise InputError(f"SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {x.shape[1]} x {x.shape[0]}")
        value = metrics.structural_similarity(
            x, y, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        values.append(float(value))
    return float(np.mean(values))


def one_channel(rgb: np.ndarray, channel: Literal["gray", "y"]) -> np.ndarray:
    """MATLAB's rgb2gray, or the Y (16..235) of its rgb2ycbcr, not rounded: [..., 3] floats in 0..255 -> [...]."""
    if channel == "gray":
        return rgb @ np.array(_MATLAB_GRAY)
    return rgb @ np.array(_MATLAB_Y) / 255 + _MATLAB_Y_OFFSET


def _pairs(a: Any, b: Any, protocol: Protocol) -> list[tuple[np.ndarray, np.ndarray]]:
    xs, ys = _levels(a), _levels(b)
    if xs.shape != ys.shape:
        raise InputError(f"two images of one shape are compared, got {list(xs.shape[1:])} and {list(ys.shape[1:])}")
    if xs.shape[0] == 0:
        raise InputError("there is no image to compare")
    return [(_seen(x, protocol), _seen(y, protocol)) for x, y in zip(xs, ys, strict=True)]


def _levels(image: Any) -> np.ndarray:
    """[N, H, W, C] float64 in 0..255."""
    if isinstance(image, Tensor):
        host = image.detach().cpu()
        array = (host.double() if host.is_floating_point() else host).numpy()
        array = array.reshape(-1, *array.shape[1:]) if array.ndim == 4 else array[None]
        array = array[..., None] if array.ndim == 3 else np.moveaxis(array, 1, -1)
        floating = torch.is_floating_point(image)
    elif isinstance(image, np.ndarray | Image.Image):
        array = np.asarray(image)[None]
        array = array[..., None] if array.ndim == 3 else array
        floating = array.dtype.kind == "f"
    else:
        raise InputError(f"expected an array, a PIL image or a tensor, got {type(image).__name__}")
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise InputError(f"expected images of 1 or 3 planes, got shape {list(np.shape(image))}")
    if floating:
        return array.astype(np.float64) * 255
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise InputError(f"expected uint8, uint16 or floats in [0, 1], got {array.dtype}")
    return array.astype(np.float64) / (1 if array.dtype.itemsize == 1 else 257)


def _seen(levels: np.ndarray, protocol: Protocol) -> np.ndarray:
    """levels: [H, W, C] -> what the protocol compares, [h, w, 1 or C]."""
    if levels.shape[-1] == 3 and protocol.channel != "all":
        levels = one_channel(levels, protocol.channel)[..., None]
    if protocol.rounded:
        levels = np.clip(np.floor(levels + 0.5), 0, 255)  # as MATLAB's uint8()
    if protocol.shave:
        levels = levels[protocol.shave : -protocol.shave, protocol.shave : -protocol.shave]
    if levels.size == 0:
        raise InputError("nothing is left of the image after shaving its border")
    return levels

"""Degradations, as the published protocols define them."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memnet_fast.errors import InputError
from memnet_fast.resize import imresize

_BLOCK = 8
# Table K.1 of the JPEG standard (ITU-T T.81): the steps of luma at quality 50.
_LUMA_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def gaussian(image: Tensor, sigma: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """White Gaussian noise: neither clipped nor rounded, as in the published denoising protocol.

    image: [..., H, W] float in [0, 1]. sigma: standard deviation in grey levels of 0..255, a number or a tensor that
    broadcasts against image (one level for each image of a batch: [N, 1, 1, 1]). Same shape, dtype and device out.
    """
    noise = torch.randn(image.shape, generator=generator, dtype=image.dtype, device=image.device)
    level = sigma.to(image) if isinstance(sigma, Tensor) else sigma
    return image + noise * (level / 255)


def jpeg(image: Tensor, quality: int | Tensor) -> Tensor:
    """Every plane as a baseline gray JPEG file gives it back, as in the published deblocking protocol (gray, or Y of colour).

    image: [..., H, W] float in [0, 1]; it is clipped and rounded to 8 bits first. quality: 1..100 on libjpeg's scale, a whole
    number or a tensor of them that broadcasts against image with 1 for H and W ([N, 1, 1, 1] for a batch). Same shape, dtype
    and device out; values are multiples of 1/255. Encoded on the CPU, by Pillow. Raises InputError for other qualities,
    dtypes, for images without pixels and for NaN, which no file holds.
    """
    levels, qualities = _jpeg_arguments(image, quality)
    if bool(levels.isnan().any()):
        raise InputError("the image holds NaN, which no JPEG can hold")
    planes, each = levels.to("cpu", torch.uint8).numpy(), qualities.tolist()
    result = np.empty(planes.shape, np.uint8)
    for plane, out, q in zip(planes, result, each, strict=True):
        file = io.BytesIO()
        Image.fromarray(plane).save(file, "JPEG", quality=q)
        with Image.open(file, formats=["JPEG"]) as decoded:
            out[...] = np.asarray(decoded)
    return torch.from_numpy(result).reshape(image.shape).to(image.device, image.dtype) / 255


def jpeg_blocks(image: Tensor, quality: int | Tensor) -> Tensor:
    """What `jpeg` gives, computed on the image's device without a file: for training, where files would keep a GPU waiting.

    Quantised blocks of 8 x 8, the last row and column repeated to fill the last ones, with the roundings of libjpeg; its
    transform is one of integers, this one is exact, so that a coefficient near the middle between two steps may fall to the
    other side. Arguments, result and errors are those of `jpeg`, but for NaN, for which a GPU would have to be waited for: its
    block becomes NaN as a whole.
    """
    levels, qualities = _jpeg_arguments(image, quality)
    (count, h, w), device = levels.shape, levels.device
    rows, columns = (torch.arange(-(-side // _BLOCK) * _BLOCK, device=device).clamp(max=side - 1) for side in (h, w))
    # In float64, which neither autocast nor TF32 touches.
    padded = levels.double()[:, rows][:, :, columns] - 128
    blocks = padded.view(count, len(rows) // _BLOCK, _BLOCK, len(columns) // _BLOCK, _BLOCK).transpose(2, 3)
    dct = _dct().to(device)
    q = qualities.to(device).view(-1, 1, 1, 1, 1)
    percent = torch.where(q < 50, 5000 // q, 200 - 2 * q)
    steps = torch.tensor(_LUMA_STEPS, device=device)
    steps = ((steps * percent + 50) // 100).clamp(1, 255).double()
    # libjpeg's coefficients have three bits behind the point; halves are rounded away from zero.
    coefficients = (8 * (dct @ blocks @ dct.T)).round()
    quantised = coefficients.sign() * ((coefficients.abs() + 4 * steps) / (8 * steps)).floor()
    decoded = (dct.T @ (quantised * steps) @ dct + 128.5).floor().clamp(0, 255)
    whole = decoded.transpose(2, 3).reshape(count, len(rows), len(columns))[:, :h, :w]
    return whole.reshape(image.shape).to(image.dtype) / 255


def _jpeg_arguments(image: Tensor, quality: int | Tensor) -> tuple[Tensor, Tensor]:
    """Planes of grey levels 0..255, float32 [P, H, W] on the image's device, and the quality of each, int64 [P] on the CPU."""
    if image.ndim < 2 or not image.is_floating_point() or 0 in image.shape[-2:]:
        raise InputError(f"expected a float image [..., H, W] with pixels, got {image.dtype} {list(image.shape)}")
    qualities = torch.as_tensor(quality).cpu()
    if qualities.is_floating_point() or qualities.dtype == torch.bool or bool(((qualities < 1) | (qualities > 100)).any()):
        raise InputError(f"the quality of a JPEG is a whole number of 1..100, got {quality}")
    # MATLAB's uint8() rounds halves up.
    levels = (image.detach().float().clamp(0, 1) * 255 + 0.5).floor()
    return levels.reshape(-1, *image.shape[-2:]), qualities.long().expand(*image.shape[:-2], 1, 1).reshape(-1)


def _dct() -> Tensor:
    """The orthonormal discrete cosine transform of 8 values, float64 [8, 8]."""
    k = torch.arange(_BLOCK, dtype=torch.float64)
    matrix = torch.cos(math.pi / _BLOCK * (k + 0.5) * k.view(-1, 1)) * math.sqrt(2 / _BLOCK)
    matrix[0] = math.sqrt(1 / _BLOCK)
    return matrix


def modcrop(image: Tensor, scale: int) -> Tensor:
    """[..., H, W] -> the upper left part whose sides are multiples of scale. Raises InputError where nothing is left."""
    h, w = (side - side % scale for side in image.shape[-2:])
    if min(h, w) < 1:
        raise InputError(f"an image of {image.shape[-1]} x {image.shape[-2]} has no part whose sides are multiples of {scale}")
    return image[..., :h, :w]


def bicubic(image: Tensor, scale: int) -> Tensor:
    """Smaller by scale and back to its size, both by MATLAB's imresize: what super-resolution is given.

    image: [..., H, W] float, sides multiples of scale (see modcrop). scale: a whole number of at least 1. Same shape, dtype
    and device out, neither clipped nor rounded. Raises InputError.
    """
    if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
        raise InputError(f"scale must be a whole number of at least 1, got {scale!r}")
    if image.ndim < 2 or image.shape[-2] % scale or image.shape[-1] % scale:
        raise InputError(f"the sides of {list(image.shape)} are not multiples of {scale}; crop with modcrop first")
    # The size, not 1 / scale: in floating point ceil(scale * side) may count one pixel too many.
    small = imresize(image, size=(image.shape[-2] // scale, image.shape[-1] // scale))
    return imresize(small, size=(image.shape[-2], image.shape[-1]))

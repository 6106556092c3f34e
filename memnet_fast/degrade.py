"""Degradations, as the published protocols define them."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memnet_fast.errors import InputError
from memnet_fast.resize import imresize


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
    dtypes and for images without pixels.
    """
    if image.ndim < 2 or not image.is_floating_point() or 0 in image.shape[-2:]:
        raise InputError(f"expected a float image [..., H, W] with pixels, got {image.dtype} {list(image.shape)}")
    levels = torch.as_tensor(quality)
    if levels.is_floating_point() or levels.dtype == torch.bool or bool(((levels < 1) | (levels > 100)).any()):
        raise InputError(f"the quality of a JPEG is a whole number of 1..100, got {quality}")
    # MATLAB's uint8() rounds halves up.
    planes = (image.detach().float().clamp(0, 1) * 255 + 0.5).floor().to("cpu", torch.uint8).numpy()
    each = levels.cpu().expand(*image.shape[:-2], 1, 1).reshape(-1).tolist()
    h, w = image.shape[-2:]
    result = np.empty((len(each), h, w), np.uint8)
    for plane, out, q in zip(planes.reshape(-1, h, w), result, each, strict=True):
        file = io.BytesIO()
        Image.fromarray(plane).save(file, "JPEG", quality=q)
        with Image.open(file, formats=["JPEG"]) as decoded:
            out[...] = np.asarray(decoded)
    return torch.from_numpy(result).reshape(image.shape).to(image.device, image.dtype) / 255


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

"""Degradations, as the published protocols define them."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(image: Tensor, sigma: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """White Gaussian noise: neither clipped nor rounded, as in the published denoising protocol.

    image: [..., H, W] float in [0, 1]. sigma: standard deviation in grey levels of 0..255, a number or a tensor that
    broadcasts against image (one level for each image of a batch: [N, 1, 1, 1]). Same shape, dtype and device out.
    """
    noise = torch.randn(image.shape, generator=generator, dtype=image.dtype, device=image.device)
    return image + noise * (sigma / 255)

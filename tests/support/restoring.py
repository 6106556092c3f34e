"""A network small enough to restore many images in a test, and images to restore."""

from __future__ import annotations

import numpy as np
import torch

from memnet_fast.config import MemNetConfig
from memnet_fast.reference import MemNet

SMALL = MemNetConfig(channels=16, num_memory_blocks=2, num_recursions=2)


def small_net(seed: int = 0) -> MemNet:
    """Radius 10, random everywhere; its results stay near its input, so that clipping hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    net = MemNet(SMALL)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 4:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / parameter[0].numel()) ** 0.5)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.3)
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=generator) * 0.3)
        net.recon.weight.mul_(0.05)
    return net.eval()


def picture(shape: tuple[int, ...], dtype: type | str = np.uint8, seed: int = 0) -> np.ndarray:
    """Random pixels; integers away from the ends of their range, floats in [0.2, 0.8]."""
    values = np.random.default_rng(seed).uniform(0.2, 0.8, shape)
    dtype = np.dtype(dtype)
    return (values * (np.iinfo(dtype).max if dtype.kind == "u" else 1)).astype(dtype)

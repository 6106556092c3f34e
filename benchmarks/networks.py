"""The networks that are measured: with bundled weights where there are some."""

from __future__ import annotations

import torch
from torch import nn

from memnet_fast.bench.truth import noisy
from memnet_fast.models import create_model, list_models
from memnet_fast.reference import MemNet


def network(name: str) -> MemNet:
    """A bundled model, or a preset with random weights whose batch normalisations have seen a few noisy images, so that its
    values are of the size that trained ones have. Raises InputError for an unknown name.
    """
    if name in list_models(pretrained=True):
        return create_model(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = create_model(name)
        generator = torch.Generator().manual_seed(0)
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None  # the mean over everything seen
        net.train()
        with torch.no_grad():
            for _ in range(2):
                net(noisy(2, 40, 40, generator, net.config.in_channels))
        for norm in norms:
            norm.momentum = 0.1
    return net.eval()

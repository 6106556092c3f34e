"""The multi-supervised loss (equation 10 of the paper), over the square or over Charbonnier's distance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memnet_fast.errors import InputError

_CHARBONNIER_EPS = 1e-3


def _square(error: Tensor) -> Tensor:
    """As Caffe's EuclideanLoss, for which the paper's rates and clipping are made: the sum over a patch, not its mean."""
    return error.square().flatten(1).sum(1).mean() / 2


def _charbonnier(error: Tensor) -> Tensor:
    """A smooth absolute value: strong degradations, whose errors are large, do not drown the weak ones."""
    return torch.sqrt(error.square() + _CHARBONNIER_EPS**2).mean()


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {"square": _square, "charbonnier": _charbonnier}


def multi_supervised(heads: list[Tensor], weights: Tensor | None, clean: Tensor, distance: str, alpha: float = 0.0) -> Tensor:
    """alpha * d(ensemble) + (1 - alpha) * mean of d(head); of a single output just d.

    heads: M outputs [N, C, H, W] of any float dtype. weights: [M], those of the ensemble; None with one output. clean:
    float32, same shape. distance: "square" (half the sum over a patch, mean over patches) or "charbonnier" (mean over all
    values). alpha: 0 to 1; 0 for 1 / (heads + 1), as in the paper. Returns a scalar, float32.
    Raises InputError for another distance.
    """
    if distance not in DISTANCES:
        raise InputError(f"unknown loss '{distance}'; choose from {', '.join(DISTANCES)}")
    d = DISTANCES[distance]
    if weights is None:
        return d(heads[0].float() - clean)
    alpha = alpha or 1 / (len(heads) + 1)
    ensemble = torch.stack([w * h.float() for w, h in zip(weights, heads, strict=True)]).sum(0)
    return alpha * d(ensemble - clean) + (1 - alpha) * torch.stack([d(h.float() - clean) for h in heads]).mean()

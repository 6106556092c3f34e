"""Muon for convolutions (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon), AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# The quintic iteration of the source: after five of them, singular values from 0.002 to 1 are between 0.68 and 1.21.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_MOMENTUM = 0.95


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon is for it: weights [out, in, k, k] of a convolution between several channels."""
    return parameter.ndim == 4 and min(parameter.shape[:2]) > 1


def orthogonalized(matrices: Tensor) -> Tensor:
    """Nearly U V^T of each U S V^T.

    matrices: [N, rows, columns], float32; singular values far below the norm of a matrix (a thousandth and less) stay small.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-12)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """groups: as of AdamW; in those with "matrices": True every parameter [out, in, k, k] is a matrix of out rows and is moved
    along its orthogonalised Nesterov momentum, by about lr per weight (root mean square), as AdamW moves weights by about lr at
    most. Its weight decay is AdamW's. `torch.optim.Muon` is for two dimensions only, and takes one matrix after the other."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, **adamw: Any) -> None:
        super().__init__([{"matrices": False, **group} for group in groups], lr=lr, **adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["matrices"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["matrices"]:
                self._move(group)
        return loss

    def _move(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[nn.Parameter]] = {}
        for p in group["params"]:
            if p.grad is not None:
                alike.setdefault(p.shape, []).append(p)
        for parameters in alike.values():
            directions = torch.stack([self._momentum(p).flatten(1) for p in parameters])
            # The squares of the elements of an orthogonal matrix add up to its shorter side: their mean is 1 / longer side.
            scale = max(directions.shape[1:]) ** 0.5
            for p, direction in zip(parameters, orthogonalized(directions), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction.view(p.shape), alpha=-group["lr"] * scale)

    def _momentum(self, p: nn.Parameter) -> Tensor:
        assert p.grad is not None
        if not self.state[p]:
            # AdamW looks for a step in every state that it loads.
            self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
        momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - _MOMENTUM)
        return p.grad.lerp(momentum, _MOMENTUM)

"""Wrong networks that look right at a glance: what every gate of a benchmark must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A network and an image -> a result.
Fault = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def _cached_by_address() -> Fault:
    kept: dict[int, Tensor] = {}
    return lambda net, x: kept.setdefault(x.data_ptr(), net(x))


def without_last_row(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = net(x).clone()
    y[:, :, -1] = x[:, :, -1]
    return y


def _one_nan(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = net(x).clone()
    y[0, 0, 3, 3] = float("nan")
    return y


def faults() -> dict[str, Fault]:
    """Fresh ones: one of them remembers what it has seen."""
    return {
        "returns its input": lambda net, x: x,
        "returns zeros": lambda net, x: torch.zeros_like(x),
        "caches by address": _cached_by_address(),
        "skips the last row": without_last_row,
        "skips the last image": lambda net, x: torch.cat([net(x[:-1]), x[-1:]]),
        "one NaN": _one_nan,
        "another shape": lambda net, x: net(x)[..., :-1],
    }

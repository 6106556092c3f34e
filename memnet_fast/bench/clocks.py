"""How long one run takes, and quantiles of many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Clock(Protocol):
    def sample(self, run: Callable[[], object]) -> float:
        """Milliseconds that one run takes, beginning with cold caches."""


class CudaClock:
    """Events on the current stream of a device.

    The write that cools the caches is queued first. While it runs, the host launches what is timed, so the time of a short
    run is that of the device and not of the first launch; a run of many launches that the host cannot keep up with shows that,
    as its user would see it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._cold = torch.empty(max(4 * cache, 256 << 20), dtype=torch.int8, device=device)

    def sample(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            self._cold.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end)


class HostClock:
    """For runs whose call returns when they are done."""

    def sample(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20 %, median, 80 %."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]

"""Memory on the device, and one error where it is short."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from memnet_fast.errors import DeviceOOM


@contextmanager
def short_memory(what: str, device: torch.device) -> Iterator[None]:
    """Raises DeviceOOM, with `what` was asked for, in place of the many errors that say that memory is short."""
    try:
        yield
    except DeviceOOM:
        raise
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        # A fault of a kernel is "an illegal memory access".
        if not isinstance(error, MemoryError) and ("memory" not in text or "memory access" in text):
            raise
        raise DeviceOOM(f"{what} on {device}: {(text or 'out of memory').splitlines()[0]}") from error


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str) -> Tensor:
    """torch.empty that raises DeviceOOM where memory is short."""
    size = math.prod(shape) * dtype.itemsize / 2**20
    with short_memory(f"{size:.0f} MiB of {what}", device):
        return torch.empty(shape, dtype=dtype, device=device)


def empty_to_keep(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str) -> Tensor:
    """As `empty`, for what outlives the call: never an inference tensor, which later calls in another mode could not write."""
    with torch.inference_mode(False):
        return empty(shape, dtype, device, what)

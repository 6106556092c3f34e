"""The tensors that a call reads, and whether they still hold what they held at the call before.

There are hundreds, and they are looked at in every call: what is done for each of them is done by `map`, in C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from memnet_fast import native
from memnet_fast.errors import InputError
from memnet_fast.memory import short_memory

_dtype, _device = attrgetter("dtype"), attrgetter("device")


@dataclass(frozen=True, eq=False)
class Parameters:
    """tensors: on one device, contiguous, without autograd; they share the memory of the caller's own, which therefore stays
    what it is as long as this object lives. in_place: all of them do; where one is not contiguous, `tensors` has a copy."""

    tensors: tuple[Tensor, ...]
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    addresses: np.ndarray  # [P] uint64
    sizes: np.ndarray  # [P] int64, bytes
    in_place: bool

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Parameters:
        """Raises InputError where they lie on several devices."""
        # First of all, for another thread may give the tensors other memory (`p.data = ...`) at any moment.
        kept = tuple(t.detach() for t in tensors)
        device = kept[0].device
        if any(d != device for d in map(_device, kept)):
            raise InputError("the parameters of the network lie on several devices; move it to one")
        in_place = _plain(kept)
        if not in_place:
            with short_memory("parameters", device):
                kept = tuple(t.resolve_neg().contiguous() for t in kept)
        addresses = np.fromiter(map(Tensor.data_ptr, kept), np.uint64, len(kept))
        sizes = np.fromiter((t.nbytes for t in kept), np.int64, len(kept))
        return cls(kept, device, tuple(map(_dtype, kept)), addresses, sizes, in_place)


def _plain(tensors: Sequence[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors))


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], list[int], list[torch.dtype]]:
    return list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors)), list(map(_dtype, tensors))


class Followed:
    """`Parameters.of`, made anew only where something moved."""

    def __init__(self) -> None:
        self._last: Parameters | None = None
        self._at: tuple[list[int], list[int], list[torch.dtype]] = [], [], []

    def of(self, tensors: Sequence[Tensor]) -> Parameters:
        """The tensors given last are held, so that nothing else can come to lie at their addresses: memory at the same
        addresses is the same memory. Its shape, dtype and order may still be another one (`p.data = p.data.mT`)."""
        at = _places(tensors)
        # What has no memory (device "meta") has address 0 everywhere.
        if self._last is not None and at == self._at and _plain(tensors) and all(at[0]):
            return self._last
        # The old ones may be all that keeps their memory, and go before copies are made of the new ones.
        self._last = None
        known = Parameters.of(tensors)
        if known.in_place:
            # Of what is kept: the tensors themselves may lie elsewhere again.
            self._last, self._at = known, _places(known.tensors)
        return known


class Values:
    """The values of parameters, bit for bit, as they were. Reading those of a GPU waits for it."""

    def __init__(self, parameters: Parameters) -> None:
        # Not the parameters themselves: they would keep memory alive that the network has left.
        self._device, self._dtypes, self._sizes = parameters.device, parameters.dtypes, parameters.sizes
        self._shapes = [t.shape for t in parameters.tensors]
        self._bytes = _bytes_of(parameters)
        self._host = self._bytes.numpy() if parameters.device.type == "cpu" and native.why_missing() is None else None

    def are_in(self, parameters: Parameters) -> bool:
        if parameters.device != self._device or parameters.dtypes != self._dtypes:
            return False
        if not np.array_equal(parameters.sizes, self._sizes):
            return False
        if self._host is None:
            return torch.equal(_bytes_of(parameters), self._bytes)
        return native.module().same_bytes(parameters.addresses, parameters.sizes, self._host)

    def tensors(self) -> tuple[Tensor, ...]:
        """The values as tensors of their own."""
        # Copies, because behind a tensor of 16 bit one of 32 need not lie at a multiple of four bytes.
        parts = zip(self._bytes.split(self._sizes.tolist()), self._dtypes, self._shapes, strict=True)
        return tuple(part.clone().view(dtype).view(shape) for part, dtype, shape in parts)


def _bytes_of(parameters: Parameters) -> Tensor:
    """One behind the other: uint8, on their device."""
    return torch.cat([t.reshape(-1).view(torch.uint8) for t in parameters.tensors])

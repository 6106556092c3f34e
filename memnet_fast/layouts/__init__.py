"""How the CUDA kernels want their weights: each layout is an array of int32 indices, said once for all who pack or read.

Entry i of a layout says which element of the weight, padded to 64 channels and flat, lies at place i of the packed array;
-1 stands for zero. The shape of the array is the shape in memory, from the slowest index to the fastest.
Layouts of fragments stand in `wgmma` (Hopper) and `mma` (all others); the plain ones are here.
"""

from __future__ import annotations

import numpy as np

# Channels of a slot: kChannels of csrc/cuda/kernels.h.
CHANNELS = 64


def first_conv(in_channels: int) -> np.ndarray:
    """[9][in_channels][64] of a weight [64][in_channels][3][3]."""
    index = np.arange(CHANNELS * in_channels * 9, dtype=np.int32).reshape(CHANNELS, in_channels, 9)
    return np.ascontiguousarray(index.transpose(2, 1, 0))


def reconstruct(out_channels: int, kernel: int) -> np.ndarray:
    """[kernel * kernel][out_channels][64] of a weight [out_channels][64][kernel][kernel]."""
    taps = kernel * kernel
    index = np.arange(out_channels * CHANNELS * taps, dtype=np.int32).reshape(out_channels, CHANNELS, taps)
    return np.ascontiguousarray(index.transpose(2, 0, 1))


def rows(*shape: int) -> np.ndarray:
    """An array as it is."""
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


def into(layout: np.ndarray, padded: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A layout of a weight of shape `padded` as a layout of the weight of shape `shape` in its corner; -1 for all beyond it."""
    corner = np.full(padded, -1, np.int32)
    corner[tuple(slice(n) for n in shape)] = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    return np.where(layout < 0, np.int32(-1), corner.reshape(-1)[layout])

"""Weights as mma.sync m16n8k16 takes them: the right operands of its products, a fragment for each lane, as index maps.

The left operand is 16 pixels of 16 input channels, the right one 16 input channels of 8 output channels. Lane l holds of the
right one the rows 2 (l % 4) + {0, 1, 8, 9} of column l // 4. A thread reads the fragments of two products, 16 bytes, at once:
csrc/cuda/mma_tile.h, `weight_offset`.
"""

from __future__ import annotations

import numpy as np

from memnet_fast.layouts import CHANNELS


def _fragments() -> tuple[np.ndarray, np.ndarray]:
    """Output and input channel of each value of a weight of 64 by 64: [4, 4, 32, 8], that is step of 16 inputs, pair of 8
    outputs, lane, value."""
    step, pair, lane, value = np.ogrid[: CHANNELS // 16, : CHANNELS // 16, :32, :8]
    out = 16 * pair + 8 * (value // 4) + lane // 4
    row = 2 * (lane % 4) + value % 2 + 8 * (value % 4 // 2)
    out, channel = np.broadcast_arrays(out, 16 * step + row)
    return out, channel


def conv3x3() -> np.ndarray:
    """int32 [9, 4, 4, 32, 8]: flat indices into a weight [64 out, 64 in, 3, 3], tap by tap."""
    out, channel = _fragments()
    tap = np.arange(9).reshape(9, 1, 1, 1, 1)
    return ((out * CHANNELS + channel) * 9 + tap).astype(np.int32)


def gate(num_src: int) -> np.ndarray:
    """int32 [num_src, 4, 4, 32, 8]: flat indices into a weight [64 out, num_src, 64 in], source by source."""
    out, channel = _fragments()
    source = np.arange(num_src).reshape(num_src, 1, 1, 1, 1)
    return ((out * num_src + source) * CHANNELS + channel).astype(np.int32)

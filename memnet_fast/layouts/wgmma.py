"""Weights as Hopper's tensor cores take them from registers: the fragments of csrc/cuda/residual_block_sm90.cuh.

A table has the shape of the packed tensor and holds, for each of its elements, the flat index of the weight that belongs
there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CHANNELS = 64
STEPS = 36  # of the inner dimension: 9 taps x 4 quarters of the input channels
STEPS_FP8 = 18  # 9 taps x 2 halves
THREADS = 128  # of a warpgroup


def conv3x3() -> np.ndarray:
    """int32 [36 steps, 128 threads, 8 values] into a weight [64 out, 64 in, 3, 3].

    Step 4 * tap + q multiplies the input channels 16 q to 16 q + 15. Of that 64 x 16 matrix, lane l of warp w holds the
    rows (output channels) 16 w + l / 4 and the one 8 below, and of each the columns 2 (l % 4), the next one, and the
    same 8 further: registers (row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8) of two columns
    each.
    """
    step, thread, value = np.ogrid[:STEPS, :THREADS, :8]
    tap, quarter = step // 4, step % 4
    warp, lane, register = thread // 32, thread % 32, value // 2
    out_channel = 16 * warp + lane // 4 + 8 * (register % 2)
    in_channel = 16 * quarter + 2 * (lane % 4) + value % 2 + 8 * (register // 2)
    return ((out_channel * CHANNELS + in_channel) * 9 + tap).astype(np.int32)


def conv3x3_fp8_a() -> np.ndarray:
    """int32 [18 steps, 128 threads, 16 bytes] into a weight [64 out, 64 in, 3, 3], for e4m3.

    As conv3x3, with 32 input channels in a step: a register holds four neighbouring columns, from 4 (l % 4) on, and the columns
    of the other two registers are 16 further.
    """
    return _fp8(lambda column: column)


def conv3x3_fp8_b() -> np.ndarray:
    """As conv3x3_fp8_a, for the second convolution: of each 16 channels between the two, c and c + 8 lie side by side."""
    return _fp8(lambda column: column // 16 * 16 + column % 16 // 2 + column % 2 * 8)


def _fp8(channel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """channel: the one that a place among 64 holds."""
    step, thread, value = np.ogrid[:STEPS_FP8, :THREADS, :16]
    tap, half = step // 2, step % 2
    warp, lane, register = thread // 32, thread % 32, value // 4
    out_channel = 16 * warp + lane // 4 + 8 * (register % 2)
    column = 32 * half + 4 * (lane % 4) + value % 4 + 16 * (register // 2)
    return ((out_channel * CHANNELS + channel(column)) * 9 + tap).astype(np.int32)

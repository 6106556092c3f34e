"""Lays weights out as the native kernels read them (the shapes stand in ``csrc/plan.h``).

Every function takes float64 arrays, computes in float64, rounds once to float32, pads channels with zeros up to ``cp``,
and returns a contiguous array whose data begin at a multiple of 64 bytes, so that no vector load crosses a cache line.
"""

import functools
import math

import numpy as np

_ALIGNMENT = 64


def padded_channels(channels: int) -> int:
    """Channels rounded up to a multiple of 16: Cp."""
    return -(-channels // 16) * 16


def aligned_zeros(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """Zeros of the given shape whose first element lies at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def pad_channels(values: np.ndarray, cp: int) -> np.ndarray:
    """values: [..., C] -> [..., Cp] float32, zeros behind."""
    values = np.asarray(values, np.float64)
    if values.shape[-1] > cp:
        raise ValueError(f"{values.shape[-1]} channels do not fit {cp}")
    packed = aligned_zeros((*values.shape[:-1], cp))
    packed[..., : values.shape[-1]] = values
    return packed


def _check_conv(weight: np.ndarray, kernel: int) -> np.ndarray:
    weight = np.asarray(weight, np.float64)
    if weight.ndim != 4 or weight.shape[2:] != (kernel, kernel):
        raise ValueError(f"expected a weight [out, in, {kernel}, {kernel}], got {list(weight.shape)}")
    return weight


def _pad_square(matrices: np.ndarray, cp: int) -> np.ndarray:
    """matrices: [K, in, out] -> [K][Cp][Cp] float32."""
    count, cin, cout = matrices.shape
    if max(cin, cout) > cp:
        raise ValueError(f"{cin} -> {cout} channels do not fit {cp}")
    packed = aligned_zeros((count, cp, cp))
    packed[:, :cin, :cout] = matrices
    return packed


def pack_direct(weight: np.ndarray, cp: int) -> np.ndarray:
    """weight: [out, in, 3, 3] -> [9][Cp in][Cp out] float32, for algorithm ``direct``."""
    weight = _check_conv(weight, 3)
    return _pad_square(weight.transpose(2, 3, 1, 0).reshape(9, weight.shape[1], weight.shape[0]), cp)


@functools.cache
def winograd_weight_transform() -> np.ndarray:
    """G [8, 3] float64 of F(6x6, 3x3) at the points 0, +-1, +-2, +-1/2, infinity."""
    points = np.array([0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5])
    rows = [
        [point**power / math.prod(point - other for other in np.delete(points, i)) for power in range(3)]
        for i, point in enumerate(points)
    ]
    transform = np.array([*rows, [0.0, 0.0, 1.0]])
    transform.flags.writeable = False
    return transform


def pack_winograd(weight: np.ndarray, cp: int) -> np.ndarray:
    """weight: [out, in, 3, 3] -> G w G^T as [64][Cp in][Cp out] float32, for algorithm ``winograd``."""
    weight = _check_conv(weight, 3)
    g = winograd_weight_transform()
    # One product in the final order of axes: 42 weights of a network are packed before its first result.
    transformed = np.kron(g, g) @ weight.transpose(2, 3, 1, 0).reshape(9, -1)
    return _pad_square(transformed.reshape(64, weight.shape[1], weight.shape[0]), cp)


def pack_first(weight: np.ndarray, cp: int) -> np.ndarray:
    """weight: [C, Cin, 3, 3] -> [9][Cin][Cp] float32."""
    weight = _check_conv(weight, 3)
    return pad_channels(weight.transpose(2, 3, 1, 0).reshape(9, weight.shape[1], weight.shape[0]), cp)


def pack_gate(weight: np.ndarray, num_src: int, cp: int) -> np.ndarray:
    """weight: [C, num_src * C] or [C, num_src * C, 1, 1], sources in slot order -> [num_src][Cp in][Cp out] float32."""
    weight = np.asarray(weight, np.float64)
    out = weight.shape[0]
    if weight.size != out * num_src * out:
        raise ValueError(f"expected a gate weight [{out}, {num_src * out}], got {list(weight.shape)}")
    return _pad_square(weight.reshape(out, num_src, out).transpose(1, 2, 0), cp)


def pack_reconstruct(weight: np.ndarray, cp: int) -> np.ndarray:
    """weight: [Cout, C, k, k], k = 1 or 3 -> [k * k][Cout][Cp] float32."""
    weight = np.asarray(weight, np.float64)
    weight = _check_conv(weight, 1 if weight.shape[-1] == 1 else 3)
    return pad_channels(weight.transpose(2, 3, 0, 1).reshape(-1, weight.shape[0], weight.shape[1]), cp)

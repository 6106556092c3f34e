"""Lays weights out as the native kernels read them (the shapes stand in ``csrc/plan.h``).

Every function takes float64 arrays, computes in float64, rounds to float32 (and from there to bf16 where it says so), pads
channels with zeros up to ``cp``, and returns a contiguous array whose data begin at a multiple of 64 bytes, so that no
vector load crosses a cache line.
"""

import functools
import math

import numpy as np
import torch

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


def _pair_channels(matrices: np.ndarray) -> np.ndarray:
    """matrices: [K, Cp in, Cp out] float32 -> [K][Cp in / 2][Cp out][2] uint16, the bits of bf16 (nearest, ties to even)."""
    count, cin, cout = matrices.shape
    pairs = np.ascontiguousarray(matrices.reshape(count, cin // 2, 2, cout).transpose(0, 1, 3, 2))
    packed = aligned_zeros(pairs.shape, np.uint16)
    packed[...] = torch.from_numpy(pairs).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return packed


def pack_bf16_direct(weight: np.ndarray, cp: int) -> np.ndarray:
    """weight: [out, in, 3, 3] -> [9][Cp in / 2][Cp out][2] bf16 bits, for precision ``bf16``, algorithm ``direct``."""
    return _pair_channels(pack_direct(weight, cp))


def bf16_winograd_transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A^T [3, 5], G [5, 3] and B^T [5, 5], float64, of F(3x3, 3x3) at the points +-2/5, +-5/4, infinity.

    Scaled so that the entries of A^T and B^T are what csrc/cpu/bf16_winograd.h computes.
    """
    points = np.array([0.4, -0.4, 1.25, -1.25])
    powers = points[:, None] ** np.arange(5)
    norm = np.array([math.prod(point - other for other in np.delete(points, i)) for i, point in enumerate(points)])
    last = np.zeros((1, 5))
    last[0, 4] = 1
    a = np.vstack([powers[:, :3], last[:, 2:]]).T
    g = np.vstack([powers[:, :3] / norm[:, None], last[:, 2:]])
    b = np.zeros((5, 5))
    for i in range(4):
        b[i, :4] = np.poly(np.delete(points, i))[::-1]
    b[4] = np.poly(points)[::-1]
    return a, g, b


def pack_bf16_winograd(weight: np.ndarray, cp: int) -> np.ndarray:
    """weight: [out, in, 3, 3] -> G w G^T as [25][Cp in / 2][Cp out][2] bf16 bits, for precision ``bf16``, algorithm
    ``winograd``."""
    weight = _check_conv(weight, 3)
    g = bf16_winograd_transforms()[1]
    transformed = np.einsum("ay,oiyx,bx->abio", g, weight, g, optimize=True)
    return _pair_channels(_pad_square(transformed.reshape(25, weight.shape[1], weight.shape[0]), cp))


def pack_bf16_gate(weight: np.ndarray, num_src: int, cp: int) -> np.ndarray:
    """weight: as for pack_gate -> [num_src][Cp in / 2][Cp out][2] bf16 bits."""
    return _pair_channels(pack_gate(weight, num_src, cp))


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

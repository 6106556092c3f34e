"""What each operation of a plan computes and moves, by formula.

For n images of h x w pixels (P = n h w), C channels, Cp of them in memory (C rounded up for the kernels), k sources of a gate
or heads of a reconstruction, q x q its kernel, and e bytes for each value of a slot:

| operation      | flop (as defined)         | executed                                   | bytes                             |
|----------------|---------------------------|--------------------------------------------|-----------------------------------|
| first_conv     | 2 P 9 C_in C              | 2 P 9 C_in Cp                              | P (4 C_in + e Cp) + weights       |
| residual_block | 2 P 18 C^2                | direct 2 P 18 Cp^2                         | P 2 e Cp + weights                |
|                |                           | Winograd 2 * 2 n tiles points Cp^2         |                                   |
| gate           | 2 P k C^2                 | 2 P k Cp^2                                 | P (k + 1) e Cp + weights          |
| reconstruct    | 2 P k q^2 C C_out         | 2 P q^2 Cp C_out if heads are mixed first  | P (k e Cp + 4 (C_in + C_out)) + w |

FLOP are those of the convolutions, two for each multiply-add; batch normalisation, ReLU, bias, skip and the transforms of
Winograd's algorithm count as nothing: time spent on them is time lost. tiles of t x t pixels cover the image: ceil(h / t)
ceil(w / t), with (t + 2)^2 points each. Bytes are the least that must move: every map that an operation reads or writes, once,
and its packed weights, once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from memnet_fast import packing
from memnet_fast.config import MemNetConfig
from memnet_fast.plan import FirstConv, Gate, Op, Reconstruct, ResidualBlock


@dataclass(frozen=True)
class Cost:
    """flop: of the operation as it is defined, by direct convolution. executed: of the products that a backend computes
    instead. bytes: the least that must move."""

    flop: int
    executed: int
    bytes: int


@dataclass(frozen=True)
class Way:
    """How a backend computes. channels: Cp; element: bytes of a value in a slot, and of a weight of a block or gate; winograd:
    residual blocks by Winograd's algorithm; mixes_heads: a reconstruction adds its heads before the only convolution."""

    channels: int
    element: int
    winograd: bool
    mixes_heads: bool


@cache
def winograd_tile() -> tuple[int, int]:
    """Pixels of a side, and points of a tile, as the weights are packed."""
    points = packing.pack_winograd(np.zeros((1, 1, 3, 3)), 16).shape[0]
    return math.isqrt(points) - 2, points


def cost(op: Op, config: MemNetConfig, way: Way, n: int, h: int, w: int) -> Cost:
    """Of one operation on [n, C_in, h, w]."""
    pixels, c, cp, e = n * h * w, config.channels, way.channels, way.element
    cin, cout = config.in_channels, config.out_channels
    match op:
        case FirstConv():
            weights = 4 * 9 * cin * cp
            return Cost(18 * pixels * cin * c, 18 * pixels * cin * cp, pixels * (4 * cin + e * cp) + weights)
        case ResidualBlock():
            products, points = 18 * pixels * cp * cp, 9
            if way.winograd:
                tile, points = winograd_tile()
                products = 2 * n * -(-h // tile) * -(-w // tile) * points * cp * cp
            return Cost(36 * pixels * c * c, 2 * products, pixels * 2 * e * cp + 2 * points * cp * cp * e)
        case Gate(srcs=srcs):
            k = len(srcs)
            return Cost(2 * pixels * k * c * c, 2 * pixels * k * cp * cp, pixels * (k + 1) * e * cp + k * cp * cp * e)
        case Reconstruct(srcs=srcs):
            k, taps = len(srcs), config.recon_kernel**2
            convolutions = 1 if way.mixes_heads else k
            return Cost(
                2 * pixels * k * taps * c * cout,
                2 * pixels * convolutions * taps * cp * cout,
                pixels * (k * e * cp + 4 * (cin + cout)) + 4 * taps * cp * cout,
            )

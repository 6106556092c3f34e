"""Layers L0 and L2: every operation of every backend alone, bit by bit on impulses and by its spread on real numbers."""

from __future__ import annotations

import pytest
from support import layers
from support.candidates import ALL, DIRECT, TORCH, WINOGRAD

# 16 fills one vector of padded channels, 5 leaves most of it empty, 20 spills into a second.
CHANNELS = [16, 5, 20]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("candidate", TORCH[:1] + DIRECT + WINOGRAD, ids=lambda c: c.name)
def test_impulses(candidate, channels):
    """L0"""
    layers.l0_impulse(candidate, channels)


@pytest.mark.parametrize("candidate", TORCH[1:], ids=lambda c: c.name)
def test_impulses_in_low_precision(candidate):
    """L0: quarters and eighths are exact in bfloat16 too."""
    layers.l0_impulse(candidate)


@pytest.mark.parametrize("size", [(17, 19), (40, 37)], ids=str)
@pytest.mark.parametrize("channels", [64, 16])
@pytest.mark.parametrize("candidate", ALL, ids=lambda c: c.name)
def test_errors_have_the_expected_spread(candidate, channels, size):
    """L2"""
    layers.l2_kernels(candidate, channels, size)

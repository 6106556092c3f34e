"""Colour: what the network sees, and how its results go back."""

from __future__ import annotations

import numpy as np
import pytest
from support.restoring import picture

from memnet_fast.errors import InputError
from memnet_fast.restore import color

# JFIF: rows Y, Cb, Cr of full-range YCbCr without the offset of 128.
_JFIF = np.array([[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]])


def test_merge_equals_a_conversion_to_ycbcr_and_back():
    rgb = picture((5, 7, 3), np.float64)
    seen = color.planes(rgb, "y")
    restored = seen + np.random.default_rng(1).normal(0, 0.1, seen.shape).astype(np.float32)
    ycc = rgb @ _JFIF.T
    np.testing.assert_allclose(seen[0], ycc[..., 0], atol=1e-7)
    ycc[..., 0] += (restored - seen)[0]
    np.testing.assert_allclose(color.merge(rgb, seen, restored), ycc @ np.linalg.inv(_JFIF).T, atol=1e-7)


def test_luma_of_a_window_has_the_bits_of_the_whole():
    rgb = picture((40, 37, 3), np.float32)
    assert np.array_equal(color.luma(rgb)[3:20, 5:30], color.luma(rgb[3:20, 5:30]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_integer_survives_the_way_to_floats_and_back(dtype):
    values = np.arange(np.iinfo(dtype).max + 1, dtype=dtype).reshape(-1, 1, 1)
    unit = color.to_unit(values)
    assert unit.dtype == np.float32 and unit.min() == 0 and unit.max() == 1
    assert np.array_equal(color.to_samples(unit, values.dtype), values)


def test_rounding_is_half_to_even_and_values_are_clipped():
    levels = np.array([-3.0, 0.5, 1.5, 2.5, 254.5, 300.0])
    assert color.to_samples(levels / 255, np.dtype(np.uint8)).tolist() == [0, 0, 2, 2, 254, 255]
    assert color.to_samples(np.array([-0.5, 1.5]), np.dtype(np.float32)).tolist() == [-0.5, 1.5]


@pytest.mark.parametrize("channels", [0, 5, 300])
def test_unknown_channel_counts_are_refused(channels):
    with pytest.raises(InputError, match=f"1 to 4 channels.*got {channels}"):
        color.colour_channels(channels)

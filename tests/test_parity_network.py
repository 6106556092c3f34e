"""Layers L1, L3, L4 and L5: whole networks on every backend, precision, algorithm and instruction set."""

from __future__ import annotations

import pytest
import torch
from support import checks, integer, layers, networks
from support.candidates import ALL, DIRECT, TORCH, WINOGRAD, torch_candidate

from memnet_fast import native
from memnet_fast.config import PRESETS, MemNetConfig

EXACT = TORCH + DIRECT


@pytest.mark.parametrize("candidate", EXACT, ids=lambda c: c.name)
@pytest.mark.parametrize("name", [n for n, c in networks.VARIANTS.items() if not c.clamp and n != "chain"])
def test_integer_networks(candidate, name):
    """L1. Clamped networks are left out: an integer of any size would come out as 0 or 1. A chain of three, passed three times
    with the same normalisations, leaves the integers that bfloat16 holds."""
    layers.l1_integer(candidate, networks.VARIANTS[name], seed=1)


@pytest.mark.parametrize("candidate", EXACT, ids=lambda c: c.name)
def test_integer_network_of_80_layers(candidate):
    """L1 on the official network: 80 layers, 64 channels."""
    layers.l1_integer(candidate, PRESETS["memnet_m6r6"], size=(13, 17))


@pytest.mark.parametrize("candidate", EXACT, ids=lambda c: c.name)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (15, 16), (16, 17), (17, 15), (31, 33), (63, 65)], ids=str)
def test_integer_network_at_odd_sizes(candidate, size):
    """L1 at sizes around the blocks of the kernels (T01 to T04)."""
    layers.l1_integer(candidate, networks.SMALL, seed=2, size=size)


@pytest.mark.parametrize("candidate", ALL, ids=lambda c: c.name)
@pytest.mark.parametrize("seed", range(3))
def test_network_against_the_policy_matched_reference(candidate, seed):
    """L3"""
    layers.l3_network(candidate, seed=seed)


@pytest.mark.parametrize("candidate", ALL, ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["no_bias", "short_long", "colour", "unshared", "last_output", "chain", "lornatang"])
def test_variants_against_the_policy_matched_reference(candidate, name):
    """L3"""
    layers.l3_network(candidate, networks.VARIANTS[name], seed=1)


@pytest.mark.parametrize("candidate", TORCH[:1] + DIRECT + WINOGRAD, ids=lambda c: c.name)
def test_official_network_against_the_policy_matched_reference(candidate):
    """L3 on 80 layers and 64 channels."""
    layers.l3_network(candidate, PRESETS["memnet_m6r6"], n=1)


@pytest.mark.parametrize("candidate", TORCH[1:], ids=lambda c: c.name)
def test_official_network_in_low_precision(candidate):
    """L3: NSR of tf32, bf16 and fp16 on 80 layers."""
    layers.l3_network(candidate, PRESETS["memnet_m6r6"], size=(21, 19), n=1)


@pytest.mark.parametrize("candidate", ALL, ids=lambda c: c.name)
def test_nan_footprint(candidate):
    """L4, T33"""
    layers.l4_footprint(candidate)
    layers.l4_footprint(candidate, networks.VARIANTS["lornatang"], (60, 43))


@pytest.mark.parametrize("candidate", TORCH[:1] + DIRECT[:1] + WINOGRAD[:1], ids=lambda c: c.name)
def test_nan_footprint_of_the_official_network(candidate):
    """L4, T33: 149x149 pixels around the bad one, clipped at the border."""
    net = networks.preset("memnet_m6r6")
    assert 2 * net.config.receptive_radius + 1 == 149
    x = networks.image(1, 1, 170, 180)
    bad = x.clone()
    bad[0, 0, 81, 20] = float("nan")
    runner = candidate.build(net)
    clean, broken = runner.run(x)[0], runner.run(bad)[0]
    mask = checks.footprint(x.shape, 0, 81, 20, 74)
    assert int(mask.sum()) == 149 * 95
    checks.require_footprint(broken, clean, mask, exact=candidate.algorithm != "winograd")


@pytest.mark.parametrize("candidate", ALL, ids=lambda c: c.name)
def test_batch_place_and_crop_do_not_matter(candidate):
    """L5, T57, T59"""
    layers.l5_invariance(candidate)


@pytest.mark.parametrize("candidate", DIRECT + WINOGRAD, ids=lambda c: c.name)
def test_repeats_are_bit_equal(candidate):
    """L5: a hundred runs on memory that held something else each time (T58 asks for a thousand on a GPU)."""
    net = networks.build(networks.SMALL)
    x = networks.image(2, 1, 19, 23)
    runner = candidate.build(net)
    first = runner.run(x)[0]
    for i in range(100):
        runner.poison = (0xFF, 0x00, 0x7F, 0x42)[i % 4]
        assert torch.equal(runner.run(x)[0], first), i


def test_lowering_and_torch_backend_are_exact_in_float64():
    """The policy-matched reference itself: in float64 it is the oracle."""
    net = networks.build(MemNetConfig(channels=16, num_memory_blocks=3, num_recursions=3), tiny_variance=True)
    x = networks.image(2, 1, 17, 13)
    y, _ = torch_candidate("fp64").build(net).run(x)
    truth = networks.oracle(net, x)
    assert float((y - truth).abs().max()) <= 1e-12 * float(truth.abs().max())


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_low_precision_is_really_low(precision):
    """An fp32 run in disguise would pass every upper limit; its error would be far below that of its precision."""
    net, x, truth = layers.network_case(layers.NETWORK, 2, 33, 29, 0)
    candidate = next(c for c in TORCH if c.precision == precision)
    y, _ = candidate.build(net).run(x)
    assert checks.nsr(y, truth, x) > 0.3 * checks.UNIT[precision]


@pytest.mark.skipif(native.why_missing() is not None, reason=f"no native module: {native.why_missing()}")
def test_the_native_backend_takes_part():
    """Without a native module its candidates vanish from every list above; this test then shows as skipped."""
    assert [c.name for c in DIRECT] == [f"cpu-direct-{isa}" for isa in native.module().isas()]
    assert len(DIRECT) == len(WINOGRAD) >= 1
    assert DIRECT[-1].name == "cpu-direct-baseline", "portable code runs everywhere"


def test_integer_cases_use_the_whole_range_they_may():
    assert integer.largest_value(*integer.case(PRESETS["memnet_m6r6"], 2, 13, 17)[:2]) > 30

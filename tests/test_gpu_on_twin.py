"""The tests of a GPU, run on the CPU over the model of one: the CUDA backend with the text of its own kernels (support/simt).

Each test here is a test of test_gpu_parity.py or test_gpu_module.py with smaller sizes, so that neither those tests nor the
kernels meet each other for the first time on a GPU. What the model cannot show stands in support/simt/simt.h.
"""

from __future__ import annotations

import pytest
import test_gpu_module as module
import test_gpu_streams as streams
from support import cuda_twin, layers, networks
from support.candidates import CPU, cuda_candidate
from support.places import SHALLOW, Place

CANDIDATES = [cuda_candidate(p, CPU, capability) for p in ("fp16", "bf16") for capability in (90, 80)]


@pytest.fixture
def place(twin_build, monkeypatch):
    cuda_twin.install(twin_build, monkeypatch)
    return Place("twin", CPU, "cuda", "fp16")


@pytest.fixture
def fast(place):
    return place.fuse(networks.build(networks.SMALL))


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
def test_layers(place, candidate, monkeypatch):
    """L0 (every 23rd plan), L1, L2, L3"""
    layers.l2_kernels(candidate, 64, (9, 19))
    layers.l2_kernels(candidate, 20, (5, 35))
    layers.l3_network(candidate, networks.SMALL, size=(9, 11), n=1)
    for name in ("official", "gray_to_colour", "unshared"):
        layers.l1_integer(candidate, networks.VARIANTS[name], seed=1, size=(5, 9))
    every = layers.impulse_plans
    monkeypatch.setattr(layers, "impulse_plans", lambda channels: every(channels)[::23])
    layers.l0_impulse(candidate, 20)


@pytest.mark.parametrize("candidate", CANDIDATES[::3], ids=lambda c: c.name)
def test_footprint_and_invariance(place, candidate):
    """L4, L5"""
    layers.l4_footprint(candidate, SHALLOW, (9, 36))
    layers.l5_invariance(candidate, SHALLOW, (25, 35))


@pytest.mark.parametrize("edge", [1, 7, 31, 32, 33, 97])
def test_tile_borders(place, edge):
    for candidate in CANDIDATES[::3]:
        layers.l1_integer(candidate, SHALLOW, seed=3, size=(3, edge))
        layers.l1_integer(candidate, SHALLOW, seed=3, size=(edge, 2))


@pytest.mark.parametrize(
    "body",
    [
        module.test_it_is_the_network,
        module.test_t11_empty_batch,
        module.test_t20_fake_tensors,
        module.test_t20_opcheck,
        module.test_t22_to_t25_views,
        module.test_t65_switches_of_torch_change_nothing,
        module.test_t66_deterministic_algorithms,
    ],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_module(place, fast, body):
    body(place, fast)


@pytest.mark.parametrize(
    "body",
    [
        module.test_t40_compiled_without_a_break,
        module.test_t61_training_mode_uses_the_batch,
        module.test_t62_conversions,
        module.test_t68_what_lies_in_the_workspace,
    ],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_module_that_changes(place, fast, body):
    body(place, fast)


def test_results_are_the_callers_own(place, fast):
    module.test_t32_results_are_the_callers_own(place, fast, (9, 10))


def test_short_memory(place, fast, monkeypatch):
    module.test_t56_out_of_memory_at_every_allocation(place, fast, monkeypatch)


@pytest.mark.parametrize("change", [module._scaled, module._statistics, module._replaced, module._swapped])
def test_changed_weights(place, fast, change):
    module.test_t63_changed_weights_are_noticed(place, fast, change)


@pytest.mark.parametrize(
    "body",
    [streams.test_t51_captured_on_the_first_call, streams.test_t52_replay_after_weights_changed],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_streams(place, fast, body):
    body(place, fast)

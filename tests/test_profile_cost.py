"""What a profile says of FLOP and bytes: formulas against counts by hand, and against what the kernels themselves count."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import networks
from support.threads import torch_threads

from memnet_fast import backends, native, packing, timing
from memnet_fast.config import PRESETS
from memnet_fast.plan import FirstConv, Gate, Reconstruct, ResidualBlock, lower, outline
from memnet_fast.profile.cost import Way, cost, winograd_tile
from memnet_fast.profile.measuring import prepared, way_of
from memnet_fast.reference import count_macs

DIRECT = Way(channels=16, element=4, winograd=False, mixes_heads=True)
needs_native = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "built")


def _by_hand(op, config, way, n, h, w) -> tuple[int, int, int]:
    """flop, executed and bytes of an operation, by loops over what it reads, multiplies and writes."""
    flop = executed = moved = 0
    for _ in range(n * h * w):
        match op:
            case FirstConv():
                for _tap in range(9):
                    flop += 2 * config.in_channels * config.channels
                    executed += 2 * config.in_channels * way.channels
                moved += 4 * config.in_channels + way.element * way.channels
            case ResidualBlock():
                for _convolution in range(2):
                    for _tap in range(9):
                        flop += 2 * config.channels**2
                        executed += 2 * way.channels**2
                moved += 2 * way.element * way.channels  # one map in, one out
            case Gate():
                for _source in op.srcs:
                    flop += 2 * config.channels**2
                    executed += 2 * way.channels**2
                    moved += way.element * way.channels
                moved += way.element * way.channels
            case Reconstruct():
                for _source in op.srcs:
                    flop += 2 * config.recon_kernel**2 * config.channels * config.out_channels
                    moved += way.element * way.channels
                executed += 2 * config.recon_kernel**2 * way.channels * config.out_channels
                moved += 4 * (config.in_channels + config.out_channels)
    match op:  # weights, once
        case FirstConv():
            moved += 9 * config.in_channels * way.channels * 4
        case ResidualBlock():
            moved += 2 * 9 * way.channels**2 * way.element
        case Gate():
            moved += len(op.srcs) * way.channels**2 * way.element
        case Reconstruct():
            moved += config.recon_kernel**2 * way.channels * config.out_channels * 4
    return flop, executed, moved


@pytest.mark.parametrize("name", list(networks.VARIANTS))
def test_formulas_are_the_counts_by_hand(name):
    config = networks.VARIANTS[name]
    for way in (DIRECT, dataclasses.replace(DIRECT, channels=64, element=2)):
        for op in outline(config).ops:
            found = cost(op, config, way, 2, 3, 5)
            assert (found.flop, found.executed, found.bytes) == _by_hand(op, config, way, 2, 3, 5), op


@pytest.mark.parametrize("name", [*networks.VARIANTS, *PRESETS])
def test_all_operations_together_are_the_network(name):
    config = {**networks.VARIANTS, **PRESETS}[name]
    flop = sum(cost(op, config, DIRECT, 1, 7, 11).flop for op in outline(config).ops)
    assert flop == 2 * count_macs(config) * 77


def test_heads_that_are_not_mixed_are_convolved_one_by_one():
    op = outline(networks.SMALL).ops[-1]
    mixed, single = (cost(op, networks.SMALL, dataclasses.replace(DIRECT, mixes_heads=m), 1, 4, 4) for m in (True, False))
    assert single.executed == len(op.srcs) * mixed.executed and single.bytes == mixed.bytes


def test_winograd_multiplies_points_of_whole_tiles():
    tile, points = winograd_tile()
    assert points == (tile + 2) ** 2
    op = outline(networks.SMALL).ops[1]
    way = dataclasses.replace(DIRECT, winograd=True)
    # One pixel more than two tiles down: three of them; exactly one across.
    assert cost(op, networks.SMALL, way, 2, 2 * tile + 1, tile).executed == 2 * 2 * 2 * 3 * points * 16 * 16


@needs_native
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("name", ["official", "no_bias", "colour", "lornatang"])
@pytest.mark.parametrize("shape", [(1, 9, 13), (2, 1, 1)])
def test_the_kernels_count_what_the_formula_says(name, algorithm, shape):
    """On one thread: with more, each band of an image may compute rows of its neighbours again."""
    net = networks.build(networks.VARIANTS[name])
    n, h, w = shape
    with torch_threads(1):
        plan, choice, packed = prepared(net, "cpu", "fp32", algorithm)
        x = networks.image(n, net.config.in_channels, h, w)
        out = torch.empty(n, net.config.out_channels, h, w)
        workspace = torch.from_numpy(packing.aligned_zeros((packed.workspace_bytes(n, h, w),), "uint8"))
        timed = packed.run_timed(x, out, workspace, timing.names(plan.ops))
    way = way_of(packed, plan, choice)
    for i, op in enumerate(plan.ops):
        counted = sum(t.flop for t in timed.threads if t.op == i)
        assert counted == cost(op, plan.config, way, n, h, w).executed, op


def test_how_backends_compute():
    plan = lower(networks.build(networks.VARIANTS["no_bias"]))  # 5 channels
    cpu = torch.device("cpu")
    choice = backends.Choice("torch", "bf16", "direct")
    assert way_of(backends.torch.pack(plan, cpu, "bf16"), plan, choice) == Way(5, 2, False, False)
    if native.why_missing() is None:
        choice = backends.Choice("cpu", "fp32", "winograd")
        assert way_of(backends.cpu.pack(plan, cpu, "fp32", "winograd"), plan, choice) == Way(16, 4, True, True)


def test_names_follow_the_modules_of_the_reference():
    names = timing.names(outline(networks.SMALL).ops)
    assert names == (
        "first_conv",
        *("residual_block.0.0", "residual_block.0.1", "gate.0"),
        *("residual_block.1.0", "residual_block.1.1", "gate.1"),
        "reconstruct",
    )

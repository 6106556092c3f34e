"""Memory of a plan against a replay of it, and of the reference against what torch's profiler saw its allocator do."""

from __future__ import annotations

import pytest
import torch
from support import networks
from torch.profiler import ProfilerActivity, profile

from memnet_fast import backends, native
from memnet_fast.plan import lower, reads, writes
from memnet_fast.profile import memory as memories
from memnet_fast.profile import plots
from memnet_fast.profile.cost import Way

WAY = Way(16, 4, True, True)
needs_native = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "built")


def _steps(config, backend):
    plan = lower(networks.build(config))
    packed = backends.cpu.pack(plan, torch.device("cpu"), "fp32", "direct") if backend == "cpu" else None
    return memories.steps(plan, packed)


@pytest.mark.parametrize("name", list(networks.VARIANTS))
@pytest.mark.parametrize("backend", ["plan", pytest.param("cpu", marks=needs_native)])
def test_a_slot_is_in_use_from_its_writer_to_its_last_reader(name, backend):
    steps = _steps(networks.VARIANTS[name], backend)
    found = memories.lives(steps)
    # A replay, from the end: a slot is alive before a step that reads it, and not before the one that begins to write it.
    alive, during = set(), []
    for step in reversed(steps):
        needed, target = set(reads(step.op)), writes(step.op)
        during.append(alive | needed | ({target} if target is not None else set()))
        alive = (alive - {target}) | needed | ({target} if step.goes_on else set())
    assert not alive
    for i, expected in enumerate(reversed(during)):
        own = [life.slot for life in found if life.first <= i <= life.last]
        assert len(own) == len(set(own)), "two maps in one slot"
        assert set(own) == expected, i
    written = [step for step in steps if writes(step.op) is not None and not step.goes_on]
    assert [life.name for life in found] == [step.name for step in written]


@needs_native
def test_the_cpu_backend_has_slots_of_its_own():
    """Three recursions: the first pair goes into the sum of the gate before the third is there."""
    config = networks.VARIANTS["unshared"]
    ours, planned = _steps(config, "cpu"), _steps(config, "plan")
    assert any(step.goes_on for step in ours) and not any(step.goes_on for step in planned)
    assert max(life.slot for life in memories.lives(ours)) < max(life.slot for life in memories.lives(planned))


@pytest.mark.parametrize("name", ["official", "no_bias", "unshared", "last_output", "lornatang", "gray_to_colour"])
def test_the_reference_allocates_what_its_shapes_say(name):
    """torch.profiler records every allocation and release of the real call, at a real size."""
    net = networks.build(networks.VARIANTS[name])
    n, h, w = 2, 24, 40
    x = networks.image(n, net.config.in_channels, h, w)
    with torch.inference_mode():
        net(x)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = net(x)
    del result
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert changes, "the profiler saw no memory"
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    found = memories.reference_allocations(net.config, n, h, w)
    # What it holds that is no map: scalars, and what a library takes for itself inside a convolution.
    assert max(a.live for a in found) <= peak
    maps = [a.bytes for a in found]
    for size in sorted(set(maps)):
        assert sum(change == size for change in changes) >= maps.count(size), size
    assert peak <= max(a.live for a in found) * 1.25


def test_gate_by_gate():
    config, (n, h, w) = networks.SMALL, (1, 8, 8)
    found = memories.memory(config, _steps(config, "plan"), WAY, 1 << 20, n, h, w)
    one = 4 * 16 * h * w
    assert found.slot_bytes == one and len(found.concatenations) == 2
    for block, c in enumerate(found.concatenations):
        maps = 2 + block + 1
        assert (c.block, c.maps) == (block, maps)
        assert c.concatenated == c.normalised == c.activated == maps * one and c.result == one
        # The maps themselves, their concatenation, and that normalised and activated.
        assert c.peak == 4 * maps * one
        assert c.ours == (maps + 1) * one  # its sources and its result
    assert found.peak == max(found.live) == 5 * one
    assert found.reference_peak == max(c.peak for c in found.concatenations)
    assert memories.values(found)["peak_bytes"] == found.peak


def test_memory_grows_with_the_pixels():
    small, large = (memories.reference_allocations(networks.SMALL, 1, side, side) for side in (4, 8))
    assert [4 * a.bytes for a in small] == [a.bytes for a in large]


def test_table_and_picture():
    from rich.console import Console

    found = memories.memory(networks.SMALL, _steps(networks.SMALL, "plan"), WAY, 1 << 20, 1, 8, 8)
    with open("/dev/null", "w") as nowhere:
        console = Console(width=150, record=True, file=nowhere)
        console.print(memories.slots_table(found))
        lines = console.export_text().splitlines()
    drawn = [line.split("│")[2].strip() for line in lines if line.startswith("│")]
    # H^1 of both blocks in slot 0, B_0 in slot 2 until the second gate reads it.
    assert drawn[0] == ".|==|==." and drawn[2] == "|======." and len(drawn) == found.num_slots == 5
    assert "workspace" in " ".join(memories.summary(found))
    pytest.importorskip("matplotlib")
    assert plots.memory_chart(found).startswith(b"\x89PNG")

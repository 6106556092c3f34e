"""The steps of the CPU backend: fewer slots, the same bits."""

import pytest
import torch
from support import networks
from support.candidates import Guarded

from memnet_fast import native
from memnet_fast.backends import cpu
from memnet_fast.backends.cpu_steps import compact_steps, plain_steps
from memnet_fast.config import PRESETS, MemNetConfig
from memnet_fast.plan import Gate, lower, outline, reads, writes

CONFIGS = networks.VARIANTS | {
    "m3r6": MemNetConfig(channels=16, num_memory_blocks=3, num_recursions=6),
    "m2r5": MemNetConfig(channels=16, num_memory_blocks=2, num_recursions=5),
}


@pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
def test_every_source_is_read_once_in_its_order_from_the_slot_that_holds_it(name):
    """Runs both lists with labels in place of tensors."""

    def trace(steps):
        slots, seen = {}, {}
        for step in steps:
            sources = tuple(slots[slot] for slot in reads(step.op))
            if isinstance(step.op, Gate):
                assert step.op.dst not in step.op.srcs
                seen.setdefault(step.index, []).extend(sources)
                assert len(seen[step.index]) == step.last
                if step.first > 0:
                    assert slots[step.op.dst] == f"sum of {step.index}"
                slots[step.op.dst] = f"sum of {step.index}"
            else:
                seen[step.index] = list(sources)
                if (slot := writes(step.op)) is not None:
                    assert slot not in reads(step.op)
                    slots[slot] = f"result of {step.index}"
        return seen

    ops = outline(CONFIGS[name] if name in CONFIGS else PRESETS[name]).ops
    steps, slots = compact_steps(ops)
    assert trace(steps) == trace(plain_steps(ops))
    assert slots == 1 + max(writes(s.op) for s in steps if writes(s.op) is not None)
    assert slots <= outline(CONFIGS[name] if name in CONFIGS else PRESETS[name]).num_slots


def test_the_presets_need_two_slots_for_their_short_term_memories():
    for config in PRESETS.values():
        within_chains = config.sharing == "chain"  # the map between two convolutions of a chain that neither begins nor ends it
        assert compact_steps(outline(config).ops)[1] == config.num_memory_blocks + 1 + 2 + within_chains


@pytest.mark.skipif(native.why_missing() is not None, reason="needs the native module")
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("name", CONFIGS)
def test_compacted_plans_give_the_same_bits_in_less_memory(name, algorithm):
    net = networks.build(CONFIGS[name])
    plan, isa = lower(net), native.module().isas()[0]
    x = networks.image(2, net.config.in_channels, 13, 21)
    results, sizes = [], []
    for compact in (False, True):
        packed = cpu.CpuPacked(plan, algorithm, isa, compact)
        sizes.append(packed.workspace_bytes(2, 13, 21))
        workspace, out = Guarded(sizes[-1]), torch.full((2, net.config.out_channels, 13, 21), torch.nan)
        packed.run(x, out, workspace.bytes)
        workspace.check("the workspace")
        results.append(out)
    assert torch.equal(*results) and bool(torch.isfinite(results[0]).all())
    assert sizes[1] < sizes[0] or net.config.num_recursions < 3

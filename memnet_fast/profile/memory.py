"""Memory: the slots of a plan and how long each is in use, beside what the reference allocates for the same image.

The reference runs on an image of one pixel, while every tensor is counted from its first appearance to its end. All of its
tensors are maps, so the figures for any image are those of a pixel times its pixels. What libraries take inside an operation is
not among them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memnet_fast import timing
from memnet_fast.config import MemNetConfig
from memnet_fast.plan import FusedPlan, Op, reads, writes
from memnet_fast.profile.cost import Way
from memnet_fast.reference import MemNet


@dataclass(frozen=True)
class Step:
    """What a backend runs: an operation on its own slots, or a part of one. goes_on: it adds to what an earlier part wrote."""

    name: str
    op: Op
    goes_on: bool = False


@dataclass(frozen=True)
class Life:
    """One map in its slot: from the step that first writes it to the last that needs it (indices, both included)."""

    name: str
    slot: int
    first: int
    last: int


@dataclass(frozen=True)
class Allocation:
    """A tensor that the reference makes. op: such as "cat"; live: bytes of all tensors alive with it, the image not counted."""

    op: str
    bytes: int
    live: int


@dataclass(frozen=True)
class Concatenation:
    """What the reference allocates for the gate of a block: the concatenation, its batch normalisation and ReLU, the result;
    and its peak while it does. ours: bytes of the maps that the plan holds in slots during that gate."""

    block: int
    maps: int
    concatenated: int
    normalised: int
    activated: int
    result: int
    peak: int
    ours: int


@dataclass(frozen=True)
class Memory:
    """slot_bytes: of one slot. live: bytes in use during each step. workspace: what is allocated for all of it, with scratch
    memory (and packed weights, on a GPU). reference: allocations in order."""

    steps: tuple[Step, ...]
    num_slots: int
    lives: tuple[Life, ...]
    slot_bytes: int
    live: tuple[int, ...]
    workspace: int
    reference: tuple[Allocation, ...]
    concatenations: tuple[Concatenation, ...]

    @property
    def peak(self) -> int:
        return max(self.live)

    @property
    def reference_peak(self) -> int:
        return max(a.live for a in self.reference)


def steps(plan: FusedPlan, packed: Any) -> tuple[Step, ...]:
    """What a backend runs, with its own slots where it does not take those of the plan."""
    names = timing.names(plan.ops)
    own = getattr(packed, "steps", None)
    if own is None:
        return tuple(Step(name, op) for name, op in zip(names, plan.ops, strict=True))
    return tuple(Step(names[step.index], step.op, step.first > 0) for step in own)


def lives(steps: Sequence[Step]) -> tuple[Life, ...]:
    """In the order in which they are written first."""
    found: list[Life] = []
    holder: dict[int, int] = {}
    for i, step in enumerate(steps):
        target = writes(step.op)
        for slot in (*reads(step.op), *((target,) if step.goes_on and target is not None else ())):
            found[holder[slot]] = replace(found[holder[slot]], last=i)
        if target is not None and not step.goes_on:
            holder[target] = len(found)
            found.append(Life(step.name, target, i, i))
    return tuple(found)


@dataclass
class _Ledger(TorchDispatchMode):
    """Counts the memory of every tensor that is made while it is on."""

    known: dict[int, int] = field(default_factory=dict)
    allocations: list[Allocation] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in given or key in self.known or size == 0:
                continue
            self.known[key] = size
            weakref.finalize(storage, self.known.pop, key, None)
            self.allocations.append(Allocation(func.overloadpacket.__name__, size, sum(self.known.values())))
        return result


def reference_allocations(config: MemNetConfig, n: int, h: int, w: int) -> tuple[Allocation, ...]:
    """Of one call of the reference in float32, without gradients, on [n, C_in, h, w]."""
    ledger, net = _Ledger(), MemNet.on_cpu(config).eval()
    image = torch.zeros(1, config.in_channels, 1, 1, device="cpu", dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False), ledger:
        net(image)
    pixels = n * h * w
    return tuple(Allocation(a.op, a.bytes * pixels, a.live * pixels) for a in ledger.allocations)


def memory(config: MemNetConfig, steps: Sequence[Step], way: Way, workspace: int, n: int, h: int, w: int) -> Memory:
    """workspace: bytes that the backend asks for, for an image of this size."""
    slot = n * h * w * way.channels * way.element
    found = lives(steps)
    live = tuple(slot * sum(life.first <= i <= life.last for life in found) for i in range(len(steps)))
    reference = reference_allocations(config, n, h, w)
    concatenations = []
    for block, at in enumerate(i for i, a in enumerate(reference) if a.op == "cat"):
        cat, norm, relu, conv = reference[at : at + 4]
        peak = max(a.live for a in (cat, norm, relu, conv))
        maps = config.num_recursions + block + 1
        ours = max(live[i] for i, step in enumerate(steps) if step.name == f"gate.{block}")
        concatenations.append(Concatenation(block, maps, cat.bytes, norm.bytes, relu.bytes, conv.bytes, peak, ours))
    slots = 1 + max(life.slot for life in found)
    return Memory(tuple(steps), slots, found, slot, live, workspace, reference, tuple(concatenations))


def slots_table(memory: Memory) -> Table:
    """A row for each slot; a column for each step, filled while the slot holds a map that is still needed."""
    count = len(memory.steps)
    table = Table(title=f"{memory.num_slots} slots of {_mib(memory.slot_bytes)}; steps 0 to {count - 1} from left to right")
    table.add_column("slot", justify="right")
    table.add_column("in use", no_wrap=True)
    table.add_column("maps", justify="right")
    for slot in range(memory.num_slots):
        own = [life for life in memory.lives if life.slot == slot]
        # A map begins with a mark of its own: two in a row would otherwise look like one.
        line = "".join(
            "|" if any(life.first == i for life in own) else "=" if any(life.first < i <= life.last for life in own) else "."
            for i in range(count)
        )
        table.add_row(str(slot), line, str(len(own)))
    return table


def concatenations_table(memory: Memory) -> Table:
    table = Table(title="gate by gate: what the reference allocates (float32), and what the plan holds, MiB")
    for name in ("gate", "maps", "concatenation", "its BN", "its ReLU", "result", "reference, alive", "plan, alive", "ratio"):
        table.add_column(name, justify="right")
    for c in memory.concatenations:
        sizes = (c.concatenated, c.normalised, c.activated, c.result, c.peak, c.ours)
        table.add_row(str(c.block), str(c.maps), *(f"{b / 2**20:.1f}" for b in sizes), f"{c.peak / c.ours:.2f}")
    return table


def summary(memory: Memory) -> list[str]:
    total, joined = sum(a.bytes for a in memory.reference), sum(c.concatenated for c in memory.concatenations)
    times = memory.reference_peak / memory.workspace
    return [
        f"plan: at most {_mib(memory.peak)} in use at once; one workspace of {_mib(memory.workspace)}, with scratch memory",
        f"reference: at most {_mib(memory.reference_peak)} at once, {times:.2f} times the workspace; "
        f"{len(memory.reference)} allocations of {_mib(total)} together, of which concatenations {_mib(joined)}",
    ]


def values(memory: Memory) -> dict[str, Any]:
    """As plain values."""
    return {
        "slot_bytes": memory.slot_bytes,
        "num_slots": memory.num_slots,
        "steps": [step.name for step in memory.steps],
        "workspace_bytes": memory.workspace,
        "peak_bytes": memory.peak,
        "live_bytes": list(memory.live),
        "lives": [vars(life) for life in memory.lives],
        "reference_peak_bytes": memory.reference_peak,
        "reference_allocations": [vars(a) for a in memory.reference],
        "concatenations": [vars(c) for c in memory.concatenations],
    }


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"

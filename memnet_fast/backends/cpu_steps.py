"""The operations of a plan as the CPU runs them: gates take their sources in as these come, so that fewer slots do.

A gate sums over its sources in their order. The short-term memories among them are read by nobody afterwards, so a pair of
them is added to the sum as soon as the second one is there, and the slots of both are free again. The fp32 gate
adds up its sources one by one in the plan's order, so every bit of the result is the same; the bf16 gate sums over all sources
of a part at once, so parts change its rounding. M6R6 needs 9 slots in place of 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memnet_fast.plan import Gate, Op, Reconstruct, ResidualBlock, reads, writes

# Short-term memories that wait for their gate together. More would need more slots, fewer would read and write the sum of the
# gate more often.
_PAIR = 2


@dataclass(frozen=True)
class Step:
    """One native operation: the index-th of the plan on slots of its own, or for a gate its sources first <= j < last.

    op: srcs of a gate are those of this part.
    """

    index: int
    op: Op
    first: int = 0
    last: int = 0


def plain_steps(ops: Sequence[Op]) -> list[Step]:
    """The plan as it is."""
    return [Step(i, op, 0, len(op.srcs) if isinstance(op, Gate) else 0) for i, op in enumerate(ops)]


def compact_steps(ops: Sequence[Op]) -> tuple[list[Step], int]:
    """The same operations, gates in parts, and the number of slots that they need."""
    values = _values(ops)
    return _with_slots(_in_parts(values), len(values))


def _values(ops: Sequence[Op]) -> list[Op]:
    """The operations over values in place of slots: operation i writes value i."""
    now: dict[int, int] = {}
    renamed = []
    for i, op in enumerate(ops):
        renamed.append(_rename(op, now, i))
        if (slot := writes(op)) is not None:
            now[slot] = i
    return renamed


def _rename(op: Op, names: dict[int, int], written: int) -> Op:
    """The operation with its sources renamed, which writes `written`."""
    match op:
        case Gate():
            return replace(op, srcs=tuple(names[s] for s in op.srcs), dst=written)
        case Reconstruct():
            return replace(op, srcs=tuple(names[s] for s in op.srcs))
        case ResidualBlock():
            return replace(op, src=names[op.src], dst=written)
    return replace(op, dst=written)


def _in_parts(ops: Sequence[Op]) -> list[Step]:
    last_read = {value: i for i, op in enumerate(ops) for value in reads(op)}
    # Parts of gates, by the operation behind which they run. Operation i writes value i.
    early: dict[int, list[Step]] = {}
    rest = {}
    for i, op in enumerate(ops):
        if not isinstance(op, Gate):
            continue
        short = 0  # the sources of its beginning that come one after the other and nobody reads later
        while short < len(op.srcs) and last_read[op.srcs[short]] == i and op.srcs[short] >= max(op.srcs[: short + 1]):
            short += 1
        first = 0
        while short - first > _PAIR:
            part = op.srcs[first : first + _PAIR]
            early.setdefault(part[-1], []).append(Step(i, replace(op, srcs=part), first, first + _PAIR))
            first += _PAIR
        rest[i] = Step(i, replace(op, srcs=op.srcs[first:]), first, len(op.srcs))
    steps = []
    for i, op in enumerate(ops):
        steps += [rest.get(i, Step(i, op)), *early.get(i, [])]
    return steps


def _with_slots(steps: Sequence[Step], count: int) -> tuple[list[Step], int]:
    """Values (below count) become slots: each has the lowest one that is free from its first write to its last use."""
    last_use = {}
    for at, step in enumerate(steps):
        for value in (*reads(step.op), writes(step.op)):
            last_use[value] = at
    slot_of: dict[int, int] = {}
    placed, most = [], 0
    for at, step in enumerate(steps):
        value = writes(step.op)
        if value is not None and value not in slot_of:
            slot_of[value] = next(slot for slot in range(count) if slot not in slot_of.values())
            most = max(most, slot_of[value] + 1)
        placed.append(replace(step, op=_rename(step.op, slot_of, slot_of[value] if value is not None else 0)))
        for used in {*reads(step.op), *(() if value is None else (value,))}:
            if last_use[used] == at:
                del slot_of[used]
    return placed, most

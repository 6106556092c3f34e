"""What a profile says in numbers: rows for a table, and everything as plain values for JSON."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from memnet_fast import __version__
from memnet_fast.profile.ceilings import Ceilings
from memnet_fast.profile.measuring import Operation, Profile


@dataclass(frozen=True)
class Row:
    """Operations of one kind and size. calls: of one run. ms: of all of them, the median of the rounds. The rest is for all of
    them, too. bound: what the measured ceilings allow less of. roofline: the least time by these ceilings over the time
    measured, by the executed FLOP (above 1: the maps were in a cache, and no copy had to be waited for)."""

    name: str
    calls: int
    ms: float
    share: float
    gflop: float
    executed_gflop: float
    gb: float
    tflops: float
    gbps: float
    bound: str
    roofline: float


def rows(profile: Profile, each: bool = False) -> list[Row]:
    """One row for operations of equal kind and sources, in the order of their first; each: one for every operation."""
    groups: dict[str, list[Operation]] = {}
    for op in profile.operations:
        groups.setdefault(f"{op.index:3} {op.name}" if each else _group(op, profile), []).append(op)
    total = statistics.median(profile.timed_ms)
    return [_row(name, ops, total, profile.ceilings[-1]) for name, ops in groups.items()]


def _group(op: Operation, profile: Profile) -> str:
    sources = len(getattr(profile.plan.ops[op.index], "srcs", ()))
    return f"{op.kind}, {sources} sources" if sources else op.kind


def _row(name: str, ops: Sequence[Operation], total: float, ceilings: Ceilings) -> Row:
    ms = statistics.median(map(sum, zip(*(op.ms for op in ops), strict=True)))
    flop, executed, moved = (sum(getattr(op.cost, key) for op in ops) for key in ("flop", "executed", "bytes"))
    compute, memory = 1e3 * executed / ceilings.flops, 1e3 * moved / ceilings.bytes
    return Row(
        name,
        len(ops),
        ms,
        ms / total,
        1e-9 * flop,
        1e-9 * executed,
        1e-9 * moved,
        1e-9 * executed / ms,
        1e-6 * moved / ms,
        "compute" if compute >= memory else "memory",
        max(compute, memory) / ms,
    )


def phases(profile: Profile) -> list[tuple[str, str, float, float, float | None]]:
    """(kind of operation, phase, milliseconds of all threads, share of all, GFLOP/s of a thread in it: products alone)."""
    sums: dict[tuple[str, str], float] = {}
    flop: dict[str, int] = {}
    for op in profile.operations:
        flop[op.kind] = flop.get(op.kind, 0) + op.cost.executed
        for phase, ms in op.phases.items():
            sums[op.kind, phase] = sums.get((op.kind, phase), 0.0) + ms
    total = sum(sums.values())
    return [
        (kind, phase, ms, ms / total, 1e-6 * flop[kind] / ms if phase == "product" and ms else None)
        for (kind, phase), ms in sums.items()
        if ms
    ]


def operations_table(profile: Profile, each: bool = False) -> Table:
    c = profile.choice
    threads = f", {profile.threads} threads" if profile.threads else ""
    what = f"{c.backend} {c.precision} {c.algorithm}, {'x'.join(map(str, profile.shape))}"
    table = Table(title=f"{what}{threads}, {len(profile.rounds)} rounds")
    table.add_column("operation", no_wrap=True)
    for name in ("calls", "ms", "share", "GFLOP", "executed", "GB", "TFLOP/s", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound")
    table.add_column("of roofline", justify="right", no_wrap=True)
    total = statistics.median(profile.timed_ms)
    for r in rows(profile, each):
        table.add_row(*_cells(r), r.bound, _percent(r.roofline))
    if profile.packing_ms:
        table.add_row("packing of weights", "", _short(profile.packing_ms), _percent(profile.packing_ms / total), *[""] * 7)
    table.add_section()
    whole = _row("all", profile.operations, total, profile.ceilings[-1])
    table.add_row(*_cells(whole), "", _percent(_ideal(profile)))
    return table


def _cells(r: Row) -> tuple[str, ...]:
    numbers = (r.gflop, r.executed_gflop, r.gb, r.tflops, r.gbps)
    return r.name, str(r.calls), _short(r.ms), _percent(r.share), *map(_short, numbers)


def _short(value: float) -> str:
    """Three digits that mean something, never as a power of ten."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, min(digits, 6))}f}"


def _ideal(profile: Profile) -> float:
    """The least time of all operations, each by its own bound, over the time measured."""
    each = rows(profile, each=True)
    return sum(r.roofline * r.ms for r in each) / sum(r.ms for r in each)


def phases_table(profile: Profile) -> Table | None:
    """Where the threads were; None for a backend that does not say it."""
    found = phases(profile)
    if not found:
        return None
    table = Table("operation", "phase", title="phases, the time of all threads added up")
    for name in ("ms", "share", "GFLOP/s a thread", "of the peak"):
        table.add_column(name, justify="right")
    peak = profile.ceilings[0].flops
    for kind, phase, ms, share, rate in found:
        speed = (f"{rate:.1f}", _percent(1e9 * rate / peak)) if rate else ("", "")
        table.add_row(kind, phase, _short(ms), _percent(share), *speed)
    return table


def notes(profile: Profile) -> list[str]:
    """The lines below the tables: what the percentages are of, and what lies around the operations."""
    plain, timed = statistics.median(profile.plain_ms), statistics.median(profile.timed_ms)
    lines = []
    for c in profile.ceilings:
        fma = f"multiply-adds {1e-9 * c.fma:.0f} GFLOP/s, " if c.fma else ""
        threads = {None: "", 1: "1 thread: "}.get(c.threads, f"{c.threads} threads: ")
        lines.append(f"measured, {threads}{fma}product {1e-9 * c.gemm:.0f} GFLOP/s, copy {1e-9 * c.bytes:.1f} GB/s")
    source = "multiply-adds" if profile.ceilings[-1].fma else "the product"
    lines.append(
        f"of roofline: the larger of executed FLOP over the rate of {source} and bytes over that of the copy, over the time; "
        "GFLOP: by direct convolution, executed: as computed"
    )
    ratio = statistics.median(t / p for t, p in zip(profile.timed_ms, profile.plain_ms, strict=True))
    lines.append(
        f"the ordinary call in turns with these rounds: {plain:.2f} ms; timed operations / ordinary call: {ratio:.3f}"
        f" ({timed:.2f} ms)"
    )
    return lines


def values(profile: Profile) -> dict[str, Any]:
    """Everything as plain values, with each operation by itself."""
    c = profile.choice
    return {
        "program": __version__,
        "backend": c.backend,
        "precision": c.precision,
        "algorithm": c.algorithm,
        "device": str(profile.device),
        "threads": profile.threads,
        "shape": list(profile.shape),
        "cpus": len(os.sched_getaffinity(0)),
        "workspace_bytes": profile.workspace_bytes,
        "ceilings": [{**dataclasses.asdict(x), "flops": x.flops, "source": x.source} for x in profile.ceilings],
        "plain_ms": list(profile.plain_ms),
        "timed_ms": list(profile.timed_ms),
        "packing_ms": profile.packing_ms,
        "rows": [dataclasses.asdict(r) for r in rows(profile)],
        "phases": [dict(zip(("kind", "phase", "ms", "share", "gflops_of_a_thread"), p, strict=True)) for p in phases(profile)],
        "operations": [
            {
                "index": op.index,
                "name": op.name,
                "kind": op.kind,
                "ms": list(op.ms),
                "phases": op.phases,
                "counted": op.counted,
                **dataclasses.asdict(op.cost),
            }
            for op in profile.operations
        ],
    }


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"

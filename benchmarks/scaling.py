"""How time grows with threads and with pixels, each against its own baseline in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memnet_fast.bench import pairs
from memnet_fast.bench.clocks import quantiles
from memnet_fast.bench.measure import Case, Session
from memnet_fast.bench.peers import Variant
from memnet_fast.bench.process import Process, VariantFailed

Show = Callable[[dict[str, Any]], None]


def threads(session: Session, size: str, shape: tuple[int, int, int], seconds: float, show: Show) -> list[dict[str, Any]]:
    """Every variant with one thread, in turns with itself with all threads: ratio is the speedup."""
    n, h, w = shape
    case, rows = session.case(shape), []
    for variant in session.variants:
        row: dict[str, Any] = {"suite": "threads", "size": size, "n": n, "h": h, "w": w, "isa": session.isa}
        row |= {"variant": variant.name, "precision": variant.precision, "threads": session.threads}
        row["environment"] = session.environment(variant)
        if why := session.why_not(variant):
            row |= why
        else:
            session.tell(f"{size}: {variant.name} with 1 and {session.threads} threads")
            with session.start(variant, shape) as many, session.start(variant, shape, threads=1) as one:
                row |= _in_turns(session, variant, (case, many), (case, one), seconds / len(session.variants), ("", "_1"))
        rows.append(row)
        show(row)
    return rows


def pixels(session: Session, sizes: dict[str, tuple[int, int, int]], seconds: float, show: Show) -> list[dict[str, Any]]:
    """Every size in turns with the first: ratio is that of the times for one pixel."""
    rows: list[dict[str, Any]] = []
    (base, base_shape), *larger = sizes.items()
    base_case = session.case(base_shape)
    for variant in session.variants:
        for size, shape in larger:
            n, h, w = shape
            row: dict[str, Any] = {"suite": "pixels", "size": size, "n": n, "h": h, "w": w, "isa": session.isa, "base": base}
            row |= {"variant": variant.name, "precision": variant.precision, "threads": session.threads}
            row["environment"] = session.environment(variant)
            if why := session.why_not(variant):
                row |= why
            else:
                case = Case(session, shape, "large")
                session.tell(f"{variant.name}: {size} in turns with {base}")
                with session.start(variant, base_shape) as small, session.start(variant, shape) as large:
                    part = seconds / len(session.variants) / len(larger)
                    row |= _in_turns(session, variant, (base_case, small), (case, large), part, ("_base", ""), per_pixel=True)
                    if row["status"] == "ok":
                        row |= large.ask("memory")
            rows.append(row)
            show(row)
    return rows


def _in_turns(
    session: Session,
    variant: Variant,
    first: tuple[Case, Process],
    second: tuple[Case, Process],
    seconds: float,
    names: tuple[str, str],
    per_pixel: bool = False,
) -> dict[str, Any]:
    """Status, errors and, where both are right, ms + names[0], ms + names[1] and the ratio second / first."""
    row: dict[str, Any] = {}
    for case, process in (first, second):
        row = case.gated(process, variant)
        if row["status"] != "ok":
            return row

    def sample(part: tuple[Case, Process]) -> float:
        n, h, w = part[0].shape
        return part[1].time()["ms"] / (n * h * w if per_pixel else 1)

    try:
        found, enough = pairs.take_turns(lambda: sample(first), lambda: sample(second), seconds)
    except VariantFailed as failure:
        return {"status": "failed", "reason": str(failure)}
    for (case, _), values, name in zip((first, second), (found.subject, found.other), names, strict=True):
        n, h, w = case.shape
        scale = n * h * w if per_pixel else 1
        row |= {f"ms{q}{name}": value * scale for q, value in zip(("_q20", "", "_q80"), quantiles(values), strict=True)}
    return {**row, **found.row(), "enough": enough}

"""Timing of several variants of one thing, against each other, after they were found to be right.

Every round times each variant once, in an order that turns from round to round, so that a card whose clock drifts still gives
true ratios; the ratio of a variant is taken within its round. Caches are cold: every sample is preceded by a write to a buffer
several times the size of the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.journal import Journal
from memnet_fast.bench.clocks import Clock, quantiles
from memnet_fast.bench.truth import verdict

# Milliseconds of warm-up before a variant is timed, and at least so many runs: clocks rise, graphs and tiles are chosen.
_WARM_MS = 50.0
_WARM_RUNS = 3
MIN_ROUNDS, MAX_ROUNDS = 5, 50
# Seconds that a check or a warm-up may take. A network's Triton kernels are compiled meanwhile: ten of about two seconds each.
PATIENCE = 40.0


@dataclass(frozen=True)
class Variant:
    """run: does the thing once. check: figures of its error; each must be at most its limit, or nothing is timed.
    about: what the row of results says beside the numbers. patience: seconds that the check may take; None: any time.
    """

    name: str
    run: Callable[[], object]
    check: Callable[[], dict[str, float]]
    limits: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict)
    patience: float | None = PATIENCE

    @property
    def row(self) -> dict[str, Any]:
        return {"variant": self.name, **self.about}


def _gate(variant: Variant, journal: Journal, line: str) -> dict[str, Any]:
    """A row with the verdict: status "ok", "refused" (wrong) or "failed" (an exception)."""
    row = variant.row
    try:
        with journal.watching(line, row, variant.patience):
            errors = variant.check()
    except Exception as error:  # one variant that cannot run must not cost the others
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    row["errors"] = errors
    wrong = verdict(errors, variant.limits)
    return {**row, "status": "refused", "reason": wrong} if wrong else {**row, "status": "ok"}


def _warm(variant: Variant, clock: Clock) -> float:
    """Runs until the clock is warm; milliseconds of the last run."""
    spent, runs, last = 0.0, 0, 0.0
    while runs < _WARM_RUNS or spent < _WARM_MS:
        last = clock.sample(variant.run)
        spent += last
        runs += 1
        if runs >= 1000:
            break
    return last


def measure(
    variants: Sequence[Variant],
    clock: Clock,
    seconds: float,
    subject: str | None = None,
    journal: Journal | None = None,
    part: str = "",
) -> list[dict[str, Any]]:
    """One row for each variant, in their order: status, errors, and for those found right ms, ms_q20, ms_q80, rounds, and the
    ratio of their time to the subject's in the same round (ratio, ratio_q20, ratio_q80).

    seconds: about how long the timing may take, warm-up and gate not counted. A row that is not "ok" has no times.
    journal: says which variants of this part have lost the GPU before; they have no row.
    """
    journal = journal or Journal(None, lambda row: None)
    lines = {v.name: f"lost {part} {v.name}" for v in variants}
    if len(lines) != len(variants):
        raise ValueError("two variants have one name")
    variants = [v for v in variants if not journal.has(lines[v.name])]
    rows = {v.name: _gate(v, journal, lines[v.name]) for v in variants}
    good = [v for v in variants if rows[v.name]["status"] == "ok"]
    one_round = 0.0
    for v in list(good):
        try:
            with journal.watching(lines[v.name], v.row, PATIENCE):
                one_round += _warm(v, clock)
        except Exception as error:
            rows[v.name].update(status="failed", reason=f"{type(error).__name__}: {error}"[:300])
            good.remove(v)
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, 1e3 * seconds / max(one_round, 1e-6))))
    times: dict[str, list[float]] = {v.name: [] for v in good}
    for i in range(rounds):
        for k in range(len(good)):
            v = good[(i + k) % len(good)]
            with journal.watching(lines[v.name], v.row, None):
                times[v.name].append(clock.sample(v.run))
    for name, own in times.items():
        low, middle, high = quantiles(own)
        rows[name].update(ms=middle, ms_q20=low, ms_q80=high, rounds=rounds)
        if subject in times:
            low, middle, high = quantiles([a / b for a, b in zip(own, times[subject], strict=True)])
            rows[name].update(subject=subject, ratio=middle, ratio_q20=low, ratio_q80=high)
    return [rows[v.name] for v in variants]

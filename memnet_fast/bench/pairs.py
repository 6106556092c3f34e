"""Rounds of two things in turns, and when there are enough of them.

A machine whose speed drifts still gives true ratios: every run of the other lies between two of the subject and is held
against their geometric mean, which a drift passes through as the other does. Several contests with one subject take rounds in
turns: a burst of other work then costs each of them a few rounds, which a median forgets, and not one of them all.

A process is faster or slower than its twin by some per cent for as long as it lives (where its pages lie, and the like). So
what is timed can be renewed every few rounds, and no ratio is settled before there were rounds enough for three processes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from memnet_fast.bench.clocks import quantiles
from memnet_fast.bench.process import VariantFailed

# Of the interval that holds the median of the ratios, whatever their distribution. Rounds end at the first of several looks
# that finds it narrow, and each look has its own chance to be wrong: all of them together have a few per cent.
CONFIDENCE = 0.995
# A ratio is settled when that interval lies within this part of the median: two runs that settled agree within twice as much.
GOAL = 0.025
FEWEST_ROUNDS = 3
_MOST_ROUNDS = 400
# Between two renewals.
ROUNDS_OF_ONE = 4


def _looks() -> list[int]:
    """Numbers of rounds after which the interval is looked at, a third more each time. A look after each round would end them
    as soon as chance makes the interval narrow."""
    found = [3 * ROUNDS_OF_ONE]
    while found[-1] < _MOST_ROUNDS:
        found.append(min(_MOST_ROUNDS, math.ceil(found[-1] * 4 / 3)))
    return found


LOOKS = frozenset(_looks())


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Order statistics between which the median of the distribution lies with at least this confidence, whatever the
    distribution; None for too few values.
    """
    n, ordered = len(values), sorted(values)
    tail, cut = 0.0, -1  # tail: the chance that at most `cut` of n values lie below the median
    while 2 * (tail + math.comb(n, cut + 1) / 2**n) <= 1 - confidence:
        cut += 1
        tail += math.comb(n, cut) / 2**n
    return (ordered[cut], ordered[n - 1 - cut]) if cut >= 0 else None


@dataclass
class Pairs:
    """What the subject and another took, round by round. Any unit."""

    subject: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [b / a for a, b in zip(self.subject, self.other, strict=True)]

    def spread(self) -> float:
        """How far the interval of the median ratio reaches from it, as a part; infinite for too few rounds."""
        ratios = self.ratios
        found = median_interval(ratios)
        middle = statistics.median(ratios) if ratios else math.nan
        return math.inf if found is None else max(found[1] / middle, middle / found[0]) - 1

    def row(self) -> dict[str, Any]:
        """rounds, ratio with its 20 % and 80 % quantiles, and the interval of its median (None for less than nine rounds)."""
        low, middle, high = quantiles(self.ratios)
        interval = median_interval(self.ratios)
        return {
            "rounds": len(self.other),
            "ratio": middle,
            "ratio_q20": low,
            "ratio_q80": high,
            "ratio_interval": None if interval is None else list(interval),
        }


@dataclass
class Contest:
    """One thing that is held against the subject: run returns what a run of it took. settled: the ratio is known well enough.
    failure: of a run, which ended the contest.
    """

    run: Callable[[], float]
    goal: float = GOAL
    pairs: Pairs = field(default_factory=Pairs)
    settled: bool = False
    failure: VariantFailed | None = None

    def add(self, before: float, own: float, after: float) -> None:
        """A round: a run between two of the subject."""
        self.pairs.subject.append(math.sqrt(before * after))
        self.pairs.other.append(own)
        self.settled = len(self.pairs.other) in LOOKS and self.pairs.spread() <= self.goal

    def open(self) -> bool:
        """Whether another round can tell more."""
        return not self.settled and self.failure is None and len(self.pairs.other) < _MOST_ROUNDS


def run_all(
    subject: Callable[[], float],
    contests: Sequence[Contest],
    seconds: float,
    now: Callable[[], float] = time.monotonic,
    renew: Callable[[], None] | None = None,
) -> None:
    """A round of each in turn, until all are settled or about `seconds` have passed; at least three of each that does not
    fail. renew is called after every fourth turn. Raises VariantFailed where the subject fails.
    """
    start, before, turns = now(), None, 0
    while True:
        if renew is not None and turns and turns % ROUNDS_OF_ONE == 0 and now() - start < seconds:
            renew()
            before = None
        waiting, turns = [contest for contest in contests if contest.open()], turns + 1
        if not waiting:
            return
        for contest in waiting:
            if now() - start >= seconds and len(contest.pairs.other) >= FEWEST_ROUNDS:
                return
            if before is None:
                before = subject()
            try:
                own = contest.run()
            except VariantFailed as failure:
                contest.failure, before = failure, None  # whoever fails may take long to do so
                continue
            after = subject()
            contest.add(before, own, after)
            before = after


def take_turns(
    subject: Callable[[], float],
    other: Callable[[], float],
    seconds: float,
    goal: float = GOAL,
    now: Callable[[], float] = time.monotonic,
) -> tuple[Pairs, bool]:
    """Rounds until the ratio is settled (True), or for about `seconds`, but at least three (False). Raises VariantFailed."""
    contest = Contest(other, goal)
    run_all(subject, [contest], seconds, now)
    if contest.failure is not None:
        raise contest.failure
    return contest.pairs, contest.settled

"""Rounds of two things in turns, and when there are enough of them.

A machine whose speed drifts still gives true ratios: each round runs both, one right after the other, the order turns from
round to round, and only ratios within a round are compared.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from memnet_fast.bench.clocks import quantiles

# A ratio is known well enough when the interval that holds its median with 95 % is narrower than this part of it.
GOAL = 0.02
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 400


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
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
    """Samples of the subject and of another, round by round. Any unit."""

    subject: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [b / a for a, b in zip(self.subject, self.other, strict=True)]

    def spread(self) -> float:
        """Width of the interval of the median ratio, as a part of it; infinite for too few rounds."""
        ratios = self.ratios
        found = median_interval(ratios)
        return math.inf if found is None else (found[1] - found[0]) / statistics.median(ratios)

    def row(self) -> dict[str, Any]:
        """rounds, ratio with its 20 % and 80 % quantiles, and the interval of its median (None for less than six rounds)."""
        low, middle, high = quantiles(self.ratios)
        interval = median_interval(self.ratios)
        return {
            "rounds": len(self.other),
            "ratio": middle,
            "ratio_q20": low,
            "ratio_q80": high,
            "ratio_interval": None if interval is None else list(interval),
        }


def take_turns(
    subject: Callable[[], float],
    other: Callable[[], float],
    seconds: float,
    goal: float = GOAL,
    now: Callable[[], float] = time.monotonic,
) -> tuple[Pairs, bool]:
    """Rounds until the ratio is known well enough (True), or for about `seconds`, but at least three (False)."""
    pairs, start = Pairs(), now()
    while len(pairs.other) < _MOST_ROUNDS:
        if len(pairs.other) % 2 == 0:
            a = subject()
            b = other()
        else:
            b = other()
            a = subject()
        pairs.subject.append(a)
        pairs.other.append(b)
        if pairs.spread() <= goal:
            return pairs, True
        if len(pairs.other) >= _FEWEST_ROUNDS and now() - start >= seconds:
            return pairs, False
    return pairs, pairs.spread() <= goal

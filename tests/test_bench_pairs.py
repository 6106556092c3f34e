"""Sizes, rounds in turns, and when there are enough of them."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from memnet_fast.bench import pairs
from memnet_fast.bench.sizes import parse_sizes
from memnet_fast.errors import InputError


def test_sizes():
    found = parse_sizes("256, 480x641,16X64x64,1080p,4K,256")
    assert found == {
        "256x256": (1, 256, 256),
        "480x641": (1, 480, 641),
        "16x64x64": (16, 64, 64),
        "1080p": (1, 1080, 1920),
        "4k": (1, 2160, 3840),
    }
    assert parse_sizes("1x7x9") == {"7x9": (1, 7, 9)}


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "2.5", "8k", "1x2x3x4", "x", "5x", "1e3", "256,", "²", "1048576", "40000x40000", "9" * 5000]
)
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="size"):
        parse_sizes(text)


@pytest.mark.parametrize(("n", "cut"), [(1, None), (5, None), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5)])
def test_interval_of_a_median_is_that_of_the_tables(n, cut):
    """Order statistics of the sign test at 95 %, as in any table of the binomial distribution."""
    found = pairs.median_interval([float(i) for i in range(n)])
    assert found == (None if cut is None else (float(cut), float(n - 1 - cut)))


def test_interval_covers_the_median():
    chance = random.Random(0)
    hits = 0
    for _ in range(1000):
        low, high = pairs.median_interval([chance.expovariate(1.0) for _ in range(15)])
        hits += low <= math.log(2) <= high
    assert hits >= 935  # of the 965 that are expected


class Machine:
    """Things that take as long as they say, on a machine whose speed drifts and jumps. now: its clock in seconds."""

    def __init__(self, noise: float, drift: float = 1.0) -> None:
        self.chance, self.noise, self.drift = random.Random(1), noise, drift
        self.factor, self.now, self.order = 1.0, 0.0, ""

    def takes(self, name: str, milliseconds: float):
        def run() -> float:
            self.factor *= self.drift
            self.order += name
            spent = milliseconds * self.factor * math.exp(self.chance.gauss(0, self.noise))
            self.now += spent / 1000
            return spent

        return run


def test_turns_alternate_and_a_drift_cancels():
    machine = Machine(noise=0.0, drift=1.03)
    found, enough = pairs.take_turns(machine.takes("a", 100), machine.takes("b", 300), 1000, goal=0.0, now=lambda: machine.now)
    assert machine.order.startswith("abbaabba") and not enough
    assert abs(statistics.median(found.ratios) - 3) < 0.1
    assert max(found.subject) / min(found.subject) > 2, "the times themselves do drift"


def test_rounds_end_when_the_ratio_is_known():
    quiet, loud = Machine(noise=0.001), Machine(noise=0.05)
    for machine, least, most in ((quiet, 6, 6), (loud, 30, 399)):
        found, enough = pairs.take_turns(machine.takes("a", 10), machine.takes("b", 20), 1e9, now=lambda m=machine: m.now)
        assert enough and least <= len(found.other) <= most and found.spread() <= pairs.GOAL
        low, high = found.row()["ratio_interval"]
        assert (high - low) / found.row()["ratio"] <= pairs.GOAL and abs(found.row()["ratio"] / 2 - 1) < 0.02


def test_rounds_end_when_the_time_is_spent():
    machine = Machine(noise=0.3)
    found, enough = pairs.take_turns(machine.takes("a", 1000), machine.takes("b", 1000), 20.0, now=lambda: machine.now)
    assert not enough and 18 <= machine.now <= 24
    slow = Machine(noise=0.3)
    found, enough = pairs.take_turns(slow.takes("a", 60_000), slow.takes("b", 60_000), 1.0, now=lambda: slow.now)
    assert not enough and len(found.other) == 3 and found.row()["ratio_interval"] is None


def test_two_runs_on_a_noisy_machine_agree():
    """Each round 5.6 % noise in the ratio, as on two cores with company: what two runs say differs by less than 5 %."""
    said = []
    for seed in range(20):
        machine = Machine(noise=0.04)
        machine.chance = random.Random(seed)
        found, enough = pairs.take_turns(machine.takes("a", 600), machine.takes("b", 1800), 1e9, now=lambda m=machine: m.now)
        assert enough
        said.append(found.row()["ratio"])
    assert max(a / b for a, b in itertools.permutations(said, 2)) < 1.05

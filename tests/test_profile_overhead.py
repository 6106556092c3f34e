"""The benchmark of the timing's cost: ratios within rounds, and builds that disagree are not timed."""

from __future__ import annotations

import time

import pytest
import torch
from support import networks
from support.threads import torch_threads

from benchmarks import profile_overhead
from memnet_fast import native
from memnet_fast.plan import lower


def _busy(seconds: float):
    def run() -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return run


def test_ratios_are_those_of_the_cpu_time():
    found = profile_overhead.compare({"none": _busy(0.01), "off": _busy(0.01), "on": _busy(0.03)}, 3)
    assert 2.0 < found["on_cpu"]["median"] < 4.5 and 0.6 < found["off_cpu"]["median"] < 1.7
    assert found["on_cpu"]["q20"] <= found["on_cpu"]["median"] <= found["on_cpu"]["q80"]
    assert {name: len(rows) for name, rows in found["seconds"].items()} == {"none": 3, "off": 3, "on": 3}


@pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "built")
def test_the_three_ways_are_one_network(monkeypatch):
    plan, x, module = lower(networks.build(networks.SMALL)), networks.image(1, 1, 9, 11), native.module()
    with torch_threads(1):
        runs = profile_overhead.ways(plan, x, module, module)
        assert set(runs) == {"none", "off", "on"} and native.module() is module
        for run in runs.values():
            run()

        class Wrong:
            """Computes something else in every call."""

            calls = 0

            def __getattr__(self, name):
                return getattr(module, name)

            def run(self, *arguments):
                module.run(*arguments)
                Wrong.calls += 1
                # The address of the result is the last but four of the arguments.
                import ctypes

                ctypes.cast(arguments[-4], ctypes.POINTER(ctypes.c_float))[0] += Wrong.calls

        with pytest.raises(RuntimeError, match="different results"):
            profile_overhead.ways(plan, x, Wrong(), module)
    assert torch.get_num_threads() >= 1 and native.module() is module

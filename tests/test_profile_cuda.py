"""Timing on a GPU, over the model of the CUDA runtime: events and ranges around every launch, and none when nobody asks."""

from __future__ import annotations

import pytest
import torch
from support import cuda_twin, networks

from memnet_fast import native_cuda, timing
from memnet_fast.backends import cuda
from memnet_fast.plan import lower
from memnet_fast.profile.measuring import prepared
from memnet_fast.timing import Span, Stopwatch, of_timeline

CPU = torch.device("cpu")
needs_twin = pytest.mark.skipif(cuda_twin.why_not() is not None, reason=cuda_twin.why_not() or "")


@pytest.fixture
def twin(twin_build, monkeypatch):
    cuda_twin.install(twin_build, monkeypatch)
    return twin_build


@pytest.fixture
def placed(twin):
    """A network, its plan, and what a run needs."""
    plan, _, packed = prepared(networks.build(networks.SMALL), "cuda", "fp16", "direct")
    x = networks.image(1, 1, 5, 7)
    memory = [torch.empty_like(x) for _ in range(2)]
    workspace = torch.zeros(packed.workspace_bytes(1, 5, 7), dtype=torch.uint8)
    return plan, packed, x, memory, workspace


def _within(twin, launch: int) -> str:
    return twin.runtime.runtime_within(launch).decode()


@needs_twin
def test_every_launch_has_its_row_and_its_range(twin, placed):
    plan, packed, x, (plain, timed), workspace = placed
    packed.run(x, plain, workspace)
    twin.runtime.runtime_forget()
    names = timing.names(plan.ops)
    found = packed.run_timed(x, timed, workspace, names)
    assert torch.equal(plain, timed)
    launches = twin.runtime.runtime_launches()
    # In the model a launch lasts a millisecond, and each row is one launch.
    assert [(s.begin, s.end) for s in found.spans] == [(i * 1_000_000, (i + 1) * 1_000_000) for i in range(launches)]
    packing = [s for s in found.spans if s.op is None]
    assert {s.what for s in packing} == {"weights: fold", "weights: pack"}
    assert [s.op for s in found.spans[len(packing) :]] == list(range(len(plan.ops)))
    inside = [s.what if s.op is None else names[s.op] for s in found.spans]
    assert [_within(twin, i) for i in range(launches)] == [f"{timing.RANGE}/{name}" for name in inside]
    assert twin.runtime.runtime_open_ranges() == 0
    assert [s.op for s in found.host] == [s.op for s in found.spans]
    assert all(a.end <= b.begin for a, b in zip(found.host, found.host[1:], strict=False))
    assert twin.runtime.runtime_events() == 0, "events were left behind"


@needs_twin
def test_fp8_has_its_own_packing(twin):
    plan = lower(networks.build(networks.SMALL))
    packed = cuda.pack(plan, CPU, "fp8", "direct")
    x = networks.image(1, 1, 3, 4)
    workspace = torch.zeros(packed.workspace_bytes(1, 3, 4), dtype=torch.uint8)
    found = packed.run_timed(x, torch.empty_like(x), workspace, timing.names(plan.ops))
    assert "weights: quantise" in {s.what for s in found.spans}


@needs_twin
def test_an_ordinary_run_makes_no_event_and_opens_no_range(twin, placed):
    _, packed, x, (out, _), workspace = placed
    twin.runtime.runtime_forget()
    packed.run(x, out, workspace)
    assert twin.runtime.runtime_events() == 0
    assert {_within(twin, i) for i in range(twin.runtime.runtime_launches())} == {""}


@needs_twin
def test_a_launch_that_fails_closes_its_ranges(twin, placed):
    plan, packed, x, (out, _), workspace = placed
    with twin.failing_after(3), pytest.raises(Exception, match="memory"):
        packed.run_timed(x, out, workspace, timing.names(plan.ops))
    assert twin.runtime.runtime_open_ranges() == 0 and twin.runtime.runtime_events() == 0


@needs_twin
def test_a_timeline_serves_one_call_of_its_plan(twin, placed):
    plan, packed, x, (out, _), workspace = placed
    names = list(timing.names(plan.ops))
    with pytest.raises(ValueError, match="one call"):
        packed._run(x, out, workspace, native_cuda.module().Timeline(names[:-1]))
    timeline = native_cuda.module().Timeline(names)
    packed._run(x, out, workspace, timeline)
    with pytest.raises(ValueError, match="one call"):
        packed._run(x, out, workspace, timeline)
    assert native_cuda.module().Timeline(names).rows() == []


def test_rows_of_the_runtime_become_spans():
    found = of_timeline([(-1, "weights: pack", 0.0, 0.25, 100, 160), (0, "first_conv", 0.25, 1.0, 170, 200)])
    assert found.spans == (Span(None, 0, 250_000, "weights: pack"), Span(0, 250_000, 1_000_000, "first_conv"))
    assert found.host == (Span(None, 0, 60, "weights: pack"), Span(0, 70, 100, "first_conv"))
    assert found.nanoseconds == 1_000_000


class _Event:
    """In place of torch.cuda.Event: a millisecond passes from record to record."""

    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        _Event.clock += 1
        self.at = _Event.clock

    def synchronize(self) -> None:
        assert self.at == _Event.clock, "waits for the last event"

    def elapsed_time(self, other: _Event) -> float:
        return float(other.at - self.at)


def test_operations_launched_by_python_are_timed_by_events(monkeypatch):
    ranges, seen = [], []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", ranges.pop)
    with Stopwatch(torch.device("cuda", 0), ("a", "b", "c")) as watch:
        for i in range(3):
            watch.begin(i)
            seen.append(list(ranges))
    assert seen == [["memnet", "a"], ["memnet", "b"], ["memnet", "c"]] and ranges == []
    found = watch.timing()
    assert found.spans == tuple(Span(i, i * 1_000_000, (i + 1) * 1_000_000) for i in range(3))
    assert [s.op for s in found.host] == [0, 1, 2]


def test_a_range_is_closed_also_where_a_launch_fails(monkeypatch):
    ranges = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", ranges.pop)
    with pytest.raises(RuntimeError, match="launch"), Stopwatch(torch.device("cuda", 0), ("a",)) as watch:
        watch.begin(0)
        raise RuntimeError("launch")
    assert ranges == []

"""Measured profiles: what is timed is the ordinary run, times add up, and the trace says what was measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict

import pytest
import torch
from support import networks
from support.threads import torch_threads

from memnet_fast import native
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import BackendUnavailable, InputError
from memnet_fast.profile import ceilings, measure, plots, table, trace
from memnet_fast.profile.ceilings import Ceilings

pytest.importorskip("rich")
BACKENDS = [("torch", "direct")] + ([] if native.why_missing() else [("cpu", "winograd"), ("cpu", "direct")])
ROUNDS = 2
# Three recursions: enough for the CPU backend to run a gate in parts.
CONFIG = MemNetConfig(channels=16, num_memory_blocks=2, num_recursions=3)


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Figures that no machine has; how they are measured is a test of its own."""
    one = Ceilings(fma=2e11, gemm=1e11, bytes=1e10, threads=1)
    monkeypatch.setattr(ceilings, "of_cpu", lambda threads, isa, precision="fp32": one)
    return one


@pytest.fixture(params=BACKENDS, ids=["-".join(b) for b in BACKENDS])
def profile(request):
    backend, algorithm = request.param
    with torch_threads(1):
        return measure(networks.build(CONFIG), networks.image(1, 1, 13, 17), backend, "fp32", algorithm, ROUNDS)


def test_every_operation_of_every_round_is_timed(profile):
    count = len(profile.plan.ops)
    assert [op.index for op in profile.operations] == list(range(count))
    assert len(profile.rounds) == len(profile.plain_ms) == ROUNDS
    for timing in profile.rounds:
        # A backend may run an operation in several parts, between others.
        assert {span.op for span in timing.spans} == set(range(count))
        assert all(span.begin < span.end for span in timing.spans)
        assert all(a.end <= b.begin for a, b in zip(timing.spans, timing.spans[1:], strict=False))
    assert profile.packing_ms == 0.0  # weights are packed once, before
    assert all(ms > 0 for ms in profile.plain_ms)


def test_phases_are_the_time_of_a_thread(profile):
    if profile.choice.backend != "cpu":
        assert not any(timing.threads for timing in profile.rounds) and table.phases_table(profile) is None
        return
    for timing in profile.rounds:
        assert {t.op for t in timing.threads} == {op.index for op in profile.operations}
        for part in timing.threads:
            assert any(s.op == part.op and s.begin <= part.begin <= part.end <= s.end for s in timing.spans)
            together = sum(part.phases.values())
            if profile.choice.algorithm == "winograd":
                assert together == part.end - part.begin
            assert 0 < together <= part.end - part.begin and part.phases["product"] > 0
    shares = [share for _, _, _, share, _ in table.phases(profile)]
    assert sum(shares) == pytest.approx(1)


def test_rows_add_up(profile, known_ceilings):
    rows = table.rows(profile)
    total = statistics.median(profile.timed_ms)
    assert sum(r.calls for r in rows) == len(profile.plan.ops) == len(table.rows(profile, each=True))
    assert sum(r.gflop for r in rows) == pytest.approx(1e-9 * sum(op.cost.flop for op in profile.operations))
    assert {r.name for r in rows} == {
        "first_conv",
        "residual_block",
        "gate, 4 sources",
        "gate, 5 sources",
        "reconstruct, 2 sources",
    }
    for r in rows:
        assert r.ms > 0 and r.share == pytest.approx(r.ms / total)
        assert r.tflops == pytest.approx(r.executed_gflop / r.ms) and r.gbps == pytest.approx(1e3 * r.gb / r.ms)
        compute, memory = 1e3 * r.executed_gflop * 1e9 / known_ceilings.flops, 1e3 * r.gb * 1e9 / known_ceilings.bytes
        assert r.bound == ("compute" if compute > memory else "memory")
        assert r.roofline == pytest.approx(max(compute, memory) / r.ms)
    values = table.values(profile)
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def _checked(events):
    """Spans by track. Fails unless those of a track are in order, and each lies in the one around it or behind it."""
    tracks = defaultdict(list)
    for e in events:
        assert e["ph"] in ("X", "M")
        if e["ph"] == "X":
            begin = round(1000 * e["ts"])
            assert e["dur"] >= 0 and isinstance(e["name"], str)
            tracks[e["pid"], e["tid"]].append((begin, begin + round(1000 * e["dur"]), e))
    for spans in tracks.values():
        assert [s[0] for s in spans] == sorted(s[0] for s in spans), "not in order of their beginnings"
        open_spans = []
        for begin, end, _ in spans:
            while open_spans and open_spans[-1] <= begin:
                open_spans.pop()
            assert not open_spans or end <= open_spans[-1], "crosses the end of the span around it"
            open_spans.append(end)
    return tracks


def test_trace_is_nested_in_order_and_adds_up(profile):
    parsed = json.loads(trace.encoded(profile))
    tracks = _checked(parsed["traceEvents"])
    rounds = [s for s in tracks[1, 0] if s[2]["cat"] == "round"]
    operations = [s for s in tracks[1, 0] if s[2]["cat"] != "round"]
    assert [end - begin for begin, end, _ in rounds] == [t.nanoseconds for t in profile.rounds]
    ran = [profile.operations[span.op].name for timing in profile.rounds for span in timing.spans]
    assert [s[2]["name"] for s in operations] == ran
    for op in profile.operations:
        own = [end - begin for begin, end, e in operations if e["args"]["operation"] == op.index]
        assert 1e-6 * sum(own) == pytest.approx(sum(op.ms))
    for track in tracks:
        if track[0] == 1 and track[1] > 0:
            threads = [s for s in tracks[track] if s[2]["cat"] == "thread"]
            phases = [s for s in tracks[track] if s[2]["cat"] == "phase"]
            whole = sum(sum(t.phases.values()) for timing in profile.rounds for t in timing.threads if t.thread == track[1] - 1)
            assert sum(end - begin for begin, end, _ in phases) == whole
            assert len(threads) == sum(len(timing.spans) for timing in profile.rounds)
    # One ordinary call under torch.profiler: the operator is in it.
    assert any("memnet_fast::forward" in e["name"] for (pid, _), spans in tracks.items() if pid == 2 for _, _, e in spans)


def test_the_checks_of_a_trace_can_fail(profile):
    events = [e for e in json.loads(trace.encoded(profile))["traceEvents"] if e["pid"] == 1 and e.get("tid") == 0]
    crossed = json.loads(json.dumps(events))
    next(e for e in crossed if e.get("cat") == "first_conv")["dur"] += 1e9
    with pytest.raises(AssertionError, match="crosses"):
        _checked(crossed)
    with pytest.raises(AssertionError, match="order"):
        _checked(events[::-1])


def test_tables_and_pictures(profile):
    from rich.console import Console

    pytest.importorskip("matplotlib")
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table.operations_table(profile, each=True))
        text = console.export_text()
    assert all(op.name in text for op in profile.operations)
    assert plots.roofline(table.values(profile)).startswith(b"\x89PNG")
    assert any("multiply-adds 200 GFLOP/s" in line for line in table.notes(profile))


def test_labels_of_the_roofline_do_not_overlap(profile, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plots, "_png", figures.append)
    values = table.values(profile)
    gate = next(r for r in values["rows"] if r["name"] == "gate, 5 sources")
    values["rows"] += [{**gate, "name": f"gate, {count} sources"} for count in (6, 7)]
    plots.roofline(values)
    figures[0].draw_without_rendering()
    axes = figures[0].axes[0]
    shown = [t for t in (*axes.texts, *axes.get_legend().get_texts()) if t.get_text()]
    named = {"first_conv", "residual_block", "gate, 4 to 7 sources", "reconstruct, 2 sources"}
    assert named <= {t.get_text() for t in shown}
    boxes = [t.get_window_extent() for t in shown]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_without_the_host_the_trace_has_one_process():
    found = measure(networks.build(networks.SMALL), networks.image(1, 1, 3, 5), "torch", "bf16", rounds=1, host=False)
    assert {e["pid"] for e in trace.trace(found)["traceEvents"]} == {1} and not found.host
    assert found.choice.precision == "bf16"


def test_the_best_of_the_rounds(profile):
    best = dataclasses.replace(profile, best=True)
    assert best.total_ms == pytest.approx(sum(min(op.ms) for op in profile.operations))
    assert best.total_ms <= 1.000001 * min(profile.timed_ms)
    for row, each in zip(table.rows(best), table.rows(profile), strict=True):
        assert row.ms <= each.ms and row.roofline >= each.roofline
    assert sum(r.share for r in table.rows(best)) == pytest.approx(1)
    assert all(ms <= same[2] for (_, _, ms, *_), same in zip(table.phases(best), table.phases(profile), strict=True))


def test_what_cannot_be_profiled_is_refused():
    net, x = networks.build(networks.SMALL), networks.image(1, 1, 3, 5)
    with pytest.raises(InputError, match="rounds"):
        measure(net, x, rounds=0)
    with pytest.raises(InputError, match="channels"):
        measure(net, networks.image(1, 2, 3, 5), "torch")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable):
            measure(net, x, "cuda")


def test_a_timed_run_that_computes_something_else_is_noticed(monkeypatch):
    from memnet_fast.backends.torch import TorchPacked
    from memnet_fast.errors import NumericError

    honest = TorchPacked.run_timed

    def spoiled(self, image, out, workspace, names):
        timing = honest(self, image, out, workspace, names)
        out.add_(1e-3)
        return timing

    monkeypatch.setattr(TorchPacked, "run_timed", spoiled)
    with pytest.raises(NumericError, match="another result"):
        measure(networks.build(networks.SMALL), networks.image(1, 1, 3, 5), "torch", rounds=1, host=False)

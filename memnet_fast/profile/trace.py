"""The trace: Chrome's JSON, for ui.perfetto.dev and chrome://tracing.

Every round is there, one after the other. Process 1 is the plan: a track of operations, and below it a track for each thread,
or the enqueueing by the host. A thread's span in an operation is where it was; the phases inside are sums of many short laps,
laid end to end. Process 2 is one ordinary call under torch.profiler, on a clock of its own.
"""

from __future__ import annotations

import json
from typing import Any

from memnet_fast import __version__
from memnet_fast.profile.measuring import Profile

_PLAN, _CALL = 1, 2
_PAUSE = 1_000_000  # nanoseconds between two rounds


def trace(profile: Profile) -> dict[str, Any]:
    """The trace as plain values. Times are microseconds with three decimals, so whole nanoseconds."""
    about = f"{profile.choice.backend} {profile.choice.precision} {profile.choice.algorithm}"
    events = [_name("process_name", _PLAN, 0, f"plan, {about}, {'x'.join(map(str, profile.shape))}")]
    events.append(_name("thread_name", _PLAN, 0, "operations"))
    tracks = {t.thread for timing in profile.rounds for t in timing.threads}
    events += [_name("thread_name", _PLAN, 1 + thread, f"thread {thread}") for thread in sorted(tracks)]
    if any(timing.host for timing in profile.rounds):
        events.append(_name("thread_name", _PLAN, 1, "enqueued by the host"))
    start = 0
    for number, timing in enumerate(profile.rounds):
        first, last = timing.spans[0].begin, timing.spans[-1].end
        events.append(_span(f"round {number}", "round", 0, start + first, start + last, {}))
        for span in timing.spans:
            if span.op is None:
                events.append(_span(span.what, "weights", 0, start + span.begin, start + span.end, {}))
                continue
            op = profile.operations[span.op]
            cost = op.cost
            arguments = {"operation": op.index, "flop": cost.flop, "executed_flop": cost.executed, "bytes": cost.bytes}
            events.append(_span(op.name, op.kind, 0, start + span.begin, start + span.end, arguments))
        for part in timing.threads:
            name, track = profile.operations[part.op].name, 1 + part.thread
            events.append(_span(name, "thread", track, start + part.begin, start + part.end, {"executed_flop": part.flop}))
            at = part.begin
            for phase, length in part.phases.items():
                if length:
                    events.append(_span(phase, "phase", track, start + at, start + at + length, {"sum_of_laps": True}))
                    at += length
        for span in timing.host:
            name = span.what if span.op is None else profile.operations[span.op].name
            events.append(_span(name, "host", 1, start + span.begin, start + span.end, {}))
        start += max(span.end for span in (*timing.spans, *timing.host)) + _PAUSE
    events += _call(profile)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"program": f"memnet_fast {__version__}", "device": str(profile.device)},
    }


def _call(profile: Profile) -> list[dict[str, Any]]:
    if not profile.host:
        return []
    tracks = {name: number for number, name in enumerate(dict.fromkeys(e.track for e in profile.host))}
    events = [_name("process_name", _CALL, 0, "one ordinary call, torch.profiler")]
    events += [_name("thread_name", _CALL, number, name) for name, number in tracks.items()]
    return events + [_span(e.name, "torch", tracks[e.track], e.begin, e.end, {}, _CALL) for e in profile.host]


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _span(
    name: str, category: str, thread: int, begin: int, end: int, arguments: dict[str, Any], process: int = _PLAN
) -> dict[str, Any]:
    times = {"ts": begin / 1000, "dur": (end - begin) / 1000}
    return {"ph": "X", "name": name, "cat": category, "pid": process, "tid": thread, **times, "args": arguments}


def encoded(profile: Profile) -> bytes:
    return json.dumps(trace(profile), allow_nan=False, separators=(",", ":")).encode()

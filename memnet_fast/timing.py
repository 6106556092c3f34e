"""What a backend says of one run that it timed: which operation of the plan ran when."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from memnet_fast.plan import FirstConv, Gate, Op, Reconstruct, ResidualBlock

KINDS: dict[type, str] = {FirstConv: "first_conv", ResidualBlock: "residual_block", Gate: "gate", Reconstruct: "reconstruct"}
# The NVTX range around all operations of a timed run.
RANGE = "memnet"


def names(ops: Iterable[Op]) -> tuple[str, ...]:
    """Of operations, by the modules of the reference: first_conv, residual_block.<block>.<recursion>, gate.<block>,
    reconstruct. Blocks and recursions count from 0. The repetitions of a chain have one name."""
    return tuple(".".join([KINDS[type(op)], *(part for part in op.scale.split(".") if part.isdecimal())]) for op in ops)


@dataclass(frozen=True)
class Span:
    """begin, end: nanoseconds from the beginning of the run. op: an index of the plan's operations; None: something else, which
    `what` names."""

    op: int | None
    begin: int
    end: int
    what: str = ""


@dataclass(frozen=True)
class ThreadSpan:
    """One thread's part of an operation. phases: nanoseconds by name, which add up to no more than end - begin. flop: of its
    products, as the kernel counted them, with padding and with what is computed twice."""

    op: int
    thread: int
    begin: int
    end: int
    phases: Mapping[str, int]
    flop: int


@dataclass(frozen=True)
class Timing:
    """One run. spans: one after the other, for the device that computes. threads: what a CPU backend's threads did in them.
    host: for a GPU, the enqueueing of each span, on the clock of the host."""

    spans: tuple[Span, ...]
    threads: tuple[ThreadSpan, ...] = ()
    host: tuple[Span, ...] = ()

    @property
    def nanoseconds(self) -> int:
        return self.spans[-1].end - self.spans[0].begin if self.spans else 0


def of_native(times: Any, phases: Sequence[str]) -> Timing:
    """From the array of `_native.run_timed`, times_dtype [operations, 1 + threads]."""
    origin = int(times[0, 0]["begin"]) if len(times) else 0
    spans, threads = [], []
    for i, (whole, *each) in enumerate(times):
        spans.append(Span(i, int(whole["begin"]) - origin, int(whole["end"]) - origin))
        for thread, t in enumerate(each):
            if t["begin"]:
                sums = {name: int(ns) for name, ns in zip(phases, t["phases"], strict=True)}
                begin, end = int(t["begin"]) - origin, int(t["end"]) - origin
                threads.append(ThreadSpan(i, thread, begin, end, sums, int(t["flop"])))
    return Timing(tuple(spans), tuple(threads))


def of_timeline(rows: Sequence[tuple[int, str, float, float, int, int]]) -> Timing:
    """From `_native_cuda.Timeline.rows`."""
    origin = rows[0][4] if rows else 0
    spans = [Span(None if op < 0 else op, round(1e6 * begin), round(1e6 * end), name) for op, name, begin, end, *_ in rows]
    host = [Span(None if op < 0 else op, begin - origin, end - origin, name) for op, name, _, _, begin, end in rows]
    return Timing(tuple(spans), host=tuple(host))


@dataclass
class Stopwatch:
    """Times the operations that Python launches one by one: by events on a GPU, with an NVTX range around each, else by the
    clock. One event stands between two operations, so their times add up to that of the run.

        with Stopwatch(device, names) as watch:
            for i, op in enumerate(ops):
                watch.begin(i)
                ...
        watch.timing()    # waits for the device
    """

    device: torch.device
    names: Sequence[str]
    _marks: list[tuple[int, int, Any]] = field(init=False, repr=False, default_factory=list)

    def __enter__(self) -> Stopwatch:
        if self.device.type == "cuda":
            torch.cuda.nvtx.range_push(RANGE)
        return self

    def begin(self, op: int) -> None:
        """Operation `op` begins, and the one before ends."""
        if self.device.type == "cuda":
            if self._marks:
                torch.cuda.nvtx.range_pop()
            self._mark(op)
            torch.cuda.nvtx.range_push(self.names[op])
        else:
            self._mark(op)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            if self._marks:
                torch.cuda.nvtx.range_pop()
            torch.cuda.nvtx.range_pop()
        self._mark(-1)

    def _mark(self, op: int) -> None:
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        self._marks.append((op, time.perf_counter_ns(), event))

    def timing(self) -> Timing:
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        origin = self._marks[0][1]
        host = tuple(Span(op, a - origin, b - origin) for (op, a, _), (_, b, _) in pairs)
        first, last = self._marks[0][2], self._marks[-1][2]
        if first is None:
            return Timing(host)
        last.synchronize()
        # Each end is the next begin, also after rounding.
        at = [round(1e6 * first.elapsed_time(event)) for _, _, event in self._marks]
        spans = tuple(Span(op, begin, end) for (op, _, _), begin, end in zip(self._marks, at, at[1:], strict=False))
        return Timing(spans, host=host)

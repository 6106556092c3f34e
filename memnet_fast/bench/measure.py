"""Rows of results: every variant of one size, in its own process, in turns with the subject, after it was found to be right."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from memnet_fast.bench import pairs, peers, truth
from memnet_fast.bench.clocks import quantiles
from memnet_fast.bench.peers import Variant
from memnet_fast.bench.prepare import Preparation
from memnet_fast.bench.process import Process, VariantFailed
from memnet_fast.reference import MemNet
from memnet_fast.restore.tiling import available_bytes


@dataclass
class Session:
    """A network, a folder with everything its variants need, and how they are run.

    isa: "native" or "avx2", which asks everybody to leave AVX-512 alone. cache: keeps from run to run what
    does not change. tell: is told what happens, in words.
    """

    net: MemNet
    folder: Path
    variants: list[Variant]
    threads: int
    device: str = "cpu"
    isa: str = "native"
    cache: Path | None = None
    tell: Callable[[str], None] = lambda text: None
    preparation: Preparation | None = None

    def why_not(self, variant: Variant) -> dict[str, str] | None:
        """Status and reason of a variant that cannot be tried, with how to install what it needs. Waits for its files."""
        if absent := variant.missing():
            return {"status": "missing", "reason": f"{', '.join(absent)} not installed", "install": variant.install}
        failed = self.prepared() if variant.files else {}
        for kind in variant.files:
            if kind in failed:
                return {"status": "failed", "reason": failed[kind]}
        return None

    def prepared(self) -> dict[str, str]:
        """Waits until every file is there; by its kind, why one is not."""
        return self.preparation.finish() if self.preparation is not None else {}

    def environment(self, variant: Variant) -> dict[str, str]:
        return {**variant.environment, **(peers.AVX2 if self.isa == "avx2" else {})}

    def start(
        self,
        variant: Variant,
        shape: tuple[int, int, int],
        threads: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> Process:
        """The variant's process; threads and environment in place of the usual ones."""
        settings: dict[str, Any] = {"folder": str(self.folder), "shape": shape, "device": self.device}
        settings["threads"] = threads or self.threads
        settings.update({"own": variant.own} if variant.own else {"peer": variant.name})
        return Process(settings, self.environment(variant) if environment is None else environment)

    def case(self, shape: tuple[int, int, int]) -> Case:
        return Case(self, shape)


@contextmanager
def session(net: MemNet, variants: Sequence[Variant], **options: Any) -> Iterator[Session]:
    """A Session in a temporary folder, with the files that the variants need."""
    with tempfile.TemporaryDirectory(prefix="memnet-bench-") as name:
        made = Session(net, Path(name), list(variants), **options)
        made.tell("preparing the network for every engine")
        with Preparation(net, made.folder, made.variants, made.cache) as made.preparation:
            yield made


class Case:
    """Images of one shape with their truth, and the gate. name: of its files, where a session has two cases at once."""

    def __init__(self, session: Session, shape: tuple[int, int, int], name: str = "image") -> None:
        self._session, self.shape = session, shape
        session.tell("restoring the images in float64")
        device = torch.device(session.device)
        self._truth = truth.NetworkCase(session.net, shape, device, thrifty=device.type == "cpu", cache=session.cache)
        self._files = []
        for i, content in enumerate(self._truth.contents):
            self._files.append(session.folder / f"{name}{i}.npy")
            np.save(self._files[-1], content.cpu().numpy())

    def check(self, process: Process, variant: Variant, seconds: float = 600.0) -> dict[str, float]:
        """Errors of a running variant. Afterwards the first image is loaded again. Raises VariantFailed."""
        results = []
        for file in self._files:
            out = file.with_name("result.npy")
            process.ask("load", seconds, file=str(file))
            process.ask("run", seconds, file=str(out))
            results.append(torch.from_numpy(np.load(out)).to(self._truth.image.device))
        process.ask("load", seconds, file=str(self._files[0]))
        return self._truth.errors_of(results, clamped=variant.clamped)

    def warm(self, process: Process) -> None:
        """Gives a process that takes the place of one that was right the first image, and a run. Raises VariantFailed."""
        process.ask("load", file=str(self._files[0]))
        process.time()

    def gated(self, process: Process, variant: Variant, seconds: float = 600.0) -> dict[str, Any]:
        """status "ok", "refused" (wrong) or "failed" (does not run), errors or the reason, start_s: seconds from the start of
        the process until both images were restored.
        """
        start = time.monotonic()
        try:
            errors = self.check(process, variant, seconds)
        except VariantFailed as failure:
            return {"status": "failed", "reason": str(failure)}
        # None where there is no number: JSON knows no NaN.
        known = {key: value if math.isfinite(value) else None for key, value in errors.items()}
        row: dict[str, Any] = {"errors": known, "start_s": round(time.monotonic() - start, 3)}
        wrong = truth.verdict(errors, truth.limits(variant.precision))
        return {**row, "status": "refused", "reason": wrong} if wrong else {**row, "status": "ok"}


class _Seat:
    """The process of a variant, until a new one takes its place."""

    def __init__(self, session: Session, case: Case, variant: Variant) -> None:
        self._session, self._case, self.variant = session, case, variant
        self.process = session.start(variant, case.shape)
        self.count = 1

    def renew(self) -> None:
        """Raises VariantFailed."""
        self.process.close()
        self.process = self._session.start(self.variant, self._case.shape)
        self.count += 1
        self._case.warm(self.process)

    def __enter__(self) -> _Seat:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.__exit__(kind, error, trace)


@dataclass
class _Running:
    """A variant that was found to be right, and what is known of it."""

    seat: _Seat
    row: dict[str, Any]
    contest: pairs.Contest
    others: list[float] = field(default_factory=list)  # what other programs used of the CPUs, run by run
    in_flight: int = 1

    def finished(self) -> dict[str, Any]:
        """Its row, with times where it has any."""
        found = self.contest.pairs
        if self.contest.failure is not None:
            return {"status": "failed", "reason": str(self.contest.failure)}
        low, middle, high = quantiles(found.other)
        row = {**self.row, "ms": middle, "ms_q20": low, "ms_q80": high, **found.row(), "enough": self.contest.settled}
        row |= {"processes": self.seat.count, "in_flight": self.in_flight}
        row["others"] = round(statistics.median(self.others), 3) if self.others else None
        return row


def forward(
    session: Session,
    size: str,
    shape: tuple[int, int, int],
    seconds: float,
    show: Callable[[dict[str, Any]], None] = lambda row: None,
    goal: float = pairs.GOAL,
    until: float | None = None,
) -> list[dict[str, Any]]:
    """One row for each variant of the session at one size, in their order; `show` gets each when it is done. The first variant
    is the subject; all are timed in turns with it, also a second process of its own, whose ratio should be 1. As many as the
    memory holds run side by side, so that each is timed now and then all the time; every four rounds, new processes take
    their places, where starting them takes no longer than eight.

    seconds: about how long the timing of all variants may take; starting and checking them is not counted. until: the moment
    (time.monotonic) by which everything should be done, in place of seconds; peers that cannot be started before it are
    "skipped".
    A row that is not "ok" has no times and no ratio; without a right subject no row has. Where an exception ends this early,
    `show` has got what was timed until then.
    """
    subject, *others = session.variants
    n, h, w = shape
    base = {"suite": "forward", "size": size, "n": n, "h": h, "w": w, "threads": session.threads, "isa": session.isa}
    rows: list[dict[str, Any]] = []

    def add(variant: Variant, row: dict[str, Any]) -> None:
        about: dict[str, Any] = {"variant": variant.name, "precision": variant.precision}
        notes = [variant.note] if variant.note else []
        if session.isa == "avx2" and not variant.masks:
            notes.append("uses AVX-512 all the same: it has no switch")
        if notes:
            about["note"] = "; ".join(notes)
        rows.append({**base, **about, **row, "environment": session.environment(variant)})
        show(rows[-1])

    def refuse_all(row: dict[str, Any]) -> list[dict[str, Any]]:
        add(subject, row)
        for variant in others:
            add(variant, session.why_not(variant) or {"status": "failed", "reason": "not tried: the subject was not right"})
        return rows

    if why := session.why_not(subject):
        return refuse_all(why)
    case = session.case(shape)
    session.prepared()  # a CPU that still makes files is none to time on
    session.tell(f"{size}: {subject.name}")
    with _Seat(session, case, subject) as first:
        gate = case.gated(first.process, subject)
        if gate["status"] != "ok":
            return refuse_all(gate)
        waiting = []
        for variant in session.variants:
            if why := session.why_not(variant):
                add(variant, why)
            else:
                waiting.append(variant)
        possible, starts = len(waiting), _Starts()
        while waiting:
            with ExitStack() as stack:
                running: list[_Running] = []
                while waiting and (not running or _room(session, running)):
                    variant = waiting.pop(0)
                    if until is not None and variant is not subject and time.monotonic() + starts.mean() >= until:
                        add(variant, {"status": "skipped", "reason": "not tried: the time was spent"})
                        continue
                    session.tell(f"{size}: {variant.name}")
                    with starts.timed():
                        seat = stack.enter_context(_Seat(session, case, variant))
                        row = case.gated(seat.process, variant)
                        row |= _memory_of(seat.process, row)
                    if row["status"] == "ok":
                        running.append(_running(seat, {**row, "subject": subject.name}, goal))
                    else:
                        seat.process.close()
                        add(variant, row)
                if not running:
                    continue
                part = seconds * len(running) / possible
                if until is not None:
                    left = until - time.monotonic() - starts.mean() * len(waiting)
                    part = left * len(running) / (len(running) + len(waiting))
                session.tell(f"{size}: rounds of {', '.join(r.seat.variant.name for r in running)}")
                try:
                    _time_all(first, gate["start_s"], running, part)
                finally:
                    for r in running:
                        if r.contest.failure is not None or len(r.contest.pairs.other) >= pairs.FEWEST_ROUNDS:
                            add(r.seat.variant, r.finished())
    order = {variant.name: i for i, variant in enumerate(session.variants)}
    return sorted(rows, key=lambda row: order[row["variant"]])


class _Starts:
    """How long variants take to start and to be checked."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds.append(time.monotonic() - start)

    def mean(self) -> float:
        return statistics.mean(self._seconds) if self._seconds else 0.0


def _room(session: Session, running: Sequence[_Running]) -> bool:
    """Whether another process may be started beside these: on a CPU, where it may become twice as large as the largest."""
    peaks = [r.row.get("peak_mib") for r in running]
    if session.device != "cpu" or any(peak is None for peak in peaks):
        return False
    return available_bytes(torch.device("cpu")) / 2**20 > 2 * max(peak for peak in peaks if peak is not None)


def _memory_of(process: Process, row: dict[str, Any]) -> dict[str, Any]:
    """What is to be added to the row of a variant that was found to be right, or its failure."""
    if row["status"] != "ok":
        return {}
    try:
        return process.ask("memory")
    except VariantFailed as failure:
        return {"status": "failed", "reason": str(failure)}


def _running(seat: _Seat, row: dict[str, Any], goal: float) -> _Running:
    def run() -> float:
        answer = seat.process.time()
        made.in_flight = answer["in_flight"]
        if answer["others"] is not None:
            made.others.append(answer["others"])
        return float(answer["ms"])

    made = _Running(seat, row, pairs.Contest(run, goal))
    return made


def _time_all(first: _Seat, start_s: float, running: Sequence[_Running], seconds: float) -> None:
    """Fills the contests. Where the subject fails, all of them have failed. start_s: of the subject."""

    def renew() -> None:
        opened = [r for r in running if r.contest.open()]
        rounds = [_seconds_of_rounds(r.contest) for r in opened]
        if start_s <= 2 * sum(rounds):
            first.renew()
        for r, spent in zip(opened, rounds, strict=True):
            # What takes minutes to start (a compiler) keeps its process.
            if r.row["start_s"] > 2 * spent:
                continue
            try:
                r.seat.renew()
            except VariantFailed as failure:
                r.contest.failure = failure
        first.process.time()  # it waited

    try:
        first.process.time()  # it waited while the others were started
        pairs.run_all(lambda: float(first.process.time()["ms"]), [r.contest for r in running], seconds, renew=renew)
    except VariantFailed as failure:
        for r in running:
            if r.contest.open():
                r.contest.failure = VariantFailed(f"{first.variant.name}: {failure}")


def _seconds_of_rounds(contest: pairs.Contest) -> float:
    """What one process's rounds take."""
    found = contest.pairs
    return pairs.ROUNDS_OF_ONE * (statistics.median(found.subject) + statistics.median(found.other)) / 1000


def memory(
    session: Session,
    size: str,
    shape: tuple[int, int, int],
    show: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Peak memory of the whole process of every variant after two images, with the system's allocator as it comes: keeping
    pages would cost some engines memory. No times, so a busy machine does no harm.
    """
    n, h, w = shape
    rows, case = [], session.case(shape)
    for variant in session.variants:
        row: dict[str, Any] = {"suite": "memory", "size": size, "n": n, "h": h, "w": w, "threads": session.threads}
        row |= {"isa": session.isa, "variant": variant.name, "precision": variant.precision}
        if why := session.why_not(variant):
            row |= why
        else:
            session.tell(f"{size}: {variant.name}")
            plain = {k: v for k, v in session.environment(variant).items() if k not in peers.KEEP_PAGES}
            with session.start(variant, shape, environment=plain) as process:
                row |= case.gated(process, variant)
                if row["status"] == "ok":
                    row |= process.ask("memory")
        rows.append(row)
        show(row)
    return rows

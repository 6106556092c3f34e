"""Rows of results: every variant of one size, in its own process, in turns with the subject, after it was found to be right."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memnet_fast.bench import pairs, peers, truth
from memnet_fast.bench.clocks import quantiles
from memnet_fast.bench.peers import Variant
from memnet_fast.bench.process import Process, VariantFailed
from memnet_fast.reference import MemNet

_WARM_RUNS = 1  # the gate ran both already


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
    unprepared: dict[str, str] = field(default_factory=dict)

    def why_not(self, variant: Variant) -> dict[str, str] | None:
        """Status and reason of a variant that cannot be tried, with how to install what it needs."""
        if absent := variant.missing():
            return {"status": "missing", "reason": f"{', '.join(absent)} not installed", "install": variant.install}
        for kind in variant.files:
            if kind in self.unprepared:
                return {"status": "failed", "reason": self.unprepared[kind]}
        return None

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
        made.unprepared = peers.prepare(net, made.folder, made.variants, made.cache)
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


def forward(
    session: Session,
    size: str,
    shape: tuple[int, int, int],
    seconds: float,
    show: Callable[[dict[str, Any]], None] = lambda row: None,
    goal: float = pairs.GOAL,
) -> list[dict[str, Any]]:
    """One row for each variant of the session at one size. The first variant is the subject; all are timed in turns with it,
    also a second process of its own, whose ratio should be 1.

    seconds: about how long the timing of all variants may take; starting and checking them is not counted. A row that is not
    "ok" has no times and no ratio; without a right subject no row has.
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
    session.tell(f"{size}: {subject.name}")
    with session.start(subject, shape) as first:
        gate = case.gated(first, subject)
        if gate["status"] != "ok":
            return refuse_all(gate)
        possible = sum(session.why_not(v) is None for v in others) + 1
        for variant in session.variants:
            if why := session.why_not(variant):
                add(variant, why)
                continue
            session.tell(f"{size}: {variant.name}, in turns with {subject.name}")
            with session.start(variant, shape) as second:
                row = case.gated(second, variant)
                if row["status"] == "ok":
                    try:
                        row |= _timed(first, second, seconds / possible, goal)
                        row |= {"subject": subject.name, **second.ask("memory")}
                    except VariantFailed as failure:
                        whose = f"{subject.name}: " if first.ended() else ""
                        row = {"status": "failed", "reason": f"{whose}{failure}"}
            add(variant, row)
    return rows


def _timed(first: Process, second: Process, seconds: float, goal: float) -> dict[str, Any]:
    others: list[float] = []
    seen: dict[str, Any] = {}

    def sample(process: Process) -> float:
        answer = process.time()
        if answer["others"] is not None:
            others.append(answer["others"])
        seen.update(answer)
        return answer["ms"]

    for _ in range(_WARM_RUNS):
        first.time()
        second.time()
    found, enough = pairs.take_turns(lambda: sample(first), lambda: sample(second), seconds, goal)
    low, middle, high = quantiles(found.other)
    row = {"ms": middle, "ms_q20": low, "ms_q80": high, **found.row(), "enough": enough, "in_flight": seen["in_flight"]}
    row["others"] = round(statistics.median(others), 3) if others else None
    return row


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

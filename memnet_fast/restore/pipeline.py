"""Runs a job: decoding, restoring and encoding overlap, one bad file does not stop the others, and files appear whole.

The thread that calls `run_job` only schedules: it hands work to three pools of threads, and everything comes back to it through
one queue. Files enter the network in the order of the job. In memory at a time: decoded images that wait for the network,
`AHEAD_BYTES` together (a larger one is let through alone); one image for each thread that decodes or feeds the network; and two
results for each thread that encodes, because the network pauses while as many wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from memnet_fast import __version__, weights
from memnet_fast.engine import PIXELS_PER_PASS
from memnet_fast.errors import BackendUnavailable, ImageError, InputError, OutputError
from memnet_fast.files import make_folder, sweep, write_whole
from memnet_fast.restore import images
from memnet_fast.restore.isolation import Decoders, Reading
from memnet_fast.restore.job import Job
from memnet_fast.restore.journal import FOLDER as JOURNAL_FOLDER
from memnet_fast.restore.journal import Journal, key_of, open_journal
from memnet_fast.restore.report import STAGES, FileResult, JobReport, Stage, Threads
from memnet_fast.restore.restorer import Restorer
from memnet_fast.restore.strip import comparison_strip
from memnet_fast.restore.tiling import Tiled

AHEAD_BYTES = 256 << 20
AHEAD_IMAGES = 64

# index, windows done and in all of that file, share of the whole job
JobProgress = Callable[[int, int, int, float], None]


def run_job(
    job: Job,
    restorers: Restorer | Sequence[Restorer],
    *,
    encoding: images.Encoding | None = None,
    reading: Reading | None = None,
    stop_on_error: bool = False,
    threads: Threads | None = None,
    isolate: bool = False,
    progress: JobProgress | None = None,
    on_result: Callable[[FileResult], None] | None = None,
    report: JobReport | None = None,
) -> JobReport:
    """Restores the files of a job. One that fails is reported and does not stop the others; with `stop_on_error` those after
    it are not begun.

    restorers: one for each device, otherwise alike. reading: what is accepted. threads: None is `Threads.default()`.
    isolate: decode in child processes, so that a decoder that crashes, or is killed for its memory, takes one file with it and
    not the job.
    progress(index, done, total, fraction): windows of file number `index`, and the share of all files; never falls.
    on_result: told about each file when it is finished. Both are called in this thread.
    report: filled as the job goes on, so that it is there also when an exception ends the job; it is what is returned.
    Raises InputError (an option that fits no image), BackendUnavailable (also when a device stops working on the way) and
    OutputError (no journal can be written), which concern every file.
    """
    several = [restorers] if isinstance(restorers, Restorer) else list(restorers)
    encoding = encoding or images.Encoding()
    reading = replace(reading or Reading(), gray=several[0].color == "gray")
    report = JobReport() if report is None else report
    report.settings = settings_of(several[0], encoding)
    if any(settings_of(other, encoding) != report.settings for other in several[1:]):
        raise InputError("the restorers of one job must have the same weights, options and backend")
    threads = threads or Threads.default()
    threads.of_devices(len(several))  # before anything is touched
    journals = [] if job.folder is None else [job.folder / JOURNAL_FOLDER]
    for folder in dict.fromkeys([*(item.target.parent for item in job.items), *journals]):
        sweep(folder)
    with contextlib.ExitStack() as stack:
        journal = None
        if job.folder is not None:
            journal = stack.enter_context(open_journal(job.folder, key_of(report.settings), alone=job.alone))
            journal.describe_run(report.settings)
            journal.begin()
        decoders = stack.enter_context(Decoders(isolate))
        # Decoders switch warnings off for themselves. That is a switch of the whole process, so with several threads it may be
        # left in any position; this puts it back when they have ended.
        stack.enter_context(warnings.catch_warnings())
        run = _Run(job, several, encoding, reading, threads, decoders, journal, report)
        run.stop_on_error, run.progress, run.on_result = stop_on_error, progress, on_result
        run.run()
        if journal is not None and len(report.results) == len(job.items) and report.count("failed") == 0:
            journal.succeed({status: report.count(status) for status in ("restored", "skipped")})
    return report


def settings_of(restorer: Restorer, encoding: images.Encoding) -> dict[str, Any]:
    """Everything but the input that the bytes of a result depend on, as plain values."""
    return {
        "memnet_fast": __version__,
        "weights": weights.digest(restorer.net.reference.state_dict()),
        "config": restorer.net.config.to_dict(),
        "options": restorer.options,
        "backend": restorer.backend,
        "precision": restorer.precision,
        "algorithm": restorer.algorithm,
        "device": restorer.device.type,
        "encoding": asdict(encoding),
    }


class _Stopped(Exception):
    """Ends the work on images whose results nobody waits for any more."""


@dataclass(frozen=True)
class _Loaded:
    source: images.Source
    digest: str | None

    @property
    def pixels(self) -> int:
        return sum(_pixels(frame) for frame in self.source.frames)

    @property
    def bytes(self) -> int:
        return sum(frame.nbytes for frame in self.source.frames)


@dataclass(frozen=True)
class _Result:
    """frames: [H, W, C] each."""

    frames: list[np.ndarray]
    tiled: Tiled


@dataclass
class _Event:
    """What a thread has done: the name of the work, the files it was about, and its value or error."""

    work: str
    indices: tuple[int, ...]
    value: Any = None
    error: Exception | None = None
    seconds: float = 0.0


class _Run:
    """The scheduler. Its fields belong to the thread of `run`; the methods that the pools run touch none of the mutable ones
    but `_events`, `_free`, `_halt` and, behind `_gate`, `_working`."""

    stop_on_error = False
    progress: JobProgress | None = None
    on_result: Callable[[FileResult], None] | None = None

    def __init__(
        self,
        job: Job,
        restorers: Sequence[Restorer],
        encoding: images.Encoding,
        reading: Reading,
        threads: Threads,
        decoders: Decoders,
        journal: Journal | None,
        report: JobReport,
    ) -> None:
        self._job, self._encoding, self._reading = job, encoding, reading
        self._decoders, self._journal, self._report = decoders, journal, report
        feeding = threads.of_devices(len(restorers))
        counts = (threads.load, sum(feeding), threads.save)
        report.stages = {name: Stage(count) for name, count in zip(STAGES, counts, strict=True)}
        self._pools = {name: ThreadPoolExecutor(count, f"memnet-{name}") for name, count in zip(STAGES, counts, strict=True)}
        self._active = dict.fromkeys(STAGES, 0)
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._free: SimpleQueue[Restorer] = SimpleQueue()
        for restorer, of_it in zip(restorers, feeding, strict=True):
            for _ in range(of_it):
                self._free.put(restorer)
        self._group_pixels = PIXELS_PER_PASS // restorers[0].scale ** 2
        self._halt = threading.Event()
        self._gate = threading.Condition()
        self._working = 0  # calls in the pools; behind the gate
        self._end = len(job.items)  # nothing from here on is begun
        self._next_load = self._next_network = 0
        self._waiting: dict[int, _Loaded] = {}
        self._saving: dict[int, tuple[_Loaded, _Result]] = {}
        self._left: set[int] = set()  # finished before the network: failed to load, or skipped
        self._fractions = 0.0
        self._fraction_of: dict[int, float] = {}
        self._stage_seconds: dict[int, dict[str, float]] = {}

    def run(self) -> None:
        start = time.perf_counter()
        try:
            while self._hand_out():
                self._take(self._events.get())
                self._report.seconds = time.perf_counter() - start
        finally:
            ended = False
            while not ended:  # a second signal must not let the journal be closed below a thread that writes
                with contextlib.suppress(KeyboardInterrupt, SystemExit):
                    self._end_threads()
                    ended = True
            # What was being written when an exception came is there now, and is reported; nothing may stop that.
            self.progress = None
            while not self._events.empty():
                event = self._events.get()
                if event.work == "encode":
                    self._take_written(event)
            self._report.seconds = time.perf_counter() - start

    def _end_threads(self) -> None:
        """Drops what has not begun and waits for the rest; may be called again when an exception of a signal left it."""
        # Not by `shutdown` alone: in Python 3.11 a thread whose `join` was interrupted passes for ended from then on.
        with self._gate:
            self._halt.set()
            while self._working:
                self._gate.wait()
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)

    def _hand_out(self) -> bool:
        """Gives the pools what they can take; whether anything is under way."""
        while self._may_load():
            self._submit("decode", (self._next_load,), self._load, self._next_load)
            self._next_load += 1
        while group := self._next_group():
            loaded = [self._waiting.pop(i) for i in group]
            self._next_network = group[-1] + 1
            self._submit("network", group, self._restore, group, loaded)
        return any(self._active.values())

    def _may_load(self) -> bool:
        stage = self._report.stages["decode"]
        if self._next_load >= self._end or self._active["decode"] == stage.threads:
            return False
        waiting = len(self._waiting) + self._active["decode"]
        return waiting == 0 or (waiting < AHEAD_IMAGES and sum(loaded.bytes for loaded in self._waiting.values()) < AHEAD_BYTES)

    def _next_group(self) -> tuple[int, ...]:
        """The next images for the network, if one of its threads is free: several small ones of one kind share a call."""
        if self._active["network"] == self._report.stages["network"].threads:
            return ()
        if len(self._saving) >= 2 * self._report.stages["encode"].threads:
            return ()
        while self._next_network in self._left:
            self._left.discard(self._next_network)
            self._next_network += 1
        first = self._waiting.get(self._next_network)
        if first is None or self._next_network >= self._end:
            return ()
        group, pixels = [self._next_network], first.pixels
        while (other := self._waiting.get(group[-1] + 1)) is not None:
            pixels += other.pixels
            if group[-1] + 1 >= self._end or pixels > self._group_pixels or _kind(other) != _kind(first):
                break
            group.append(group[-1] + 1)
        return tuple(group)

    def _submit(self, work: str, indices: tuple[int, ...], function: Callable[..., Any], *args: Any) -> None:
        def guarded() -> None:
            start = time.perf_counter()
            event = _Event(work, indices)
            with self._gate:
                if self._halt.is_set():
                    return
                self._working += 1
            try:
                try:
                    event.value = function(*args)
                except Exception as error:  # whatever goes wrong in one file must not take the others with it
                    event.error = error
                event.seconds = time.perf_counter() - start
                self._events.put(event)
            finally:
                with self._gate:
                    self._working -= 1
                    self._gate.notify_all()

        self._active[work] += 1
        self._pools[work].submit(guarded)

    def _take(self, event: _Event) -> None:
        if event.work == "windows":
            done, total = event.value
            for i in event.indices:
                self._tell(i, done, total)
            return
        if event.work == "encode":
            self._take_written(event)
            return
        self._active[event.work] -= 1
        if event.work == "decode":
            self._take_loaded(event)
        else:
            self._take_restored(event)

    def _take_loaded(self, event: _Event) -> None:
        (index,) = event.indices
        self._count("decode", event, event.value.pixels if isinstance(event.value, _Loaded) else 0)
        if isinstance(event.value, _Loaded):
            self._waiting[index] = event.value
            return
        self._left.add(index)
        self._finish(index, "failed" if event.error is not None else "skipped", event.error)

    def _take_restored(self, event: _Event) -> None:
        if event.error is not None:
            raise event.error
        self._count("network", event, sum(loaded.pixels for loaded, _ in event.value))
        for index, (loaded, result) in zip(event.indices, event.value, strict=True):
            if isinstance(result, _Result):
                if self._job.compare is None:  # the pixels of the input are not needed any more, and large
                    loaded = replace(loaded, source=replace(loaded.source, frames=()))
                self._saving[index] = (loaded, result)
                self._submit("encode", (index,), self._save, index, loaded, result)
            elif not isinstance(result, _Stopped):
                self._finish(index, "failed", result)

    def _take_written(self, event: _Event) -> None:
        (index,) = event.indices
        self._active["encode"] -= 1
        loaded, result = self._saving.pop(index)
        self._count("encode", event, sum(_pixels(frame) for frame in result.frames))
        if event.error is not None:
            self._finish(index, "failed", event.error)
            return
        height, width, channels = result.frames[0].shape
        facts = {"size": (width, height), "channels": channels, "dtype": str(result.frames[0].dtype), "tiled": result.tiled}
        facts |= {"frames": len(result.frames), "jpeg_quality": loaded.source.jpeg_quality}
        self._finish(index, "restored", None, **facts)

    def _count(self, name: str, event: _Event, pixels: int) -> None:
        stage = self._report.stages[name]
        stage.seconds += event.seconds
        stage.images += len(event.indices)
        stage.pixels += pixels
        for index in event.indices:
            self._stage_seconds.setdefault(index, {})[name] = event.seconds / len(event.indices)

    def _finish(self, index: int, status: str, error: Exception | None, **facts: Any) -> None:
        if isinstance(error, InputError):
            raise error  # the fault is not the file's
        result = FileResult(index, self._job.items[index], status, self._stage_seconds.pop(index, {}), error, **facts)
        self._report.results.append(result)  # before anybody is told, who may be interrupted: the file is there
        self._tell(index, 1, 1)
        self._fraction_of.pop(index, None)
        self._fractions += 1
        if self.on_result is not None:
            self.on_result(result)
        if error is not None and _concerns_all(error):
            raise _as_fatal(error) from error
        if error is not None and self.stop_on_error:
            self._end = min(self._end, index)

    def _tell(self, index: int, done: int, total: int) -> None:
        """Progress of a file that is not finished yet."""
        share = done / max(total, 1)
        if share < self._fraction_of.get(index, 0.0):
            return
        self._fraction_of[index] = share
        if self.progress is not None:
            everything = (self._fractions + sum(self._fraction_of.values())) / len(self._job.items)
            self.progress(index, done, total, everything)

    # What the pools run.

    def _load(self, index: int) -> _Loaded | None:
        """None: there is nothing to do."""
        item = self._job.items[index]
        with images.open_image(item.source) as file:
            before = _state(os.fstat(file.fileno()))
            digest = None
            if self._journal is not None:
                digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
                if self._job.existing == "skip" and self._journal.may_skip(item.target, digest):
                    return None
            file.seek(0)
            source = self._decoders.decode(item.source, file, self._reading)
            if _state(os.stat(item.source)) != before:
                raise ImageError(f"{item.source} was changed or replaced while it was read")
        return _Loaded(source, digest)

    def _restore(self, group: tuple[int, ...], loaded: list[_Loaded]) -> list[tuple[_Loaded, _Result | Exception]]:
        restorer = self._free.get()
        try:
            return list(zip(loaded, self._restored(restorer, group, loaded), strict=True))
        finally:
            self._free.put(restorer)

    def _restored(self, restorer: Restorer, group: tuple[int, ...], loaded: list[_Loaded]) -> Sequence[_Result | Exception]:
        def told(done: int, total: int) -> None:
            if self._halt.is_set():
                raise _Stopped
            self._events.put(_Event("windows", group, (done, total)))

        try:
            if len(group) > 1:
                results = restorer.restore_many([one.source.frames[0] for one in loaded], told)
                return [_Result([result.image], result.tiled) for result in results]
            return [_restored_frames(restorer, loaded[0].source.frames, told)]
        except Exception as error:
            if len(group) == 1 or isinstance(error, _Stopped) or _concerns_all(error):
                return [error] * len(group)
        # One of them is to blame; the others are restored without it.
        return [self._restored(restorer, (i,), [one])[0] for i, one in zip(group, loaded, strict=True)]

    def _save(self, index: int, loaded: _Loaded, result: _Result) -> None:
        item, source, compare = self._job.items[index], loaded.source, self._job.compare
        data = images.encode(result.frames, item.format or source.format, self._encoding, source.metadata)
        if self._job.existing == "error" and os.path.lexists(item.target):
            raise OutputError(f"{item.target} has appeared since the job began; --existing overwrite replaces it")
        if self._journal is not None and loaded.digest is not None:
            self._journal.announce(item.target, loaded.digest, hashlib.sha256(data).hexdigest())
        make_folder(item.target.parent)
        write_whole(item.target, data)
        if compare is not None:
            strip = comparison_strip([("input", source.frames[0]), ("restored", result.frames[0])])
            images.write_image(compare, strip, images.EXTENSIONS[compare.suffix.lower()], self._encoding)


def _restored_frames(restorer: Restorer, frames: Sequence[np.ndarray], told: Callable[[int, int], None]) -> _Result:
    """The frames or pages of one file; their windows count together, each frame for as many pixels as it has."""
    everything, before, results = sum(map(_pixels, frames)), 0, []
    for frame in frames:

        def partly(done: int, total: int, before: int = before, size: int = _pixels(frame)) -> None:
            told(before + size * done // max(total, 1), everything)

        result = restorer.restore(frame, told if len(frames) == 1 else partly)
        results.append(result)
        before += _pixels(frame)
    return _Result([result.image for result in results], results[0].tiled)


def _pixels(frame: np.ndarray) -> int:
    return frame.shape[0] * frame.shape[1]


def _kind(loaded: _Loaded) -> tuple[Any, ...]:
    """Images of one kind can share a call of the network. Each file of several frames is a kind of its own."""
    first = loaded.source.frames[0]
    return (first.shape, first.dtype) if len(loaded.source.frames) == 1 else (id(loaded),)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _concerns_all(error: Exception) -> bool:
    """Options that fit no image, a backend that is gone, and a device that is not to be trusted any more."""
    return isinstance(error, InputError | BackendUnavailable | torch.AcceleratorError)


def _as_fatal(error: Exception) -> Exception:
    if isinstance(error, torch.AcceleratorError):
        return BackendUnavailable("cuda", f"the device stopped working: {str(error).splitlines()[0]}")
    return error

"""Jobs on a Ray cluster: Ray Data reads and schedules, one actor for each GPU (or share of the CPUs) holds the network.

Paths are local ones that every machine sees, or URIs of object storage (s3, gs, abfs) as PyArrow opens them. An actor gets the
bytes of some files, decodes, restores and encodes them in overlapping threads, and writes the results itself; only what became
of them goes back. When an actor dies, Ray starts it anew and gives it the same files again: the same bytes are written again.

Resuming follows the rules of `journal`. Each actor announces the outputs of a batch in a file of its own in `.memnet`, complete
before the first of them appears. An object appears in its store when it is complete, so no temporary names are needed there; on
file systems files are renamed into place. Local output folders are locked as always; object stores have no locks, so there it
is up to the user that only one job writes to a place.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
import posixpath
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memnet_fast.errors import BackendUnavailable, ImageError, InputError, MemNetError, MissingExtra, OutputError
from memnet_fast.files import sweep
from memnet_fast.restore import images
from memnet_fast.restore.isolation import Reading
from memnet_fast.restore.job import Item, Job
from memnet_fast.restore.journal import FOLDER, key_of, open_journal, parse_lines, unknown_origin
from memnet_fast.restore.pipeline import JobProgress, settings_of
from memnet_fast.restore.report import STAGES, FileResult, JobReport, Stage
from memnet_fast.restore.restorer import Restorer
from memnet_fast.restore.storage import Storage, reaching, storage_of

# What an actor takes at once: enough to hide the first decoding and the last encoding, few enough to be redone.
_BATCH = 8
# Larger files are read by the actor itself, past Ray's object store.
_LARGE = 64 << 20
# An actor that dies again and again over the same files ends the job.
_RETRIES = 3


@dataclass(frozen=True)
class _Orders:
    """What every actor is told."""

    restorer: dict[str, Any]
    encoding: images.Encoding
    reading: Reading
    source: Storage
    target: Storage
    folder: str
    existing: str
    threads: int


def run_on_ray(
    job: Job,
    restorer: dict[str, Any],
    *,
    address: str | None = None,
    workers: int | None = None,
    encoding: images.Encoding | None = None,
    reading: Reading | None = None,
    stop_on_error: bool = False,
    progress: JobProgress | None = None,
    on_result: Callable[[FileResult], None] | None = None,
    report: JobReport | None = None,
) -> JobReport:
    """As `run_job`, on the Ray cluster at `address` (None: the one in RAY_ADDRESS, or a new one on this machine).

    restorer: arguments of Restorer; the weights are read here and sent along. workers: actors; None is one for each GPU of the
    cluster, or one on a cluster without any (and with device "cpu").
    Raises MissingExtra without Ray, InputError, BackendUnavailable, and OutputError as `run_job`.
    """
    if job.folder is None or job.compare is not None:
        raise InputError("Ray restores into a folder, and makes no comparison strip")
    if any(_source(item, job) == _target(item, job) for item in job.items) and job.source_storage == job.target_storage:
        raise InputError("with Ray no output may replace its input: a file that is begun again would be restored twice")
    if restorer["device"] not in ("auto", "cpu", "cuda"):
        raise InputError("Ray chooses the device; the device may be auto, cpu or cuda")
    report = JobReport() if report is None else report
    ray = _ray()
    # Also says here, at once, whether the options fit together.
    local = Restorer(**{**restorer, "backend": "torch", "precision": "fp32", "algorithm": "auto", "device": "cpu"})
    source, target = job.source_storage or storage_of("/"), job.target_storage or storage_of("/")
    folder = str(job.folder) if job.target_storage else os.path.abspath(job.folder)
    with _cluster(ray, address), _journal(job, target, folder) as lines:
        gpus = int(ray.cluster_resources().get("GPU", 0)) if restorer["device"] != "cpu" else 0
        count = workers or max(1, gpus)
        if restorer["device"] == "cuda" and not gpus:
            raise BackendUnavailable("ray", "the cluster has no GPU")
        if gpus and count > gpus:
            raise InputError(f"{count} workers were asked for, but the cluster has {gpus} GPUs")
        resources = _resources(ray, count, gpus)
        orders = _Orders(
            {**restorer, "model": local.net.reference, "device": "cuda" if gpus else "cpu"},
            encoding or images.Encoding(),
            replace(reading or Reading(), gray=local.color == "gray"),
            source,
            target,
            folder,
            job.existing,
            max(2, int(resources["num_cpus"])),
        )
        report.stages = {name: Stage(count * (1 if name == "network" else orders.threads)) for name in STAGES}
        rows = [_row(index, item, job, folder, lines) for index, item in enumerate(job.items)]
        start = time.perf_counter()
        try:
            for settings, result in _results(ray, rows, orders, count, resources):
                report.seconds = time.perf_counter() - start
                if settings and report.settings and settings != report.settings:
                    raise InputError(
                        "the machines of the cluster chose different backends; name one with --backend and --precision"
                    )
                report.settings = settings or report.settings
                _take(result, job, report, progress, on_result, local.scale)
                if stop_on_error and result.error is not None:
                    break
        except ray.exceptions.RayError as error:
            # The rest of the message explains Ray.
            raise BackendUnavailable("ray", f"the job ended early: {str(error).strip().splitlines()[0]}") from error
        finally:
            report.seconds = time.perf_counter() - start
        if len(report.results) == len(job.items) and report.count("failed") == 0:
            counts = {status: report.count(status) for status in ("restored", "skipped")}
            mark = json.dumps({"key": key_of(report.settings), **counts}) + "\n"
            target.write(posixpath.join(folder, FOLDER, "success.json"), mark.encode())
    return report


def _ray() -> Any:
    try:
        import pyarrow  # noqa: F401
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra(f"this needs Ray ({error}); pip install 'memnet-fast[distributed]'") from error
    return ray


@contextlib.contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Connects for the time of a job, unless the program is connected already."""
    if ray.is_initialized():
        yield
        return
    try:
        options = {"include_dashboard": False} if address is None and "RAY_ADDRESS" not in os.environ else {}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BackendUnavailable("ray", f"no cluster at {address}: {str(error).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _journal(job: Job, target: Storage, folder: str) -> Iterator[dict[str, set[tuple[str, str, str]]]]:
    """The lines of earlier runs, with the folder locked where that is possible and the mark of success removed."""
    with contextlib.ExitStack() as stack:
        if target.local:
            stack.enter_context(open_journal(Path(folder), "", alone=True))
            places = [posixpath.join(folder, FOLDER), *(posixpath.dirname(_target(item, job)) for item in job.items)]
            for place in dict.fromkeys(places):
                sweep(Path(place))
        target.delete(posixpath.join(folder, FOLDER, "success.json"))
        lines: dict[str, set[tuple[str, str, str]]] = {}
        if job.existing == "skip":
            with reaching(folder):
                lines = parse_lines(target.read_all(posixpath.join(folder, FOLDER), ".jsonl"))
        yield lines


def _resources(ray: Any, count: int, gpus: int) -> dict[str, Any]:
    """Of one actor. Some CPU stays free for the reading tasks, without which the actors would wait for ever."""
    share = ray.cluster_resources().get("CPU", 1) / count
    # Whole CPUs where there are several: Ray then tells the libraries how many threads to use.
    cpus = float(int(share - 0.25)) if share >= 1.25 else round(0.8 * share, 2)
    return {"num_cpus": min(cpus, 8.0) if gpus else cpus, "num_gpus": 1 if gpus else 0}


def _source(item: Item, job: Job) -> str:
    return str(item.source) if job.source_storage else os.path.abspath(item.source)


def _target(item: Item, job: Job) -> str:
    return str(item.target) if job.target_storage else os.path.abspath(item.target)


def _row(index: int, item: Item, job: Job, folder: str, lines: dict[str, set[tuple[str, str, str]]]) -> dict[str, Any]:
    target = _target(item, job)
    name = posixpath.relpath(target, folder)
    # Names need not be text, but the strings of Arrow must be.
    return {
        "index": index,
        "source": os.fsencode(_source(item, job)),
        "target": os.fsencode(target),
        "name": os.fsencode(name),
        "format": item.format or "",
        "lines": json.dumps(sorted(lines.get(name, ()))),
    }


def _results(
    ray: Any, rows: list[dict[str, Any]], orders: _Orders, count: int, resources: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], FileResult]]:
    # Kept here as long as an actor may begin anew; inside a list, so that it is handed over as a reference.
    given = ray.put(orders)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = min(-(-len(rows) // _BATCH), 10_000)
    data = ray.data.from_items(rows, override_num_blocks=max(blocks, 1))
    data = data.map(_read, fn_kwargs={"storage": orders.source, "max_bytes": _LARGE}, num_cpus=0.1)
    with warnings.catch_warnings():
        # Ray has no other way yet to say how often an actor may begin anew; without it, for ever.
        warnings.simplefilter("ignore", DeprecationWarning)
        data = data.map_batches(
            _Worker,
            fn_constructor_args=([given],),
            batch_size=_BATCH,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=count),
            **resources,
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
        )
    for row in data.iter_rows():
        yield pickle.loads(row["result"])


def _take(
    result: FileResult,
    job: Job,
    report: JobReport,
    progress: JobProgress | None,
    on_result: Callable[[FileResult], None] | None,
    scale: int,
) -> None:
    result = replace(result, item=job.items[result.index])
    if isinstance(result.error, InputError | BackendUnavailable):
        raise result.error  # the fault is not the file's
    report.results.append(result)
    pixels = (result.size[0] * result.size[1] * result.frames) if result.size is not None else 0
    for name, seconds in result.seconds.items():
        stage = report.stages[name]
        stage.seconds += seconds
        stage.images += 1
        stage.pixels += pixels if name == "encode" else pixels // scale**2
    if progress is not None:
        progress(result.index, 1, 1, len(report.results) / len(job.items))
    if on_result is not None:
        on_result(result)


def _read(row: dict[str, Any], storage: Storage, max_bytes: int) -> dict[str, Any]:
    """The bytes of one file beside its row; no bytes for those that are too large to be passed around, or fail."""
    try:
        data = storage.read(os.fsdecode(row["source"]), max_bytes)
    except OSError:
        data = None  # the actor will meet the same error, and report it
    return {**row, "data": data or b""}


class _Worker:
    """An actor: holds the network, takes rows with the bytes of files, returns what became of them."""

    def __init__(self, given: Sequence[Any]) -> None:
        """given: orders, or a reference to them in Ray's object store."""
        orders: _Orders = given[0] if isinstance(given[0], _Orders) else _ray().get(given[0])
        self._orders = orders
        self._restorer: Restorer | None = None
        self._broken: MemNetError | None = None
        self._settings: dict[str, Any] = {}
        try:
            self._restorer = Restorer(**orders.restorer)
            self._settings = settings_of(self._restorer, orders.encoding)
        except MemNetError as error:
            self._broken = error  # told with the first files: what an actor raises, Ray tries again
        self._key = key_of(self._settings)
        self._pool = ThreadPoolExecutor(orders.threads, "memnet-codec")

    def __call__(self, table: Any) -> dict[str, list[bytes]]:
        files = [_File(row) for row in table.to_pylist()]
        if self._broken is not None:
            for file in files:
                file.error = self._broken
            return {"result": [pickle.dumps((self._settings, file.result())) for file in files]}
        loading = [self._pool.submit(self._guarded, self._load, file) for file in files]
        saving = [self._pool.submit(self._guarded, self._encode, file) for file in self._restored(files, loading)]
        _wait(saving)
        self._announce([file for file in files if file.data is not None])
        _wait([self._pool.submit(self._guarded, self._write, file) for file in files if file.data is not None])
        return {"result": [pickle.dumps((self._settings, file.result())) for file in files]}

    def _restored(self, files: Sequence[_File], loading: Sequence[Future[None]]) -> Iterator[_File]:
        for file, future in zip(files, loading, strict=True):
            future.result()
            if file.source is not None:
                self._guarded(self._restore, file)
            if file.frames is not None:
                yield file

    def _guarded(self, work: Callable[[_File], None], file: _File) -> None:
        """One bad file must not take the others with it."""
        start = time.perf_counter()
        try:
            work(file)
        except torch.AcceleratorError:
            # The device is not to be trusted any more: this process ends, and another one gets these files.
            os._exit(1)
        except Exception as error:
            file.error = _portable(error)
            file.data = None
        finally:
            stage = {"_load": "decode", "_restore": "network", "_encode": "encode"}.get(work.__name__)
            if stage is not None:
                file.seconds[stage] = time.perf_counter() - start

    def _load(self, file: _File) -> None:
        orders = self._orders
        try:
            data = file.given or orders.source.read(file.path) or b""
        except OSError as error:
            raise ImageError(f"cannot read {file.path}: {error.strerror or error}") from error
        file.digest = hashlib.sha256(data).hexdigest()
        if orders.existing == "skip":
            present = orders.target.digest(file.target)
            if (self._key, file.digest, present) in file.lines:
                file.status = "skipped"
                return
        file.source = images.decode_image(file.path, io.BytesIO(data), **asdict(orders.reading))

    def _restore(self, file: _File) -> None:
        assert file.source is not None and self._restorer is not None
        results = [self._restorer.restore(frame) for frame in file.source.frames]
        file.frames = [result.image for result in results]
        file.tiled = results[0].tiled

    def _encode(self, file: _File) -> None:
        assert file.source is not None and file.frames is not None
        file.data = bytes(
            images.encode(file.frames, file.format or file.source.format, self._orders.encoding, file.source.metadata)
        )
        present = None if self._orders.existing == "overwrite" else self._orders.target.digest(file.target)
        # A batch that is given to a second actor finds what the first one wrote: the same bytes.
        known = {hashlib.sha256(file.data).hexdigest(), *(line[2] for line in file.lines)}
        if present is not None and present not in known:
            raise OutputError(unknown_origin(file.target))

    def _announce(self, files: Sequence[_File]) -> None:
        if not files:
            return
        lines = [{"run": self._key, "settings": self._settings}] + [
            {
                "output": os.fsdecode(file.name),
                "input_sha256": file.digest,
                "output_sha256": hashlib.sha256(file.data or b"").hexdigest(),
                "key": self._key,
            }
            for file in files
        ]
        path = posixpath.join(self._orders.folder, FOLDER, f"ray-{uuid.uuid4().hex}.jsonl")
        self._orders.target.write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _write(self, file: _File) -> None:
        assert file.data is not None
        self._orders.target.write(file.target, file.data)
        file.status = "restored"


def _portable(error: Exception) -> Exception:
    """As it is, if it can be sent to another process and be read there; otherwise its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _wait(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.result()


class _File:
    """One file on its way through an actor."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.index: int = row["index"]
        self.path, self.target = os.fsdecode(row["source"]), os.fsdecode(row["target"])
        self.name: bytes = row["name"]
        self.format: str = row["format"]
        self.lines = {(key, source, target) for key, source, target in json.loads(row["lines"])}
        self.given: bytes = row["data"]
        self.digest: str | None = None
        self.source: images.Source | None = None
        self.frames: list[Any] | None = None
        self.tiled: Any = None
        self.data: bytes | None = None
        self.status = "failed"
        self.error: Exception | None = None
        self.seconds: dict[str, float] = {}

    def result(self) -> FileResult:
        item = Item(Path(self.path), Path(self.target), None)
        if self.status != "restored" or self.frames is None or self.source is None:
            return FileResult(self.index, item, self.status, self.seconds, self.error)
        height, width, channels = self.frames[0].shape
        facts = {"size": (width, height), "channels": channels, "dtype": str(self.frames[0].dtype), "tiled": self.tiled}
        facts |= {"frames": len(self.frames), "jpeg_quality": self.source.jpeg_quality}
        return FileResult(self.index, item, self.status, self.seconds, None, **facts)

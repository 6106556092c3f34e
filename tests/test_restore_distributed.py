"""Jobs on Ray: what an actor does with its files, storage by URI, and a cluster whose workers are killed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.restoring import picture, small_net

from memnet_fast.errors import BackendUnavailable, InputError, NumericError, OutputError
from memnet_fast.restore import Restorer, images
from memnet_fast.restore.isolation import Reading
from memnet_fast.restore.job import plan_job
from memnet_fast.restore.journal import key_of, open_journal, read_lines
from memnet_fast.restore.pipeline import run_job
from memnet_fast.restore.report import FileResult, JobReport

pa = pytest.importorskip("pyarrow")
distributed = pytest.importorskip("memnet_fast.restore.distributed")
storage = pytest.importorskip("memnet_fast.restore.storage")

OPTIONS = {"task": "denoise", "device": "cpu", "model": small_net()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("in/a.png", "in/b.png", "in/sub/c.jpg")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture((12, 13, 3), seed=i)).save(name)
    return tmp_path


def pixels(name: str | Path) -> np.ndarray:
    return images.read_image(name).pixels


def orders(here: Path, existing: str = "error") -> distributed._Orders:
    local = storage.storage_of("/")
    return distributed._Orders(OPTIONS, images.Encoding(), Reading(), local, local, str(here / "out"), existing, threads=2)


def work(told, lines=None, given: bool = True, worker=None):
    """An actor's answer for the folder `in`: name of the input -> result."""
    job = plan_job(["in"], "out", recursive=True, existing="overwrite" if told.existing == "overwrite" else "skip")
    rows = [distributed._row(i, item, job, told.folder, lines or {}) for i, item in enumerate(job.items)]
    rows = [distributed._read(row, told.source, 1 << 20 if given else 0) for row in rows]
    worker = worker or distributed._Worker([told])
    answers = [pickle.loads(data) for data in worker(pa.Table.from_pylist(rows))["result"]]
    assert all(settings == worker._settings for settings, _ in answers)
    return {result.item.source.name: result for _, result in answers}


@pytest.mark.parametrize("given", [True, False], ids=["bytes are given", "large files are read there"])
def test_an_actor_writes_what_a_local_job_writes(here, given):
    results = work(orders(here), given=given)
    assert {name: r.status for name, r in results.items()} == dict.fromkeys(("a.png", "b.png", "c.jpg"), "restored")
    run_job(plan_job(["in"], "local", recursive=True), Restorer(**OPTIONS))
    for path in ("a.png", "b.png", "sub/c.jpg"):
        assert Path("out", path).read_bytes() == Path("local", path).read_bytes()
    result = results["a.png"]
    assert result.size == (13, 12) and result.channels == 3 and result.seconds.keys() == {"decode", "network", "encode"}
    assert read_lines(Path("out")) == read_lines(Path("local")), "a local run can go on where a cluster stopped"


def test_one_bad_file_of_a_batch(here):
    Path("in/b.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    results = work(orders(here))
    assert results["b.png"].status == "failed" and "b.png" in str(results["b.png"].error)
    assert results["a.png"].status == results["c.jpg"].status == "restored"
    assert set(read_lines(Path("out"))) == {"a.png", "sub/c.jpg"}


def test_a_file_that_vanished(here):
    job = plan_job(["in"], "out", recursive=True)
    os.unlink("in/a.png")
    told = orders(here)
    rows = [distributed._row(i, item, job, told.folder, {}) for i, item in enumerate(job.items)]
    rows = [distributed._read(row, told.source, 1 << 20) for row in rows]
    answers = distributed._Worker([told])(pa.Table.from_pylist(rows))["result"]
    result = pickle.loads(answers[0])[1]
    assert result.status == "failed" and "cannot read" in str(result.error)


def test_a_batch_that_is_given_out_again_ends_the_same(here):
    """The first actor died before it could answer: nothing is refused, nothing differs."""
    for existing in ("error", "skip", "overwrite"):
        first = work(orders(here, existing))
        before = {path: path.read_bytes() for path in Path("out").rglob("*.*g")}
        again = work(orders(here, existing))
        assert {r.status for r in (*first.values(), *again.values())} == {"restored"}
        assert {path: path.read_bytes() for path in Path("out").rglob("*.*g")} == before


def test_an_actor_skips_by_digest_and_leaves_foreign_files_alone(here):
    work(orders(here))
    lines = read_lines(Path("out"))
    Image.fromarray(picture((12, 13, 3), seed=50)).save("in/b.png")
    Path("out/sub/c.jpg").write_bytes(b"mine")
    results = work(orders(here, "skip"), lines)
    assert {name: r.status for name, r in results.items()} == {"a.png": "skipped", "b.png": "restored", "c.jpg": "failed"}
    assert "no run recorded" in str(results["c.jpg"].error) and Path("out/sub/c.jpg").read_bytes() == b"mine"
    assert np.array_equal(pixels("out/b.png"), Restorer(**OPTIONS)(pixels("in/b.png")))


def test_outputs_are_announced_before_they_appear(here, monkeypatch):
    seen = []
    original = storage.Storage.write

    def watching(self, path, data):
        seen.append((path, len(list(Path("out").rglob("*.*g")))))
        original(self, path, data)

    monkeypatch.setattr(storage.Storage, "write", watching)
    work(orders(here))
    path, there = seen[0]
    assert path.endswith(".jsonl") and there == 0 and len(read_lines(Path("out"))) == 3


def test_a_result_that_is_not_finite_fails_alone_and_an_option_that_fits_nothing_ends_the_job(here, monkeypatch):
    worker = distributed._Worker([orders(here)])
    original, bad = worker._restorer.restore, pixels("in/b.png")

    def failing(frame):
        if np.array_equal(frame, bad):
            raise NumericError("not finite")
        return original(frame)

    monkeypatch.setattr(worker._restorer, "restore", failing)
    results = work(orders(here), worker=worker)
    assert {name: r.status for name, r in results.items()} == {"a.png": "restored", "b.png": "failed", "c.jpg": "restored"}
    for options, error in (({"tile": 8}, InputError), ({"backend": "cpu", "precision": "fp16"}, BackendUnavailable)):
        results = work(replace(orders(here, "overwrite"), restorer={**OPTIONS, **options}))
        job = plan_job(["in"], "out", recursive=True, existing="overwrite")
        with pytest.raises(error):
            distributed._take(results["a.png"], job, JobReport(), None, None, 1)


def test_errors_that_cannot_be_sent_are_sent_as_text(here, monkeypatch):
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    def odd(*args, **options):
        raise Odd("why", 2)

    monkeypatch.setattr(images, "decode_image", odd)
    results = work(orders(here))
    assert all(str(r.error) == "Odd: why" for r in results.values())


def test_an_actor_ends_when_its_device_stops_working(here, monkeypatch):
    worker = distributed._Worker([orders(here)])

    def dead(frame):
        raise torch.AcceleratorError("CUDA error")

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(worker._restorer, "restore", dead)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        work(orders(here), worker=worker)
    assert not list(Path().glob("out/*.png"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:1"}, InputError, "Ray chooses the device"),
        ({"tile": -1}, InputError, "tile must be"),
        ({"task": "sr"}, InputError, "needs a scale"),
    ],
)
def test_bad_options_are_said_before_a_cluster_is_asked_for(here, monkeypatch, options, error, message):
    monkeypatch.setattr(distributed, "_cluster", None)
    with pytest.raises(error, match=message):
        distributed.run_on_ray(plan_job(["in"], "out", recursive=True), {**OPTIONS, **options})
    with pytest.raises(InputError, match="no output may replace its input"):
        distributed.run_on_ray(plan_job(["in"], "in", recursive=True, existing="overwrite"), OPTIONS)
    with pytest.raises(InputError, match="into a folder"):
        distributed.run_on_ray(plan_job(["in/a.png"], "b.png"), OPTIONS)


def answered(monkeypatch, answers, **options) -> JobReport:
    """A job on a cluster that gives these answers."""
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 2}, exceptions=SimpleNamespace(RayError=ConnectionError))
    monkeypatch.setattr(distributed, "_ray", lambda: ray)
    monkeypatch.setattr(distributed, "_cluster", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(distributed, "_results", lambda *args: iter(answers))
    return distributed.run_on_ray(plan_job(["in"], "out", recursive=True, existing="skip"), {**OPTIONS, **options})


def results_of(count: int) -> list[FileResult]:
    return [FileResult(i, None, "restored", dict.fromkeys(distributed.STAGES, 1.0), size=(30, 20)) for i in range(count)]


def test_stages_count_the_pixels_that_went_in_and_the_mark_has_its_key(here, monkeypatch):
    settings = {"backend": "torch"}
    report = answered(monkeypatch, [(settings, result) for result in results_of(3)], task="sr", scale=2)
    assert {name: stage.pixels for name, stage in report.stages.items()} == {"decode": 450, "network": 450, "encode": 1800}
    mark = json.loads(Path("out/.memnet/success.json").read_text())
    assert mark == {"key": key_of(settings), "restored": 3, "skipped": 0}


def test_machines_that_chose_different_backends_are_refused(here, monkeypatch):
    answers = zip([{"backend": "cpu"}, {"backend": "cpu"}, {"backend": "torch"}], results_of(3), strict=True)
    with pytest.raises(InputError, match="chose different backends; name one with --backend"):
        answered(monkeypatch, answers)
    assert not Path("out/.memnet/success.json").exists()


def test_an_output_that_cannot_be_read_is_not_replaced(here, monkeypatch):
    local = storage.storage_of("/")
    assert local.digest(str(here / "none")) is None and local.digest(str(here / "in")) == "unreadable"
    monkeypatch.setattr(storage.Storage, "digest", lambda self, path: "unreadable" if path.endswith("a.png") else None)
    results = work(orders(here, "skip"))
    assert {name: r.status for name, r in results.items()} == {"a.png": "failed", "b.png": "restored", "c.jpg": "restored"}
    assert "no run recorded" in str(results["a.png"].error)


def test_plans_by_uri(here):
    root = here.as_uri()
    Path("in/.hidden").mkdir()
    for name in ("in/notes.txt", "in/.x.png", "in/.hidden/d.png"):
        Path(name).touch()
    job = storage.plan_uris([f"{root}/in"], f"{root}/out", recursive=True, format="png")
    assert [(str(i.source.relative_to(here)), str(i.target.relative_to(here))) for i in job.items] == [
        ("in/a.png", "out/a.png"),
        ("in/b.png", "out/b.png"),
        ("in/sub/c.jpg", "out/sub/c.png"),
    ]
    assert sorted(path.name for path, _ in job.ignored) == [".x.png", "d.png", "notes.txt"]
    assert len(storage.plan_uris([f"{root}/in"], f"{root}/out").items) == 2
    assert len(storage.plan_uris([f"{root}/in/a.png"], f"{root}/out").items) == 1
    with open_journal(Path("in/sub"), "key") as journal:
        journal.announce(Path("in/sub/c.jpg"), "one", "two")
    planned = storage.plan_uris([f"{root}/in"], f"{root}/out", recursive=True)
    assert [i.source.name for i in planned.items] == ["a.png", "b.png"]
    assert (here / "in/sub/c.jpg", "an output of an earlier run") in planned.ignored
    assert len(storage.plan_uris([f"{root}/in/sub"], f"{root}/out").items) == 1, "who names the folder wants what is in it"
    shutil.rmtree("in/sub/.memnet")
    Path("in/out").mkdir()
    Path("in/out/a.png").touch()
    planned = storage.plan_uris([f"{root}/in"], f"{root}/in/out", recursive=True, existing="skip")
    assert len(planned.items) == 3, "outputs of an earlier run are never inputs"
    planned = storage.plan_uris([f"{root}/in/sub"], f"{root}/in")
    assert [str(i.target.relative_to(here)) for i in planned.items] == ["in/c.jpg"], "an input may stand below the output"
    assert len(storage.plan_uris([f"{root}/in/a.png"], f"{root}/in", existing="overwrite").items) == 1
    Path("out/sub").mkdir(parents=True)
    Path("out/sub/c.jpg").touch()
    with pytest.raises(InputError, match="in/sub/c.jpg would replace another input, .*/out/sub/c.jpg"):
        storage.plan_uris([f"{root}/in", f"{root}/out/sub/c.jpg"], f"{root}/out", recursive=True, existing="overwrite")


@pytest.mark.parametrize(
    ("inputs", "output", "existing", "message"),
    [
        (["{}/in", "in"], "{}/out", "error", "either all paths or all URIs"),
        (["{}/none"], "{}/out", "error", "there is no file or folder"),
        (["{}/in/a.png", "{}/in/x/a.png"], "{}/out", "error", "would both be written"),
        (["{}/in"], "{}/in", "skip", "is an input"),
        (["{}/in/a.png"], "{}/in", "error", "is an input"),
        (["{}/full/a.png", "{}/in/b.png"], "{}/in", "error", "in/b.png is an input"),
        (["{}/in"], "{}/full", "error", "full/a.png exists already"),
        (["bogus://x/in"], "{}/out", "error", "cannot open bogus"),
        (["hdfs://localhost:1/in"], "{}/out", "error", "cannot open hdfs|would not appear whole"),
    ],
)
def test_bad_plans_by_uri(here, inputs, output, existing, message):
    for name in ("in/x/a.png", "full/a.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    root = here.as_uri()
    with pytest.raises(InputError, match=message):
        storage.plan_uris([text.format(root) for text in inputs], output.format(root), existing=existing)


def test_other_storage_writes_objects_and_reports_what_it_cannot_write(here):
    class Remote:
        """An object store of a few lines: an object appears when its stream is closed."""

        def __init__(self):
            self.objects = {}

        def open_output_stream(self, path):
            if path.startswith("forbidden"):
                raise PermissionError("AccessDenied")
            store, parts = self.objects, []

            class Stream:
                write = staticmethod(parts.append)

                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    store[path] = b"".join(parts)

            return Stream()

    remote = Remote()
    place = storage.Storage(remote, False)
    place.write("bucket/a.png", b"data")
    assert remote.objects == {"bucket/a.png": b"data"}
    with pytest.raises(OutputError, match="cannot write forbidden/a.png: AccessDenied"):
        place.write("forbidden/a.png", b"data")


def _descendants(pid: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, last = [], [pid]
    while last:
        last = [child for child, parent in parents.items() if parent in last]
        found += last
    return found


def _actors() -> list[int]:
    """Processes of this test's own cluster that hold a network."""
    found = []
    for pid in _descendants(os.getpid()):
        try:
            if b"MapWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def test_a_cluster_whose_worker_is_killed(here):
    """Two actors, one killed in the middle: every output is there once and right, and nothing of it is made again."""
    ray = pytest.importorskip("ray")
    for i in range(40):
        Image.fromarray(picture((64, 65, 3), seed=i)).save(f"in/{i:02}.png")
    Path("in/bad.png").write_bytes(b"")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False, logging_level="error")
    try:
        killed, told = [], []

        def kill_one(result):
            if not killed:
                killed.extend(_actors()[:1])
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

        root = here.as_uri()
        job = storage.plan_uris([f"{root}/in"], f"{root}/out", recursive=True)
        report = distributed.run_on_ray(
            job, OPTIONS, workers=2, on_result=kill_one, progress=lambda i, done, total, share: told.append(share)
        )
        assert killed, "no actor was found"
        assert sorted(r.index for r in report.results) == list(range(44)), "every file once"
        assert report.count("restored") == 43 and [r.item.source.name for r in report.results if r.error] == ["bad.png"]
        assert told == sorted(told) and told[-1] == 1
        assert report.settings["backend"] == Restorer(**OPTIONS).backend and report.stages["network"].threads == 2
        with pytest.raises(BackendUnavailable, match="no GPU"):
            distributed.run_on_ray(plan_job(["in/sub"], "out3"), {**OPTIONS, "device": "cuda"})
    finally:
        ray.shutdown()
    restorer = Restorer(**OPTIONS)
    for item in job.items:
        if item.source.name != "bad.png":
            expected = images.encode([restorer(pixels(item.source))], item.format, images.Encoding())
            assert item.target.read_bytes() == bytes(expected)
    assert not list(Path("out").rglob("*.part")) and not Path("out/.memnet/success.json").exists()
    os.unlink("in/bad.png")
    os.unlink("out/07.png")
    report = run_job(plan_job(["in"], "out", recursive=True, existing="skip"), restorer)
    assert (report.count("skipped"), report.count("restored")) == (42, 1), "a local run goes on where the cluster stopped"

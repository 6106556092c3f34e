"""Running a job: what is written, what is reported, and what happens when something fails."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.restoring import picture, small_net

from memnet_fast.errors import BackendUnavailable, ImageCorrupt, ImageError, InputError, NumericError, OutputError
from memnet_fast.restore import Restorer, images, pipeline
from memnet_fast.restore.job import plan_job
from memnet_fast.restore.report import JobReport, Stage, Threads, describe


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def restorer():
    return Restorer(model=small_net(), algorithm="direct")


def draw(*names: str, shape: tuple[int, ...] = (12, 13)) -> None:
    for i, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(shape, seed=i)).save(name)


def pixels(name: str | Path) -> np.ndarray:
    return images.read_image(name).pixels


def run(restorer, *args, **options) -> JobReport:
    names = ("recursive", "existing", "compare", "format")
    planned = plan_job(*args, **{name: options.pop(name) for name in names if name in options})
    return pipeline.run_job(planned, restorer, **options)


def images_in(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def test_overwriting_the_input_is_possible_on_request(here, restorer):
    draw("a.png")
    before = pixels("a.png")
    assert run(restorer, ["a.png"], "a.png", existing="overwrite").count("restored") == 1
    assert np.array_equal(pixels("a.png"), restorer(before))


def test_a_job_restores_every_file_and_tells_about_it(here, restorer):
    draw("in/a.png", "in/b.png", "in/sub/c.png", "in/sub/d.png", "in/e.png")
    draw("in/f.png", shape=(30, 50, 3))
    told, finished = [], []
    report = run(restorer, ["in"], "out", recursive=True, progress=lambda *v: told.append(v), on_result=finished.append)
    assert report.results == finished and report.count("restored") == 6
    assert sorted(r.index for r in report.results) == list(range(6))
    for result in report.results:
        expected = restorer(pixels(result.item.source))
        assert np.array_equal(pixels(result.item.target), expected)
        assert (*result.size[::-1], result.channels) == expected.shape and result.dtype == "uint8" and result.tiled.windows >= 1
        assert result.seconds.keys() == {"decode", "network", "encode"} and all(v > 0 for v in result.seconds.values())
    fractions = [v[3] for v in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1 and {v[0] for v in told} == set(range(6))


def test_stages_are_measured(here, restorer):
    draw("in/a.png", "in/b.png", shape=(40, 50))
    report = run(restorer, ["in"], "out", threads=Threads(1, 1, 1))
    for name, stage in report.stages.items():
        assert (stage.images, stage.pixels, stage.threads) == (2, 4000, 1) and 0 < stage.seconds <= report.seconds, name
    assert report.limit() == max(report.stages, key=lambda name: report.stages[name].seconds)


def test_the_limit_is_the_busiest_stage():
    report = JobReport(seconds=10.0, stages={"decode": Stage(4, 20.0), "network": Stage(1, 6.0), "encode": Stage(2, 1.0)})
    assert report.limit() == "network" and report.stages["decode"].busy(10.0) == 0.5
    assert Stage(2, 4.0, 1, 8_000_000).rate() == 4.0 and Stage(2).rate() is None and JobReport().limit() is None


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_no_bit_depends_on_batch_threads_or_neighbours(here, algorithm):
    """Equal images share calls of the network, in groups that depend on timing."""
    draw(*(f"in/{i}.png" for i in range(9)), shape=(24, 37, 3))
    for number, (batch, threads) in enumerate([("auto", "2:1:2"), (1, "1:1:1"), (3, "3:2:1"), (16, "2:3:2")]):
        net = Restorer(model=small_net(), algorithm=algorithm, batch=batch)
        report = run(net, ["in"], f"out{number}", threads=Threads.parse(threads))
        assert report.count("restored") == 9
        for name in images_in("in"):
            assert Path(f"out{number}", name).read_bytes() == Path("out0", name).read_bytes()
    assert np.array_equal(pixels("out0/4.png"), Restorer(model=small_net(), algorithm=algorithm)(pixels("in/4.png")))


def test_equal_images_share_a_call(here, restorer, monkeypatch):
    draw(*(f"in/{i}.png" for i in range(8)))
    draw("in/9.png", shape=(12, 14))
    original, groups = restorer.restore_many, []

    def slow(arrays, progress):
        groups.append(len(arrays))
        return original(arrays, progress)

    gate = threading.Event()

    def first(image, progress):
        gate.wait(5)  # until the others are decoded
        return type(restorer).restore(restorer, image, progress)

    monkeypatch.setattr(restorer, "restore_many", slow)
    monkeypatch.setattr(restorer, "restore", first)
    threading.Timer(0.7, gate.set).start()
    assert run(restorer, ["in"], "out", threads=Threads(1, 1, 1)).count("restored") == 9
    assert sum(groups) >= 6 and max(groups) >= 6


def test_a_bad_image_of_a_group_fails_alone(here, restorer, monkeypatch):
    draw(*(f"in/{i}.png" for i in range(6)))
    bad = pixels("in/3.png")

    def failing(arrays, progress):
        raise NumericError("one of them")

    def one(image, progress):
        if np.array_equal(image, bad):
            raise NumericError("this one")
        return type(restorer).restore(restorer, image, progress)

    monkeypatch.setattr(restorer, "restore_many", failing)
    monkeypatch.setattr(restorer, "restore", one)
    report = run(restorer, ["in"], "out")
    assert [r.item.source.name for r in report.results if r.status == "failed"] == ["3.png"]
    assert images_in("out") == ["0.png", "1.png", "2.png", "4.png", "5.png"]


def test_several_restorers_share_a_job(here):
    draw(*(f"in/{i}.png" for i in range(8)), shape=(30, 31))
    several = [Restorer(model=small_net(), batch=1) for _ in range(2)]
    assert run(several, ["in"], "out").count("restored") == 8
    for name in images_in("in"):
        assert np.array_equal(pixels(f"out/{name}"), several[0](pixels(f"in/{name}")))
    report = run(several, ["in"], "out3", threads=Threads(1, (2, 1), 1))
    assert report.count("restored") == 8 and report.stages["network"].threads == 3
    with pytest.raises(InputError, match="for 3 devices, but the job has 2"):
        run(several, ["in"], "out4", threads=Threads(1, (1, 1, 1), 1))
    assert not Path("out4").exists()
    with pytest.raises(InputError, match="must have the same weights"):
        run([Restorer(model=small_net()), Restorer(model=small_net(1))], ["in"], "out2")


def test_work_overlaps(here, restorer, monkeypatch):
    """Ten images, 0.1 s in each stage: one after the other they would take 3 s."""
    draw(*(f"in/{i}.png" for i in range(10)))
    for module, name in ((images, "decode_image"), (images, "encode")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, original=original, **k: (time.sleep(0.1), original(*a, **k))[1])

    def slow(arrays, progress):
        time.sleep(0.1 * len(arrays))
        return type(restorer).restore_many(restorer, arrays, progress)

    def one(image, progress):
        time.sleep(0.1)
        return type(restorer).restore(restorer, image, progress)

    monkeypatch.setattr(restorer, "restore_many", slow)
    monkeypatch.setattr(restorer, "restore", one)
    report = run(restorer, ["in"], "out")
    work = sum(s.seconds for s in report.stages.values())
    assert report.count("restored") == 10 and work > 3.0 and report.seconds < 0.8 * work


def test_memory_is_bounded(here, restorer, monkeypatch):
    """A slow network stops the decoding, and slow encoding the network."""
    draw(*(f"in/{i:02}.png" for i in range(30)), shape=(40, 40))
    monkeypatch.setattr(pipeline, "AHEAD_BYTES", 5 * 1600)
    decoded, restored, written = [], [], []
    gaps = []
    decode, save = images.decode_image, images.encode

    def decoding(*args, **options):
        gaps.append(len(decoded) - len(restored))
        decoded.append(1)
        return decode(*args, **options)

    def restoring(image, progress):
        time.sleep(0.005)
        result = type(restorer).restore(restorer, image, progress)
        restored.append(1)
        return result

    waiting = []

    def encoding(*args, **options):
        waiting.append(len(restored) - len(written))
        time.sleep(0.02)
        written.append(1)
        return save(*args, **options)

    monkeypatch.setattr(images, "decode_image", decoding)
    monkeypatch.setattr(images, "encode", encoding)
    monkeypatch.setattr(restorer, "restore", restoring)
    monkeypatch.setattr(restorer, "restore_many", lambda arrays, told: [restoring(a, told) for a in arrays])
    monkeypatch.setattr(pipeline, "PIXELS_PER_PASS", 1)
    assert run(restorer, ["in"], "out", threads=Threads(2, 1, 1)).count("restored") == 30
    assert max(gaps) <= 5 + 2 + 1 and max(waiting) <= 2 + 1


def test_one_bad_file_does_not_stop_the_others(here, restorer):
    draw("in/a.png", "in/b.png", "in/c.png")
    Path("in/b.png").write_bytes(Path("in/b.png").read_bytes()[:60])
    report = run(restorer, ["in"], "out")
    assert {r.item.source.name: type(r.error) for r in report.results} == {
        "a.png": type(None),
        "b.png": ImageCorrupt,
        "c.png": type(None),
    }
    assert images_in("out") == ["a.png", "c.png"] and not Path("out/.memnet/success.json").exists()


@pytest.mark.parametrize("threads", ["1:1:1", "3:2:2"])
def test_stopping_at_the_first_bad_file(here, restorer, threads):
    draw("in/a.png", "in/b.png", "in/c.png", "in/d.png")
    Path("in/b.png").write_bytes(b"")
    report = run(restorer, ["in"], "out", stop_on_error=True, threads=Threads.parse(threads))
    assert {r.item.source.name for r in report.results if r.status == "failed"} == {"b.png"}
    assert images_in("out") == ["a.png"] and len(report.results) == 2


def test_a_file_that_vanishes_after_planning_fails_alone(here, restorer):
    draw("in/a.png", "in/b.png")
    planned = plan_job(["in"], "out")
    os.unlink("in/a.png")
    by_name = {r.item.source.name: r for r in pipeline.run_job(planned, restorer).results}
    assert "cannot read in/a.png" in str(by_name["a.png"].error) and by_name["b.png"].error is None


@pytest.mark.parametrize("how", ["appended", "replaced"])
def test_a_file_that_changes_while_it_is_read_fails(here, restorer, monkeypatch, how):
    draw("a.png", "other.png")
    original = images.decode_image

    def changing(path, file, *args, **options):
        source = original(path, file, *args, **options)
        if how == "replaced":
            os.replace("other.png", "a.png")
        else:
            with open("a.png", "ab") as more:
                more.write(b"more")
        return source

    monkeypatch.setattr(images, "decode_image", changing)
    (result,) = run(restorer, ["a.png"], "b.png").results
    assert isinstance(result.error, ImageError) and "changed or replaced" in str(result.error)


def test_an_unforeseen_error_in_one_file_is_reported_as_such(here, restorer, monkeypatch):
    draw("in/a.png", "in/b.png")
    original = images.decode_image

    def broken(path, *args, **options):
        if path.name == "a.png":
            raise RuntimeError("a\nbug")
        return original(path, *args, **options)

    monkeypatch.setattr(images, "decode_image", broken)
    by_name = {r.item.source.name: r for r in run(restorer, ["in"], "out").results}
    assert describe(by_name["a.png"].error) == "unexpected RuntimeError: a bug" and by_name["b.png"].error is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InputError("no core"), InputError),
        (BackendUnavailable("cpu", "gone"), BackendUnavailable),
        (torch.AcceleratorError("CUDA error: an illegal memory access\nmore"), BackendUnavailable),
    ],
)
def test_errors_that_concern_every_file_end_the_job(here, restorer, monkeypatch, error, expected):
    """Also an error after which the device computes nothing right any more: no file is touched with it again."""
    calls = []

    def failing(image, progress):
        calls.append(1)
        raise error

    draw("in/a.png", "in/b.png", "in/c.png")
    monkeypatch.setattr(restorer, "restore", failing)
    monkeypatch.setattr(restorer, "restore_many", failing)
    report = JobReport()
    with pytest.raises(expected):
        run(restorer, ["in"], "out", report=report)
    assert len(calls) == 1 and images_in("out") == []
    failed = [r.status for r in report.results]
    assert failed == ([] if expected is InputError else ["failed"]), "the file that a device died with is named"


def test_a_second_signal_waits_for_the_threads_that_write(here, restorer, monkeypatch):
    """Nothing may be closed below them: what is being written is recorded, and whole."""
    draw("in/a.png")
    original = images.encode

    def slow(*args):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return original(*args)

    monkeypatch.setattr(images, "encode", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(restorer, ["in"], "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert images_in("out") == ["a.png"]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run(restorer, ["in"], "out", existing="skip").count("skipped") == 1


@pytest.mark.parametrize("compare", [None, "strip.png"])
def test_pixels_of_an_input_are_kept_only_for_a_strip(here, restorer, monkeypatch, compare):
    draw("a.png")
    original, kept = pipeline._Run._save, []

    def watching(self, index, loaded, result):
        kept.append(len(loaded.source.frames))
        original(self, index, loaded, result)

    monkeypatch.setattr(pipeline._Run, "_save", watching)
    assert run(restorer, ["a.png"], "b.png", compare=compare).count("restored") == 1
    assert kept == [0 if compare is None else 1]


def test_an_interruption_while_progress_is_told_loses_no_result(here, restorer):
    draw("a.png")
    report = JobReport()

    def interrupted(*args):
        if Path("b.png").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(restorer, ["a.png"], "b.png", progress=interrupted, report=report)
    assert [result.status for result in report.results] == ["restored"]


def test_an_output_folder_that_cannot_be_made_ends_the_job(here, restorer):
    draw("in/a.png", "in/c.png", "b.png")
    Path("blocked").touch()
    with pytest.raises(OutputError, match="cannot make the folder"):
        run(restorer, ["in"], "blocked/out")
    with pytest.raises(OutputError, match="blocked is a file"):
        run(restorer, ["b.png"], "blocked/c.png")
    planned = plan_job(["b.png"], "later/c.png")
    Path("later").touch()  # in the way since the job was planned
    assert isinstance(pipeline.run_job(planned, restorer).results[0].error, OutputError)


def test_an_output_that_appears_meanwhile_is_not_replaced(here, restorer):
    draw("a.png")
    planned = plan_job(["a.png"], "b.png")
    Path("b.png").write_bytes(b"theirs")
    (result,) = pipeline.run_job(planned, restorer).results
    assert "has appeared since" in str(result.error) and Path("b.png").read_bytes() == b"theirs"


def test_a_full_disk_fails_each_file_and_keeps_the_old_ones(here, restorer, monkeypatch):
    draw("in/a.png", "in/b.png")
    run(restorer, ["in"], "out")
    before = {name: Path("out", name).read_bytes() for name in images_in("out")}
    original = os.replace

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    report = run(Restorer(model=small_net(1)), ["in"], "out", existing="overwrite")
    monkeypatch.setattr(os, "replace", original)
    assert report.count("failed") == 2 and all("No space left" in str(r.error) for r in report.results)
    assert {name: Path("out", name).read_bytes() for name in images_in("out")} == before
    assert sorted(os.listdir("out")) == [".memnet", "a.png", "b.png"], "no temporary file stays"


def test_the_strip_shows_input_and_result(here, restorer):
    draw("a.png")
    assert run(restorer, ["a.png"], "b.png", compare="strip.png").count("restored") == 1
    strip = pixels("strip.png")
    assert np.array_equal(strip[-12:, :13], pixels("a.png"))
    second = strip.shape[1] // 2 + 4
    assert np.array_equal(strip[-12:, second : second + 13], pixels("b.png"))


def test_pages_are_restored_one_by_one(here, restorer):
    frames = [picture((20, 21), seed=i) for i in range(3)]
    Image.fromarray(frames[0]).save("a.tiff", save_all=True, append_images=[Image.fromarray(f) for f in frames[1:]])
    (result,) = run(restorer, ["a.tiff"], "b.tiff").results
    assert result.status == "failed"
    told = []
    reading = pipeline.Reading(pages="all")
    (result,) = run(restorer, ["a.tiff"], "b.tiff", reading=reading, progress=lambda *v: told.append(v[3])).results
    assert result.status == "restored" and result.frames == 3 and told == sorted(told) and told[-1] == 1
    restored = images.read_image("b.tiff", pages="all").frames
    for frame, before in zip(restored, frames, strict=True):
        assert np.array_equal(frame[..., 0], restorer(before))


def test_no_filter_of_warnings_is_left_behind(here, restorer):
    draw(*(f"in/{i}.png" for i in range(12)))
    before = list(warnings.filters)
    run(restorer, ["in"], "out", threads=Threads(4, 1, 2))
    assert warnings.filters == before


@pytest.mark.parametrize("text", ["1:2", "1:2:3:4", "a:1:1", "0:1:1", "1:-1:1", "", "1:1:5000"])
def test_bad_threads(text):
    with pytest.raises(InputError):
        Threads.parse(text)
    assert str(Threads.parse("1:2:3")) == "1:2:3"


@pytest.mark.parametrize(
    "name", ["with space.png", "ünïcödé ☃.png", "-dash.png", "new\nline.png", "%s.png", "x" * 251 + ".png"]
)
def test_names_of_all_kinds_work(here, restorer, name):
    draw("in/" + name)
    assert run(restorer, ["in"], "out").results[0].error is None
    assert images_in("out") == [name]


def test_bytes_that_are_no_text_work_as_a_name(here, restorer):
    draw("in/a.png")
    os.rename(b"in/a.png", b"in/\xff\xfe.png")
    assert run(restorer, ["in"], "out").results[0].error is None
    assert images_in("out") == [os.fsdecode(b"\xff\xfe.png")]


def test_composed_and_decomposed_names_are_two_files(here, restorer):
    draw("in/\u00e9.png", "in/e\u0301.png")
    if len(os.listdir("in")) == 1:
        pytest.skip("this file system takes them for one name")
    assert run(restorer, ["in"], "out").count("restored") == 2 and len(images_in("out")) == 2

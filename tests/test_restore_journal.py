"""Going on after an interruption: what is skipped, what is made again, what is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.restoring import picture, small_net

from memnet_fast import files
from memnet_fast.errors import InputError, OutputError
from memnet_fast.restore import Restorer, pipeline
from memnet_fast.restore.images import Encoding
from memnet_fast.restore.job import plan_job
from memnet_fast.restore.journal import digest_of, key_of, open_journal, read_lines


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("in/a.png", "in/b.png", "in/sub/c.png")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture((12, 13), seed=i)).save(name)
    return tmp_path


@pytest.fixture(scope="module")
def restorer():
    return Restorer(model=small_net())


def run(restorer, existing="skip", **options) -> dict[str, str]:
    """Names of the inputs and what became of them."""
    report = pipeline.run_job(plan_job(["in"], "out", recursive=True, existing=existing), restorer, **options)
    return {r.item.source.name: r.status for r in report.results}


ALL = {"a.png": "restored", "b.png": "restored", "c.png": "restored"}
SKIPPED = dict.fromkeys(ALL, "skipped")


@pytest.mark.parametrize("first", ["error", "overwrite", "skip"])
def test_a_second_run_skips_what_the_first_wrote(here, restorer, first):
    assert run(restorer, first) == ALL
    before = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*.png")}
    assert run(restorer) == SKIPPED
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("*.png")} == before


def test_only_what_is_missing_is_made(here, restorer):
    run(restorer)
    os.unlink("out/b.png")
    assert run(restorer) == {**SKIPPED, "b.png": "restored"}


def test_names_and_times_do_not_count(here, restorer):
    """A changed input of the same name, size and time is restored again; the same input with another time is not."""
    run(restorer)
    status = os.stat("in/a.png")
    changed = bytearray(Path("in/a.png").read_bytes())
    Image.fromarray(picture((12, 13), seed=77)).save("in/a.png")
    assert bytes(changed) != Path("in/a.png").read_bytes()
    os.utime("in/a.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime("in/b.png", (0, 0))
    os.utime("out/b.png", (0, 0))
    assert run(restorer) == {**SKIPPED, "a.png": "restored"}
    assert run(restorer) == SKIPPED
    Path("in/a.png").write_bytes(changed)
    assert run(restorer) == {**SKIPPED, "a.png": "restored"}, "the output is that of another input now"


@pytest.mark.parametrize(
    "other",
    [
        {"model": small_net(1)},
        {"color": "gray"},
        {"tta": True},
        {"algorithm": "direct"},
        {"overlap": 3},
        {"tile": 32},
        {"backend": "torch"},
        {"backend": "torch", "precision": "bf16"},
        {"task": "deblock", "model": small_net()},
        {"task": "sr", "scale": 2, "model": small_net()},
    ],
)
def test_other_options_or_weights_make_everything_again(here, restorer, other):
    run(restorer)
    assert run(Restorer(**{"model": small_net(), **other})) == ALL


def test_other_encoding_and_version_make_everything_again(here, restorer, monkeypatch):
    run(restorer)
    assert run(restorer, encoding=Encoding(png_level=1)) == ALL
    monkeypatch.setattr(pipeline, "__version__", "999")
    assert run(restorer, encoding=Encoding(png_level=1)) == ALL


def test_options_that_change_no_bit_do_not_count(here, restorer):
    run(restorer)
    assert run(Restorer(model=small_net(), batch=1), threads=pipeline.Threads(1, 1, 1), isolate=False) == SKIPPED


def test_the_folder_may_be_moved(here, restorer):
    run(restorer)
    os.rename("out", "elsewhere")
    os.rename("in", "inputs")
    report = pipeline.run_job(plan_job(["inputs"], "elsewhere", recursive=True, existing="skip"), restorer)
    assert report.count("skipped") == 3


@pytest.mark.parametrize("what", ["edited", "cut off", "empty", "a folder of records lost", "foreign"])
def test_files_that_no_run_wrote_are_left_alone(here, restorer, what):
    """A file of unknown origin is neither skipped nor replaced: it fails, and the others are restored."""
    if what != "foreign":
        run(restorer)
    Path("out").mkdir(exist_ok=True)
    path = Path("out/a.png")
    data = path.read_bytes() if path.exists() else b""
    content = {"edited": data + b"x", "cut off": data[:-1], "empty": b"", "foreign": b"mine"}.get(what, data)
    path.write_bytes(content)
    if what == "a folder of records lost":
        os.unlink("out/.memnet/journal.jsonl")
        os.unlink("out/b.png")
        os.unlink("out/sub/c.png")
    report = pipeline.run_job(plan_job(["in"], "out", recursive=True, existing="skip"), restorer)
    by_name = {r.item.source.name: r for r in report.results}
    assert by_name["a.png"].status == "failed" and "no run recorded" in str(by_name["a.png"].error)
    assert report.count("failed") == 1 and path.read_bytes() == content
    assert run(restorer, "overwrite") == ALL


@pytest.mark.parametrize("moment", ["before the line", "before the rename", "after the rename"])
def test_a_crash_between_the_two_steps_leads_to_no_wrong_skip(here, restorer, monkeypatch, moment):
    """The line comes first; with either half missing the next run does the right thing."""
    run(Restorer(model=small_net(1)))  # older outputs, of other weights
    older = Path("out/a.png").read_bytes()

    class Crash(BaseException):
        pass

    def crash(*args):
        raise Crash

    def after(path, data):
        files.write_whole(path, data)
        if path.name == "a.png":
            raise Crash

    if moment == "before the line":
        monkeypatch.setattr(pipeline.Journal, "announce", crash)
    else:
        monkeypatch.setattr(pipeline, "write_whole", crash if moment == "before the rename" else after)
    planned = plan_job(["in/a.png", "in/b.png"], "out", existing="skip")
    with open_journal(Path("out"), key_of(pipeline.settings_of(restorer, Encoding()))) as journal:
        state = pipeline._Run(
            planned,
            [restorer],
            Encoding(),
            pipeline.Reading(),
            pipeline.Threads(1, 1, 1),
            pipeline.Decoders(False),
            journal,
            pipeline.JobReport(),
        )
        loaded = state._load(0)
        result = restorer.restore(loaded.source.frames[0])
        with pytest.raises(Crash):
            state._save(0, loaded, pipeline._Result([result.image], result.tiled))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert (Path("out/a.png").read_bytes() == older) == (moment != "after the rename")
    done = "skipped" if moment == "after the rename" else "restored"
    assert run(restorer) == {**ALL, "a.png": done}
    assert run(restorer) == SKIPPED
    expected = restorer(np.asarray(Image.open("in/a.png")))
    assert np.array_equal(np.asarray(Image.open("out/a.png")), expected)


def test_torn_and_strange_lines_are_passed_over(here, restorer):
    run(restorer)
    path = Path("out/.memnet/journal.jsonl")
    good = path.read_bytes()
    path.write_bytes(
        good[:40] + b"\n\x00\xff\n[1]\nnull\n{}\n" + b'{"output": 1}\n' + b"[" * 100000 + b"\n" + good + good[-100:-60]
    )
    assert run(restorer) == SKIPPED
    os.unlink("out/a.png")
    assert run(restorer) == {**SKIPPED, "a.png": "restored"}
    assert run(restorer) == SKIPPED, "a line after a torn one counts"


def test_the_mark_of_success_comes_last(here, restorer):
    mark = Path("out/.memnet/success.json")
    seen = []
    run(restorer, on_result=lambda result: seen.append(mark.exists()))
    assert seen == [False] * 3 and json.loads(mark.read_text())["restored"] == 3
    Path("in/bad.png").write_bytes(b"")
    assert run(restorer)["bad.png"] == "failed"
    assert not mark.exists()
    os.unlink("in/bad.png")
    run(restorer)
    assert json.loads(mark.read_text()) == {**json.loads(mark.read_text()), "restored": 0, "skipped": 3}


def test_two_runs_on_one_folder_do_not_meet(here, restorer):
    with open_journal(Path("out"), "key"), pytest.raises(InputError, match="another run is writing into out"):
        run(restorer)
    assert run(restorer) == ALL


def test_single_files_share_a_folder_but_not_with_a_job(here, restorer):
    with open_journal(Path("out"), "key", alone=False):
        pipeline.run_job(plan_job(["in/a.png"], "out/a.png", existing="skip"), restorer)
        with pytest.raises(InputError, match="another run"):
            run(restorer)
    assert run(restorer) == {**ALL, "a.png": "skipped"}


def test_journals_of_several_writers_are_read_together(here, restorer):
    run(restorer)
    os.rename("out/.memnet/journal.jsonl", "out/.memnet/worker-1.jsonl")
    assert run(restorer) == SKIPPED
    assert set(read_lines(Path("out"))) == {"a.png", "b.png", "sub/c.png"}


def test_a_journal_that_cannot_be_read_counts_for_nothing(here, restorer, caplog):
    run(restorer)
    Path("out/.memnet/strange.jsonl").mkdir()
    assert run(restorer) == SKIPPED
    assert "strange.jsonl cannot be read" in caplog.text


def test_a_closed_journal_writes_into_no_other_file(here):
    with open_journal(Path("out"), "key") as journal:
        pass
    with open("other", "wb"), pytest.raises(OutputError, match="cannot write the journal"):
        journal.announce(Path("out/a.png"), "one", "two")
    assert Path("other").read_bytes() == b""


def test_a_journal_that_cannot_be_written(here, restorer, monkeypatch):
    monkeypatch.setattr(os, "write", lambda file, data: len(data) - 1)
    with pytest.raises(OutputError, match="disk is full"):
        run(restorer)


def test_names_of_all_kinds_come_back_from_the_journal(here, restorer):
    os.rename(b"in/a.png", b"in/\xff\n\xc3\xa9.png")
    run(restorer)
    assert set(run(restorer).values()) == {"skipped"}


def test_the_digest_of_a_file(here):
    assert digest_of(Path("in")) is None and digest_of(Path("none")) is None
    Path("x").write_bytes(b"abc")
    assert digest_of(Path("x")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


HOLDER = """
import os, sys, time
from pathlib import Path
from memnet_fast import files
original = os.replace
def wait(*args):
    print("open", flush=True)
    time.sleep(60)
os.replace = wait
files.write_whole(Path("out.bin"), b"data")
"""


def test_temporary_files_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".memnet-keep.txt").touch()
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        (temporary,) = tmp_path.glob(".memnet-*.part")
        assert files.sweep(tmp_path) == [] and temporary.exists()
        child.kill()
        child.wait()
    assert temporary.exists()
    assert files.sweep(tmp_path) == [temporary] and sorted(os.listdir()) == [".memnet-keep.txt"]
    assert files.sweep(tmp_path / "none") == []


def test_a_job_sweeps_the_folders_it_writes_to(here, restorer):
    for folder in ("out", "out/sub", "out/.memnet", "other"):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, ".memnet-x.part").touch()
    run(restorer)
    assert sorted(str(p) for p in Path().rglob("*.part")) == ["other/.memnet-x.part"]


def test_a_writer_that_is_swept_before_it_has_its_lock_begins_again(tmp_path, monkeypatch):
    original, swept = files.tempfile.mkstemp, []

    def swept_once(**options):
        made = original(**options)
        if not swept:
            swept.append(files.sweep(tmp_path))
        return made

    monkeypatch.setattr(files.tempfile, "mkstemp", swept_once)
    files.write_whole(tmp_path / "a", b"data")
    assert len(swept[0]) == 1 and os.listdir(tmp_path) == ["a"]

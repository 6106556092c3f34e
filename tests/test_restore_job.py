"""Jobs: which files are found and where they go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memnet_fast import files
from memnet_fast.errors import InputError, OutputError
from memnet_fast.restore import job
from memnet_fast.restore.journal import open_journal


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")


def plan(*args, **options):
    planned = job.plan_job(*args, **options)
    return {str(item.source): str(item.target) for item in planned.items}


def test_one_file_to_one_file(here):
    touch("a.png")
    assert plan(["a.png"], "b.jpg") == {"a.png": "b.jpg"}
    assert plan(["a.png"], "new/deep/b.tiff") == {"a.png": "new/deep/b.tiff"}


def test_one_file_to_a_folder(here):
    touch("a.png")
    Path("old").mkdir()
    assert plan(["a.png"], "old") == {"a.png": "old/a.png"}
    assert plan(["a.png"], "new/") == {"a.png": "new/a.png"}


def test_several_files_go_to_a_folder(here):
    touch("a.png", "x/b.jpg")
    assert plan(["a.png", "x/b.jpg"], "out") == {"a.png": "out/a.png", "x/b.jpg": "out/b.jpg"}
    touch("file")
    with pytest.raises(InputError, match="file is a file, but several inputs"):
        plan(["a.png", "x/b.jpg"], "file")


def test_a_folder_is_flat_unless_recursive_and_then_mirrored(here):
    touch("in/a.png", "in/sub/b.JPG", "in/sub/deep/c.webp")
    flat = job.plan_job(["in"], "out")
    assert [str(i.target) for i in flat.items] == ["out/a.png"]
    assert flat.ignored == [(Path("in/sub"), "a folder; -r takes those too")]
    assert plan(["in"], "out", recursive=True) == {
        "in/a.png": "out/a.png",
        "in/sub/b.JPG": "out/sub/b.JPG",
        "in/sub/deep/c.webp": "out/sub/deep/c.webp",
    }


def test_a_glob_is_mirrored_below_its_fixed_part(here):
    touch("in/a.jpg", "in/x/a.jpg", "in/x/y/a.jpg", "in/x/b.png")
    assert plan(["in/**/*.jpg"], "out") == {
        "in/a.jpg": "out/a.jpg",
        "in/x/a.jpg": "out/x/a.jpg",
        "in/x/y/a.jpg": "out/x/y/a.jpg",
    }
    assert plan(["none*.png"], "out") == {}


def test_a_file_whose_name_looks_like_a_glob_is_a_file(here):
    touch("a[1].png", "a1.png")
    assert plan(["a[1].png"], "b.png") == {"a[1].png": "b.png"}


def test_what_is_no_image_is_ignored_with_its_reason(here):
    touch("in/a.png", "in/README", "in/Thumbs.db", "in/.DS_Store", "in/._a.png", "in/b.gif")
    planned = job.plan_job(["in"], "out")
    assert [str(i.source) for i in planned.items] == ["in/a.png"]
    reasons = {path.name: reason for path, reason in planned.ignored}
    assert reasons == {
        "README": "not an image by its name",
        "Thumbs.db": "not an image by its name",
        ".DS_Store": "a hidden file",
        "._a.png": "a hidden file",
        "b.gif": "not an image by its name",
    }


def test_links_are_not_followed_outside_and_loops_end(here):
    touch("in/a.png", "elsewhere/secret.png", "elsewhere/more/b.png")
    os.symlink("../elsewhere/secret.png", "in/out.png")
    os.symlink("a.png", "in/same.png")
    os.symlink("nowhere.png", "in/broken.png")
    os.symlink("../elsewhere/more", "in/folder")
    os.symlink(".", "in/loop")
    planned = job.plan_job(["in"], "out", recursive=True)
    assert sorted(str(i.source) for i in planned.items) == ["in/a.png", "in/same.png"]
    assert {path.name: reason for path, reason in planned.ignored} == {
        "out.png": "a link that leads outside",
        "broken.png": "a broken link",
        "folder": "a link to a folder",
        "loop": "a link to a folder",
    }


def test_outputs_of_an_earlier_run_are_never_inputs(here):
    touch("in/a.png", "in/out/a.png", "in/out/sub/b.png")
    assert plan(["in"], "in/out", recursive=True, existing="overwrite") == {"in/a.png": "in/out/a.png"}
    assert plan(["in/**/*.png"], "in/out", existing="overwrite") == {"in/a.png": "in/out/a.png"}


@pytest.mark.parametrize("pattern", ["in", "in/**/*.png"])
def test_what_a_journal_below_lists_is_no_input_but_what_stands_beside_it_is(here, pattern):
    touch("in/a.png", "in/old/a.png", "in/old/new.png", "in/old/sub/b.png", "in/old/sub/deep/a.png", "in/other/a.png")
    for folder, outputs in (("in", ["a.png"]), ("in/old", ["a.png", "sub/b.png"]), ("in/old/sub", ["deep/a.png"])):
        with open_journal(Path(folder), "key") as journal:
            for name in outputs:
                journal.announce(Path(folder, name), "one", "two")
    planned = job.plan_job([pattern], "out", recursive=True)
    assert sorted(str(i.source) for i in planned.items) == ["in/a.png", "in/old/new.png", "in/other/a.png"]
    reason = "an output of an earlier run"
    found = sorted(str(path.relative_to("in/old")) for path, why in planned.ignored if why == reason)
    assert found == ["a.png", "sub/b.png", "sub/deep/a.png"]


def test_a_folder_of_outputs_may_be_named(here):
    touch("in/old/a.png", "in/old/sub/b.png")
    with open_journal(Path("in/old"), "key") as journal:
        journal.announce(Path("in/old/a.png"), "one", "two")
        journal.announce(Path("in/old/sub/b.png"), "one", "two")
    assert len(plan(["in/old"], "out", recursive=True)) == 2
    assert len(plan(["in/old/**/*.png"], "out")) == 2
    assert plan(["in"], "out", recursive=True) == {}
    assert len(plan(["in/old/a.png"], "out/")) == 1


def test_a_glob_follows_no_link_to_a_folder(here):
    touch("in/a.png", "in/sub/b.png", "elsewhere/secret.png")
    os.symlink("../elsewhere", "in/outside")
    os.symlink(".", "in/loop")
    os.symlink("in", "door")
    for pattern in ("in/**/*.png", "in/*/../*.png", "door/**/*.png"):
        planned = job.plan_job([pattern], "out")
        found = {os.path.realpath(i.source) for i in planned.items}
        assert found <= {str(here / "in/a.png"), str(here / "in/sub/b.png")} and str(here / "in/a.png") in found
        assert {reason for _, reason in planned.ignored} <= {"below a link to a folder"}
    assert plan(["in/**/*.png"], "out").keys() == {"in/a.png", "in/sub/b.png"}
    assert plan(["in/outside/*.png"], "out").keys() == {"in/outside/secret.png"}, "a link that is named is meant"


def test_hidden_folders_are_not_entered(here):
    touch("in/a.png", "in/.git/b.png", "in/.memnet/c.png")
    planned = job.plan_job(["in"], "out", recursive=True)
    assert [str(i.source) for i in planned.items] == ["in/a.png"]
    assert planned.ignored == [(Path("in/.git"), "a hidden folder"), (Path("in/.memnet"), "a hidden folder")]


def test_a_journal_is_kept_in_the_output_folder_but_not_for_one_file(here):
    touch("in/a.png", "b.png")
    assert job.plan_job(["in"], "out").folder == Path("out") and job.plan_job(["in"], "out").alone
    assert job.plan_job(["b.png"], "c.png").folder is None and job.plan_job(["b.png"], "out/").folder is None
    planned = job.plan_job(["b.png"], "x/c.png", existing="skip")
    assert planned.folder == Path("x") and not planned.alone


def test_a_file_named_twice_is_restored_once(here):
    touch("in/a.png", "in/b.png")
    assert plan(["in", "in/*.png", "in/a.png"], "out") == {"in/a.png": "out/a.png", "in/b.png": "out/b.png"}


@pytest.mark.parametrize(
    ("name", "format", "expected", "code"),
    [
        ("a.jpeg", "jpg", "a.jpeg", "JPEG"),
        ("a.TIF", "tiff", "a.TIF", "TIFF"),
        ("a.png", "jpg", "a.jpg", "JPEG"),
        ("a.b.bmp", "webp", "a.b.webp", "WEBP"),
        ("photo", "png", "photo.png", "PNG"),
        ("v1.2", "png", "v1.2.png", "PNG"),
        ("photo", "same", "photo", None),
    ],
)
def test_formats_name_their_files(here, name, format, expected, code):
    touch(name)
    (item,) = job.plan_job([name], "out/", format=format).items
    assert item.target == Path("out") / expected and item.format == code


@pytest.mark.parametrize(
    ("inputs", "output", "options", "message"),
    [
        (["a.png"], "out", {}, "out has no known image extension"),
        (["a.png"], "b.jpg", {"format": "png"}, "contradicts the format png"),
        (["a.png"], "", {}, "empty path"),
        ([""], "out", {}, "an input is an empty path"),
        (["a.png", ""], "out", {}, "an input is an empty path"),
        (["none.png"], "b.png", {}, "there is no file or folder none.png"),
        (["n" * 300], "b.png", {}, "cannot look at n+: File name too long"),
        (["n" * 300 + "*.png"], "out", {}, "cannot look at .*: File name too long"),
        (["a.png"], "n" * 300 + ".png", {}, "cannot look at .*: File name too long"),
        (["a.png"], "b.png", {"log": "n" * 300}, "cannot look at .*: File name too long"),
        (["a.png"], "old.png/", {}, "old.png is a file, but the / at its end asks for a folder"),
        (["x"], "old.png/", {}, "old.png is a file, but several inputs, a folder or a glob need a folder"),
        (["a.png", "x/a.png"], "out", {}, "a.png and x/a.png would both be written to out/a.png"),
        (["a.png", "a.jpg"], "out", {"format": "png"}, "would both be written to out/a.png"),
        (["a.png"], "a.png", {}, "is the input itself"),
        (["a.png"], "x/../a.png", {}, "is the input itself"),
        (["a.png"], "old.png", {}, "old.png exists already; --existing overwrite"),
        (["a.png", "x/a.png"], "x", {"existing": "overwrite"}, "a.png would replace another input, x/a.png"),
        (["a.png"], "b.png", {"compare": "b.png"}, "would replace an input or another output"),
        (["a.png"], "b.png", {"compare": "a.png"}, "would replace an input or another output"),
        (["a.png"], "b.png", {"compare": "old.png"}, "old.png exists already"),
        (["a.png"], "b.png", {"compare": "strip"}, "needs the extension"),
        (["a.png", "a.jpg"], "out", {"compare": "s.png"}, "there are 2 inputs"),
        (["a.png"], "b.png", {"log": "old.png"}, "old.png exists already"),
        (["a.png"], "b.png", {"log": "x"}, "x is a folder"),
        (["a.png"], "b.png", {"log": "s.png", "compare": "s.png"}, "two outputs would be written to s.png"),
        (["a.png"], "b.png", {"existing": "keep"}, "choose from error, skip, overwrite"),
        (["a.png"], "a.png", {"existing": "skip"}, "is the input itself"),
        (["a.png"], "b", {"existing": "skip", "format": "png"}, "the name b must tell its format"),
        (["a.png"], "b.png", {"format": "gif"}, "choose from same, png"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_written(here, inputs, output, options, message):
    touch("a.png", "a.jpg", "x/a.png", "x/b.png", "old.png")
    before = sorted(map(str, here.rglob("*")))
    with pytest.raises(InputError, match=message):
        job.plan_job(inputs, output, **options)
    assert sorted(map(str, here.rglob("*"))) == before


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("old.png/b.png", {}, "cannot write old.png/b.png: old.png is a file"),
        ("old.png/y/z/", {}, "cannot write old.png/y/z/a.png: old.png is a file"),
        ("b.png", {"compare": "old.png/s.png"}, "cannot write old.png/s.png: old.png is a file"),
        ("pipe.png", {"existing": "overwrite"}, "cannot write pipe.png: it is no regular file"),
        ("stream.png", {"existing": "overwrite"}, "cannot write stream.png: it is no regular file"),
        ("closed/b.png", {}, "cannot write closed/b.png: the folder closed is not writable"),
        ("closed/new/b.png", {}, "cannot write closed/new/b.png: the folder closed is not writable"),
    ],
)
def test_the_output_of_one_image_can_be_written_or_that_is_said_beforehand(here, monkeypatch, output, options, message):
    touch("a.png", "old.png", "closed/any")
    os.mkfifo("pipe.png")
    Path("stream.png").symlink_to("/proc/self/fd/1")
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != Path("closed"))  # root may write everywhere
    before = sorted(map(str, here.rglob("*")))
    with pytest.raises(OutputError, match=message):
        job.plan_job(["a.png"], output, **options)
    assert sorted(map(str, here.rglob("*"))) == before


def test_of_several_images_one_that_cannot_be_written_keeps_the_others_in_the_job(here):
    touch("in/a.png", "in/x/b.png", "out/x")
    assert len(plan(["in"], "out", recursive=True)) == 2


def test_what_may_not_be_looked_at_is_said_in_one_line(here, monkeypatch):
    """A folder that may not be entered; root may enter all of them."""
    touch("a.png")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(InputError, match="cannot look at a.png: Permission denied"):
        job.plan_job(["a.png"], "b.png")

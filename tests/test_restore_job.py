"""Jobs: which files are found, where they go, and what happens when one fails."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.restoring import picture, small_net

from memnet_fast.errors import BackendUnavailable, ImageCorrupt, InputError, OutputError
from memnet_fast.restore import Restorer, images, job
from memnet_fast.restore.strip import comparison_strip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def restorer():
    return Restorer(model=small_net(), algorithm="direct")


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")


def draw(*names: str) -> None:
    for i, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture((12, 13), seed=i)).save(name)


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
        (["none.png"], "b.png", {}, "there is no file or folder none.png"),
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
        (["a.png"], "b.png", {"existing": "skip"}, "choose from error, overwrite"),
        (["a.png"], "b.png", {"format": "gif"}, "choose from same, png"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_written(here, inputs, output, options, message):
    touch("a.png", "a.jpg", "x/a.png", "x/b.png", "old.png")
    before = sorted(map(str, here.rglob("*")))
    with pytest.raises(InputError, match=message):
        job.plan_job(inputs, output, **options)
    assert sorted(map(str, here.rglob("*"))) == before


def test_overwriting_the_input_is_possible_on_request(here, restorer):
    draw("a.png")
    before = np.asarray(images.read_image("a.png").image)
    results = job.run_job(job.plan_job(["a.png"], "a.png", existing="overwrite"), restorer)
    assert results[0].error is None
    assert np.array_equal(np.asarray(images.read_image("a.png").image), restorer(before))


def test_a_job_restores_every_file_and_tells_about_it(here, restorer):
    draw("in/a.png", "in/b.png", "in/sub/c.png")
    told, finished = [], []
    planned = job.plan_job(["in"], "out", recursive=True)
    results = job.run_job(planned, restorer, progress=lambda *v: told.append(v), on_result=finished.append)
    assert results == finished and all(r.error is None and r.size == (13, 12) and r.mode == "L" for r in results)
    for item in planned.items:
        expected = restorer(images.read_image(item.source).image)
        assert np.array_equal(np.asarray(images.read_image(item.target).image), np.asarray(expected))
    assert [v[0] for v in told] == sorted(v[0] for v in told) and {v[0] for v in told} == {0, 1, 2}


def test_one_bad_file_does_not_stop_the_others(here, restorer):
    draw("in/a.png", "in/b.png", "in/c.png")
    Path("in/b.png").write_bytes(Path("in/b.png").read_bytes()[:60])
    results = job.run_job(job.plan_job(["in"], "out"), restorer)
    assert [type(r.error) for r in results] == [type(None), ImageCorrupt, type(None)]
    assert sorted(os.listdir("out")) == ["a.png", "c.png"]


def test_stopping_at_the_first_bad_file(here, restorer):
    draw("in/a.png", "in/b.png", "in/c.png")
    Path("in/b.png").write_bytes(b"")
    results = job.run_job(job.plan_job(["in"], "out"), restorer, stop_on_error=True)
    assert len(results) == 2 and sorted(os.listdir("out")) == ["a.png"]


def test_a_file_that_vanishes_after_planning_fails_alone(here, restorer):
    draw("in/a.png", "in/b.png")
    planned = job.plan_job(["in"], "out")
    os.unlink("in/a.png")
    results = job.run_job(planned, restorer)
    assert "cannot read in/a.png" in str(results[0].error) and results[1].error is None


def test_an_unforeseen_error_in_one_file_is_reported_as_such(here, restorer, monkeypatch):
    draw("in/a.png", "in/b.png")
    original = job.read_image

    def broken(path, limit):
        if path.name == "a.png":
            raise RuntimeError("a\nbug")
        return original(path, limit)

    monkeypatch.setattr(job, "read_image", broken)
    results = job.run_job(job.plan_job(["in"], "out"), restorer)
    assert job.describe(results[0].error) == "unexpected RuntimeError: a bug" and results[1].error is None


@pytest.mark.parametrize("error", [InputError("no core"), BackendUnavailable("cpu", "gone")])
def test_errors_that_concern_every_file_end_the_job(here, restorer, monkeypatch, error):
    def failing(image, progress):
        raise error

    draw("in/a.png", "in/b.png")
    monkeypatch.setattr(restorer, "restore", failing)
    with pytest.raises(type(error)):
        job.run_job(job.plan_job(["in"], "out"), restorer)


def test_an_output_folder_that_cannot_be_made_fails_each_file(here, restorer):
    draw("in/a.png")
    touch("blocked")
    results = job.run_job(job.plan_job(["in"], "blocked/out"), restorer)
    assert isinstance(results[0].error, OutputError)


def test_the_strip_shows_input_and_result(here, restorer):
    draw("a.png")
    results = job.run_job(job.plan_job(["a.png"], "b.png", compare="strip.png"), restorer)
    assert results[0].error is None
    strip = np.asarray(images.read_image("strip.png").image)
    pixels, restored = (np.asarray(images.read_image(name).image) for name in ("a.png", "b.png"))
    assert np.array_equal(strip[-12:, :13], pixels)
    second = strip.shape[1] // 2 + 4
    assert np.array_equal(strip[-12:, second : second + 13], restored)


def test_strips_show_every_mode_and_refuse_other_sizes():
    eight, sixteen = picture((9, 90)), picture((9, 90)).astype(np.uint16) * 257
    strip = comparison_strip([("a", Image.fromarray(eight)), ("b", Image.fromarray(sixteen))])
    assert strip.mode == "L" and np.array_equal(np.asarray(strip)[-9:, :90], np.asarray(strip)[-9:, -90:])
    colour = Image.fromarray(picture((9, 90, 4)))
    assert comparison_strip([("a", Image.fromarray(eight)), ("b", colour)]).mode == "RGB"
    with pytest.raises(InputError, match="one size"):
        comparison_strip([("a", Image.new("L", (4, 4))), ("b", Image.new("L", (4, 5)))])


@pytest.mark.parametrize(
    "name", ["with space.png", "ünïcödé ☃.png", "-dash.png", "new\nline.png", "%s.png", "x" * 251 + ".png"]
)
def test_names_of_all_kinds_work(here, restorer, name):
    draw("in/" + name)
    assert job.run_job(job.plan_job(["in"], "out"), restorer)[0].error is None
    assert os.listdir("out") == [name]


def test_bytes_that_are_no_text_work_as_a_name(here, restorer):
    draw("in/a.png")
    os.rename(b"in/a.png", b"in/\xff\xfe.png")
    assert job.run_job(job.plan_job(["in"], "out"), restorer)[0].error is None
    assert os.listdir(b"out") == [b"\xff\xfe.png"]


def test_composed_and_decomposed_names_are_two_files(here, restorer):
    draw("in/\u00e9.png", "in/e\u0301.png")
    if len(os.listdir("in")) == 1:
        pytest.skip("this file system takes them for one name")
    assert len(job.run_job(job.plan_job(["in"], "out"), restorer)) == len(os.listdir("out")) == 2

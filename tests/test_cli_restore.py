"""What the restoring commands share: the three verbs, options as flags and in TOML, resuming, reports."""

from __future__ import annotations

import contextlib
import json
import locale
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.restoring import picture, small_net

from memnet_fast import cli
from memnet_fast.errors import BackendUnavailable
from memnet_fast.restore import Restorer, images, pipeline
from memnet_fast.restore.report import Threads
from memnet_fast.weights import save_weights


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_end_politely", lambda state: None)
    save_weights(small_net(), tmp_path / "net")
    return tmp_path


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def draw(*names: str, shape: tuple[int, ...] = (14, 15), **options) -> None:
    for i, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(shape, seed=i)).save(name, **options)


def pixels(name: str) -> np.ndarray:
    return images.read_image(name).pixels


def log() -> dict:
    return json.loads(Path("run.json").read_text())


def test_deblock_tells_the_quality_of_its_input(run):
    draw("a.jpg", shape=(40, 41, 3), quality=23)
    code, _, err = run("deblock", "-i", "a.jpg", "-o", "b.png", "-n", "net", "-v", "--log", "run.json")
    assert code == 0 and "JPEG of quality 23" in err
    assert log()["task"] == "deblock" and log()["files"][0]["jpeg_quality"] == 23
    assert np.array_equal(pixels("b.png"), Restorer("deblock", model=small_net())(pixels("a.jpg")))


@pytest.mark.parametrize(("arguments", "scale"), [([], 4), (["-s", "2"], 2), (["-s", "3"], 3)])
def test_sr_enlarges(run, arguments, scale):
    draw("a.png", shape=(9, 11, 3))
    code, _, err = run("sr", "-i", "a.png", "-o", "b.png", *arguments, "-n", "net", "--log", "run.json")
    assert code == 0 and pixels("b.png").shape == (9 * scale, 11 * scale, 3)
    assert log()["files"][0]["size"] == [11 * scale, 9 * scale] and log()["options"]["scale"] == scale
    assert np.array_equal(pixels("b.png"), Restorer("sr", scale=scale, model=small_net())(pixels("a.png")))


def test_sr_shows_both_sizes_in_one_strip(run):
    draw("a.png", shape=(9, 90, 3))
    assert run("sr", "-i", "a.png", "-o", "b.png", "-s", "2", "-n", "net", "--compare", "strip.png")[0] == 0
    assert np.array_equal(pixels("strip.png")[-18:, -180:], pixels("b.png"))


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("sr", ["-s", "5"], "'5' is not one of"),
        ("sr", ["-s", "1"], "'1' is not one of"),
        ("denoise", ["-s", "2"], "No such option '-s'"),
        ("denoise", ["-j", "1:2"], "expected load:proc:save"),
        ("denoise", ["-j", "0:1:1"], "whole numbers from 1"),
        ("denoise", ["-j", "1:2,:2"], "expected load:proc:save"),
        ("denoise", ["-j", "1:2,2:2"], "are for 2 devices, but the job has 1"),
        ("denoise", ["-t", "0,32"], "one tile size serves all GPUs"),
        ("denoise", ["-t", "32,"], "one tile size serves all GPUs"),
        ("denoise", ["-f", "gif"], "'gif' is not one of"),
        ("denoise", ["-g", "x"], "expected -1 for the CPU"),
        ("denoise", ["-g", "0,0"], "different numbers"),
        ("denoise", ["-g", "0,00"], "different numbers"),
        ("denoise", ["-g", "9" * 5000], "different numbers"),
        ("denoise", ["-t", "9" * 5000], "expected auto or a whole number"),
        ("denoise", ["-j", f"{'9' * 5000}:1:1"], "expected load:proc:save"),
        ("denoise", ["-g", "-1", "--device", "cpu"], "give one"),
        ("denoise", ["--workers", "2"], "--workers is for --engine ray"),
        ("denoise", ["--address", "x"], "--address is for --engine ray"),
        ("denoise", ["--engine", "ray", "-j", "1:1:1"], "--threads is for --engine local"),
        ("denoise", ["--engine", "slurm"], "'slurm' is not one of"),
        ("denoise", ["--pages", "first"], "'first' is not one of"),
        ("denoise", ["--existing", "keep"], "'keep' is not one of"),
        ("denoise", ["--config", "none.toml"], "cannot read none.toml"),
    ],
)
def test_bad_options_exit_2_with_one_line(run, verb, arguments, message):
    draw("a.png")
    code, out, err = run(verb, "-i", "a.png", "-o", "b.png", "-n", "net", *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and err.startswith("memnet: error: ")
    assert not Path("b.png").exists()


def test_missing_weights_are_said_in_one_line(run, monkeypatch, tmp_path):
    from memnet_fast import weights

    draw("a.png")
    monkeypatch.setattr(weights, "_FOLDER", tmp_path)
    code, _, err = run("deblock", "-i", "a.png", "-o", "b.png")
    assert code == 2 and "memnet_m6r6.deblock are not bundled" in err and err.count("\n") == 1


def test_the_flags_of_real_esrgan(run):
    """-i -o -n -s -t -g -j -x -f, as its users type them; -g 99 is a GPU that no machine has."""
    draw("in/a.jpg", "in/b.png", shape=(20, 30, 3))
    flags = ["-i", "in", "-o", "out", "-n", "net", "-s", "2", "-t", "32", "-j", "1:2:2", "-x", "-f", "png"]
    assert run("sr", *flags, "-g", "-1", "--log", "run.json")[0] == 0
    assert sorted(p.name for p in Path("out").glob("*.*")) == [".memnet", "a.png", "b.png"]
    expected = Restorer("sr", scale=2, model=small_net(), tile=32, tta=True)(pixels("in/b.png"))
    assert np.array_equal(pixels("out/b.png"), expected)
    stages = log()["stages"]
    assert [stages[name]["threads"] for name in ("decode", "network", "encode")] == [1, 2, 2]
    code, _, err = run("sr", *flags, "-g", "99", "--existing", "overwrite")
    assert code == 5 and "device cuda:99 does not exist" in err


def test_the_lists_of_real_esrgan_for_several_gpus(run):
    """0,1 and one number for each of them; -g auto is the default, and -t 0 or 32 may be said once or for each."""
    draw("a.png", shape=(40, 50))
    assert run("denoise", "-i", "a.png", "-o", "b.png", "-n", "net", "-g", "auto", "-t", "32,32", "--log", "run.json")[0] == 0
    assert log()["options"]["gpu"] is None and log()["options"]["tile"] == 32 and log()["files"][0]["windows"] > 1
    code, _, err = run("denoise", "-i", "a.png", "-o", "c.png", "-n", "net", "-g", "98,99", "-j", "1:1,2:2", "-t", "0,0")
    assert code == 5 and "device cuda:98 does not exist" in err
    assert Threads.parse("1:1,2:2").of_devices(2) == (1, 2) and Threads.parse("1:3:2").of_devices(2) == (3, 3)
    assert str(Threads.parse("1:1,2:2")) == "1:1,2:2" and str(Threads.parse("4:3:2")) == "4:3:2"


@pytest.mark.parametrize(("flag", "format"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_the_format_of_real_esrgan_names_the_outputs_of_a_folder(run, flag, format):
    """-f wins over the extension of the input, and the part before it stays, dots included."""
    draw("in/a.x.png")
    assert run("denoise", "-i", "in", "-o", "out", "-n", "net", "-f", flag)[0] == 0
    with Image.open(f"out/a.x.{flag}") as result:
        assert result.format == format


def test_options_from_a_file(run):
    draw("in/a.png", "in/b.png", shape=(20, 30, 3))
    text = 'input = ["in"]\noutput = "out"\nmodel = "net"\ncolor = "rgb"\ntta = true\ntile = 32\nlog = "run.json"\nscale = 3\n'
    Path("job.toml").write_text(text)
    assert run("sr", "--config", "job.toml", "-s", "2", "--color", "gray")[0] == 0
    options = log()["options"]
    assert options["scale"] == 2 and options["color"] == "gray" and options["tta"] is True and options["tile"] == 32
    assert pixels("out/a.png").shape == (40, 60, 1)
    given = {key: value for key, value in options.items() if value is not None}
    assert given.keys() >= {"input", "output", "png_level", "on_error", "max_pixels"}
    Path("again.toml").write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in given.items()))
    assert run("sr", "--config", "again.toml", "--existing", "skip")[0] == 0, "the names of the log are those of the file"
    assert log()["skipped"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 'y'", "no option is called colour"),
        ("color = 'lab'", "'lab' is not one of"),
        ("tile = true", "expected auto or a whole number"),
        ("tile = -1", "expected auto or a whole number"),
        ("verbose = 1", "verbose must be true or false"),
        ("tta = 0.5", "tta must be true or false"),
        ("quality = 95.5", "quality must not be a fraction"),
        ("quality = inf", "quality must not be a fraction"),
        ("tile = [1]", "tile must be one value"),
        ("input = 3", "input must be a path or a list"),
        ("quality = 'best'", "'best' is not a valid integer"),
        ("config = 'job.toml'", "no option is called config"),
        ("not toml", "is not TOML"),
        (f"tile = {'9' * 5000}", "is not TOML"),
        ("tile = 1979-05-27", "tile must be one value"),
    ],
)
def test_bad_files_of_options(run, text, message):
    draw("a.png")
    Path("job.toml").write_text(text)
    code, _, err = run("denoise", "-i", "a.png", "-o", "b.png", "-n", "net", "--config", "job.toml")
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_job_goes_on_where_it_stopped(run):
    draw("in/a.png", "in/b.png", "in/c.png")
    flags = ["-i", "in", "-o", "out", "-n", "net", "--log", "run.json"]
    assert run("denoise", *flags)[0] == 0
    os.unlink("out/b.png")
    code, out, _ = run("denoise", *flags, "--existing", "skip", "--dry-run")
    lines = [f"in/{n}.png -> out/{n}.png  ({'restore' if n == 'b' else 'skip'})" for n in "abc"]
    assert code == 0 and out.splitlines() == lines and not Path("out/b.png").exists()
    code, _, err = run("denoise", *flags, "--existing", "skip", "-v")
    assert code == 0 and "1 restored, 0 failed, 2 skipped" in err and "in/a.png -> out/a.png: skipped" in err
    assert [f["status"] for f in log()["files"]] == ["skipped", "restored", "skipped"]
    assert run("denoise", *flags, "--existing", "skip", "-x")[0] == 0
    assert log()["restored"] == 3, "other options: nothing old is taken"
    Path("out/a.png").write_bytes(b"edited")
    code, out, err = run("denoise", *flags, "--existing", "skip", "-x", "--dry-run")
    assert "refuse: the output is of unknown origin" in out
    code, _, err = run("denoise", *flags, "--existing", "skip", "-x")
    assert code == 3 and "out/a.png exists already, and no run recorded" in err and Path("out/a.png").read_bytes() == b"edited"


def test_a_second_process_on_the_folder_is_refused(run):
    draw("in/a.png")
    from memnet_fast.restore.journal import open_journal

    with open_journal(Path("out"), "key"):
        code, _, err = run("denoise", "-i", "in", "-o", "out", "-n", "net")
    assert code == 2 and "another run is writing into out" in err and err.count("\n") == 1


def test_stages_are_shown_and_logged(run):
    draw("in/a.png", "in/b.png", shape=(40, 50))
    code, _, err = run("denoise", "-i", "in", "-o", "out", "-n", "net", "--log", "run.json")
    line = err.splitlines()[-1]
    assert code == 0 and all(f"{name} " in line for name in ("decode", "network", "encode")) and "limited by " in line
    record = log()
    assert record["limited_by"] in ("decode", "network", "encode")
    for stage in record["stages"].values():
        assert stage["images"] == 2 and stage["megapixels"] == 0.004 and 0 < stage["busy"] <= 1
    assert record["files"][0]["seconds"].keys() == {"decode", "network", "encode"}


def test_one_bad_file_of_many(run):
    draw(*(f"in/{i:03}.png" for i in range(100)), shape=(5, 6))
    Path("in/050.png").write_bytes(b"")
    code, _, err = run("denoise", "-i", "in", "-o", "out", "-n", "net", "--progress", "json", "--log", "run.json")
    events = [json.loads(text) for text in err.splitlines() if text.startswith("{")]
    fractions = [e["fraction"] for e in events if e["event"] == "progress"]
    assert code == 3 and fractions == sorted(fractions) and fractions[-1] == 1
    assert events[-1]["restored"] == 99 and events[-1]["failed"] == 1
    assert len(list(Path("out").glob("*.png"))) == 99 and "in/050.png is empty" in err
    assert [f["input"] for f in log()["files"] if f["status"] == "failed"] == ["in/050.png"]


def test_all_files_fail(run):
    Path("in").mkdir()
    for name in ("a.png", "b.png"):
        Path("in", name).write_bytes(b"no")
    code, _, err = run("denoise", "-i", "in", "-o", "out", "-n", "net")
    assert code == 3 and "0 restored, 2 failed" in err


def test_a_write_that_fails_in_its_middle_costs_one_file():
    """The system ends the write of one output half-way (row I28): its old file stays, nothing is left beside it."""
    draw("in/a.png", "in/c.png", shape=(12, 13))
    draw("in/b.tiff", shape=(400, 400))
    Path("out").mkdir()
    Path("out/b.tiff").write_bytes(b"old")
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    code = limited + "from memnet_fast.cli import main; main()"
    flags = ["denoise", "-i", "in", "-o", "out", "-n", "net", "--existing", "overwrite"]
    # -B: Python would leave the bytecode of its modules cut off, too, and every later import of them would fail.
    done = subprocess.run([sys.executable, "-B", "-c", code, *flags], capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 3 and len(errors) == 1 and "b.tiff" in errors[0], done.stderr
    assert Path("out/b.tiff").read_bytes() == b"old"
    assert sorted(path.name for path in Path("out").iterdir()) == [".memnet", "a.png", "b.tiff", "c.png"]


def test_a_second_name_of_an_input_is_replaced_and_the_input_stays(run):
    """Hard links (row I29): the output gets a file of its own."""
    draw("in/a.png")
    Path("out").mkdir()
    os.link("in/a.png", "out/a.png")
    os.link("in/a.png", "in/b.png")
    before = Path("in/a.png").read_bytes()
    assert run("denoise", "-i", "in", "-o", "out", "-n", "net", "--existing", "overwrite")[0] == 0
    assert Path("in/a.png").read_bytes() == Path("in/b.png").read_bytes() == before
    assert Path("out/a.png").read_bytes() == Path("out/b.png").read_bytes() != before


def test_pages(run):
    frames = [Image.fromarray(picture((10, 11), seed=i)) for i in range(3)]
    frames[0].save("a.tiff", save_all=True, append_images=frames[1:])
    assert run("denoise", "-i", "a.tiff", "-o", "b.tiff", "-n", "net")[0] == 3
    code, _, err = run("denoise", "-i", "a.tiff", "-o", "b.tiff", "-n", "net", "--pages", "all", "-v")
    assert code == 0 and "3 frames" in err and len(images.read_image("b.tiff", pages="all").frames) == 3


def test_isolated_decoding(run):
    draw("in/a.png", "in/b.png")
    assert run("denoise", "-i", "in", "-o", "out", "-n", "net", "--isolate")[0] == 0
    assert np.array_equal(pixels("out/a.png"), Restorer(model=small_net())(pixels("in/a.png")))


def test_a_device_that_stops_working_ends_the_job_with_5(run, monkeypatch):
    import torch

    def dead(self, *args):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")

    draw("in/a.png", "in/b.png", shape=(12, 13))
    monkeypatch.setattr(Restorer, "restore", dead)
    monkeypatch.setattr(Restorer, "restore_many", dead)
    code, _, err = run("denoise", "-i", "in", "-o", "out", "-n", "net", "--log", "run.json")
    assert code == 5 and "the device stopped working: CUDA error" in err and "in/a.png" in err
    assert [f["status"] for f in log()["files"]] == ["failed", "not tried"]


def test_a_log_that_cannot_be_written_hides_no_other_error(run, monkeypatch):
    draw("in/a.png")
    Path("file").touch()
    flags = ["denoise", "-i", "in", "-o", "out", "-n", "net", "--log", "file/run.json"]
    code, _, err = run(*flags)
    assert code == 3 and "cannot make the folder file" in err

    def gone(*args, **options):
        raise BackendUnavailable("cuda", "the device stopped working")

    monkeypatch.setattr(pipeline, "run_job", gone)
    code, _, err = run(*flags, "--existing", "overwrite")
    assert code == 5 and "cannot make the folder file" in err and "the device stopped working" in err


def test_numbers_do_not_follow_the_locale(run, tmp_path, monkeypatch):
    """Row I41: a decimal comma, and a clock far from UTC."""
    before, zone = locale.setlocale(locale.LC_ALL), os.environ.get("TZ")
    try:
        os.environ["TZ"] = "<+1245>-12:45"
        time.tzset()  # the variable alone is read once
        _set_a_locale_with_a_comma(tmp_path, monkeypatch)
        assert locale.localeconv()["decimal_point"] == ","
        draw("in/a.png", "in/b.png")
        flags = ["denoise", "-i", "in", "-o", "out", "-n", "net", "--log", "run.json"]
        code, _, err = run(*flags, "--progress", "json")
        assert code == 0 and isinstance(log()["seconds"], float)
        assert all(isinstance(json.loads(line), dict) for line in err.splitlines() if line.startswith("{"))
        assert run(*flags, "--existing", "skip")[0] == 0 and log()["skipped"] == 2
    finally:
        locale.setlocale(locale.LC_ALL, before)
        os.environ.pop("TZ")
        if zone is not None:
            os.environ["TZ"] = zone
        time.tzset()


def _set_a_locale_with_a_comma(folder: Path, monkeypatch) -> None:
    """One that is installed, or one that is compiled now."""
    for name in ("de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            return
    command = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(folder / "de_DE.UTF-8")]
    if shutil.which("localedef") is not None:
        subprocess.run(command, capture_output=True, timeout=60)
        monkeypatch.setenv("LOCPATH", str(folder))
        with contextlib.suppress(locale.Error):  # also where it said that it made one
            locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
            return
    pytest.skip("no locale with a decimal comma is installed, and none can be made")


def test_a_reader_of_the_progress_that_leaves_ends_the_job():
    """The pipe breaks (row I34); what is there is whole, and the next run goes on."""
    draw(*(f"in/{i}.png" for i in range(12)), shape=(60, 70))
    code = "from memnet_fast.cli import main; main()"
    flags = ["denoise", "-i", "in", "-o", "out", "-n", "net", "--progress", "json", "-t", "32", "--existing", "skip"]
    with subprocess.Popen([sys.executable, "-c", code, *flags], stderr=subprocess.PIPE) as child:
        child.stderr.readline()
        child.stderr.close()
    assert child.returncode not in (0, -signal.SIGKILL)
    restorer = Restorer(model=small_net(), tile=32)
    for path in Path("out").glob("*.png"):
        assert np.array_equal(pixels(str(path)), restorer(pixels(f"in/{path.name}")))
    assert not list(Path("out").glob("*.part"))
    report = pipeline.run_job(pipeline_plan(), restorer)
    assert report.count("failed") == 0 and len(report.results) == 12


def pipeline_plan():
    from memnet_fast.restore.job import plan_job

    return plan_job(["in"], "out", existing="skip")

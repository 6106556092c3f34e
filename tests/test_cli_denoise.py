"""`memnet denoise`, from arguments to files and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.restoring import picture, small_net

from memnet_fast.cli import main
from memnet_fast.cli.options import spread_inputs
from memnet_fast.restore import Restorer, images
from memnet_fast.weights import save_weights


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with the weights `net`, and signal handlers as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    save_weights(small_net(), tmp_path / "net")
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(capsys):
    def call(*arguments: str, model: bool = True) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["denoise", *arguments, *(["-n", "net"] if model else [])])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def draw(*names: str, shape: tuple[int, ...] = (14, 15)) -> None:
    for i, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(shape, seed=i)).save(name)


def pixels(name: str) -> np.ndarray:
    found = images.read_image(name).pixels
    return found[..., 0] if found.shape[2] == 1 else found


def images_in(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def listing() -> list[str]:
    return sorted(str(p) for p in Path().rglob("*") if p.is_file() and p.parent.name != ".memnet")


def test_one_file(run):
    draw("a.png", shape=(20, 30, 3))
    code, out, err = run("-i", "a.png", "-o", "b.png")
    assert (code, out) == (0, "")
    assert err.startswith("memnet: 1 restored, 0 failed; ") and "(cpu, fp32, winograd)" in err and err.count("\n") == 1
    assert np.array_equal(pixels("b.png"), Restorer(model=small_net())(pixels("a.png")))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-i", "a", "b", "-o", "c"], ["-i", "a", "-i", "b", "-o", "c"]),
        (["-i", "a", "-o", "c", "--input", "b", "d"], ["-i", "a", "-o", "c", "--input", "b", "-i", "d"]),
        (["--input=a", "b", "-r"], ["--input=a", "-i", "b", "-r"]),
        (["-i", "-a", "b", "-x"], ["-i", "-a", "-i", "b", "-x"]),
        (["-o", "c", "d"], ["-o", "c", "d"]),
        (["-i"], ["-i"]),
        (["-i", "a", "--", "b"], ["-i", "a", "--", "b"]),
    ],
)
def test_one_flag_takes_several_inputs(arguments, expected):
    assert spread_inputs(arguments) == expected


def test_several_inputs_after_one_flag_and_repeated_flags(run):
    draw("a.png", "b.png", "-c.png", "in/d.png")
    assert run("-i", "a.png", "b.png", "-o", "out", "--input", "-c.png", "in")[0] == 0
    assert images_in("out") == ["-c.png", "a.png", "b.png", "d.png"]


def test_a_tree_is_mirrored(run):
    draw("in/a.png", "in/sub/b.jpg", "in/sub/deep/c.png")
    Path("in/README").touch()
    code, _, err = run("-i", "in", "-o", "out", "-r", "-f", "png")
    assert code == 0 and "3 restored, 0 failed; 1 ignored" in err
    assert [name for name in listing() if name.startswith("out/")] == ["out/a.png", "out/sub/b.png", "out/sub/deep/c.png"]


def test_options_reach_the_restorer(run):
    draw("a.png", shape=(60, 70, 3))
    log = ["--log", "run.json", "--existing", "overwrite"]
    assert run("-i", "a.png", "-o", "b.png", "--algorithm", "direct", "-t", "32", "-b", "2", "--color", "rgb", *log)[0] == 0
    record = json.loads(Path("run.json").read_text())
    assert (
        record["settings"]["algorithm"] == "direct"
        and record["files"][0]["tile"] == [32, 32]
        and record["files"][0]["batch"] == 2
    )
    expected = Restorer(model=small_net(), algorithm="direct", color="rgb")(pixels("a.png"))
    assert np.array_equal(pixels("b.png"), expected)
    assert run("-i", "a.png", "-o", "b.png", "--backend", "torch", "-p", "bf16", "--color", "gray", "-x", *log)[0] == 0
    record = json.loads(Path("run.json").read_text())
    assert (record["settings"]["backend"], record["settings"]["precision"], record["files"][0]["channels"]) == (
        "torch",
        "bf16",
        1,
    )
    expected = Restorer(model=small_net(), backend="torch", precision="bf16", color="gray", tta=True)(pixels("a.png"))
    assert np.array_equal(pixels("b.png"), expected[..., 0])
    assert run("-i", "a.png", "-o", "b.png", "-t", "32", "--overlap", "2", "--device", "cpu", *log)[0] == 0
    expected = Restorer(model=small_net(), tile=32, overlap=2)(pixels("a.png"))
    assert np.array_equal(pixels("b.png"), expected)


def test_quality_and_png_level_reach_the_encoder(run):
    draw("a.png", shape=(64, 64, 3))
    for name, options in {"low.jpg": ["-Q", "20"], "high.jpg": [], "flat.png": ["--png-level", "0"], "small.png": []}.items():
        assert run("-i", "a.png", "-o", name, *options)[0] == 0
    size = {name: os.path.getsize(name) for name in ("low.jpg", "high.jpg", "flat.png", "small.png")}
    assert size["low.jpg"] * 2 < size["high.jpg"] and size["small.png"] < size["flat.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "a.png"], "Missing option '-o'"),
        (["-o", "b.png"], "Missing option '-i'"),
        (["-i", "none.png", "-o", "b.png"], "there is no file or folder none.png"),
        (["-i", "a.png", "-o", "b.png", "--bogus"], "No such option '--bogus'"),
        (["-i", "a.png", "-o", "b.png", "-t", "big"], "expected auto or a whole number of at least 0, got 'big'"),
        (["-i", "a.png", "-o", "b.png", "-b", "0"], "expected auto or a whole number of at least 1"),
        (["-i", "a.png", "-o", "b.png", "-t", "8"], "a tile of 8 has no core"),
        (["-i", "a.png", "-o", "b.png", "--color", "lab"], "'lab' is not one of"),
        (["-i", "a.png", "-o", "b.png", "-Q", "0"], "0 is not in the range 1<=x<=100"),
        (["-i", "a.png", "-o", "b.png", "-p", "fp7"], "unknown precision 'fp7'"),
        (["-i", "a.png", "-o", "b.png", "--backend", "tpu"], "unknown backend 'tpu'"),
        (["-i", "a.png", "-o", "b.png", "--device", "gpu"], "unknown device 'gpu'"),
        (["-i", "a.png", "-o", "b.png", "-n", "nothing"], "there is no model and no file 'nothing'"),
        (["-i", "a.png", "-o", "b.png", "-n", "n" * 300], "cannot read weights nnn"),
        (["-i", "", "-o", "out"], "an input is an empty path"),
        (["-i", "a.png", "-o", "b.png", "-n", "a.png"], "neither safetensors, nor a PyTorch file"),
        (["-i", "a.png", "-o", "a.png"], "is the input itself"),
        (["-i", "a.png", "-o", "old.png"], "exists already"),
        (["-i", "a.png", "x/a.png", "-o", "out"], "would both be written to out/a.png"),
        (["-i", "a.png", "-o", "b.png", "-v", "-q"], "contradict"),
    ],
)
def test_bad_options_exit_2_with_one_line_and_write_nothing(run, arguments, message):
    draw("a.png", "x/a.png", "old.png")
    before = listing()
    code, out, err = run(*arguments, model="-n" not in arguments)
    assert (code, out) == (2, "")
    assert err.startswith("memnet: error: ") and message in err and err.count("\n") == 1
    assert listing() == before


def test_nothing_to_restore_exits_4(run):
    Path("empty").mkdir()
    Path("empty/README").touch()
    for pattern in ("empty", "none*.png"):
        code, _, err = run("-i", pattern, "-o", "out")
        assert code == 4 and "nothing to restore" in err
    assert "1 ignored" in run("-i", "empty", "-o", "out")[2]


def test_a_backend_that_cannot_run_exits_5(run):
    draw("a.png")
    code, _, err = run("-i", "a.png", "-o", "b.png", "--backend", "cpu", "-p", "fp16")
    assert code == 5 and "backend 'cpu' cannot run: it computes in fp32 or bf16, not fp16" in err


def test_failed_files_exit_3_and_are_listed(run):
    draw("in/a.png", "in/b.png", "in/c.png")
    Path("in/b.png").write_bytes(Path("in/b.png").read_bytes()[:70])
    code, out, err = run("-i", "in", "-o", "out", "--log", "run.json")
    assert (code, out) == (3, "") and "Traceback" not in err
    assert "memnet: error: in/b.png is damaged or cut off" in err and "2 restored, 1 failed" in err
    assert images_in("out") == ["a.png", "c.png"]
    log = json.loads(Path("run.json").read_text())
    assert [f["status"] for f in log["files"]] == ["restored", "failed", "restored"]
    assert log["files"][1]["error_type"] == "ImageCorrupt" and (log["restored"], log["failed"]) == (2, 1)
    code, _, err = run("-i", "in/b.png", "-o", "x.png")
    assert code == 3 and "0 restored, 1 failed" in err


def test_on_error_stop_leaves_the_rest(run):
    draw("in/a.png", "in/b.png", "in/c.png")
    Path("in/b.png").write_bytes(b"")
    code, _, err = run("-i", "in", "-o", "out", "--on-error", "stop", "--log", "run.json")
    assert code == 3 and images_in("out") == ["a.png"] and "1 not tried" in err
    log = json.loads(Path("run.json").read_text())
    assert log["state"] == "stopped" and [f["status"] for f in log["files"]] == ["restored", "failed", "not tried"]


def test_the_limit_on_pixels_is_an_option(run):
    draw("a.png")
    code, _, err = run("-i", "a.png", "-o", "b.png", "--max-pixels", "209")
    assert code == 3 and "15 x 14 pixels, more than the limit of 209" in err
    assert run("-i", "a.png", "-o", "b.png", "--max-pixels", "210")[0] == 0


def test_dry_run_prints_the_plan_and_writes_nothing(run):
    draw("in/a.png", "in/sub/b.png")
    before = listing()
    code, out, err = run("-i", "in", "-o", "out", "-r", "--dry-run", "--log", "run.json")
    assert (code, err) == (0, "")
    assert out == "in/a.png -> out/a.png\nin/sub/b.png -> out/sub/b.png\n"
    assert listing() == before


def test_overwriting_needs_to_be_asked_for(run):
    draw("a.png", "b.png")
    before = Path("b.png").read_bytes()
    assert run("-i", "a.png", "-o", "b.png")[0] == 2 and Path("b.png").read_bytes() == before
    assert run("-i", "a.png", "-o", "b.png", "--existing", "overwrite")[0] == 0 and Path("b.png").read_bytes() != before


def test_the_strip_is_written(run):
    draw("a.png")
    assert run("-i", "a.png", "-o", "b.png", "--compare", "strip.png")[0] == 0
    assert np.array_equal(pixels("strip.png")[-14:, -15:].shape, (14, 15))
    assert run("-i", "a.png", "b.png", "-o", "out", "--compare", "strip2.png")[0] == 2


def test_json_progress_is_monotonic_and_complete(run):
    draw("in/a.png", "in/b.png", shape=(60, 60))
    code, out, err = run("-i", "in", "-o", "out", "--progress", "json", "-t", "32", "-b", "1", "-q")
    events = [json.loads(line) for line in err.splitlines()]
    assert all(0 <= e["index"] < e["files"] == 2 for e in events if e["event"] == "progress")
    fractions = [e["fraction"] for e in events if e["event"] == "progress"]
    assert (code, out) == (0, "") and fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert len(set(fractions)) > 10
    assert [e["status"] for e in events if e["event"] == "file"] == ["restored", "restored"]
    assert events[-1]["event"] == "end" and events[-1]["restored"] == 2 and events[-1]["left"] == 0


def test_a_bar_can_be_asked_for_and_quiet_says_nothing(run):
    draw("[b]a.png")
    assert "100%" in run("-i", "[b]a.png", "-o", "b.png", "--progress", "bar")[2]
    assert run("-i", "[b]a.png", "-o", "c.png", "-q") == (0, "", "")


def test_verbose_says_what_was_ignored_and_chosen(run):
    draw("in/a.png")
    Path("in/notes.txt").touch()
    err = run("-i", "in", "-o", "out", "-v")[2]
    assert "ignored in/notes.txt: not an image by its name" in err
    assert err.count("backend cpu, precision fp32, algorithm winograd on cpu") == 1
    assert "in/a.png -> out/a.png: 15 x 14, in one piece" in err
    Path("in/a.png").write_bytes(b"")
    assert "Traceback" in run("-i", "in/a.png", "-o", "b.png", "-v")[2]


def test_names_with_control_characters_are_printed_escaped(run):
    name = "evil\n\x1b[31mred.png"
    draw(name)
    Path(name).write_bytes(b"junk")
    code, _, err = run("-i", name, "-o", "b.png")
    assert code == 3 and "\x1b" not in err and "evil" in err and err.count("\n") == 2
    os.rename(name, b"\xff.png")
    assert run("-i", os.fsdecode(b"\xff.png"), "-o", "b.png", "--log", "run.json")[0] == 3
    assert json.loads(Path("run.json").read_text())["failed"] == 1


def test_warnings_about_files_are_lines_without_control_characters(run):
    name = "evil\n\x1b[31mred.png"
    draw(name)
    Path(name).write_bytes(Path(name).read_bytes()[:-12])  # without IEND
    code, _, err = run("-i", name, "-o", "b.png")
    assert code == 0 and "its end is missing" in err and "\x1b" not in err and err.count("\n") == 2


def test_closed_streams_cost_no_image(run, monkeypatch):
    """As `memnet ... >&- 2>&-` starts it."""
    draw("a.png")
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        closed.setattr(sys, "stderr", None)
        with pytest.raises(SystemExit) as left:
            main(["denoise", "-i", "a.png", "-o", "b.png", "-n", "net", "-v"])
    assert not left.value.code and Path("b.png").exists()


def test_a_second_run_over_a_folder_that_holds_its_output(run):
    draw("in/a.png")
    for existing in ("error", "overwrite"):
        assert run("-i", "in", "-o", "in/out", "-r", "--existing", existing)[0] == 0
    assert listing() == ["in/a.png", "in/out/a.png", "net"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", ["loading", "restoring"])
def test_a_signal_that_is_swallowed_on_its_way_still_ends_the_run(run, monkeypatch, number, code, where):
    """As an extension module does whose import it meets: the exception is lost, and something else is done instead."""
    draw("in/a.png", "in/b.png", "in/c.png", shape=(60, 60))

    def swallowing(*args, **values):
        try:
            signal.raise_signal(number)
        except BaseException:
            return

    monkeypatch.setattr(signal, "getsignal", lambda n: signal.default_int_handler)
    if where == "loading":
        original = Restorer.__init__
        monkeypatch.setattr(Restorer, "__init__", lambda self, *a, **k: (swallowing(), original(self, *a, **k))[1])
    else:
        monkeypatch.setattr("memnet_fast.cli.progress._Json.event", swallowing)
    assert run("-i", "in", "-o", "out", "-t", "32", "-b", "1", "--progress", "json")[0] == code
    assert not Path("out").exists() or images_in("out") == []


def _start(*arguments: str) -> subprocess.Popen[str]:
    # A shell's background jobs ignore SIGINT; a child of the tests must not inherit that.
    command = [sys.executable, "-c", "from memnet_fast.cli import main; main()", "denoise", *arguments]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_whole_files_only(number, code):
    draw("in/a.png")
    draw("in/b.png", shape=(700, 700))
    with _start(
        "-i", "in", "-o", "out", "-n", "net", "--progress", "json", "-t", "32", "-b", "1", "--log", "run.json"
    ) as child:
        for line in child.stderr:
            event = json.loads(line)
            if event["event"] == "progress" and event["index"] == 1 and event["done"] > 0:
                child.send_signal(number)
                break
        rest = child.stderr.read()
    assert child.returncode == code, rest
    assert "Traceback" not in rest and '"event": "end"' not in rest
    assert images_in("out") == ["a.png"] and pixels("out/a.png").shape == (14, 15)
    log = json.loads(Path("run.json").read_text())
    assert log["state"] == "not finished" and [f["status"] for f in log["files"]] == ["restored", "not tried"]

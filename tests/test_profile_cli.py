"""`memnet profile`: what it prints and writes, and one line for everything that cannot be."""

from __future__ import annotations

import builtins
import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from support.restoring import small_net
from support.threads import torch_threads

from memnet_fast import cli, files, weights
from memnet_fast.profile import ceilings, measuring
from memnet_fast.profile.ceilings import Ceilings


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A small network as the bundled one, known ceilings, one thread, and a folder of its own to work in."""
    save = tmp_path / "weights" / "memnet_m6r6.denoise.safetensors"
    save.parent.mkdir()
    weights.save_weights(small_net(), save)
    monkeypatch.setattr(weights, "_FOLDER", save.parent)
    monkeypatch.setattr(ceilings, "of_cpu", lambda threads, isa, precision="fp32": Ceilings(2e11, 1e11, 1e10, 1))
    monkeypatch.setattr(cli, "_end_politely", lambda state: None)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with torch_threads(1):
        yield


@pytest.fixture
def run(capfd):
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["profile", *arguments])
        out, err = capfd.readouterr()
        # PyTorch's own profiler says so, whatever its log level.
        err = re.sub(r"USDT:.*\n", "", err)
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (11, 13, 3), np.uint8)).save(path)
    return str(path)


def _one_line(err: str) -> str:
    assert err.startswith("memnet: error: ") and err.count("\n") == 1, err
    return err


def test_everything_it_writes(run, picture, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = run("-i", picture, "-o", "t.json", "--memory", "--json", "n.json", "--rounds", "2", "--backend", "torch")
    assert code == 0, err
    written = sorted(p.name for p in (tmp_path / "work").iterdir())
    assert written == ["n.json", "t.json", "t.memory.png", "t.roofline.png"]
    assert [line for line in err.splitlines() if not line.startswith("memnet: wrote ")] == []
    numbers = json.loads((tmp_path / "work" / "n.json").read_text())
    assert numbers["shape"] == [1, 1, 11, 13] and len(numbers["operations"]) == 8 and len(numbers["timed_ms"]) == 2
    assert len(numbers["memory"]["concatenations"]) == 2
    assert json.loads((tmp_path / "work" / "t.json").read_text())["traceEvents"]
    for png in (tmp_path / "work").glob("*.png"):
        with Image.open(png) as image:
            assert image.width > 400 and image.height > 300
    for word in ("residual_block", "gate, 3 sources", "of roofline", "concatenation", "1x1x11x13"):
        assert word in out, word


def test_numbers_alone_on_stdout(run):
    code, out, err = run("--size", "5x7", "--json", "-", "--rounds", "1", "--backend", "torch", "-p", "bf16")
    assert code == 0 and err == ""
    numbers = json.loads(out)
    assert numbers["shape"] == [1, 1, 5, 7] and numbers["precision"] == "bf16" and numbers["backend"] == "torch"


def test_a_row_for_each_operation(run):
    code, out, _ = run("--size", "6", "--rounds", "1", "--backend", "torch", "--each")
    assert code == 0 and "residual_block.1.1" in out and "1x1x6x6" in out


@pytest.mark.parametrize(("size", "height", "width"), [("4x5", 4, 5), ("30x29", 30, 29)])
def test_an_image_is_cut_or_mirrored(run, picture, monkeypatch, size, height, width):
    seen = []
    honest = measuring.measure
    monkeypatch.setattr(measuring, "measure", lambda net, x, **o: seen.append(x) or honest(net, x, **o))
    code, _, err = run("-i", picture, "--size", size, "--rounds", "1", "--backend", "torch")
    assert code == 0, err
    rgb = np.asarray(Image.open(picture), np.float32) / 255
    luma = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    assert seen[0].shape == (1, 1, height, width)
    given = seen[0][0, 0].numpy()
    assert np.allclose(given[: min(11, height), : min(13, width)], luma[:height, :width], atol=1e-6)
    if height > 22:
        assert np.array_equal(given[11:22], given[:11][::-1])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give an image"),
        (["-i", "nothing.png"], 3, "nothing.png"),
        (["-i", "broken.png"], 3, "broken.png"),
        (["--size", "0x4"], 2, "HEIGHTxWIDTH"),
        (["--size", "4x"], 2, "HEIGHTxWIDTH"),
        (["--size", "999999"], 2, "999999 has more than 268435456 pixels"),
        (["--size", "4", "--rounds", "0"], 2, "rounds"),
        (["--size", "4", "-n", "nobody"], 2, "no model and no file 'nobody'"),
        (["--size", "4", "--backend", "abacus"], 2, "unknown backend"),
        (["--size", "4", "-p", "fp31"], 2, "unknown precision"),
        (["--size", "4", "--device", "tpu"], 2, "unknown device"),
        (["--size", "4", "--backend", "torch", "--algorithm", "winograd"], 5, "direct"),
        (["--size", "4", "-o", "missing/t.json"], 3, "there is no folder missing"),
        (["--size", "4", "--json", "broken.png/n.json"], 3, "broken.png is a file"),
        (["--size", "4", "--json", "n" * 300], 3, "File name too long"),
        (["--size", "4", "-n", "n" * 300], 2, "cannot read weights"),
        (["--size", "4", "-o", "."], 3, "is a folder"),
        (["--size", "4", "--json", "missing/n.json"], 3, "there is no folder missing"),
        (["--size", "4", "-o", "t.json", "--json", "t.json"], 3, "another result"),
        (["--size", "4", "--ncu", "--backend", "cpu"], 2, "run on a GPU"),
        (["--size", "4", "--ncu", "-p", "fp32"], 2, "knows the precisions"),
    ],
)
def test_what_cannot_be_is_one_line(run, tmp_path, arguments, code, message):
    (tmp_path / "work" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    before = sorted((tmp_path / "work").iterdir())
    found, out, err = run(*arguments)
    assert (found, out) == (code, "") and message in _one_line(err)
    assert sorted((tmp_path / "work").iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_backend_that_cannot_run(run):
    code, out, err = run("--size", "4", "--backend", "cuda")
    assert (code, out) == (5, "") and "cuda" in _one_line(err)


def test_without_matplotlib_only_pictures_are_refused(run, monkeypatch, tmp_path):
    honest = builtins.__import__

    def missing(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return honest(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    code, _, err = run("--size", "4", "-o", "t.json", "--backend", "torch")
    assert code == 2 and "pip install memnet_fast[profile]" in _one_line(err)
    assert not list((tmp_path / "work").iterdir())
    assert run("--size", "4", "--rounds", "1", "--backend", "torch")[0] == 0


def test_a_full_disk_leaves_nothing_half_written(run, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    code, out, err = run("--size", "4", "-o", "t.json", "--rounds", "1", "--backend", "torch")
    assert code == 3 and out == "" and "No space left" in _one_line(err)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("backend", ["auto", "cuda", "triton", "torch"])
def test_the_command_for_nsight_compute(run, backend, picture):
    code, out, err = run("-i", picture, "--size", "9x8", "--backend", backend, "--ncu")
    assert code == 0 and err == ""
    command, *comments = out.splitlines()
    words = shlex.split(command)
    assert words[0] == "ncu" and words[words.index("--nvtx-include") + 1] == "memnet/"
    assert all(line.startswith("# ") for line in comments)
    for name in ("first_conv", "residual_block.1.0", "gate.0", "reconstruct"):
        assert name in " ".join(comments)
    # What follows is a command line of this program.
    own = words[words.index("profile") + 1 :]
    options = cli.memnet.commands["profile"].make_context("profile", own).params
    assert options["image"] == picture and options["size"] == (9, 8) and options["rounds"] == 1 and options["device"] == "cuda"
    assert options["backend"] == ("cuda" if backend == "auto" else backend)
    if backend != "torch":
        pattern = re.compile(words[words.index("--kernel-name") + 1].removeprefix("regex:"))
        assert pattern.match("first_conv_kernel" if backend in ("auto", "cuda") else "conv3x3")


def test_the_names_of_the_kernels_are_those_of_the_sources():
    from pathlib import Path

    from memnet_fast.profile.ncu import _KERNELS

    root = Path(__file__).parents[1]
    text = "".join(p.read_text() for p in (root / "csrc" / "cuda").iterdir() if p.suffix in (".cu", ".cuh"))
    # __global__ void __launch_bounds__(...) name(
    functions = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(const __grid_constant__", text))
    assert set(_KERNELS["cuda"]) == functions - {"fold_kernel", "quantise_kernel", "pack_kernel"}
    kernels = root / "kernels"
    launched = set()
    for name in ("first_conv", "residual_block", "gate", "reconstruct"):
        launched |= set(re.findall(r"^\s*(\w+)\[", (kernels / f"{name}.py").read_text(), re.MULTILINE))
    assert set(_KERNELS["triton"]) <= launched

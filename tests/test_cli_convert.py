"""`memnet convert`: every format to ours, in one step or not at all; C26."""

from __future__ import annotations

import os

import pytest
import torch
from support import checkpoints as make
from support import networks

from memnet_fast import cli, weights
from memnet_fast.config import MemNetConfig


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_end_politely", lambda state: None)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture
def caffe(tmp_path):
    path = tmp_path / "MemNet_M2R2.caffemodel"
    path.write_bytes(make.caffemodel(make.official_blobs(2, 2, 4)))
    return path


def test_caffemodel(run, caffe, tmp_path):
    out = tmp_path / "out.safetensors"
    code, told, err = run("convert", caffe, out)
    assert code == 0 and told == ""
    assert "official .caffemodel, M2R2, 4 channels, 1 -> 1" in err and f"wrote {out}" in err and len(err.splitlines()) == 2
    before, after = weights.load_weights(caffe), weights.load_weights(out)
    assert before.config == after.config == MemNetConfig(channels=4, num_memory_blocks=2, num_recursions=2)
    state = after.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in before.state_dict().items())
    origin = weights.load_info(out)["converted_from"]
    assert origin["file"] == caffe.name and "caffemodel" in origin["recognised"] and len(origin["sha256"]) == 64


def test_our_own_file_onto_itself(run, tmp_path):
    path, link = tmp_path / "net.safetensors", tmp_path / "link.safetensors"
    weights.save_weights(networks.build(networks.SMALL), path, {"author": "a test"})
    link.symlink_to(path)
    before = weights.load_weights(path).state_dict()
    for source in (path, link):
        assert run("convert", source, path)[0] == 0
        assert weights.load_info(path)["author"] == "a test"
        after = weights.load_weights(path).state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.safetensors", "net.safetensors"]


def test_failures_leave_nothing(run, caffe, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    broken = tmp_path / "broken.pth"
    broken.write_bytes(caffe.read_bytes()[:-1])
    for arguments, part in (
        ((broken, out), "broken.pth"),
        ((tmp_path / "missing", out), "No such file"),
        ((tmp_path, out), "directory"),
        ((caffe, tmp_path / "out.pth"), "something.safetensors"),
    ):
        code, _, err = run("convert", *arguments)
        assert code == 2 and part in err and len(err.splitlines()) == 1 and "Traceback" not in err
    out.write_bytes(b"older")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run("convert", caffe, out)
    assert code == 3 and "No space left" in err
    assert out.read_bytes() == b"older"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["broken.pth", caffe.name, "out.safetensors"])


def test_nonfinite_weights_only_on_demand(run, tmp_path):
    blobs = make.official_blobs(1, 1, 4)
    blobs["conv1"][1][0] = float("inf")
    source, out = tmp_path / "x.caffemodel", tmp_path / "x.safetensors"
    source.write_bytes(make.caffemodel(blobs))
    code, _, err = run("convert", source, out)
    assert code == 2 and "conv1 (bias) is not finite" in err and not out.exists()
    assert run("convert", source, out, "--allow-nonfinite")[0] == 0
    assert weights.load_weights(out, allow_nonfinite=True).first.conv.bias[0].isinf()


def test_an_unforeseen_error_is_one_line_unless_verbose(run, caffe, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(weights, "save_weights", broken)
    code, _, err = run("convert", caffe, tmp_path / "out.safetensors")
    assert (code, err) == (1, "memnet: error: unexpected RuntimeError: a bug (-v shows where)\n")
    assert "Traceback" in run("convert", "-v", caffe, tmp_path / "out.safetensors")[2]


def test_help_does_not_wait_for_torch_and_names_the_command(run):
    code, out, _ = run("--help")
    assert code == 0 and "  convert " in out
    code, out, _ = run("convert", "--help")
    assert code == 0 and "--allow-nonfinite" in out and "DST.{safetensors,onnx,pt2}" in out

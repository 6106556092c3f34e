"""The small training loop: it learns, it resumes bit by bit, it stops on nonsense, it grows without changing the function."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memnet_fast import weights
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError, NumericError
from memnet_fast.reference import MemNet
from memnet_fast.tasks import TASKS
from memnet_fast.training import export, loop
from memnet_fast.training.loop import Stage
from memnet_fast.training.samples import ImageSet

TINY = MemNetConfig(channels=8, num_memory_blocks=2, num_recursions=1)
STAGE = Stage(recursions=1, steps=6, batch=2, patch=16, warmup=2, lr=2e-3)


def _images() -> list[torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(40), torch.arange(48), indexing="ij")
    return [(128 + 100 * torch.sin(x / (3 + k)) * torch.cos(y / 7)).to(torch.uint8) for k in (2, 3)]


def _set(stage: Stage = STAGE) -> ImageSet:
    return ImageSet(_images(), stage.levels, stage.patch)


def _new(seed: int = 0) -> MemNet:
    torch.manual_seed(seed)
    return MemNet(TINY)


def test_two_images_are_learnt(tmp_path: Path) -> None:
    stage = Stage(recursions=1, steps=200, batch=4, patch=24, warmup=10, lr=5e-3, low=30, high=50, ema=0.9)
    net = loop.train_stage(_new(), _set(stage), stage, checkpoint=tmp_path / "c", log=tmp_path / "log", bf16=False)
    restored, noisy = loop.validate(net, _images(), TASKS["denoise"], (40,))
    assert noisy["sigma 40"] == pytest.approx(20 * math.log10(255 / 40), abs=0.2)
    assert restored["sigma 40"] > noisy["sigma 40"] + 3
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("task", ["denoise", "deblock", "sr"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_interrupted_and_resumed_is_the_same(task: str, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {"denoise": {}, "deblock": {"low": 5, "high": 60}, "sr": {"only": (2, 3)}}[task]
    stage = dataclasses.replace(STAGE, task=task, **levels)
    data = _set(stage)
    whole = loop.train_stage(_new(), data, stage, checkpoint=tmp_path / "a", save_every=0)
    calls = 0
    original = loop.loss_function

    def interrupted(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "loss_function", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.train_stage(_new(), data, stage, checkpoint=tmp_path / "b", save_every=0)
    monkeypatch.setattr(loop, "loss_function", original)
    resumed = loop.train_stage(_new(7), data, stage, checkpoint=tmp_path / "b", save_every=0)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    loop.train_stage(_new(), _set(), STAGE, checkpoint=tmp_path / "c")
    with pytest.raises(InputError, match="another stage"):
        loop.train_stage(_new(), _set(), Stage(recursions=1, steps=7), checkpoint=tmp_path / "c")


def test_nan_stops_and_keeps_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = loop.loss_function, 0

    def poisoned(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args) * (float("nan") if calls == 4 else 1)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "loss_function", poisoned)
    with pytest.raises(NumericError, match="step 3"):
        loop.train_stage(_new(), _set(), STAGE, checkpoint=tmp_path / "c", save_every=0)
    state = torch.load(tmp_path / "c", weights_only=True)
    assert state["step"] == 3
    assert all(torch.isfinite(v.float()).all() for v in state["net"].values())


@pytest.mark.parametrize("order", ["long_short", "short_long"])
def test_growing_keeps_the_function(order: str) -> None:
    torch.manual_seed(0)
    net = MemNet(MemNetConfig(channels=8, num_memory_blocks=3, num_recursions=2, gate_order=order))  # type: ignore[arg-type]
    for _ in range(2):
        net(torch.rand(3, 1, 16, 16))
    net.eval()
    grown = loop.grow(net, 4).eval()
    x = torch.rand(2, 1, 11, 13)
    assert grown.config.num_recursions == 4
    torch.testing.assert_close(grown(x), net(x), rtol=1e-5, atol=1e-6)
    grown.train()
    grown(x).sum().backward()
    # The new memories are read with zero weights, and must learn all the same.
    assert grown.blocks[0].gate.conv.weight.grad[:, 3 * 8 :].abs().sum() > 0
    with pytest.raises(InputError):
        loop.grow(grown, 2)


def _folder(folder: Path) -> Path:
    folder.mkdir()
    for i, image in enumerate(_images()):
        Image.fromarray(np.asarray(image)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("task", ["denoise", "deblock", "sr"])
def test_command_trains_a_folder_from_an_earlier_result(tmp_path: Path, task: str) -> None:
    data = str(_folder(tmp_path / "data"))
    loop.save_result(_new(), [{"name": "one"}], tmp_path / "one.result")
    command = [sys.executable, "-m", "memnet_fast.training", "--data", data, "--validation", data, "--task", task]
    command += ["--work", str(tmp_path / "work"), "--recursions", "2", "--steps", "2", "--batch", "1", "--patch", "16"]
    command += ["--warmup", "1", "--name", "two", "--init", str(tmp_path / "one.result")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["steps"] == 2 and record["task"] == task
    labels = [TASKS[task].label(level) for level in TASKS[task].levels]
    assert list(record["psnr"]) == list(record["psnr_degraded"]) == labels
    result = tmp_path / "work" / "two.result"
    assert loop.load_result(result).config == dataclasses.replace(TINY, num_recursions=2)
    assert [r["name"] for r in loop.load_history(result)] == ["one", "two"]


@pytest.mark.parametrize(("task", "label"), [("denoise", "sigma 50"), ("deblock", "Q 10"), ("sr", "x3")])
def test_export_states_what_was_measured(tmp_path: Path, task: str, label: str) -> None:
    net = loop.train_stage(_new(), _set(), STAGE, checkpoint=tmp_path / "c")
    loop.save_result(net, [{"name": "a", "hours": 0.5}, {"name": "b", "hours": 0.25, "task": task}], tmp_path / "r")
    words = ["--validation-name", "V", "--data", "D", "--hardware", "H", "--commit", "0"]
    folder = _folder(tmp_path / "data")
    export.main([str(tmp_path / "r"), str(tmp_path / "w"), "--validation", str(folder), *words], standalone_mode=False)
    info = weights.load_info(tmp_path / "w")
    assert info["task"] == task and info["hours"] == 0.75 and len(info["head_weights"]) == 2
    restored, degraded = loop.validate(net, _images(), TASKS[task])
    assert info["psnr"]["V"] == pytest.approx(restored, abs=1e-3)
    assert info["psnr_degraded"]["V"] == pytest.approx(degraded, abs=1e-3) and label in degraded

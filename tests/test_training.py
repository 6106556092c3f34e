"""The small training loop: it learns, it resumes bit by bit, it stops on nonsense, it grows without changing the function."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memnet_fast import degrade, weights
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError, NumericError
from memnet_fast.reference import MemNet
from memnet_fast.training import export, loop
from memnet_fast.training.loop import Stage

TINY = MemNetConfig(channels=8, num_memory_blocks=2, num_recursions=1)
STAGE = Stage(recursions=1, steps=6, batch=2, patch=16, warmup=2, lr=2e-3)


@pytest.fixture
def images() -> list[torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(40), torch.arange(48), indexing="ij")
    return [(128 + 100 * torch.sin(x / (3 + k)) * torch.cos(y / 7)).to(torch.uint8) for k in (2, 3)]


def _new(seed: int = 0) -> MemNet:
    torch.manual_seed(seed)
    return MemNet(TINY)


def test_two_images_are_learnt(images: list[torch.Tensor], tmp_path: Path) -> None:
    stage = Stage(recursions=1, steps=200, batch=4, patch=24, warmup=10, lr=5e-3, sigma_low=30, sigma_high=50, ema=0.9)
    net = loop.train_stage(_new(), images, stage, checkpoint=tmp_path / "c", log=tmp_path / "log", bf16=False)
    table = loop.validate(net, images, (40,))
    noisy = 20 * math.log10(255 / 40)
    assert table["sigma40"] > noisy + 3
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_interrupted_and_resumed_is_the_same(
    images: list[torch.Tensor], tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.train_stage(_new(), images, STAGE, checkpoint=tmp_path / "a", save_every=0)
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
        loop.train_stage(_new(), images, STAGE, checkpoint=tmp_path / "b", save_every=0)
    monkeypatch.setattr(loop, "loss_function", original)
    resumed = loop.train_stage(_new(7), images, STAGE, checkpoint=tmp_path / "b", save_every=0)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_checkpoint_of_another_stage_is_refused(images: list[torch.Tensor], tmp_path: Path) -> None:
    loop.train_stage(_new(), images, STAGE, checkpoint=tmp_path / "c")
    with pytest.raises(InputError, match="another stage"):
        loop.train_stage(_new(), images, Stage(recursions=1, steps=7), checkpoint=tmp_path / "c")


def test_nan_stops_and_keeps_the_last_good_state(
    images: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.loss_function, 0

    def poisoned(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args) * (float("nan") if calls == 4 else 1)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "loss_function", poisoned)
    with pytest.raises(NumericError, match="step 3"):
        loop.train_stage(_new(), images, STAGE, checkpoint=tmp_path / "c", save_every=0)
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


def test_samples_come_from_the_seed(images: list[torch.Tensor]) -> None:
    one, two, other = (loop.sample_batch(images, STAGE, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], other[0])
    with pytest.raises(InputError, match="smaller than the patch"):
        loop.sample_batch(images, Stage(patch=64), torch.Generator())


def test_noise_has_the_asked_level_and_is_not_clipped() -> None:
    clean = torch.zeros(2, 1, 200, 200)
    sigma = torch.tensor([10.0, 50.0]).view(2, 1, 1, 1)
    noisy = degrade.gaussian(clean, sigma, torch.Generator().manual_seed(0))
    assert noisy.min() < 0
    # The standard error of a standard deviation over 40,000 values is 0.35 %.
    assert torch.allclose(255 * noisy.std((1, 2, 3)), sigma.flatten(), rtol=0.02)


def test_command_trains_a_folder(tmp_path: Path, images: list[torch.Tensor]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(np.asarray(image)).save(data / f"{i}.png")
    command = [sys.executable, "-m", "memnet_fast.training", "--data", str(data), "--validation", str(data), "--work"]
    command += [str(tmp_path / "work"), "--recursions", "1", "--steps", "2", "--batch", "1", "--patch", "16", "--warmup", "1"]
    done = subprocess.run([*command, "--name", "one"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["steps"] == 2 and record["psnr"].keys() == {"sigma15", "sigma30", "sigma50", "sigma70"}
    net = loop.load_result(tmp_path / "work" / "one.result")
    assert net.config.num_recursions == 1
    more = [*command, "--name", "two", "--init", str(tmp_path / "work" / "one.result")]
    more[more.index("--recursions") + 1] = "2"
    done = subprocess.run(more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [r["name"] for r in loop.load_history(tmp_path / "work" / "two.result")] == ["one", "two"]


def test_export_states_what_was_measured(tmp_path: Path, images: list[torch.Tensor]) -> None:
    net = loop.train_stage(_new(), images, STAGE, checkpoint=tmp_path / "c")
    loop.save_result(net, [{"name": "a", "hours": 0.5}, {"name": "b", "hours": 0.25}], tmp_path / "r")
    data = tmp_path / "data"
    data.mkdir()
    Image.fromarray(np.asarray(images[0])).save(data / "0.png")
    words = ["--validation-name", "V", "--data", "D", "--hardware", "H", "--commit", "0"]
    export.main([str(tmp_path / "r"), str(tmp_path / "w"), "--validation", str(data), *words], standalone_mode=False)
    info = weights.load_info(tmp_path / "w")
    assert info["hours"] == 0.75 and len(info["head_weights"]) == 2
    assert info["psnr_noisy"]["V"]["sigma 50"] == 14.151
    assert info["psnr"]["V"]["sigma 50"] == pytest.approx(loop.validate(net, images[:1], (50,))["sigma50"], abs=1e-3)

"""`memnet eval` and its protocols."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memnet_fast import cli, degrade, evaluation, metrics
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import ImageCorrupt, InputError
from memnet_fast.evaluation import Score, evaluate, mean, planes, score
from memnet_fast.reference import MemNet
from memnet_fast.tasks import TASKS
from memnet_fast.weights import save_weights


def _photo(h: int = 37, w: int = 50, colour: bool = True) -> np.ndarray:
    y, x = np.mgrid[:h, :w]
    waves = [127 + 100 * np.sin(x / (3 + k) + y / 5) * np.cos(y / (7 - k)) for k in range(3)]
    return np.stack(waves, -1).astype(np.uint8) if colour else waves[0].astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    Image.fromarray(_photo()).save(tmp_path / "set" / "a.png")
    Image.fromarray(_photo(24, 31, False)).save(tmp_path / "set" / "b.bmp")
    (tmp_path / "set" / "notes.txt").write_text("no image")
    torch.manual_seed(0)
    save_weights(MemNet(MemNetConfig(channels=4, num_memory_blocks=1, num_recursions=1)).eval(), tmp_path / "w.safetensors")
    return tmp_path


def _rounded(levels: np.ndarray) -> np.ndarray:
    return np.floor(levels + 0.5)  # as MATLAB's uint8()


def test_planes_are_those_of_the_protocol() -> None:
    image = _photo()
    r, g, b = np.moveaxis(image.astype(np.float64), -1, 0)
    expected = {
        ("denoise", "paper"): [_rounded(0.298936021293775 * r + 0.587043074451121 * g + 0.114020904255103 * b)],
        ("sr", "paper"): [_rounded(16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255)],
        ("deblock", "full-y"): [_rounded(0.299 * r + 0.587 * g + 0.114 * b)],
        ("sr", "rgb"): [r, g, b],
    }
    for (task, protocol), levels in expected.items():
        found = planes(image, TASKS[task], protocol)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy() * 255, np.stack(levels), atol=1e-4)
    gray = _photo(colour=False)
    for protocol in evaluation.PROTOCOLS:
        np.testing.assert_allclose(planes(gray, TASKS["sr"], protocol).numpy() * 255, gray[None], atol=1e-4)
    with pytest.raises(InputError, match="unknown protocol"):
        planes(gray, TASKS["sr"], "mine")


@pytest.mark.parametrize(("task", "level"), [("denoise", 30), ("deblock", 10), ("sr", 3)])
def test_scores_are_what_the_metrics_say(task: str, level: int) -> None:
    """The identity restores nothing; a constant offset has a known PSNR."""
    image = _photo()
    same = score("a", image, lambda x: x, TASKS[task], level, "paper", 5)
    assert same.psnr == same.psnr_degraded and same.ssim == same.ssim_degraded
    clean = planes(image, TASKS[task], "paper")
    shifted = score("a", image, lambda x: clean[:, : x.shape[1], : x.shape[2]] + 10 / 255, TASKS[task], level, "paper", 5)
    if task != "sr":  # there both are clipped and rounded
        assert shifted.psnr == pytest.approx(20 * np.log10(255 / 10), abs=1e-4)
    given = {
        "denoise": lambda: clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(5)) * (30 / 255),
        "deblock": lambda: degrade.jpeg(clean, 10),
        "sr": lambda: degrade.bicubic(clean[:, :36, :48], 3),
    }[task]()
    whole = clean[:, :36, :48] if task == "sr" else clean
    protocol = metrics.Protocol("all", 3, True) if task == "sr" else metrics.PLAIN
    assert same.psnr_degraded == pytest.approx(metrics.psnr(given, whole, protocol), abs=1e-9)
    assert same.ssim_degraded == pytest.approx(metrics.ssim(given, whole, protocol), abs=1e-9)


def test_mean_is_over_images_and_tiny_images_have_no_ssim(tmp_path: Path) -> None:
    Image.fromarray(_photo(40, 40, False)).save(tmp_path / "large.png")
    Image.fromarray(_photo(5, 9, False)).save(tmp_path / "tiny.png")
    scores = [s for s in evaluate(evaluation.image_files(tmp_path), lambda x: x, TASKS["denoise"], 25) if isinstance(s, Score)]
    assert [s.name for s in scores] == ["large.png", "tiny.png"] and scores[1].ssim is None
    total = mean(scores)
    assert total.psnr == pytest.approx((scores[0].psnr + scores[1].psnr) / 2) and total.ssim == scores[0].ssim


def test_noise_does_not_depend_on_the_other_images(tmp_path: Path) -> None:
    Image.fromarray(_photo(40, 40, False)).save(tmp_path / "a.png")
    alone = next(iter(evaluate(evaluation.image_files(tmp_path), lambda x: x, TASKS["denoise"], 25, seed=1)))
    again = score("a.png", _photo(40, 40, False), lambda x: x, TASKS["denoise"], 25, "paper", 1)
    other = score("a.png", _photo(40, 40, False), lambda x: x, TASKS["denoise"], 25, "paper", 2)
    assert alone == again != other


def _memnet(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(w) for w in words])
    return (left.value.code, *capsys.readouterr())  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("task", "level", "label", "baseline"),
    [("denoise", 30, "sigma 30", "noisy"), ("deblock", 10, "Q 10", "JPEG"), ("sr", 2, "x2", "bicubic")],
)
def test_command_prints_a_table_and_writes_json(
    folder: Path, capsys: pytest.CaptureFixture[str], task: str, level: int, label: str, baseline: str
) -> None:
    words = ["eval", "--task", task, "--level", level, "--data", folder / "set", "-n", folder / "w.safetensors"]
    code, table, _ = _memnet(capsys, *words, "--protocol", "rgb", "--json", folder / "r.json")
    assert code == 0 and f"PSNR {baseline}" in table and "a.png" in table and "mean" in table and label in table
    report = json.loads((folder / "r.json").read_text())
    (measured,) = report["levels"]
    assert measured["level"] == label and [r["name"] for r in measured["images"]] == ["a.png", "b.bmp"]
    assert measured["mean"]["psnr"] == pytest.approx(np.mean([r["psnr"] for r in measured["images"]]))
    assert report["protocol"] == "rgb" and report["task"] == task and report["failed"] == []
    code, out, _ = _memnet(capsys, *words, "--protocol", "rgb", "--json", "-")
    assert json.loads(out)["levels"][0]["images"] == measured["images"]


def test_command_runs_the_network_with_and_without_ensemble(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from memnet_fast.weights import load_weights

    words = [
        "eval",
        "--task",
        "denoise",
        "--level",
        40,
        "--data",
        folder / "set",
        "-n",
        folder / "w.safetensors",
        "--json",
        "-",
    ]
    net = load_weights(folder / "w.safetensors")
    given = planes(_photo(), TASKS["denoise"], "paper")
    noisy = degrade.gaussian(given, 40, torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = metrics.psnr(net(noisy[None])[0], given)
        views = [
            torch.rot90(noisy, k, (1, 2)).flip(2) if f else torch.rot90(noisy, k, (1, 2)) for k in range(4) for f in (0, 1)
        ]
        back = [
            torch.rot90(net(v[None])[0].flip(2) if f else net(v[None])[0], -k, (1, 2))
            for v, (k, f) in zip(views, [(k, f) for k in range(4) for f in (0, 1)], strict=True)
        ]
        ensemble = metrics.psnr(torch.stack(back).mean(0), given)
    for more, expected in ((["--backend", "torch"], plain), (["--tta"], ensemble), ([], plain)):
        code, out, _ = _memnet(capsys, *words, *more)
        assert code == 0
        assert json.loads(out)["levels"][0]["images"][0]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert abs(ensemble - plain) > 1e-2


def test_bad_files_are_named_and_the_others_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "set" / "c.png").write_bytes((folder / "set" / "a.png").read_bytes()[:200])
    Image.fromarray(_photo()[:3, :3]).save(folder / "set" / "d.png")
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(folder / "set" / "e.png")
    words = ["eval", "--task", "sr", "--level", 4, "--data", folder / "set", "-n", folder / "w.safetensors"]
    code, table, said = _memnet(capsys, *words)
    assert code == 3 and "a.png" in table and "b.bmp" in table
    lines = said.splitlines()
    assert len(lines) == 3 and all(any(name in line for line in lines) for name in ("c.png", "d.png", "e.png"))
    with pytest.raises(ImageCorrupt):
        evaluation.read_image(folder / "set" / "c.png")


def test_a_report_that_cannot_be_written_costs_no_measurement(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--task", "denoise", "--level", 30, "--data", folder / "set", "-n", folder / "w.safetensors"]
    code, table, said = _memnet(capsys, *words, "--json", folder / "nowhere" / "r.json")
    assert code == 3 and "mean" in table and "cannot write" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("how", ["closed", "full"])
def test_a_table_that_cannot_be_printed_costs_no_measurement(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    words = ["eval", "--task", "denoise", "--level", 30, "--data", folder / "set", "-n", folder / "w.safetensors"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as left:
        patched.setattr(sys, "stdout", None if how == "closed" else Full())
        cli.main([str(w) for w in (*words, "--json", folder / "r.json")])
    assert left.value.code == (0 if how == "closed" else 1)
    assert len(json.loads((folder / "r.json").read_text())["levels"][0]["images"]) == 2


def test_infinite_psnr_is_valid_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--task", "denoise", "--level", 0, "--data", folder / "set", "-n", folder / "w.safetensors", "--json", "-"]
    code, out, _ = _memnet(capsys, *words)
    row = json.loads(out, parse_constant=lambda name: pytest.fail(name))["levels"][0]["images"][0]
    assert code == 0 and row["psnr_degraded"] is None and isinstance(row["psnr"], float)


def test_exit_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = ["--data", folder / "set", "-n", folder / "w.safetensors"]
    (folder / "none").mkdir()
    for words, code, part in (
        (["--task", "denoise", "--level", 300, *good], 2, "0..255"),
        (["--task", "deblock", "--level", 10.5, *good], 2, "1..100"),
        (["--task", "sr", "--level", 5, *good], 2, "2, 3 or 4"),
        (["--task", "sr", "--level", "nan", *good], 2, "2, 3 or 4"),
        (["--task", "denoise", "--level", "nan", *good], 2, "0..255"),
        (["--task", "deblock", "--level", "nan", *good], 2, "1..100"),
        (["--task", "sr", "--level", 2, *good, "--protocol", "best"], 2, "unknown protocol"),
        (["--task", "sr", "--level", 2, "--data", folder / "nowhere", "-n", folder / "w.safetensors"], 2, "no folder"),
        (["--task", "sr", "--level", 2, "--data", "", "-n", folder / "w.safetensors"], 2, "empty path"),
        (["--task", "sr", "--level", 2, "--data", "n" * 300, "-n", folder / "w.safetensors"], 2, "cannot list the folder"),
        (["--task", "sr", "--level", 2, "--data", folder / "set", "-n", "nothing"], 2, "nothing"),
        (["--task", "sr", "--level", 2, "--data", folder / "none", "-n", folder / "w.safetensors"], 4, "nothing to measure"),
        (["--task", "sr", "--level", 2, *good, "--device", "cuda:7"], 5, "cuda:7"),
    ):
        found, _, said = _memnet(capsys, "eval", *words)
        assert found == code and part in said and len(said.splitlines()) == 1, (words, said)

"""Training in legs of some minutes: stages that end by the clock, what a leg leaves, starts from bundled weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.recipes import image_folder, recipe

pytest.importorskip("lightning", reason="training needs the extra 'train'")

from memnet_fast import weights
from memnet_fast.errors import CheckpointMismatch, InputError
from memnet_fast.training import export, module, run
from memnet_fast.training.recipe import Stage, differences, load_recipe
from memnet_fast.training.results import load_result
from memnet_fast.training.run import Hardware, train

CPU = Hardware("cpu")
_ROOT = Path(__file__).parents[1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that looks at its clock sees that six seconds are over."""

    def elapsed(self: module.StageModule) -> float:
        self.seconds += 6
        return self.seconds

    monkeypatch.setattr(module.StageModule, "elapsed", elapsed)


class _StopAt(run._Stopping):
    left = 0

    @property
    def due(self) -> bool:
        type(self).left -= 1
        return self.left == 0


def test_the_cosine_runs_over_the_minutes() -> None:
    stage = Stage(1, 1000, lr=2.0, warmup=10, minutes=1.0)
    assert stage.rate(4, 59.0) == pytest.approx(1.0)  # the warmup counts steps
    assert stage.rate(20, 30.0) == pytest.approx(2 * 0.505)
    assert stage.rate(20, 60.0) == stage.rate(20, 999.0) == pytest.approx(0.02)
    # Steps that end sooner than the minutes still end it.
    assert stage.rate(999, 0.0) == pytest.approx(0.02, rel=1e-2)
    assert Stage(1, 1000, lr=2.0, warmup=10).rate(505, 1e9) == pytest.approx(2 * 0.505)


def test_a_stage_ends_by_the_clock_and_the_next_begins(tmp_path: Path, clock: None) -> None:
    outcome = train(recipe(tmp_path, stages__0__steps=1000, stages__0__minutes=0.5), hardware=CPU)
    assert outcome.done and outcome.step == 3 and [r["recursions"] for r in outcome.history] == [1, 2]
    lines = json.loads(torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["history"])
    assert lines[0]["minutes"] == 0.5 and lines[0]["hours"] < 0.02
    # Finished is finished, whatever the clock says.
    assert train(recipe(tmp_path, stages__0__steps=1000, stages__0__minutes=0.5), resume=True, hardware=CPU).done


def test_the_clock_goes_on_where_a_leg_ended(tmp_path: Path, clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"training__steps": 1000, "training__minutes": 0.5, "log_every": 1000}
    seen: list[float] = []

    def rate(self: Stage, step: int, seconds: float = 0.0) -> float:
        seen.append(seconds)
        return original(self, step, seconds)

    original = Stage.rate
    monkeypatch.setattr(Stage, "rate", rate)
    _StopAt.left = 2
    with monkeypatch.context() as patch:
        patch.setattr(run, "_Stopping", _StopAt)
        assert not train(recipe(tmp_path, **changes), hardware=CPU).done
    first = list(seen)
    seen.clear()
    outcome = train(recipe(tmp_path, **changes), resume=True, hardware=CPU)
    assert outcome.done
    stage_1 = seen[: next(i for i in range(1, len(seen)) if seen[i] < seen[i - 1])]
    assert first == [6, 12] and stage_1[0] == 18 and stage_1[-1] == 30, (first, seen)
    # The last step's loss is read although no line of the log was due.
    events = list((tmp_path / "run" / "tensorboard" / "stage2").glob("events.*"))
    assert events


def test_a_leg_leaves_a_network_that_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaged and with settled statistics, as a result is; and none where a signal asks to hurry."""
    for signal_, there in ((0, True), (15, False)):
        folder = tmp_path / str(signal_)
        folder.mkdir()
        _StopAt.left = 2
        with monkeypatch.context() as patch:
            patch.setattr(run, "_Stopping", _StopAt)
            patch.setattr(_StopAt, "signal", property(lambda self, s=signal_: s, lambda self, value: None), raising=False)
            assert not train(recipe(folder), hardware=CPU).done
        assert (folder / "run" / "stopped.result").exists() == there
    left = tmp_path / "0" / "run" / "stopped.result"
    net, history = load_result(left)
    state = torch.load(left.with_name("last.ckpt"), weights_only=True)["state"]
    assert history[-1]["step"] == 2 and not net.training
    for name, average in state["average"].items():
        assert torch.equal(net.state_dict()[name], average), name
    assert not torch.equal(net.first.bn.running_mean, state["net"]["first.bn.running_mean"])
    words = ["--validation-name", "V", "--data", "D", "--hardware", "H", "--commit", "0"]
    file = tmp_path / "w.safetensors"
    export.main([str(left), str(file), "--validation", str(tmp_path / "0" / "data"), *words], standalone_mode=False)
    assert math.isfinite(weights.load_info(file)["psnr"]["V"]["sigma 50"])
    # It is gone when the training is done.
    assert train(recipe(tmp_path / "0"), resume=True, hardware=CPU).done and not left.exists()


@pytest.mark.parametrize("task", ["denoise", "deblock", "sr"])
def test_legs_go_on_from_the_bundled_weights(task: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    small = ("training.batch=1", "training.patch=12", "training.settle=1", "training.warmup=1", "training.precision=fp32")
    few = ("stages.0.steps=1", "training.lr=1e-9", "training.ema=0.0", f"data={folder}", f"output={tmp_path / 'run'}")
    loaded = load_recipe(f"{task}_leg", (*small, *few, "stages.0.settle=0"))
    assert loaded.stages[0].minutes == 8 and loaded.stages[0].recursions == 6 and loaded.task == task
    outcome = train(loaded, hardware=CPU)
    bundled = weights.bundled()[f"memnet_m6r6.{task}"]
    earlier = weights.load_info(bundled)["recipe"]
    assert outcome.done and outcome.history[: len(earlier)] == earlier and len(outcome.history) == len(earlier) + 1
    # A rate of next to nothing leaves the bundled network.
    before, after = weights.load_weights(bundled), load_result(tmp_path / "run" / "result")[0]
    for (name, p), q in zip(after.named_parameters(), before.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) < 1e-7, name
    for name in ("last.ckpt", "result"):
        assert (tmp_path / "run" / name).stat().st_size < 16e6


def test_the_leg_script_goes_on_from_the_file_of_the_leg_before(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "DATA": str(folder),
        "OUT": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    script = str(_ROOT / "benchmarks" / "train_leg.sh")
    small = ["training.batch=1", "training.patch=12", "training.settle=1", "log_every=1", "stages.0.minutes=60"]

    def leg(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, *words], capture_output=True, text=True, timeout=500, env=environment | more)

    first = leg("deblock", *small, MINUTES="0.0001")
    assert first.returncode == 0 and "stopped in stage 1 after step 1;" in first.stderr, first.stderr
    checkpoint, result = tmp_path / "out" / "deblock.ckpt", tmp_path / "out" / "deblock.result"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["deblock.ckpt", "deblock.result"]
    assert checkpoint.stat().st_size < 16e6 and load_result(result)[1][-1]["step"] == 1
    kept = checkpoint.rename(tmp_path / "kept")
    result.unlink()
    second = leg("deblock", *small, "stages.0.steps=2", "--override", FROM=str(kept))
    assert second.returncode == 0 and "step 2 of 2" in second.stderr and "step 1 of" not in second.stderr, second.stderr
    assert math.isfinite(load_result(result)[1][-1]["hours"]) and checkpoint.exists()
    finished = checkpoint.rename(tmp_path / "finished")
    result.unlink()
    third = leg("deblock", *small, "stages.0.steps=2", FROM=str(finished))
    assert third.returncode == 2 and "has had all its minutes" in third.stderr.splitlines()[-1] and not result.exists()


@pytest.mark.parametrize(("words", "said"), [(["colourise"], "denoise, deblock or sr"), (["sr"], "DATA names no folder")])
def test_the_leg_script_names_what_is_missing(words: list[str], said: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "DATA"}
    done = subprocess.run([str(_ROOT / "benchmarks" / "train_leg.sh"), *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_large_network_is_trained_by_an_option(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    small = ("network.preset=memnet_m10r10", "network.channels=4", "training.batch=1", "training.patch=8", "training.settle=1")
    stages = ("stages.0.steps=1", "stages.1.steps=1", "stages.1.recursions=10", f"data={folder}", f"output={tmp_path / 'run'}")
    outcome = train(load_recipe("denoise", (*small, *stages)), hardware=CPU)
    net = weights.load_weights(tmp_path / "run" / "weights.safetensors")
    assert outcome.done and (net.config.num_memory_blocks, net.config.num_recursions) == (10, 10)
    words = ["--validation", str(folder), "--validation-name", "V", "--data", "D", "--hardware", "H", "--commit", "0"]
    file = tmp_path / "m10r10.safetensors"
    export.main([str(tmp_path / "run" / "result"), str(file), "--half", *words], standalone_mode=False)
    info = weights.load_info(file)
    assert len(info["head_weights"]) == 10 and [r["recursions"] for r in info["recipe"]] == [1, 10]


def test_a_checkpoint_of_before_these_options_goes_on(tmp_path: Path) -> None:
    new = recipe(tmp_path).to_dict()
    old = json.loads(json.dumps(new))
    for stage in old["stages"]:
        del stage["minutes"], stage["jpeg"]
    assert not differences(old, new)
    assert differences(old, recipe(tmp_path, training__minutes=2).to_dict()) == [
        "stages.0.minutes: 0.0 -> 2",
        "stages.1.minutes: 0.0 -> 2",
    ]


def test_a_name_that_is_no_model_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        train(recipe(tmp_path, init="memnet_m6r6.colourise"), hardware=CPU)
    with pytest.raises(CheckpointMismatch, match="holds another network"):
        train(recipe(tmp_path, init="memnet_m6r6.denoise", stages__0__recursions=6, stages__1__recursions=6), hardware=CPU)

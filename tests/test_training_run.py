"""Trainings from recipe to result: interruptions, several processes. What is refused: test_training_refusals.py."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import image_folder, images, recipe, recipe_file

pytest.importorskip("lightning", reason="training needs the extra 'train'")

from support.stops import StopAt
from support.two_processes import one_step

from memnet_fast import cli, native, weights
from memnet_fast.errors import CheckpointMismatch, InputError, NumericError
from memnet_fast.evaluation import mean_psnr
from memnet_fast.tasks import TASKS
from memnet_fast.training import module, run
from memnet_fast.training.losses import multi_supervised
from memnet_fast.training.results import load_result, save_result
from memnet_fast.training.run import Hardware, train

CPU = Hardware("cpu")
MEMNET = [sys.executable, "-m", "memnet_fast.cli"]
_TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The result of the small recipe without any interruption."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = train(recipe(folder), hardware=CPU)
    assert outcome.done and [r["recursions"] for r in outcome.history] == [1, 2]
    return load_result(folder / "run" / "result")[0].state_dict()


def _same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_result(folder / "run" / "result")[0].state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("stop", range(1, 6))
def test_interrupted_at_every_step_and_resumed_is_the_same(
    stop: int, tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 has the steps 1 to 3, stage 2 the steps 4 to 6."""
    StopAt.left = stop
    monkeypatch.setattr(run, "_Stopping", StopAt)
    outcome = train(recipe(tmp_path), hardware=CPU)
    monkeypatch.undo()
    # Where a stop falls on the last step of a stage, the next stage has already begun.
    assert not outcome.done and (outcome.stage, outcome.step) == {1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1), 5: (1, 2)}[stop]
    torch.manual_seed(99)
    assert train(recipe(tmp_path), resume=True, hardware=CPU).done
    _same(tmp_path, whole)


@pytest.mark.parametrize("task", ["deblock", "sr"])
def test_other_tasks_resume_to_the_same_bits(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for stop in (99, 4):
        folder = tmp_path / str(stop)
        folder.mkdir()
        changes = {"task": f'"{task}"', "levels__only": "[2, 3]" if task == "sr" else "[10, 40]"}
        StopAt.left = stop
        with monkeypatch.context() as patch:
            patch.setattr(run, "_Stopping", StopAt)
            outcome = train(recipe(folder, **changes), hardware=CPU)
        if not outcome.done:
            assert train(recipe(folder, **changes), resume=True, hardware=CPU).done
        results.append(load_result(folder / "run" / "result")[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results), strict=True))


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++")


@needs_compiler
def test_a_compiled_training_is_the_same_training_and_resumes_to_the_same_bits(
    tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for stop in (99, 2):
        folder = tmp_path / str(stop)
        folder.mkdir()
        StopAt.left = stop
        with monkeypatch.context() as patch:
            patch.setattr(run, "_Stopping", StopAt)
            outcome = train(recipe(folder, training__compile=True), hardware=CPU)
        assert outcome.done == (stop == 99)
        if not outcome.done:
            assert train(recipe(folder, training__compile=True), resume=True, hardware=CPU).done
        results.append(load_result(folder / "run" / "result")[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results), strict=True))
    # AdamW makes full steps of gradients that are zero but for rounding: those of biases before a batch normalisation.
    for name, value in whole.items():
        if value.ndim == 4:
            torch.testing.assert_close(results[0][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@needs_compiler
def test_the_plain_path_is_compiled_as_a_whole(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, training__compile=True, training__memory="plain", network__num_memory_blocks=1)
    net = module.MemNet(dataclasses.replace(loaded.network, num_recursions=1))
    trainee = module.StageModule(net, loaded, 0, images(), lambda m: None)
    trainee._choose_kernels()
    assert trainee._heads is not module._plain_heads and trainee.kernels == "torch"
    x = torch.rand(2, 1, 9, 7)
    expected, found = trainee.net.heads(x), trainee._heads(trainee.net, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_died_between_steps_goes_on_from_the_last_checkpoint(
    tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for after in (2, 3):  # lives of different lengths; each ends in the middle of a step
        original, calls = module.multi_supervised, 0

        def dying(*arguments: Any, after: int = after, original: Any = original) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls > after:
                raise RuntimeError("the machine is gone")
            return original(*arguments)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="is gone"):
            patch.setattr(module, "multi_supervised", dying)
            train(recipe(tmp_path, save_minutes=0), resume=True, hardware=CPU)
    assert train(recipe(tmp_path), resume=True, hardware=CPU).done
    _same(tmp_path, whole)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("number", range(5))
def test_died_at_every_save_of_an_end_and_resumed_is_the_same(
    number: int, written: bool, tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network and checkpoint of stage 1, network, weight file and checkpoint of stage 2; before each, or after it."""
    saves: list[str] = []

    def dying(name: str, save: Any) -> Any:
        def instead(*arguments: Any) -> None:
            saves.append(name)
            if written or len(saves) <= number:
                save(*arguments)
            if len(saves) > number:
                raise RuntimeError("the machine is gone")

        return instead

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="is gone"):
        for name in ("save_result", "save_weights", "write_state"):
            patch.setattr(run, name, dying(name, getattr(run, name)))
        train(recipe(tmp_path), hardware=CPU)
    assert saves == ["save_result", "write_state", "save_result", "save_weights", "write_state"][: number + 1]
    assert train(recipe(tmp_path), resume=True, hardware=CPU).done
    _same(tmp_path, whole)
    file = weights.load_weights(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in file.named_parameters())
    assert [record["name"] for record in load_result(tmp_path / "run" / "result")[1]] == ["tiny stage 1", "tiny stage 2"]


def test_a_finished_training_stays_as_it_is(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    train(recipe(tmp_path), hardware=CPU)
    before = (tmp_path / "run" / "result").read_bytes()
    with pytest.raises(InputError, match="--resume auto"):
        train(recipe(tmp_path), hardware=CPU)
    assert train(recipe(tmp_path), resume=True, hardware=CPU).done
    assert (tmp_path / "run" / "result").read_bytes() == before
    _same(tmp_path, whole)
    with pytest.raises(AssertionError):  # another seed is another training
        _same(tmp_path, _result_of_seed(tmp_path / "other", 1))


def _result_of_seed(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    folder.mkdir()
    train(recipe(folder, seed=seed), hardware=CPU)
    return load_result(folder / "run" / "result")[0].state_dict()


def test_the_checkpoint_of_the_real_network_is_small(tmp_path: Path) -> None:
    """A state that can be kept between legs: below 16 MB, read without running anything."""
    shape = {"network__channels": 64, "network__num_memory_blocks": 6, "stages__1__recursions": 6, "training__batch": 1}
    changes = {**shape, "training__steps": 1, "training__accumulate": 1, "training__warmup": 0, "training__settle": 1}
    train(recipe(tmp_path, **changes), hardware=CPU)
    size = (tmp_path / "run" / "last.ckpt").stat().st_size
    assert size < 16e6 and (tmp_path / "run" / "weights.safetensors").stat().st_size < 3e6
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state"]
    assert state["step"] == 1 and len(state["optimizer"]["state"]) == len(
        list(load_result(tmp_path / "run/result")[0].parameters())
    )


def test_history_and_best_say_what_was_measured(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    train(recipe(tmp_path, validation=folder, validate_every=1), hardware=CPU)
    net, history = load_result(tmp_path / "run" / "result")
    assert [r["name"] for r in history] == ["tiny stage 1", "tiny stage 2"]
    assert history[1]["images"] == 2 and history[1]["levels"] == {"low": 20, "high": 50, "only": []}
    restored, degraded = mean_psnr(net, images(), TASKS["denoise"], 50)
    assert history[1]["psnr"]["sigma 50"] == pytest.approx(restored, abs=1e-3)
    assert history[1]["psnr_degraded"]["sigma 50"] == degraded == pytest.approx(20 * math.log10(255 / 50), abs=0.5)
    best = load_result(tmp_path / "run" / "best.result")[1][-1]
    assert sum(best["psnr"].values()) >= sum(history[1]["psnr"].values())
    info = weights.load_info(tmp_path / "run" / "weights.safetensors")
    assert info["task"] == "denoise" and info["recipe"] == history
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))


def test_starts_from_a_result_or_a_weight_file_of_fewer_recursions(tmp_path: Path) -> None:
    train(recipe(tmp_path), hardware=CPU)
    for init in ("stage1.result", "result", "weights.safetensors"):
        folder = tmp_path / init
        folder.mkdir()
        where = tmp_path / "run" / init
        train(recipe(folder, init=where, stages__0__recursions=2, task='"deblock"'), hardware=CPU)
        assert len(load_result(folder / "run" / "result")[1]) == (3 if init == "stage1.result" else 4)
    (tmp_path / "again").mkdir()
    with pytest.raises(CheckpointMismatch, match="channels: 4 -> 8"):
        where = tmp_path / "run" / "result"
        train(recipe(tmp_path / "again", init=where, network__channels=8, stages__0__recursions=2), hardware=CPU)
    with pytest.raises(InputError, match="only to more recursions"):
        train(recipe(tmp_path / "again", init=where), hardware=CPU)
    shallow = recipe(tmp_path / "again", init=tmp_path / "run" / "stage1.result", stages__0__recursions=2)
    fixed = dataclasses.replace(shallow, stages=tuple(dataclasses.replace(s, statistics="fixed") for s in shallow.stages))
    with pytest.raises(InputError, match="has none for 2 recursions"):
        train(fixed, hardware=CPU)
    assert not (tmp_path / "again" / "run").exists()


def test_a_changed_recipe_holds_from_where_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what the state of the optimiser holds, and an average that was not there before."""
    StopAt.left = 1
    with monkeypatch.context() as patch:
        patch.setattr(run, "_Stopping", StopAt)
        train(recipe(tmp_path, training__ema=0.0), hardware=CPU)
    seen = []

    def look(self: module.StageModule, *rest: Any) -> None:
        original(self, *rest)
        seen.append({group["weight_decay"] for group in self.optimizers().param_groups})

    original = module.StageModule.on_train_batch_start
    monkeypatch.setattr(module.StageModule, "on_train_batch_start", look)
    changes = {"training__ema": 0.9, "training__weight_decay": 0.25}
    assert train(recipe(tmp_path, **changes), resume=True, override=True, hardware=CPU).done
    assert seen[0] == {0.0, 0.25}


def test_a_network_in_eval_mode_is_trained_with_the_statistics_of_its_batches(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, stages__0__steps=1)
    net = module.MemNet(dataclasses.replace(loaded.network, num_recursions=1)).eval()
    trainee = module.StageModule(net, loaded, 0, images(), lambda m: None)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module.lightning.Trainer(accelerator="cpu", max_steps=1, **options).fit(trainee)
    assert int(trainee.net.first.bn.num_batches_tracked) == 1


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"training__memory": "plain"},
        pytest.param(
            {"network__channels": 16, "training__kernels": "native"},
            marks=pytest.mark.skipif(native.why_missing() is not None, reason=f"no native module: {native.why_missing()}"),
        ),
    ],
)
def test_fixed_statistics_stay_and_what_is_trained_is_what_will_be_used(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(self: module.StageModule, *rest: Any) -> torch.Tensor:
        loss = original(self, *rest)
        if self.stage.statistics == "fixed" and not seen:
            seen.append((float(loss.detach()), *self.samples(0)))
        return loss

    original = module.StageModule.training_step
    monkeypatch.setattr(module.StageModule, "training_step", look)
    how = {**how, "stages__0__recursions": 2, "stages__1__statistics": "fixed", "validate_every": 1}
    for stop in (99, 5):  # as a whole, and with a stop after the stage's second step
        folder = tmp_path / str(stop)
        loaded = recipe(folder, validation=image_folder(folder / "data"), **how)
        StopAt.left = stop
        with monkeypatch.context() as patch:
            patch.setattr(run, "_Stopping", StopAt)
            train(loaded, hardware=CPU)
        assert train(loaded, resume=True, hardware=CPU).done
    before, best, after = (
        load_result(tmp_path / "99" / "run" / name)[0] for name in ("stage1.result", "best.result", "result")
    )
    _same(tmp_path / "5", after.state_dict())
    [(loss, degraded, clean)] = seen
    used = multi_supervised(before.heads(degraded), before.head_weights, clean, "charbonnier")
    assert loss == pytest.approx(float(used.detach()), rel=1e-5)
    statistics = dict(before.named_buffers())
    assert statistics and best.config == after.config
    for net in (best, after):
        assert all(torch.equal(value, statistics[name]) for name, value in net.named_buffers())
    assert not any(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True) if p.ndim > 1)


def test_the_log_has_every_told_step_also_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    changes = {"stages__0__steps": 7, "log_every": 3}
    StopAt.left = 2
    with monkeypatch.context() as patch:
        patch.setattr(run, "_Stopping", StopAt)
        train(recipe(tmp_path, **changes), hardware=CPU)
    train(recipe(tmp_path, **changes), resume=True, hardware=CPU)
    losses = {}
    for file in (tmp_path / "run" / "tensorboard" / "stage1").glob("events.*"):
        events = event_accumulator.EventAccumulator(str(file)).Reload()
        if "loss" in events.Tags()["scalars"]:
            losses |= {event.step: event.value for event in events.Scalars("loss")}
    assert sorted(losses) == [3, 6, 7] and all(math.isfinite(v) for v in losses.values())


def test_nan_between_told_steps_reaches_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = module.multi_supervised, 0

    def poisoned(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments) * (math.nan if calls == 2 else 1)

    monkeypatch.setattr(module, "multi_supervised", poisoned)
    with pytest.raises(NumericError, match="a weight is not finite after step 2"):
        train(recipe(tmp_path, save_minutes=0, stages__0__steps=9, log_every=5), hardware=CPU)
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state"]
    assert state["step"] == 1 and all(torch.isfinite(v.float()).all() for v in state["net"].values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_state(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a gradient that is NaN although its loss is finite must not reach a checkpoint."""
    original, calls = module.multi_supervised, 0

    def poisoned(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(*arguments)
        if calls == 3:
            if where == "loss":
                return loss * math.nan
            loss.register_hook(lambda g: g * math.nan)
        return loss

    with monkeypatch.context() as patch, pytest.raises(NumericError, match="step [23]; the last good state is kept"):
        patch.setattr(module, "multi_supervised", poisoned)
        train(recipe(tmp_path, save_minutes=0, stages__0__steps=9), hardware=CPU)
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state"]
    assert state["step"] == 2 and all(torch.isfinite(v.float()).all() for v in state["net"].values())


def test_the_loss_has_the_alpha_of_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    loss = module.multi_supervised
    monkeypatch.setattr(module, "multi_supervised", lambda *args: seen.append(args[4]) or loss(*args))
    train(recipe(tmp_path, training__alpha=0.75, stages__0__steps=2), hardware=CPU)
    assert seen and set(seen) == {0.75}


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path: Path) -> None:
    """With fixed statistics, k passes over b patches make the step of one pass over the same k * b patches."""
    loaded = recipe(tmp_path)
    stage = dataclasses.replace(loaded.stages[0], optimizer="sgd", clip=0.0, steps=1, warmup=0, lr=1.0, weight_decay=0.0, ema=0)
    steps = {}
    for accumulate in (1, 3):
        shaped = dataclasses.replace(stage, accumulate=accumulate, batch=6 // accumulate, statistics="fixed")
        made = dataclasses.replace(loaded, stages=(shaped,), init="the network below")
        torch.manual_seed(0)
        trainee = _Divided(module.MemNet(dataclasses.replace(made.network, num_recursions=1)), made)
        before = [p.detach().clone() for p in trainee.net.parameters()]
        trainer = module.lightning.Trainer(
            accelerator="cpu", max_steps=1, accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False
        )
        trainer.fit(trainee)
        steps[accumulate] = [b - p.detach() for b, p in zip(before, trainee.net.parameters(), strict=True)]
    for one, three in zip(*steps.values(), strict=True):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-6)
    assert max(float(s.abs().max()) for s in steps[1]) > 1e-3


class _Divided(module.StageModule):
    """The same patches however they are divided."""

    def __init__(self, net: module.MemNet, made: Any) -> None:
        super().__init__(net, made, 0, images(), lambda m: None)

    def samples(self, number: int, share: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        from memnet_fast.training.samples import sample_batch

        degraded, clean = sample_batch(self._images, 6, 0, 0)
        k = 6 // self.stage.accumulate
        return degraded[number * k : (number + 1) * k], clean[number * k : (number + 1) * k]


def test_two_images_are_learnt_by_a_bundled_recipe(tmp_path: Path) -> None:
    """The modern recipe with its options, shrunk: from noise to something clearly better in seconds."""
    from memnet_fast.training.recipe import load_recipe

    folder = image_folder(tmp_path / "data")
    small = ["network.channels=8", "network.num_memory_blocks=2", "training.batch=4", "training.patch=24", "training.ema=0.9"]
    small += ["stages.0.steps=120", "stages.1.steps=40", "stages.1.recursions=2", "training.warmup=10", "training.lr=5e-3"]
    small += ["levels.low=30", "levels.high=50", "validate_every=0", f"data={folder}", f"validation={folder}"]
    outcome = train(load_recipe("denoise", (*small, f"output={tmp_path / 'run'}")), hardware=CPU)
    record = outcome.history[-1]
    assert record["psnr"]["sigma 30"] > record["psnr_degraded"]["sigma 30"] + 3
    assert record["psnr"]["sigma 50"] > record["psnr_degraded"]["sigma 50"] + 3


# As a command, in processes of their own


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_sigterm_saves_leaves_and_resumes_to_the_same_bits(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    steps = ["stages.0.steps=100000"]
    command = [*MEMNET, "train", str(recipe_file(tmp_path)), "--accelerator", "cpu", *steps]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment()) as process:
        assert process.stderr is not None
        while "step 2 of" not in (line := process.stderr.readline()):
            assert line, "it ended before its second step"
        with pytest.raises(InputError, match="another training writes into"):
            train(recipe(tmp_path), resume=True, hardware=CPU)
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 143, rest
    assert "stopped in stage 1 after step" in rest and "Traceback" not in rest
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state"]
    assert 2 <= state["step"] < 100000


def test_max_minutes_ends_a_leg(tmp_path: Path) -> None:
    start = time.monotonic()
    outcome = train(recipe(tmp_path, stages__0__steps=1_000_000, log_every=1000), max_minutes=0.03, hardware=CPU)
    assert not outcome.done and outcome.signal == 0 and outcome.step > 0 and time.monotonic() - start < 60
    assert (tmp_path / "run" / "last.ckpt").exists()


def test_two_processes_train_together_and_resume(tmp_path: Path) -> None:
    """Started by Lightning, and resumed by torchrun."""
    where = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "memnet_fast.cli"]
    words = ["train", str(recipe_file(tmp_path)), "--accelerator", "cpu", "--devices", "2"]
    for command in ([*MEMNET, *words, "--max-minutes", "0.0001"], [*torchrun, *words, "--resume", "auto"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=_environment())
        assert done.returncode == 0, done.stderr
    assert "done: " in done.stderr and done.stderr.count("stage 2, step 3 of 3") == 1
    assert len(load_result(tmp_path / "run" / "result")[1]) == 2
    with pytest.raises(InputError, match="batch of 3 cannot be shared by 2 processes"):
        train(recipe(tmp_path, training__batch=3), hardware=Hardware("cpu", 2))


def test_gradients_of_two_processes_are_those_of_one_and_differences_are_noticed(tmp_path: Path) -> None:
    recipe_file(tmp_path)
    port = str(_free_port())
    ranks = []
    for rank in ("0", "1"):
        environment = {**_environment(), "PYTHONPATH": os.pathsep.join([str(_TESTS), *sys.path]), "LOCAL_RANK": rank}
        environment |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        call = [sys.executable, str(_TESTS / "support" / "two_processes.py"), str(tmp_path)]
        ranks.append(subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=environment))
    for process in ranks:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    two = torch.load(tmp_path / "step", weights_only=True)
    one = one_step(tmp_path, 1)
    largest = max(float(g.abs().max()) for g in one.values())
    assert largest > 1e-3
    for name, gradient in one.items():
        assert float((gradient - two[name]).abs().max()) <= 1e-5 * largest, name
    refused = (tmp_path / "refused").read_text().splitlines()
    expected = ("see the same training images", "follow the same recipe", "go on from the same step")
    for line, what in zip(refused, expected, strict=True):
        assert line.startswith(f"the processes do not {what}")


def test_machines_that_share_a_folder_go_on_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own command: what tells them apart is NODE_RANK alone."""
    StopAt.left = 2
    with monkeypatch.context() as patch:
        patch.setattr(run, "_Stopping", StopAt)
        train(recipe(tmp_path), hardware=CPU)
    command = [*MEMNET, "train", str(recipe_file(tmp_path)), "--accelerator", "cpu", "--nodes", "2", "--resume", "auto"]
    shared = {**_environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    machines = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**shared, "NODE_RANK": rank}) for rank in ("0", "1")
    ]
    try:
        said = [machine.communicate(timeout=300)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "stage 1, step 3 of 3" in said[0] and "done: " in said[0] and "done: " not in said[1]
    assert len(load_result(tmp_path / "run" / "result")[1]) == 2


def test_who_inherits_the_environment_of_a_training_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a training starts, only the processes of Lightning have its id and another rank than the first one."""
    parent, own = str(os.getppid()), str(os.getpid())
    for rank, launcher, launched in (("1", parent, True), ("0", parent, False), (None, parent, False), ("1", None, False)):
        for name, value in (("LOCAL_RANK", rank), (run._LAUNCHER, launcher)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        before = set(threading.enumerate())
        with run._ending_with_launcher():
            watching = set(threading.enumerate()) - before
            assert len(watching) == launched, (rank, launcher)
            assert not launched or run._LAUNCHER not in os.environ, "handed on to what this process starts"
            with run._several(2):
                assert os.environ.get(run._LAUNCHER) == (None if rank == "1" else own)
        assert os.environ.get(run._LAUNCHER) == launcher
        for thread in watching:
            thread.join(60)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_recipes_are_listed_copied_and_named_when_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def memnet(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(words)
        return (left.value.code, *capsys.readouterr())  # type: ignore[return-value]

    listed = memnet("recipes")
    assert listed[0] == 0 and "denoise_paper" in listed[1] and listed[1] == memnet("recipes", "ls")[1]
    assert memnet("recipes", "cp", "sr")[0] == 0 and (tmp_path / "sr.toml").exists()
    code, _, said = memnet("recipes", "cp", "sr")
    assert code == 2 and "exists already" in said
    code, _, said = memnet("train", "nothing")
    assert code == 2 and "there is no recipe and no file 'nothing'" in said and len(said.splitlines()) == 1
    code, _, said = memnet("train", "sr.toml", "data=nowhere")
    assert code == 2 and "there is no folder 'nowhere'" in said and len(said.splitlines()) == 1
    assert not logging.getLogger("memnet_fast").handlers


def test_results_read_back_with_their_history(tmp_path: Path) -> None:
    train(recipe(tmp_path), hardware=CPU)
    net, history = load_result(tmp_path / "run" / "result")
    save_result(net, history, tmp_path / "copy")
    again, same = load_result(tmp_path / "copy")
    assert same == json.loads(json.dumps(history)) and not again.training
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(InputError, match="there is no file"):
        load_result(tmp_path / "nothing")

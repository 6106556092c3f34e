"""Trainings that cannot begin or go on: refused in one line, before anything is made or changed."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.recipes import network, recipe, recipe_file

pytest.importorskip("lightning", reason="training needs the extra 'train'")

from support.stops import StopAt

from memnet_fast import cli
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import BackendUnavailable, CheckpointCorrupt, CheckpointMismatch, InputError, OutputError
from memnet_fast.training import module, run
from memnet_fast.training.results import load_result, save_result
from memnet_fast.training.run import Hardware, train

CPU = Hardware("cpu")


def test_a_training_without_a_compiler_ends_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> None:
        assert torch.device(device).type == "cpu"
        raise InputError("torch.compile does not work here")

    monkeypatch.setattr(module.lean, "check_compiler", missing)
    with pytest.raises(InputError, match="does not work here"):
        train(recipe(tmp_path, training__compile=True), hardware=CPU)
    assert not (tmp_path / "run").exists()


def test_changed_recipe_and_data_are_refused_with_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StopAt.left = 1
    with monkeypatch.context() as patch:
        patch.setattr(run, "_Stopping", StopAt)
        train(recipe(tmp_path), hardware=CPU)
    for changes, said in (
        ({"training__lr": 1e-3}, r"stages.0.lr: 0.002 -> 0.001; stages.1.lr: 0.002 -> 0.001\)"),
        ({"training__patch": 12}, "stages.0.patch: 16 -> 12"),
        ({"levels__high": 55}, "levels.high: 50 -> 55"),
        ({"seed": 4}, "seed: 0 -> 4"),
    ):
        with pytest.raises(CheckpointMismatch, match=said):
            train(recipe(tmp_path, **changes), resume=True, hardware=CPU)
    with pytest.raises(CheckpointMismatch, match="cannot go on as another network or task .network.channels: 4 -> 8"):
        train(recipe(tmp_path, network__channels=8), resume=True, override=True, hardware=CPU)
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "data" / "more.png")
    with pytest.raises(CheckpointMismatch, match="data: other images"):
        train(recipe(tmp_path), resume=True, hardware=CPU)
    assert train(recipe(tmp_path, training__lr=1e-3), resume=True, override=True, hardware=CPU).done


@pytest.mark.parametrize(
    ("before", "after"), [("adamw", "sgd"), ("sgd", "adamw"), ("adamw", "muon"), ("muon", "adamw"), ("sgd", "muon")]
)
def test_another_optimiser_cannot_go_on(before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StopAt.left = 1
    with monkeypatch.context() as patch:
        patch.setattr(run, "_Stopping", StopAt)
        train(recipe(tmp_path, training__optimizer=before), hardware=CPU)
    before_it = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(CheckpointMismatch, match="another optimiser"):
        train(recipe(tmp_path, training__optimizer=after), resume=True, override=True, hardware=CPU)
    assert sorted((tmp_path / "run").rglob("*")) == before_it


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages__0__steps": 2}, "is at step 2 of stage 1, where the recipe has ended it"),
        ({"stages__0__minutes": 1e-6}, "is at step 2 of stage 1, where the recipe has ended it"),
        ({"stages__0__statistics": "fixed"}, "is within stage 1, which began with statistics of batches"),
    ],
)
def test_a_stage_is_not_over_because_a_changed_recipe_says_so(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There would be no result of it, nor of the stages after it."""
    init = tmp_path / "first.result"
    save_result(network(MemNetConfig(channels=4, num_memory_blocks=2, num_recursions=1)), [], init)
    StopAt.left = 2
    with monkeypatch.context() as patch:
        patch.setattr(run, "_Stopping", StopAt)
        train(recipe(tmp_path, init=init), hardware=CPU)
    with pytest.raises(CheckpointMismatch, match=said):
        train(recipe(tmp_path, init=init, **changes), resume=True, override=True, hardware=CPU)
    assert not (tmp_path / "run" / "result").exists()


def test_a_finished_training_goes_on_by_more_steps_and_by_no_other_stage(tmp_path: Path) -> None:
    two = recipe(tmp_path, stages__0__recursions=2)
    train(dataclasses.replace(two, stages=two.stages[:1]), hardware=CPU)
    with pytest.raises(CheckpointMismatch, match="is done; for another stage give init=.*/run/result and another output"):
        train(two, resume=True, override=True, hardware=CPU)
    more = dataclasses.replace(two, stages=(dataclasses.replace(two.stages[0], steps=5),))
    outcome = train(more, resume=True, override=True, hardware=CPU)
    # One record of the stage, with all its hours: they are added up in metadata.
    assert outcome.done and outcome.step == 5 and [record["steps"] for record in outcome.history] == [5]


def test_processes_of_torchrun_that_would_train_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun started 2 processes"):
        train(recipe(tmp_path), hardware=CPU)
    assert not (tmp_path / "run").exists()


def test_gpus_that_are_not_there_are_exit_code_5_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = torch.cuda.device_count() + 1
    with pytest.raises(SystemExit) as left:
        cli.main(["train", str(recipe_file(tmp_path)), "--accelerator", "cuda", "--devices", str(count)])
    said = capsys.readouterr().err
    assert left.value.code == 5 and f"training was to have {count} CUDA devices" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_output_folder_without_room_for_a_lock_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot write into"):
        train(recipe(tmp_path), hardware=CPU)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    train(recipe(tmp_path), hardware=CPU)
    last = tmp_path / "run" / "last.ckpt"
    good = last.read_bytes()
    one_bit = bytearray(good)
    with zipfile.ZipFile(last) as archive:
        tensor = max(archive.infolist(), key=lambda entry: entry.file_size)
    one_bit[tensor.header_offset + tensor.file_size // 2] ^= 4
    for bad in (b"", good[: len(good) // 2], b"no checkpoint", one_bit, (tmp_path / "run" / "result").read_bytes()):
        last.write_bytes(bad)
        with pytest.raises(CheckpointCorrupt, match="last.ckpt"):
            train(recipe(tmp_path), resume=True, hardware=CPU)
    state = torch.load(tmp_path / "run" / "result", weights_only=True)
    torch.save({**dict.fromkeys(("recipe", "data", "stage", "best", "state"), 0), **state, "version": 1}, last)
    with pytest.raises(CheckpointMismatch, match="version 1"):
        train(recipe(tmp_path), resume=True, hardware=CPU)


def test_a_pipe_is_no_start_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is not a file"):
        load_result(tmp_path / "pipe")


def test_what_cannot_be_trained_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data"):
        train(recipe(tmp_path, data='""'), hardware=CPU)
    with pytest.raises(InputError, match="no output"):
        train(recipe(tmp_path, output='""'), hardware=CPU)
    with pytest.raises(InputError, match="there is no folder"):
        train(recipe(tmp_path, data=tmp_path / "nowhere"), hardware=CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image"):
        train(recipe(tmp_path, data=tmp_path / "empty"), hardware=CPU)
    with pytest.raises(InputError, match="2 of 2 images .* smaller than 41 x 41"):
        train(recipe(tmp_path, training__patch=41), hardware=CPU)
    with pytest.raises(InputError, match="one pixel has no statistics"):
        train(recipe(tmp_path, training__patch=1, training__batch=1), hardware=CPU)
    with pytest.raises(InputError, match="max_minutes"):
        train(recipe(tmp_path), max_minutes=0, hardware=CPU)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="output folder"):
        train(recipe(tmp_path, output=tmp_path / "file"), hardware=CPU)
    with pytest.raises(InputError, match="there is no folder"):
        train(recipe(tmp_path, validation=tmp_path / "nowhere"), hardware=CPU)
    (tmp_path / "small").mkdir()
    Image.fromarray(np.zeros((11, 40), np.uint8)).save(tmp_path / "small" / "0.png")
    sr = recipe(tmp_path, task='"sr"', levels__only="[2]", validation=tmp_path / "small")
    with pytest.raises(InputError, match="40 x 11 is smaller than 12 x 12"):  # nothing to compare at the scale of 4
        train(sr, hardware=CPU)
    with pytest.raises(InputError, match="there is no file"):
        train(recipe(tmp_path, init=tmp_path / "nowhere"), hardware=CPU)
    with pytest.raises(BackendUnavailable, match="backend 'cuda' cannot run"):  # nowhere are there so many
        train(recipe(tmp_path, training__batch=1000), hardware=Hardware("cuda", 1000))
    with pytest.raises(InputError, match="sync_batchnorm over several processes needs CUDA"):
        train(recipe(tmp_path, training__sync_batchnorm=True, training__memory="plain"), hardware=Hardware("cpu", 2))
    assert not (tmp_path / "run").exists()

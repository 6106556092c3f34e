"""Every weight file that comes with the package says how it came about and what it reaches."""

from __future__ import annotations

import re

import pytest

from memnet_fast import weights
from memnet_fast.tasks import TASKS

_KEYS = ("task", "recipe", "data", "seed", "commit", "hours", "hardware", "head_weights", "protocol")
_TABLES = ("psnr", "ssim", "psnr_degraded", "ssim_degraded")


def test_all_tasks_are_there() -> None:
    assert {f"memnet_m6r6.{task}" for task in TASKS} <= set(weights.bundled())


@pytest.mark.parametrize("name", list(weights.bundled()))
def test_metadata_is_complete_and_true(name: str) -> None:
    path = weights.bundled()[name]
    assert path.stat().st_size <= 3e6
    info, net = weights.load_info(path), weights.load_weights(path)
    missing = [key for key in (*_KEYS, *_TABLES) if not info.get(key)]
    assert not missing, missing
    task = TASKS[info["task"]]
    assert name.partition(".")[2] == task.name
    assert re.fullmatch("[0-9a-f]{7,40}", info["commit"])
    assert info["head_weights"] == pytest.approx(net.head_weights.tolist(), abs=6e-5)
    assert len(info["seed"]) == len(info["recipe"])
    for seed, stage in zip(info["seed"], info["recipe"], strict=True):
        assert stage["seed"] == seed and stage["steps"] > 0 and stage["lr"] > 0 and stage["recursions"] > 0
    assert info["recipe"][-1]["recursions"] == net.config.num_recursions
    assert info["hours"] == pytest.approx(sum(stage["hours"] for stage in info["recipe"]), abs=0.01)
    for data in info["psnr"]:
        tables = {table: info[table][data] for table in _TABLES}
        for label in map(task.label, task.levels):
            assert 15 < tables["psnr"][label] < 50 and 0 < tables["ssim_degraded"][label] < tables["ssim"][label] < 1, label
            assert tables["psnr"][label] > tables["psnr_degraded"][label] + 0.3, label

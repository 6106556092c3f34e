"""Trainings whose processes end at any moment: what is on the disk, and what the others do (support/killed_training.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.recipes import recipe_file

pytest.importorskip("lightning", reason="training needs the extra 'train'")
if not hasattr(os, "fork"):
    pytest.skip("processes are forked", allow_module_level=True)

_TESTS = Path(__file__).parent


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(_TESTS), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}


def _found(*words: object) -> dict[str, Any]:
    command = [sys.executable, str(_TESTS / "support" / "killed_training.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=_environment())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_checkpoint_loads_after_every_kill_during_a_save(tmp_path: Path) -> None:
    found = _found("saves", tmp_path, 40)
    assert found["kills"] == 40 and found["saves"] >= 40
    assert (found["unreadable"], found["backwards"], found["temporary_left"]) == (0, 0, 0), found


def test_a_training_killed_at_random_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    found = _found("runs", tmp_path, 8)
    assert (found["kills"], found["finished"]) == (8, 2)
    wrong = ("unreadable", "other_bits", "wrong_codes", "temporary_left")
    assert not any(found[name] for name in wrong), found


def test_of_two_processes_one_fails_and_nobody_waits(tmp_path: Path) -> None:
    found = _found("ranks", tmp_path)
    assert not any(case["hung"] for case in found.values()), found
    assert found["whole"]["codes"] == [0, 0]
    lost = "memnet: error: another process of this training ended"
    for case, codes in (("killed", [3, -9]), ("raising", [3, 2]), ("first_killed", [-9, 3]), ("saving", [-9, 3])):
        assert found[case]["codes"] == codes, found[case]
        said = found[case]["said"][codes.index(3)].splitlines()
        assert said[-1].startswith(lost) and sum("error" in line for line in said) == 1, said
        # The last step that both took; or, of who died while saving, the save before.
        assert found[case]["step"] == 2, found[case]
    assert found["raising"]["said"][1] == "memnet: error: this process has had enough\n"
    # What was written and not yet named is cleared away by whoever goes on, to the bits of an undisturbed training.
    assert found["saving"]["temporary"] == 1
    assert found["resumed"]["codes"] == [0, 0] and found["resumed"]["temporary"] == 0 and found["resumed"]["same"]


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    command = [sys.executable, str(_TESTS / "support" / "first_process_dies.py"), str(recipe_file(tmp_path))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment(), start_new_session=True) as process:
        try:
            # Both hold this pipe: it ends when both have ended.
            _, said = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == -signal.SIGKILL
    assert said == "memnet: error: the first process of this training ended\n"

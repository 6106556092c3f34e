"""Jobs that end at random moments leave whole files only, and the next run makes exactly the rest (rows I34, J06, J08)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import kills


def test_the_backends_of_earlier_runs_are_read_from_the_journal(tmp_path):
    (tmp_path / ".memnet").mkdir()
    text = '{"run": "1", "settings": {"backend": "torch"}}\n{"output": "a"}\n[]\n{"run": "2", "settings": {"backend": "cpu"}}\n'
    (tmp_path / ".memnet/journal.jsonl").write_text(text + '{"run": "3", "settings": {"backend": "tri')
    assert kills._backends(tmp_path) == ["cpu", "torch"]


def test_an_unforeseen_end_of_a_run_says_where(tmp_path):
    code = "from benchmarks import kills; kills.memnet = None; print(kills._finish(kills._start(kills.Path(), 'out')))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.stdout == "99\n" and "'NoneType' object is not callable" in (tmp_path / "messages.txt").read_text()


def test_fifteen_ends_at_random_moments():
    """`python -m benchmarks.kills 200` is the long version."""
    command = [sys.executable, "-m", "benchmarks.kills", "15", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["ended_by_SIGKILL"] == 15 and told["reruns"] > 0
    assert (told["incomplete"], told["wrong_reruns"], told["wrong_codes"], told["temporary_files_left"]) == (0, 0, 0, 0)

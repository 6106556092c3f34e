"""The benchmark of training steps, at a size that says nothing about speed: its rows are complete and true in themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import training


def test_rows_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "results_folder", lambda: tmp_path)
    monkeypatch.setattr(training, "WAYS", ("plain", "lean compiled" if shutil.which("g++") else "lean", "native"))
    assert training.main("cpu", 1, 8, 2) == 0
    stored = json.loads((tmp_path / "training.json").read_text())
    assert [row["way"] for row in stored["rows"]] == list(training.WAYS) and stored["about"]["patch"] == 8
    for row in stored["rows"]:
        assert row["peak_mib"] > row["before_mib"] > 0 and row["median_ms"] > 0 and row["throughput_to_plain"] > 0
    assert stored["rows"][0]["throughput_to_plain"] == 1

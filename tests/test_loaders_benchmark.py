"""The benchmark of the loaders: its files are those of a port, and its rows are complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import loaders
from memnet_fast.weights import load_weights


def test_its_files_hold_one_network_and_rows_are_complete(tmp_path: Path) -> None:
    files = loaders.write_files(tmp_path, channels=4, num_memory_blocks=2, num_recursions=1)
    own, *ports = [load_weights(path).state_dict() for path in files]
    for state in ports:
        assert own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)
    rows = loaders.measure(files[1:2], files[0], 1)
    # safetensors does not know this file.
    assert [row["reader"] for row in rows] == ["memnet_fast", "torch, weights_only"]
    assert all(row["median_ms"] > 0 and row["peak_mib"] >= 0 and row["rounds"] == 1 for row in rows)


@pytest.mark.parametrize("words", [["nowhere.pth"], ["--rounds", "0"]])
def test_bad_arguments_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        loaders.main(words)
    assert left.value.code == 2 and "error:" in capsys.readouterr().err.splitlines()[-1]

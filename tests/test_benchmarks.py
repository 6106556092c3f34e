"""The benchmarks are honest: a wrong peer is not timed, and the README says what the stored results say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import peers, report
from benchmarks.test_forward import GATE, Worker
from memnet_fast.config import MemNetConfig
from memnet_fast.reference import MemNet
from memnet_fast.weights import save_weights

ROOT = Path(__file__).parents[1]


def _calibrated() -> MemNet:
    torch.manual_seed(0)
    net = MemNet(MemNetConfig(channels=16, num_memory_blocks=2, num_recursions=2))
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(2, 1, 24, 24))
    return net.eval()


@pytest.mark.parametrize("name", [n for n in peers.PEERS if n != "torch.compile"])
def test_every_peer_computes_the_network(name: str) -> None:
    net = _calibrated()
    x = torch.rand(2, 1, 19, 23)
    with torch.inference_mode():
        expected = net(x)
        torch.testing.assert_close(peers.PEERS[name][0](net)(x), expected, rtol=1e-4, atol=1e-4)


def test_worker_measures_time_memory_and_error(tmp_path: Path) -> None:
    net, image = _calibrated(), torch.rand(1, 1, 20, 24)
    save_weights(net, tmp_path / "weights.safetensors")
    np.save(tmp_path / "image.npy", image.numpy())
    with torch.inference_mode():
        oracle = net.double()(image.double()).numpy()
    np.save(tmp_path / "oracle.npy", oracle)
    worker = Worker(peers.SUBJECT, tmp_path, 1)
    try:
        assert worker.ask("check")["nsr"] < GATE
        assert worker.ask("forward")["seconds"] > 0
        memory = worker.ask("memory")
        assert memory["peak_mib"] >= memory["before_mib"] > 10
        # A peer that returns its input, or forgets the last row, does not pass the gate.
        np.save(tmp_path / "oracle.npy", image.double().numpy() + 1e-3)
        assert worker.ask("check")["nsr"] > GATE
        oracle[..., -1, :] = 0
        np.save(tmp_path / "oracle.npy", oracle)
        assert worker.ask("check")["nsr"] > GATE
    finally:
        worker.close()


def test_readme_shows_the_stored_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert report.render(text) == text


def test_changed_results_would_be_noticed() -> None:
    text = (ROOT / "README.md").read_text()
    wrong = re.sub(r"\| \d+ \|", "| 1 |", text, count=1)
    assert wrong != text and report.render(wrong) == text
    with pytest.raises(ValueError, match="markers"):
        report.render("no markers")


def test_readme_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", (ROOT / "README.md").read_text()):
        path = target[0] or target[1]
        if "://" not in path:
            assert (ROOT / path).exists(), path

"""The benchmarks are honest: a wrong peer is not timed, and the README says what the stored results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import peers, report
from memnet_fast.config import MemNetConfig
from memnet_fast.reference import MemNet

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

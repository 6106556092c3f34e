"""The benchmarks are honest: a wrong peer is not timed, and the README says what the stored results say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import peers, pipeline, report
from benchmarks.test_forward import GATE, Worker
from memnet_fast.config import MemNetConfig
from memnet_fast.reference import MemNet
from memnet_fast.restore import images
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


def test_the_pipeline_is_timed_beside_the_network_on_its_own_planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(_calibrated(), tmp_path / "weights.safetensors")
    (tmp_path / "work").mkdir()
    seen = []
    original = pipeline.network_seconds
    monkeypatch.setattr(pipeline, "network_seconds", lambda net, planes: (seen.append(planes), original(net, planes))[1])
    result = pipeline.measure(tmp_path / "work", 11, 0.2, str(tmp_path / "weights.safetensors"), 2)
    assert len(result["ratios"]) == 2 and min(result["seconds_network_alone"]) > 0 and result["stages"]["encode"]["seconds"] > 0
    names = sorted(path.name for path in (tmp_path / "work" / "in").iterdir())
    assert len({name.partition(".")[2] for name in names}) == 4 and len(seen) == 5
    expected = [images.read_image(tmp_path / "work" / "in" / name).pixels.shape[:2] for name in names]
    shapes = sorted(plane.shape[1:] for planes in seen[1:3] for plane in planes)
    assert shapes == sorted(expected), "both halves together are the planes of the folder, once"
    assert result["megapixels"] == pytest.approx(sum(h * w for h, w in expected) / 1e6)
    drawn = [w * h / 1e6 for w, h, *_ in pipeline._KINDS]
    assert min(drawn) >= 0.02 and max(drawn) < 0.31

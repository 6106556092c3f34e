"""Whole-network time and memory of the CPU backend beside plain PyTorch.

    python -m pytest benchmarks --benchmark-json=benchmarks/results/DEVICE/forward.json

Each round of a peer is paired with a round of the subject just before it, so that a machine whose speed drifts still gives
true ratios. The error against float64 comes first: a peer that is wrong is not timed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peers import PEERS, SUBJECT
from memnet_fast import degrade
from memnet_fast.backends import cpu
from memnet_fast.models import create_model
from memnet_fast.weights import save_weights

SIZES = {"256x256": (1, 256, 256), "512x512": (1, 512, 512), "16x64x64": (16, 64, 64)}
ROUNDS = 5
# Root mean square error relative to the residual. Right peers were measured at 1.0e-6 to 2.7e-6 with the bundled weights; a
# wrong kernel is at 1e-2 and more.
GATE = 2e-5


class Worker:
    """A peer in its own process."""

    def __init__(self, peer: str, folder: Path, threads: int) -> None:
        environment = {**os.environ, **PEERS[peer][1], "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "benchmarks.worker", peer, str(folder), str(threads)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )

    def ask(self, request: str) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer's process ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module", params=SIZES)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path, int, Worker]]:
    """Weights, a noisy image, its restoration in float64, and the subject, ready."""
    n, h, w = SIZES[request.param]
    threads = cpu.num_threads()
    net = create_model("memnet_m6r6.denoise")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((n, 1, h // 16 + 1, w // 16 + 1), generator=generator)
    clean = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic").clamp(0, 1)
    image = degrade.gaussian(clean, 30.0, generator)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_weights(net, folder / "weights.safetensors")
        np.save(folder / "image.npy", image.numpy())
        with torch.inference_mode():
            double = net.double()
            oracle = torch.cat([double(image[i : i + 1].double()) for i in range(n)])
        np.save(folder / "oracle.npy", oracle.numpy())
        subject = Worker(SUBJECT, folder, threads)
        subject.ask("check")
        yield request.param, folder, threads, subject
        subject.close()


@pytest.mark.parametrize("peer", PEERS)
def test_forward(benchmark: Any, case: tuple[str, Path, int, Worker], peer: str) -> None:
    size, folder, threads, subject = case
    if peer.endswith("default allocator") and size != "256x256":
        pytest.skip("one size shows what the allocator costs, and this peer is slow")
    worker = Worker(peer, folder, threads)
    try:
        nsr = worker.ask("check")["nsr"]
        assert nsr <= GATE, f"{peer} is wrong: error {nsr:.2e} of the residual; nothing is timed"
        worker.ask("forward")
        own: list[float] = []
        theirs: list[float] = []
        benchmark.pedantic(
            lambda: theirs.append(worker.ask("forward")["seconds"]),
            setup=lambda: own.append(subject.ask("forward")["seconds"]),
            rounds=ROUNDS,
        )
        ratios = [t / o for t, o in zip(theirs, own, strict=True)]
        benchmark.group = size
        benchmark.extra_info.update(
            peer=peer,
            size=size,
            threads=threads,
            nsr=nsr,
            ms=1e3 * statistics.median(theirs),
            ratio_to_subject=statistics.median(ratios),
            ratio_q20_q80=[statistics.quantiles(ratios, n=5)[0], statistics.quantiles(ratios, n=5)[3]],
            environment=PEERS[peer][1],
        )
    finally:
        worker.close()

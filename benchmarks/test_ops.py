"""Single operations of M6R6 on the CPU, each beside the same operation in plain PyTorch where one writes it so.

    python -m benchmarks.run --suite ops [--sizes 256]        stores what they say
    python -m pytest benchmarks/test_ops.py --op-size 256x256

Every round is preceded by a round of the other, so that their ratio holds also where the machine's speed drifts. The error
against float64 comes first: what is wrong is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu.cases import op_cases
from benchmarks.gpu.ops import PlacedOp, limit, plain
from memnet_fast import native
from memnet_fast.backends import cpu
from memnet_fast.bench.clocks import quantiles

CPU = torch.device("cpu")
NAMES = [case.name for case in op_cases()]


def ways() -> list[tuple[str, str]]:
    """(backend, algorithm) in float32."""
    own = [] if native.why_missing() else [("cpu", algorithm) for algorithm in cpu.ALGORITHMS]
    return [*own, ("torch", "direct")]


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--op-threads"))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", ways(), ids="-".join)
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_operation(benchmark: Any, request: pytest.FixtureRequest, index: int, way: tuple[str, str]) -> None:
    backend, algorithm = way
    h, w = map(int, request.config.getoption("--op-size").split("x"))
    case = op_cases(4)[index]
    placed = PlacedOp(case, backend, "fp32", None, h, w, CPU, algorithm)
    errors = placed.check()
    assert errors["relative"] <= limit("fp32", algorithm), f"{case.name} is wrong: {errors}; nothing is timed"
    other = plain(case, h, w, CPU, torch.float32)
    theirs: list[float] = []
    own: list[float] = []

    def before() -> None:
        if other is not None:
            theirs.append(_milliseconds(other))

    benchmark.pedantic(
        lambda: own.append(_milliseconds(placed)),
        setup=before,
        rounds=request.config.getoption("--op-rounds"),
        warmup_rounds=1,
    )
    own, theirs = own[1:], theirs[1:]  # without the warm-up
    low, middle, high = quantiles(own)
    flop, byte = case.flop * h * w, case.byte * h * w
    row = {"suite": "op", "op": case.name, "size": f"{h}x{w}", "n": 1, "h": h, "w": w, "status": "ok", "errors": errors}
    row |= {"variant": f"memnet_fast {backend} {algorithm}", "precision": "fp32", "threads": torch.get_num_threads()}
    row |= {"ms": middle, "ms_q20": low, "ms_q80": high, "rounds": len(own)}
    row |= {"flop": flop, "byte": byte, "tflops": flop / middle * 1e-9, "tbps": byte / middle * 1e-9}
    if theirs:
        low, middle, high = quantiles([a / b for a, b in zip(theirs, own, strict=True)])
        row |= {"plain_ms": quantiles(theirs)[1], "plain_ratio": middle, "plain_ratio_q20": low, "plain_ratio_q80": high}
    benchmark.group = case.name
    benchmark.extra_info.update(row)


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        run()
    return 1e3 * (time.perf_counter() - start)

"""Conditions that hold for every test: fixed seeds, no TF32, and memory that is full of NaN until somebody writes it."""

from __future__ import annotations

import logging
import os

# cuBLAS is deterministic only with this, and reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from benchmarks.gpu.journal import gpu_is_lost

pytest.register_assert_rewrite("support.checks", "support.layers", "support.places")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    slow = pytest.mark.skip(reason="slow; asked for by -m slow")
    for item in items:
        # Not item.keywords, which hold the names of all folders above, too.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        elif item.get_closest_marker("slow") and "slow" not in (config.option.markexpr or ""):
            item.add_marker(slow)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Ends a process that has lost the GPU. It would fail every test that is left, and so fast that, of several workers, it got
    nearly all of them. What the test reported is known by now; xdist starts another worker.
    """
    if gpu_is_lost():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU is lost to this process since {nodeid}", returncode=1)


@pytest.fixture(autouse=True)
def _numerics():
    """Seeds, IEEE float32, and NaN in every torch.empty: a value that is read before it is written then shows."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def _of_the_process() -> dict[str, object]:
    log = logging.getLogger("memnet_fast")
    return {
        "handlers of the log": tuple(log.handlers),
        "level of the log": log.level,
        "working directory": os.getcwd(),
        "threads of torch": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "MEMNET_ variables": {k: v for k, v in os.environ.items() if k.startswith("MEMNET_")},
    }


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was(_numerics: None):
    """What a test leaves behind would decide about another one, in some orders only. Before monkeypatch, so undone after it."""
    before = _of_the_process()
    yield
    after = _of_the_process()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test changed what belongs to the process: {changed}"


@pytest.fixture(scope="session")
def twin_build(tmp_path_factory: pytest.TempPathFactory):
    """The CUDA backend compiled for the CPU (support/cuda_twin.py), once for all the tests that run it there."""
    from support import cuda_twin

    reason = cuda_twin.why_not()
    if reason is not None:
        pytest.skip(reason)
    return cuda_twin.build(tmp_path_factory.mktemp("twin"))

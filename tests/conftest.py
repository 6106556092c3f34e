"""Conditions that hold for every test: fixed seeds, no TF32, and memory that is full of NaN until somebody writes it."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("support.checks", "support.layers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


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

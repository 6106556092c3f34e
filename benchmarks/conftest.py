"""Options of the benchmarks of single operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--op-size", default="256x256", help="HxW of the image")
    parser.addoption("--op-threads", type=int, default=torch.get_num_threads())
    parser.addoption("--op-rounds", type=int, default=15)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name is nobody's business

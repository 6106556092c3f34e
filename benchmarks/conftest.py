"""What every result file says about the machine and the software it was measured with."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch

from memnet_fast import native
from memnet_fast.health import cpu_model


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name is nobody's business
    module = native.module()
    machine_info["memnet"] = {
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "isa": module.isas()[0],
        "native_compiler": module.compiler(),
        "torch": torch.__version__,
        "compiler": subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[:1],
    }

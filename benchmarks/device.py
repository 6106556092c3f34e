"""The folder of benchmarks/results/ that belongs to this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from memnet_fast.health import cpu_model


def results_folder() -> Path:
    """Named after the CPU and the number of CPUs in use; made if it is not there."""
    words = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    folder = Path(__file__).parent / "results" / f"{words}-{len(os.sched_getaffinity(0))}cpu"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

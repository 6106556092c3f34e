"""Runs the benchmarks and stores what they say:  python -m benchmarks.run [PYTEST OPTION ...]

Writes benchmarks/results/<device>/forward.json, then the tables of the README (benchmarks/report.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import report
from memnet_fast.health import cpu_model

_HERE = Path(__file__).parent


def device_name() -> str:
    """The CPU and the number of CPUs in use, as a folder name."""
    words = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    return f"{words}-{len(os.sched_getaffinity(0))}cpu"


def main() -> int:
    folder = _HERE / "results" / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "forward.json"
    fresh = result.with_suffix(".part")
    command = [sys.executable, "-m", "pytest", str(_HERE), f"--benchmark-json={fresh}", *sys.argv[1:]]
    code = subprocess.run(command, cwd=_HERE.parent).returncode
    if code == 0:
        fresh.replace(result)
        report.main()
    return code


if __name__ == "__main__":
    sys.exit(main())

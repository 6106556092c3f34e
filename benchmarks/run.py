"""Runs the benchmarks and stores what they say:  python -m benchmarks.run [PYTEST OPTION ...]

Writes forward.json and memory.json into benchmarks/results/<device>/, then the tables of the README.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import memory, report
from benchmarks.device import results_folder

_HERE = Path(__file__).parent


def main() -> int:
    result = results_folder() / "forward.json"
    fresh = result.with_suffix(".part")
    command = [sys.executable, "-m", "pytest", str(_HERE), f"--benchmark-json={fresh}", *sys.argv[1:]]
    code = subprocess.run(command, cwd=_HERE.parent).returncode
    if code == 0:
        fresh.replace(result)
        memory.main()
        report.main()
    return code


if __name__ == "__main__":
    sys.exit(main())

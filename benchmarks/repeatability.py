"""Whether two runs of memnet bench --json say the same:  python -m benchmarks.repeatability 1.json 2.json

Prints both ratios of every variant and size, and how far apart they are. Exit code 1: some are further apart than 5 %.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_GOAL = 0.05


def differences(first: dict[str, Any], second: dict[str, Any]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(size, variant) -> both ratios and the larger over the smaller, less 1; of what both runs timed."""
    runs = [{(r["size"], r["variant"]): r["ratio"] for r in run["rows"] if "ratio" in r} for run in (first, second)]
    pairs = {key: (runs[0][key], runs[1][key]) for key in runs[0] if key in runs[1]}
    return {key: (a, b, max(a, b) / min(a, b) - 1) for key, (a, b) in pairs.items()}


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    try:
        found = differences(*(json.loads(Path(name).read_text()) for name in arguments))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"benchmarks.repeatability: not two results of memnet bench: {error}", file=sys.stderr)
        return 2
    for (size, variant), (a, b, apart) in found.items():
        print(f"{size:10} {variant:40} {a:7.3f} {b:7.3f}  {100 * apart:5.1f} %")
    return int(not found or max(apart for *_, apart in found.values()) > _GOAL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

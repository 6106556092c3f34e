"""Begins a file of results with what is known of machine and software:  python -m benchmarks.gpu.facts OUT.json"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu import store
from memnet_fast.bench.facts import about

if __name__ == "__main__":
    store.add(Path(sys.argv[1]), about(), [])

"""What a file of results says about the machine and the software:  python -m benchmarks.gpu.facts OUT.json (begins it)"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import memnet_fast
from benchmarks.gpu import store
from memnet_fast import native

_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu,memory.total"


def _output(*command: str) -> str | None:
    """What a command prints, or None where it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(module: str) -> str | None:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return None


def about() -> dict[str, Any]:
    """Plain values. The commit comes from git, or from MEMNET_COMMIT where the sources are a copy without history."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("MEMNET_COMMIT") or _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "nvcc": (_output("nvcc", "--version") or "").splitlines()[-1:],
        "memnet_fast": memnet_fast.__version__,
        "package": str(Path(memnet_fast.__file__).parent),
        "native_cpu": native.why_missing() or "ok",
        "native_cuda": _native_cuda(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "sm_count": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "memory_bytes": p.total_memory,
        }
        values = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "-i", "0")
        if values:
            found["gpu"]["nvidia_smi"] = dict(zip(_QUERY.split(","), map(str.strip, values.split(",")), strict=False))
    return found


def _native_cuda() -> str:
    from memnet_fast import native_cuda

    return native_cuda.why_missing() or "ok"


def folder_name(gpu: str) -> str:
    """The folder of benchmarks/results/ for a GPU."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())


if __name__ == "__main__":
    store.add(Path(sys.argv[1]), about(), [])

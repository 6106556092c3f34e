"""Counts the instructions that one run of the network executes, with valgrind: exact, whatever else the machine does.

profile_overhead.py uses it. `dump` writes a plan as the native module takes it; this file, run as a script under valgrind with
numpy alone (FOLDER MODULE.so RUNS), reads it and runs it. What two runs execute less what one does is one run.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from memnet_fast.backends.cpu import CpuPacked

_POINTERS = ("srcs", "scale", "shift", "weight_a", "bias_a", "weight_b", "bias_b", "head_weights")
_ALIGNMENT = 64
# The best that valgrind knows.
ISA = "avx2"


def dump(folder: Path, packed: CpuPacked, image: np.ndarray) -> None:
    """image [1, C, H, W] float32. Addresses become a block and a place in it."""
    starts = [(block.ctypes.data, block.ctypes.data + block.nbytes) for block in packed._kept]
    places = {}
    for key in _POINTERS:
        for i, address in enumerate(packed.ops[key].tolist()):
            if address:
                block = next(k for k, (low, high) in enumerate(starts) if low <= address < high)
                places[f"{key} {i}"] = (block, address - starts[block][0])
    blocks = {f"block{k}": block.reshape(-1).view(np.uint8) for k, block in enumerate(packed._kept)}
    np.savez(folder / "blocks.npz", image=image, ops=packed.ops.view(np.uint8), **blocks)
    n, _, h, w = image.shape
    call = {"places": places, "shape": packed._shape(n, h, w), "bytes": packed.workspace_bytes(n, h, w)}
    (folder / "call.json").write_text(json.dumps({**call, "algorithm": packed.algorithm, "isa": packed.isa}))


def why_not() -> str | None:
    return None if shutil.which("valgrind") else "valgrind is not installed"


def count(folder: Path, module: Path) -> int:
    """Instructions of one run of what was dumped. Raises RuntimeError."""
    totals = []
    for runs in (1, 2):
        command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        # Not -I, which would also ignore the seed: with random hashes, two runs differ by more than the network.
        command += [sys.executable, "-P", "-s", __file__, str(folder), str(module), str(runs)]
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        found = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
        if done.returncode or found is None:
            raise RuntimeError(f"valgrind ended with {done.returncode}: {done.stderr[-500:]}")
        totals.append(int(found[1].replace(",", "")))
    return totals[1] - totals[0]


def _aligned(data: np.ndarray) -> np.ndarray:
    raw = np.zeros(data.nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    raw[start : start + data.nbytes] = data
    return raw[start : start + data.nbytes]


def main() -> None:
    folder, path, runs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    loader = importlib.machinery.ExtensionFileLoader("_native", path)
    spec = importlib.util.spec_from_loader("_native", loader)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    stored = np.load(folder / "blocks.npz")
    call = json.loads((folder / "call.json").read_text())
    blocks = [_aligned(stored[f"block{k}"]) for k in range(sum(name.startswith("block") for name in stored.files))]
    ops = stored["ops"].view(module.op_dtype)
    for place, (block, offset) in call["places"].items():
        key, i = place.split()
        ops[key][int(i)] = blocks[block].ctypes.data + offset
    image, n = stored["image"], call["shape"]
    out = np.zeros((n[0], n[4], n[1], n[2]), np.float32)
    workspace = _aligned(np.zeros(call["bytes"], np.uint8))
    where = (workspace.ctypes.data, workspace.nbytes, image.ctypes.data, out.ctypes.data)
    for _ in range(runs):
        module.run(ops, *n, *where, call["algorithm"], call["isa"], 1)
    assert np.isfinite(out).all() and out.any()
    out.tofile(folder / "out.bin")


if __name__ == "__main__":
    main()

"""One peer in a process of its own, so that its peak memory and its allocator are its own.

    python -m benchmarks.worker PEER FOLDER THREADS

FOLDER holds weights.safetensors, image.npy and oracle.npy (float64). Answers each line on standard input with one line of
JSON: `check` the error against the oracle, `forward` the seconds of one pass, `memory` the peak in MiB.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import PEERS
from memnet_fast.weights import load_weights


def _peak_mib() -> float:
    """Of this program alone: getrusage's figure would begin with what the parent held when it forked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell a process its peak memory")


def main() -> None:
    peer, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    net = load_weights(folder / "weights.safetensors")
    image = torch.from_numpy(np.load(folder / "image.npy"))
    before = _peak_mib()
    run = PEERS[peer][0](net)
    with torch.inference_mode():
        for line in sys.stdin:
            match line.strip():
                case "check":
                    y = run(image).double()
                    oracle = torch.from_numpy(np.load(folder / "oracle.npy"))
                    residual = (oracle - image).square().mean().sqrt()
                    answer = {"nsr": float((y - oracle).square().mean().sqrt() / residual)}
                case "forward":
                    start = time.perf_counter()
                    run(image)
                    answer = {"seconds": time.perf_counter() - start}
                case "memory":
                    answer = {"peak_mib": _peak_mib(), "before_mib": before}
                case other:
                    raise SystemExit(f"unknown request {other!r}")
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

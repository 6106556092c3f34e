"""Peak memory of one forward pass in every peer:  python -m benchmarks.memory

Writes benchmarks/results/<device>/memory.json. Apart from timing, because it does not mind a busy machine and needs no rounds.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.device import results_folder
from benchmarks.peers import PEERS
from benchmarks.test_forward import SIZES, Worker
from memnet_fast.backends import cpu
from memnet_fast.models import create_model
from memnet_fast.weights import save_weights


def main() -> int:
    rows = []
    for size, (n, h, w) in SIZES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_weights(create_model("memnet_m6r6.denoise"), folder / "weights.safetensors")
            np.save(folder / "image.npy", torch.rand((n, 1, h, w), generator=torch.Generator().manual_seed(0)).numpy())
            for peer in PEERS:
                worker = Worker(peer, folder, cpu.num_threads())
                try:
                    worker.ask("forward")
                    rows.append({"peer": peer, "size": size, **worker.ask("memory")})
                finally:
                    worker.close()
                print(json.dumps(rows[-1]), flush=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": cpu.num_threads()}
    (results_folder() / "memory.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

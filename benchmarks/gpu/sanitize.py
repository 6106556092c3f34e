"""Every kernel on shapes with ragged edges, for compute-sanitizer to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize

Without PyTorch's cache every tensor is an allocation of its own, whose ends are then really its ends. Exit code 3: a result is
not finite.
"""

from __future__ import annotations

import argparse

import torch

import memnet_fast as mf
from benchmarks.gpu.cases import op_cases
from benchmarks.gpu.ops import PlacedOp
from memnet_fast.config import MemNetConfig

# Strips of 32 to 96 pixels, their edges, an image smaller than any tile, several images.
SHAPES = [(1, 1, 1), (1, 5, 7), (2, 17, 33), (1, 33, 97), (1, 3, 200)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--precisions", default="fp16,bf16")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    net = mf.MemNet(MemNetConfig(num_memory_blocks=2, num_recursions=2)).eval().to(options.device)
    finite = True
    for precision in options.precisions.split(","):
        fast = mf.fuse(net, backend=options.backend, precision=precision)
        for n, h, w in SHAPES:
            y = fast(torch.rand(n, 1, h, w).to(options.device)).cpu()
            finite = finite and bool(torch.isfinite(y).all())
            print(precision, n, h, w, "finite" if finite else "NOT FINITE", flush=True)
        # As a user's graph would hold it, and the same shape again, which the backend replays by itself.
        x = torch.rand(1, 1, 33, 97).to(options.device)
        for _ in range(4):
            finite = finite and bool(torch.isfinite(fast(x)).all())
        if options.backend == "cuda":
            # A newer GPU has a residual block of its own; the one of sm_80 is what the others run.
            old = PlacedOp(op_cases()[0], "cuda", precision, {"capability": 80}, 33, 97, torch.device(options.device))
            # By memcpy, which initcheck sees; kernels of PyTorch are not instrumented.
            old._work.copy_(torch.zeros(old._work.shape, dtype=torch.uint8))
            old()
    return 0 if finite else 3


if __name__ == "__main__":
    raise SystemExit(main())

"""One forward pass with warm-up before it, for Nsight Compute to look at (benchmarks/gpu_window.sh says how):

ncu --profile-from-start off ... python -m benchmarks.gpu.profile_target [--size 1080p] [--precision fp16]
"""

from __future__ import annotations

import argparse

import torch

import memnet_fast as mf
from benchmarks.gpu.cases import SIZES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1080p", help=", ".join(SIZES) + " or NxHxW")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    n, h, w = SIZES.get(options.size) or tuple(int(s) for s in options.size.split("x"))
    fast = mf.fuse(mf.create_model("memnet_m6r6.denoise").to(options.device), options.backend, options.precision)
    x = torch.rand(n, 1, h, w).to(options.device)
    for _ in range(2):
        fast(x)
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    y = fast(x)
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(f"{fast.backend} {fast.precision} {list(y.shape)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

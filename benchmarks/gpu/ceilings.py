"""What the card itself does: bytes of a large copy, and operations of a large matrix product, through PyTorch.

python -m benchmarks.gpu.ceilings OUT.json
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import facts, store
from benchmarks.gpu.timing import Variant, measure
from memnet_fast.bench.clocks import Clock, CudaClock


def measured(clock: Clock, device: torch.device) -> dict[str, Any]:
    """flops and bytes: of a bf16 product of 8192^3 and of a 2 GiB copy (read and written), per second; rows: the two as rows of
    results. Random data: zeros run faster than any real numbers. Small on a CPU, for a dry run.
    """
    small = device.type == "cpu"
    n, count = (128, 1 << 16) if small else (8192, (1 << 31) // 4)
    dtype = torch.float32 if small else torch.bfloat16
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty(n, n, device=device, dtype=dtype)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    names = (f"gemm {str(dtype).removeprefix('torch.')} {n}^3", f"copy of {count * 4 >> 20} MiB")
    variants = [
        Variant(names[0], partial(torch.matmul, a, b, out=product), dict, {}),
        Variant(names[1], partial(target.copy_, source), dict, {}),
    ]
    rows = measure(variants, clock, 1.0)
    for row, flop, byte in zip(rows, (2 * n**3, 0), (0, 8 * count), strict=True):
        if row["status"] != "ok":
            raise RuntimeError(f"the ceiling '{row['variant']}' could not be measured: {row['reason']}")
        row.update(suite="ceiling", tflops=flop / row["ms"] * 1e-9, tbps=byte / row["ms"] * 1e-9)
    return {"flops": rows[0]["tflops"] * 1e12, "bytes": rows[1]["tbps"] * 1e12, "rows": rows}


if __name__ == "__main__":
    where = torch.device("cuda", 0)
    found = measured(CudaClock(where), where)["rows"]
    store.add(Path(sys.argv[1]), facts.about(), found)
    for line in found:
        print(f"{line['variant']:24} {line['ms']:9.4f} ms  {line['tflops']:8.1f} TFLOP/s  {line['tbps']:6.2f} TB/s")

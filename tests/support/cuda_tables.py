"""csrc/cuda/pack.h in NumPy: what the tables of a network make of its parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from memnet_fast.backends.cuda_tables import FOLD_NORM, FOLD_TOTAL, Tables


def executed(tables: Tables, state: Sequence[Tensor]) -> np.ndarray:
    """The packed weights [packed_bytes] uint8; bytes that nobody writes are 0xFF."""
    flat = [t.detach().double().reshape(-1).numpy() for t in state]
    fold = np.full(tables.fold_count, np.nan)
    for job, sources in zip(tables.fold_jobs, tables.fold_sources, strict=True):
        at, count = int(job["out"]), int(job["count"])
        if job["kind"] == FOLD_NORM:
            weight, bias, mean, variance = (flat[s] for s in sources)
            assert len(weight) == count
            fold[at : at + count] = weight / np.sqrt(variance + job["value"])
            fold[at + count : at + 2 * count] = bias - mean * fold[at : at + count]
        elif job["kind"] == FOLD_TOTAL:
            assert len(flat[sources[0]]) == count
            total = flat[sources[0]][0]
            for value in flat[sources[0]][1:]:
                total = total + value
            fold[at] = total
        else:
            fold[at : at + count] = job["value"]
    packed = np.full(tables.packed_bytes, 0xFF, np.uint8)
    for job, source in zip(tables.pack_jobs, tables.pack_sources, strict=True):
        index = tables.maps[job["map"] : job["map"] + job["count"]]
        kept = index[index >= 0]
        value = (fold if source < 0 else flat[source])[job["base"] + kept]
        if job["scale"] >= 0:
            value = value * fold[job["scale"] + kept // job["inner"]]
        if job["shift"] >= 0:
            value = value + fold[job["shift"] + kept // job["inner"]]
        everything = torch.zeros(int(job["count"]), dtype=torch.float64)
        everything[torch.from_numpy(index >= 0)] = torch.from_numpy(value)
        kind = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16}[int(job["type"])]
        raw = everything.float().to(kind).view(torch.uint8).numpy()
        packed[job["out"] : job["out"] + len(raw)] = raw
    return packed

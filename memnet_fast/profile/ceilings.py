"""What this machine can do at best, measured: multiply-adds, copies, matrix products. Kept for as long as the process lives.

Every figure is the best of many short attempts: what a machine can do shows in the moments when nobody disturbs it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from memnet_fast import native

_BURSTS, _BURST_SECONDS = 150, 1e-3
# Piece after piece of a buffer that no cache holds, so that each comes from memory.
_COPY_BYTES, _PIECE_BYTES = 1 << 28, 1 << 24
_PRODUCTS, _SIDE = 40, 512
_GPU_COPY_BYTES, _GPU_SIDE = 1 << 30, 8192

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float16}


@dataclass(frozen=True)
class Ceilings:
    """flops: FLOP per second that products are held against, `source` says which of the measured ones: "fma" or "gemm". fma:
    of a loop of multiply-adds on registers; None where there is none (a GPU, a precision other than fp32, no native module).
    gemm: of a large product by torch. bytes: per second of a large copy, read and written. threads: None for a GPU."""

    fma: float | None
    gemm: float
    bytes: float
    threads: int | None

    @property
    def flops(self) -> float:
        return self.fma or self.gemm

    @property
    def source(self) -> str:
        return "fma" if self.fma else "gemm"


@cache
def of_cpu(threads: int, isa: str | None, precision: str = "fp32") -> Ceilings:
    """isa: of the native module's loop ("auto", "avx512", ...); None: not measured."""
    fma = None
    if isa is not None and precision == "fp32" and native.why_missing() is None:
        module = native.module()
        fma = max(module.multiply_add_rate(isa, threads, _BURST_SECONDS) for _ in range(_BURSTS))
    return Ceilings(fma, _gemm(threads, _DTYPES[precision]), _copy(threads), threads)


@cache
def of_gpu(device: torch.device, precision: str) -> Ceilings:
    """fp8 is held against the product in e4m3 where torch has it, tf32 against fp32 operands rounded by the tensor cores."""
    with torch.cuda.device(device):
        copy = 2 * _GPU_COPY_BYTES / _gpu_seconds(_gpu_copy(device))
        return Ceilings(None, 2 * _GPU_SIDE**3 / _gpu_seconds(_gpu_product(device, precision)), copy, None)


def _best(seconds: Callable[[], float], attempts: int) -> float:
    return min(seconds() for _ in range(attempts))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _copy(threads: int) -> float:
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.zeros_like(source)
    share = _PIECE_BYTES // threads
    starts = itertools.cycle(range(0, _COPY_BYTES, _PIECE_BYTES))

    def part(start: int) -> None:
        np.copyto(target[start : start + share], source[start : start + share])

    with ThreadPoolExecutor(threads) as pool:

        def piece() -> None:
            start = next(starts)
            list(pool.map(part, range(start, start + share * threads, share)))

        return 2 * share * threads / _best(lambda: _timed(piece), 4 * _COPY_BYTES // _PIECE_BYTES)


def _gemm(threads: int, dtype: torch.dtype) -> float:
    # Random numbers: zeros run faster than any real ones on some machines.
    a, b = (torch.rand(_SIDE, _SIDE, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    out = torch.empty_like(a)
    with _torch_threads(threads):
        return 2 * _SIDE**3 / _best(lambda: _timed(lambda: torch.matmul(a, b, out=out)), _PRODUCTS)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _gpu_copy(device: torch.device) -> Callable[[], object]:
    source = torch.ones(_GPU_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _gpu_product(device: torch.device, precision: str) -> Callable[[], object]:
    a, b = (torch.rand(_GPU_SIDE, _GPU_SIDE, device=device).to(_DTYPES[precision]) for _ in range(2))
    if precision == "fp8" and torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        return lambda: torch._scaled_mm(x, y, one, one, out_dtype=torch.float16)
    out = torch.empty_like(a)
    if precision != "tf32":
        return lambda: torch.matmul(a, b, out=out)

    def tf32() -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            torch.matmul(a, b, out=out)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return tf32


def _gpu_seconds(run: Callable[[], object]) -> float:
    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    once()
    return _best(once, _PRODUCTS)

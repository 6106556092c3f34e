"""Ceilings are measured: in a sane range, once for each process, and threads are given back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from memnet_fast import native
from memnet_fast.profile import ceilings


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ceilings, "_BURSTS", 3)
    monkeypatch.setattr(ceilings, "_COPY_BYTES", 1 << 22)
    monkeypatch.setattr(ceilings, "_PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "_PRODUCTS", 2)
    monkeypatch.setattr(ceilings, "_SIDE", 64)
    ceilings.of_cpu.cache_clear()
    yield
    ceilings.of_cpu.cache_clear()


@pytest.mark.parametrize("threads", [1, 2])
def test_every_figure_is_that_of_a_machine(threads):
    before = torch.get_num_threads()
    found = ceilings.of_cpu(threads, "auto")
    assert torch.get_num_threads() == before
    assert 1e5 < found.gemm < 1e14 and 1e5 < found.bytes < 1e13 and found.threads == threads
    if native.why_missing() is None:
        assert 1e6 < found.fma < 1e14 and found.flops == found.fma and found.source == "fma"


def test_without_a_loop_the_product_is_the_ceiling():
    for found in (ceilings.of_cpu(1, None), ceilings.of_cpu(1, "auto", "bf16")):
        assert found.fma is None and found.flops == found.gemm and found.source == "gemm"


def test_measured_once():
    assert ceilings.of_cpu(1, "auto") is ceilings.of_cpu(1, "auto")


def test_a_figure_is_the_best_of_its_attempts():
    attempts = iter([0.3, 0.1, 0.2])
    assert ceilings._best(lambda: next(attempts), 3) == 0.1


@pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "built")
def test_the_loop_of_multiply_adds_checks_its_arguments():
    module = native.module()
    for arguments in (("auto", 0, 0.01), ("auto", 1, 0.0), ("auto", 1, 100.0), ("mmx", 1, 0.01)):
        with pytest.raises(ValueError):
            module.multiply_add_rate(*arguments)
    for isa in module.isas():
        assert module.multiply_add_rate(isa, 1, 1e-4) > 1e6


@pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "built")
def test_multiply_adds_of_threads_that_were_not_granted_do_not_count():
    """Counted as asked for, 1024 threads of which one is granted would be a thousand times as fast as one."""
    code = """
from memnet_fast import native
print(*(max(native.module().multiply_add_rate("auto", threads, 1e-3) for _ in range(5)) for threads in (1, 1024)))
"""
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    one, many = map(float, done.stdout.split())
    assert many < 100 * one

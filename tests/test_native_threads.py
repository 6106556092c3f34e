"""How many threads the CPU backend takes: what torch says, and no more than the process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memnet_fast.backends import cpu


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 16 CPUs without limits whose torch takes them all; returns the folder of its control group."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(cpu, "Path", lambda text: tmp_path / text.lstrip("/"))
    monkeypatch.setattr(cpu, "_forked", False)
    group = tmp_path / "sys/fs/cgroup"
    (group / "cpu").mkdir(parents=True)
    return group


def test_without_limits_torch_decides(machine, monkeypatch):
    assert cpu.num_threads() == 16
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert cpu.num_threads() == 5


def test_affinity_and_fork_limit_them(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7, 9})
    assert cpu.num_threads() == 3
    monkeypatch.setattr(cpu, "_forked", True)
    assert cpu.num_threads() == 1


@pytest.mark.parametrize(
    ("text", "threads"),
    [("200000 100000", 2), ("250000 100000", 3), ("50000 100000", 1), ("max 100000", 16), ("", 16), ("-5 100000", 16)],
)
def test_control_group_limits_them(machine, text, threads):
    (machine / "cpu.max").write_text(text + "\n")
    assert cpu.num_threads() == threads


@pytest.mark.parametrize(("quota", "threads"), [("400000", 4), ("-1", 16), ("150000", 2), ("x", 16)])
def test_control_group_of_version_1_limits_them(machine, quota, threads):
    (machine / "cpu/cpu.cfs_quota_us").write_text(quota + "\n")
    (machine / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cpu.num_threads() == threads


@pytest.mark.skipif(not Path("/proc/self").exists() or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two CPUs")
def test_environment_and_set_num_threads_are_honoured():
    code = """
import torch
from memnet_fast.backends import cpu
seen = [cpu.num_threads()]
torch.set_num_threads(1)
print(*seen, cpu.num_threads())
"""
    for wanted in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": wanted}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        first, after = (int(word) for word in done.stdout.split())
        assert first == min(int(wanted), cpu._cgroup_cpus()) and after == 1

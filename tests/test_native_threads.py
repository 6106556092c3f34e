"""How many threads the CPU backend takes: what torch says, and no more than the process may use."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.restoring import small_net

from memnet_fast import control_groups, fuse, native
from memnet_fast.backends import cpu


@pytest.fixture
def root(monkeypatch, tmp_path):
    """The folder that stands for / when control groups are looked for."""
    monkeypatch.setattr(control_groups, "Path", lambda text: tmp_path / text.lstrip("/"))
    _look_again()
    (tmp_path / "proc/self").mkdir(parents=True)
    yield tmp_path
    _look_again()


def _look_again():
    for known in (control_groups.folders, control_groups._quotas):
        known.cache_clear()


@pytest.fixture
def machine(monkeypatch, root):
    """A machine of 16 CPUs without limits whose torch takes them all; returns the folder of its control group."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(cpu, "_forked", False)
    group = root / "sys/fs/cgroup"
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


def nested(group, own, limits, names):
    """The process is in the group `own`; limits: texts by group."""
    (group.parents[2] / "proc/self/cgroup").write_text(own)
    for path, texts in limits.items():
        (group / path).mkdir(parents=True, exist_ok=True)
        for name, text in zip(names, texts, strict=True):
            (group / path / name).write_text(text)


@pytest.mark.parametrize(
    ("own", "threads"),
    [
        ("0::/slice/service/inner\n", 3),
        ("0::/slice/service\n", 3),
        ("0::/slice\n", 4),
        ("0::/other\n", 9),
        ("0::/\n", 9),
        ("0::/slice/service/gone (deleted)\n", 3),
        ("0::/../slice/service\n", 9),
        ("12:memory:/slice/service\n0::/slice\n", 4),
        ("", 9),
        ("nonsense\n", 9),
    ],
)
def test_limits_of_the_groups_around_count_too(machine, own, threads):
    limits = {
        ".": "900000 100000",
        "slice": "400000 100000",
        "slice/service": "300000 100000",
        "slice/service/inner": "max 100000",
    }
    nested(machine, own, {path: [text] for path, text in limits.items()}, ["cpu.max"])
    assert cpu.num_threads() == threads


@pytest.mark.parametrize(
    ("own", "threads"),
    [
        ("4:cpu,cpuacct:/docker/inner\n3:memory:/other\n0::/init.scope\n", 3),
        ("5:cpuacct:/x\n4:cpu:/docker\n", 3),
        ("4:cpu:/other\n", 7),
        ("4:cpu,cpuacct:/docker/inner/a\xe9\n", 3),
    ],
)
def test_limits_of_the_groups_around_count_too_in_version_1(machine, own, threads):
    limits = {"cpu": ("700000", "100000"), "cpu/docker": ("150000", "50000"), "cpu/docker/inner": ("-1", "100000")}
    nested(machine, own, limits, ["cpu.cfs_quota_us", "cpu.cfs_period_us"])
    (machine.parents[2] / "proc/self/cgroup").write_bytes(own.encode("latin-1"))
    assert cpu.num_threads() == threads


def test_a_limit_that_changes_is_seen(machine):
    for quota in ("300000", "200000", "max"):
        (machine / "cpu.max").write_text(f"{quota} 100000\n")
        assert cpu.num_threads() == (16 if quota == "max" else int(quota[0]))


def test_memory_is_what_the_narrowest_group_leaves(machine):
    limits = {".": ("max", "10", ""), "a": ("5000", "4000", "anon 9\nactive_file 40\n"), "a/b": ("4500", "400", "")}
    nested(machine, "0::/a/b\n", limits, ["memory.max", "memory.current", "memory.stat"])
    assert control_groups.free_memory() == 1040
    (machine / "a/memory.max").write_text("max\n")
    assert control_groups.free_memory() == 4100
    (machine / "a/b/memory.max").write_text("max\n")
    assert control_groups.free_memory() is None


def test_memory_is_what_the_narrowest_group_of_version_1_leaves(machine):
    unlimited = str((1 << 63) - 4096)
    limits = {
        "memory": (unlimited, "7000", "total_active_file 1\n"),
        "memory/a": ("5000", "4000", "active_file 7\ntotal_active_file 40\ntotal_inactive_file 2\n"),
        "memory/a/b": ("4500", "400", ""),
        "memory/other": ("10", "10", ""),
    }
    names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"]
    nested(machine, "9:cpu,cpuacct:/other\n4:memory:/a/b\n0::/\n", limits, names)
    assert control_groups.free_memory() == 1042
    (machine / "memory/a/memory.limit_in_bytes").write_text(unlimited)
    assert control_groups.free_memory() == 4100
    (machine / "memory/memory.limit_in_bytes").write_text("8000\n")
    assert control_groups.free_memory() == 1001
    nested(machine, "4:memory:/a/b\n0::/\n", {".": ("900", "0", "")}, ["memory.max", "memory.current", "memory.stat"])
    assert control_groups.free_memory() == 900
    for path in (".", "memory", "memory/a", "memory/a/b"):
        for file in (machine / path).glob("memory.*"):
            file.write_text(unlimited if "limit" in file.name else "max\n")
    assert control_groups.free_memory() is None


@pytest.mark.skipif(native.why_missing() is not None, reason="needs the native module")
@pytest.mark.parametrize("algorithm", cpu.ALGORITHMS)
@pytest.mark.parametrize("worst", [False, True])
def test_a_call_whose_number_of_threads_changes_in_between(monkeypatch, algorithm, worst):
    """Sizes do not grow with the number of threads alone: one thread less can need more memory."""
    fast = fuse(small_net(), backend="cpu", algorithm=algorithm)
    x = torch.rand(1, 1, 33, 200)
    if worst:
        x[..., 5, 7] = float("nan")
    expected = fast(x)
    counts = itertools.cycle((1, 5, 3, 64, 2))
    monkeypatch.setattr(cpu, "num_threads", lambda: next(counts))
    for _ in range(5):
        fast.release_workspace()
        assert torch.equal(fast(x).nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.skipif(native.why_missing() is not None, reason="needs the native module")
@pytest.mark.parametrize("threads", [0, -1, 1025, 2**31 - 1])
def test_a_wrong_number_is_refused_before_anything_is_made_for_it(threads):
    module = native.module()
    operations = np.zeros(40, module.op_dtype)
    for run in (module.run, module.run_timed):
        with pytest.raises(ValueError, match="threads must be in 1..1024"):
            run(operations, 1, 5, 5, 1, 1, 16, 2, 64, 1 << 20, 64, 64, "direct", "auto", threads)


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
        assert first == min(int(wanted), control_groups.granted_cpus()) and after == 1

"""A variant that takes the GPU from its process is noted, and the program goes on without it when it is started again."""

from __future__ import annotations

import os
import time

import pytest
import torch

from benchmarks.gpu import network, store, timing
from benchmarks.gpu.journal import STATUS, Journal
from memnet_fast.bench import clocks


class _Gpu:
    """Stands for one that a fault takes away."""

    lost = False

    def synchronize(self, device=None):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fault(self):
        self.lost = True
        self.synchronize()


@pytest.fixture
def gpu(monkeypatch):
    gpu = _Gpu()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    return gpu


def _exits(status):
    raise SystemExit(status)


def _variants(gpu, where):
    def check():
        if where == "check":
            gpu.fault()
        return {}

    def run():
        if where == "run":
            gpu.fault()

    return [
        timing.Variant("first", lambda: None, dict, {}),
        timing.Variant("bad", run, check, {}, {"precision": "fp16"}),
        timing.Variant("last", lambda: None, dict, {}),
    ]


def _measure(gpu, where, file, rows):
    journal = Journal(file, rows.append)
    return timing.measure(_variants(gpu, where), clocks.HostClock(), 0.0, "first", journal, "1080p")


@pytest.mark.parametrize("where", ["check", "run"])
def test_a_lost_gpu_ends_the_process_and_costs_one_variant(gpu, tmp_path, monkeypatch, where):
    monkeypatch.setattr(os, "_exit", _exits)
    file, rows = tmp_path / "journal", []
    with pytest.raises(SystemExit) as ended:
        _measure(gpu, where, file, rows)
    assert ended.value.code == STATUS
    reason = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert rows == [{"variant": "bad", "precision": "fp16", "status": "failed", "reason": reason}]
    gpu.lost = False
    again = _measure(gpu, where, file, rows)
    assert [(r["variant"], r["status"]) for r in again] == [("first", "ok"), ("last", "ok")] and len(rows) == 1
    other = timing.measure(_variants(gpu, ""), clocks.HostClock(), 0.0, "first", Journal(file, rows.append), "256x256")
    assert len(other) == 3, "where it was not lost, it is tried"


def test_an_ordinary_error_ends_nothing(gpu, tmp_path):
    def wrong():
        raise ValueError("no such kernel")

    variants = [timing.Variant("bad", wrong, wrong, {}), *_variants(gpu, "")]
    variants = [v for v in variants if v.name != "bad" or v.run is wrong]
    rows = timing.measure(variants, clocks.HostClock(), 0.0, None, Journal(tmp_path / "journal", _exits), "1080p")
    assert [r["status"] for r in rows] == ["failed", "ok", "ok"] and not (tmp_path / "journal").exists()


def test_what_does_not_end_is_noted(gpu, tmp_path, monkeypatch):
    ended, rows = [], []
    monkeypatch.setattr(os, "_exit", ended.append)
    journal = Journal(tmp_path / "journal", rows.append)
    with journal.watching("lost 1080p slow", {"variant": "slow"}, 0.05):
        for _ in range(200):
            if ended:
                break
            time.sleep(0.05)
    assert ended == [STATUS] and rows[0]["reason"] == "no result after 0.05 s"
    assert Journal(tmp_path / "journal", rows.append).has("lost", "1080p", "slow")


def test_sizes_that_are_done_are_not_measured_again(tmp_path):
    out, journal = tmp_path / "bench.json", tmp_path / "journal"
    arguments = [
        str(out),
        "--sizes",
        "1x9x8",
        "--peers",
        "none",
        "--device",
        "cpu",
        "--seconds",
        "0",
        "--journal",
        str(journal),
    ]
    assert network.main(arguments) == 0
    rows = store.read(out)["rows"]
    assert rows and journal.read_text() == "done 1x9x8\n"
    assert network.main(arguments) == 0 and store.read(out)["rows"] == rows

"""`mf.doctor()`: a report that is true, also where something is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.restoring import small_net

import memnet_fast as mf
from memnet_fast import health, native, native_cuda, weights
from memnet_fast.cli.doctor import _cuda_module, _rows


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    path = tmp_path / "memnet_m6r6.denoise.safetensors"
    weights.save_weights(small_net(), path)
    monkeypatch.setattr(weights, "_FOLDER", tmp_path)
    return path


def test_the_report_is_json_and_tells_what_is_here(bundled):
    report = mf.doctor()
    assert json.loads(json.dumps(report)) == report
    assert report["memnet_fast"] == mf.__version__
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu"]["torch_threads"] == torch.get_num_threads() and report["cpu"]["model"]
    assert report["cuda"]["ok"] == torch.cuda.is_available()
    precisions = ["fp32", "tf32", "bf16", "fp16", "fp8"]
    row = {"backend": "torch", "device": "cpu", "can_run": True, "reason": None, "precisions": precisions}
    assert row in report["backends"]
    told = {part["backend"]: part["precisions"] for part in report["backends"] if part["device"] == "cpu"}
    bf16 = report["native"]["ok"] and report["native"]["why_no_bf16"] is None
    assert told["cuda"] == [] and ("bf16" in told["cpu"]) == bf16
    assert any("on cpu: fp32, tf32, bf16, fp16, fp8" in cell for line in _rows(report) for cell in line)
    assert report["weights"] == [
        {"name": "memnet_m6r6.denoise", "ok": True, "reason": None, "sha256": weights.load_info(bundled)["sha256"]}
    ]
    assert report["restore"]["ok"] and 0 <= report["restore"]["difference"] < 1e-4


def test_a_missing_native_module_is_reported_with_the_reason_of_the_build(bundled, monkeypatch):
    reason = "the native module was not built: no compiler"
    monkeypatch.setattr(native, "why_missing", lambda: reason)
    report = mf.doctor()
    assert report["native"]["ok"] is False and report["native"]["reason"] == reason and report["native"]["isas"] == []
    rows = {row["backend"]: row for row in report["backends"] if row["device"] == "cpu"}
    assert rows["cpu"]["can_run"] is False and reason in rows["cpu"]["reason"]
    assert report["restore"]["ok"] and report["restore"]["backend"] == "torch"


def test_the_cuda_module(bundled, monkeypatch):
    report = mf.doctor()["native_cuda"]
    missing = native_cuda.why_missing()
    assert report["reason"] == (missing or native_cuda.why_not_running()) and report["ok"] == (report["reason"] is None)
    assert "kernels" not in report["build"]
    status = {"driver": 13010, "runtime": 13000, "devices": 1, "error": None}
    module = SimpleNamespace(status=lambda: status, archs=lambda: "80 90a", compiler=lambda: "nvcc 13.0")
    monkeypatch.setattr(native_cuda, "why_missing", lambda: None)
    monkeypatch.setattr(native_cuda, "module", lambda: module)
    report = health._native_cuda()
    assert (report["ok"], report["archs"], report["driver"]) == (True, ["80", "90a"], "13.1")
    assert "built by nvcc 13.0 for 80, 90a; the driver supports CUDA 13.1" in _cuda_module(report)
    status.update(driver=12020, error="insufficient")
    assert "too old" in health._native_cuda()["reason"] and health._native_cuda()["ok"] is False
    status.update(driver=0)
    assert health._native_cuda()["reason"] == "there is no NVIDIA driver" and health._native_cuda()["driver"] is None


def test_damaged_weights_are_reported(bundled):
    data = bytearray(bundled.read_bytes())
    data[-1] ^= 1
    bundled.write_bytes(bytes(data))
    report = mf.doctor()
    assert report["weights"][0]["ok"] is False and "digest" in report["weights"][0]["reason"]
    assert report["restore"]["ok"] is False and "CheckpointCorrupt" in report["restore"]["reason"]


def test_without_weights_nothing_can_be_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_FOLDER", tmp_path)
    report = mf.doctor()
    assert report["weights"] == [] and report["restore"]["ok"] is False and "not bundled" in report["restore"]["reason"]


def test_wrong_results_are_noticed(bundled, monkeypatch):
    from memnet_fast.fused import FusedMemNet

    original = FusedMemNet.forward
    monkeypatch.setattr(FusedMemNet, "forward", lambda self, x: original(self, x) + 1e-3)
    restore = mf.doctor()["restore"]
    assert restore["ok"] is False and "differs from the reference by 0.001" in restore["reason"]


def test_a_compiler_that_does_not_run_is_reported(tmp_path, monkeypatch):
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    report = health._nvcc()
    assert report["ok"] is False and "does not run" in report["reason"]
    fake.unlink()
    assert health._nvcc()["reason"] == "nvcc is not on the PATH"


def test_the_name_is_the_function_whatever_is_imported_first():
    code = "import memnet_fast.health, memnet_fast as mf; assert callable(mf.doctor)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""When the Triton backend runs, when it says that it cannot, and that nothing else needs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support import networks

import memnet_fast as mf
from memnet_fast import backends
from memnet_fast.backends import triton as backend

CUDA = torch.device("cuda", 0)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _run(code: str, **environment: str) -> str:
    env = {**{k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MEMNET_BACKEND")}, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_unknown_precision_and_algorithm():
    config = networks.SMALL
    assert "'fp8'" in backend.why_not(config, CUDA, "fp8", "direct")
    assert "'winograd'" in backend.why_not(config, CUDA, "fp32", "winograd")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_need_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(mf.BackendUnavailable, match="TRITON_INTERPRET=1") as caught:
        mf.fuse(networks.build(networks.SMALL), backend="triton")
    assert caught.value.backend == "triton"


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)])
def test_capability(monkeypatch, capability):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    reason = backend.why_not(networks.SMALL, CUDA, "fp16", "direct")
    if capability < (8, 0):
        assert reason == f"it needs compute capability 8.0, Some GPU has {capability[0]}.{capability[1]}"
    else:
        assert reason is None


def test_other_builds_of_torch(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in backend.why_not(networks.SMALL, CUDA, "fp16", "direct")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in backend.why_not(networks.SMALL, CUDA, "fp16", "direct")


def test_auto_passes_over_it(monkeypatch):
    """Also where it could run: only its name brings it, in the call or in the environment."""
    monkeypatch.setattr(backend, "why_not", lambda *args: None)
    monkeypatch.setattr(backends.cpu, "why_not", lambda *args: "not here")
    choice = backends.choose(networks.SMALL, CUDA, "auto", "auto", "auto")
    assert choice.backend == "torch" and choice.not_taken == (
        f"cuda: {backends.cuda.ON_REQUEST_ONLY}",
        f"triton: {backend.ON_REQUEST_ONLY}",
        "cpu: not here",
    )
    asked = backends.choose(networks.SMALL, CUDA, "triton", "auto", "auto")
    assert (asked.backend, asked.precision, asked.algorithm) == ("triton", "fp32", "direct")
    monkeypatch.setenv("MEMNET_BACKEND", "triton")
    assert backends.choose(networks.SMALL, CUDA, "auto", "fp16", "auto").backend == "triton"
    monkeypatch.setattr(backend, "ON_REQUEST_ONLY", None)
    monkeypatch.delenv("MEMNET_BACKEND")
    assert backends.choose(networks.SMALL, CUDA, "auto", "auto", "auto").backend == "triton", "the line alone holds it back"


def test_without_triton():
    """The package works, and a wish for the backend raises the reason with the original error."""
    code = """
import sys
sys.modules["triton"] = None
import torch
import memnet_fast as mf
from memnet_fast.kernels import tile_config
net = mf.MemNet(mf.MemNetConfig(channels=16, num_memory_blocks=1, num_recursions=1)).eval()
assert mf.fuse(net)(torch.rand(1, 1, 5, 6)).shape == (1, 1, 5, 6)
try:
    mf.fuse(net, backend="triton")
except mf.BackendUnavailable as error:
    print(error.reason)
"""
    said = _run(code)
    assert "Triton cannot be used (ModuleNotFoundError" in said and "halted" in said and "pip install triton" in said


def test_triton_is_imported_only_on_request():
    code = """
import sys
import torch
import memnet_fast as mf
net = mf.MemNet(mf.MemNetConfig(channels=16, num_memory_blocks=1, num_recursions=1)).eval()
before = "triton" in sys.modules
mf.fuse(net)(torch.rand(1, 1, 5, 6))
print(before, "memnet_fast.kernels.gate" in sys.modules)
"""
    assert _run(code).split()[-1] == "False"

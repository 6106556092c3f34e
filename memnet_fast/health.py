"""`doctor`: what works on this machine and what does not, with the reasons. Imports nothing heavy until it is asked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

# How far a restored test image may be from the reference; Winograd in float32 stays below 1e-5.
_TOLERANCE = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}


def doctor() -> dict[str, Any]:
    """A report of plain values (it can be stored as JSON).

    Keys: memnet_fast, python, platform, packages, cpu, native, cuda, native_cuda, triton, nvcc, backends, weights, restore.
    restore["ok"]: the bundled denoiser restored a small test image on the backend that "auto" chooses, and agreed with the
    reference.
    """
    import torch

    import memnet_fast
    from memnet_fast.backends import cpu

    return {
        "memnet_fast": memnet_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("torch", "numpy", "pillow", "safetensors", "scikit-image")},
        "cpu": {
            "model": cpu_model(),
            "logical_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "backend_threads": cpu.num_threads(),
        },
        "native": _native(),
        "cuda": _cuda(),
        "native_cuda": _native_cuda(),
        "triton": _triton(),
        "nvcc": _nvcc(),
        "backends": _backends(),
        "weights": _weights(),
        "restore": _restore(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The name that the system gives the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _native() -> dict[str, Any]:
    """why_no_bf16: why the CPU backend has no precision "bf16" here; None if it has."""
    from memnet_fast import native
    from memnet_fast.backends import cpu

    reason = native.why_missing()
    return {
        "ok": reason is None,
        "reason": reason,
        "isas": list(native.module().isas()) if reason is None else [],
        "why_no_bf16": cpu.why_no_bf16() if reason is None else reason,
        "build": {key: value for key, value in native.build_info().items() if key != "cuda"},
    }


def _native_cuda() -> dict[str, Any]:
    """ok: the module is here, and the driver runs it. archs: what it holds code for. driver: the CUDA version it supports."""
    from memnet_fast import native_cuda

    build = {key: value for key, value in native_cuda.build_info().items() if key != "kernels"}
    reason = native_cuda.why_missing()
    if reason is not None:
        return {"ok": False, "reason": reason, "archs": [], "compiler": None, "driver": None, "build": build}
    module = native_cuda.module()
    reason, driver = native_cuda.why_not_running(), native_cuda.driver()
    archs = module.archs().split()
    return {
        "ok": reason is None,
        "reason": reason,
        "archs": archs,
        "compiler": module.compiler(),
        "driver": driver,
        "build": build,
    }


def _cuda() -> dict[str, Any]:
    import torch

    if torch.version.cuda is None:
        return {"ok": False, "reason": "this PyTorch is built without CUDA", "devices": []}
    if not torch.cuda.is_available():
        return {"ok": False, "reason": f"PyTorch has CUDA {torch.version.cuda}, but sees no device", "devices": []}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"ok": True, "reason": None, "version": torch.version.cuda, "devices": devices}


def _triton() -> dict[str, Any]:
    found = importlib.util.find_spec("triton") is not None
    return {"ok": found, "reason": None if found else "not installed", "version": _version("triton")}


def _nvcc() -> dict[str, Any]:
    path = shutil.which("nvcc")
    if path is None:
        return {"ok": False, "reason": "nvcc is not on the PATH", "version": None}
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"ok": False, "reason": f"{path} does not run: {error}", "version": None}
    return {"ok": True, "reason": None, "version": done.stdout.strip().splitlines()[-1]}


def _backends() -> list[dict[str, Any]]:
    """One row for each backend and kind of device that is here. precisions: those that it takes there, its best first."""
    import torch

    from memnet_fast.backends import LADDER
    from memnet_fast.config import PRESETS

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for name, module in LADDER.items():
        for device in devices:
            reasons = {
                precision: module.why_not(PRESETS["memnet_m6r6"], torch.device(device), precision, module.ALGORITHMS[0])
                for precision in module.PRECISIONS
            }
            reason = reasons[module.PRECISIONS[0]]
            taken = [precision for precision, why in reasons.items() if why is None]
            rows.append({"backend": name, "device": device, "can_run": reason is None, "reason": reason, "precisions": taken})
    return rows


def _weights() -> list[dict[str, Any]]:
    from memnet_fast import weights
    from memnet_fast.errors import MemNetError

    rows = []
    for name, path in weights.bundled().items():
        try:
            rows.append({"name": name, "ok": True, "reason": None, "sha256": weights.load_info(path)["sha256"]})
        except MemNetError as error:
            rows.append({"name": name, "ok": False, "reason": str(error), "sha256": None})
    return rows


def _restore() -> dict[str, Any]:
    import torch

    from memnet_fast.errors import MemNetError
    from memnet_fast.restore import Restorer

    image = torch.linspace(0, 1, 24 * 40).reshape(24, 40)
    try:
        restorer = Restorer("denoise")
        result = restorer(image)
        with torch.no_grad():
            expected = restorer.net.reference(image.to(restorer.device)[None, None])[0, 0].cpu()
    except (MemNetError, RuntimeError, ImportError) as error:
        return {"ok": False, "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    difference = float((result - expected).abs().max())
    ok = difference <= _TOLERANCE[restorer.precision]
    return {
        "ok": ok,
        "reason": None if ok else f"a test image differs from the reference by {difference:.3g}",
        "backend": restorer.backend,
        "precision": restorer.precision,
        "algorithm": restorer.algorithm,
        "difference": difference,
    }

"""What a file of results says about the machine and the software."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from memnet_fast import __version__
from memnet_fast.backends.cpu import usable_cpus
from memnet_fast.errors import BackendUnavailable, InputError
from memnet_fast.health import cpu_model

_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu,memory.total"
_ENGINES = ("onnx", "onnxruntime", "openvino", "ncnn", "jax", "jaxlib")


def _output(*command: str) -> str | None:
    """What a command prints, or None where it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def threads(asked: int | None) -> int:
    """The number of threads of a run: all CPUs of this process where none is asked for. Raises InputError for less than one,
    and for more than CPUs: this package would use fewer than the others.
    """
    cpus = usable_cpus()
    if asked is not None and not 1 <= asked <= cpus:
        raise InputError(f"--threads {asked}: this process may use 1 to {cpus} threads")
    return asked or cpus


def checked_device(name: str) -> str:
    """auto, cpu, cuda or cuda:N -> "cpu" or "cuda:N". Raises InputError for another word, BackendUnavailable for a device that
    is not there.
    """
    import torch

    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device '{name}'; choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device '{name}'; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailable(name, f"PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


def about(device: str | None = None) -> dict[str, Any]:
    """Plain values. device: "cpu" or "cuda:N", what is measured; gpu is about that one (None: the first that there is). The
    commit comes from git, or from MEMNET_COMMIT where the sources are a copy without history; it is None
    where the package is no part of a checkout (it may be installed inside a stranger's). changed: files of the checkout that
    differ from it.
    """
    import torch

    import memnet_fast
    from memnet_fast import native, native_cuda

    folder = str(Path(memnet_fast.__file__).parent)
    tracked = _output("git", "-C", folder, "ls-files", "--error-unmatch", "__init__.py") is not None
    status = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no", "--", ":/") if tracked else None
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("MEMNET_COMMIT") or (_output("git", "-C", folder, "rev-parse", "HEAD") if tracked else None),
        "changed": None if status is None else len(status.splitlines()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": version("triton"),
        "nvcc": (_output("nvcc", "--version") or "").splitlines()[-1:],
        "engines": {name: version(name) for name in _ENGINES},
        "memnet_fast": __version__,
        "package": folder,
        "native_cpu": native.why_missing() or "ok",
        "native_cuda": native_cuda.why_missing() or "ok",
        "cpu": cpu(),
        "gpu": None,
    }
    if native.why_missing() is None:
        found["compiler"] = native.module().compiler()
        found["flags"] = flags()
        found["isas"] = list(native.module().isas())
    if device != "cpu" and torch.cuda.is_available():
        found["gpu"] = _gpu(torch.device(device or "cuda:0").index or 0)
    return found


def _gpu(index: int) -> dict[str, Any]:
    import torch

    p = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = {
        "index": index,
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "sm_count": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "memory_bytes": p.total_memory,
    }
    # By its identity: nvidia-smi counts all devices, PyTorch those that CUDA_VISIBLE_DEVICES leaves.
    values = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "-i", f"GPU-{p.uuid}")
    if values:
        found["nvidia_smi"] = dict(zip(_QUERY.split(","), map(str.strip, values.split(",")), strict=False))
    return found


def cpu() -> dict[str, Any]:
    """cpus: how many this process may use. clocks: MHz of each in its affinity and the governor, or why they are not known."""
    used = sorted(os.sched_getaffinity(0))
    try:
        mhz = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        mhz = []
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    clocks: dict[str, Any] = {"mhz": [float(mhz[i]) for i in used] if len(mhz) > max(used) else None}
    clocks["governor"] = governor.read_text().strip() if governor.exists() else None
    if clocks["mhz"] is None:
        clocks["reason"] = "the system does not tell them"
    elif clocks["governor"] is None:
        clocks["reason"] = "no governor is visible (a virtual machine?): the clock may change unseen"
    return {"model": cpu_model(), "cpus": usable_cpus(), "clocks": clocks}


def flags() -> str | None:
    """How the kernels of the native module are compiled: the lines of the build file that say so, where it is there."""
    lists = Path(__file__).parents[2] / "csrc" / "CMakeLists.txt"
    if not lists.is_file():
        return None
    says = re.compile(r"CMAKE_CXX_FLAGS_RELEASE|target_compile_options\(memnet_|memnet_add_isa\(|_flags -m")
    return "; ".join(line.strip() for line in lists.read_text().splitlines() if says.search(line))


def folder_name(device: str) -> str:
    """The folder of benchmarks/results/ for a device."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())

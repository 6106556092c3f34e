"""Loads the compiled module ``memnet_fast._native_cuda``, or says why it is not there or cannot run."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

from memnet_fast import native


@cache
def _load() -> tuple[ModuleType | None, ImportError | None]:
    return native.load(f"{__package__}._native_cuda")


def build_info() -> dict[str, Any]:
    """What the build left behind: native (bool), reason, log, and if it was built nvcc, archs, seconds, kernels (for each
    kernel and architecture: file, function, arch, registers, stack, spill, shared) and notes. Empty when nothing was built."""
    info = native.build_info().get("cuda")
    return info if isinstance(info, dict) else {}


def why_missing() -> str | None:
    """None when the module is loaded, otherwise one sentence with the original reason."""
    return native.explain("the CUDA module", _load()[1], build_info())


def module() -> ModuleType:
    """The module. Raises ImportError with the original reason when it is missing."""
    loaded, error = _load()
    if loaded is None:
        raise ImportError(why_missing()) from error
    return loaded


def why_not_running() -> str | None:
    """None when the driver runs what the module was built with, otherwise the reason. Starts the driver, makes no context."""
    status = module().status()
    driver, runtime = status["driver"], status["runtime"]
    if driver == 0:
        return "there is no NVIDIA driver"
    if status["error"] is None:
        return None
    if driver < runtime:
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_version(driver)}, the module was built with CUDA "
            f"{_version(runtime)}; update the driver, or build with an older nvcc"
        )
    return f"the CUDA runtime reports: {status['error']}"


def driver() -> str | None:
    """The CUDA version that the driver supports, such as "13.0"; None without a driver."""
    number = module().status()["driver"]
    return _version(number) if number else None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def why_not_capability(capability: tuple[int, int]) -> str | None:
    """None when the module holds code for GPUs of this compute capability, otherwise the reason."""
    major, minor = capability
    if capability < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {major}.{minor}"
    archs = [int(arch.removesuffix("a")) for arch in module().archs().split()]
    # Code runs on the same major version from its minor version on; the PTX of the lowest one becomes code for any newer GPU.
    if any(arch // 10 == major and arch % 10 <= minor for arch in archs) or min(archs) <= 10 * major + minor:
        return None
    return (
        f"it was built for {module().archs()}, this GPU has compute capability {major}.{minor}; "
        f"build with MEMNET_CUDA_ARCHS={major}{minor}"
    )


def hopper(capability: tuple[int, int]) -> bool:
    """Whether the residual blocks can take the kernel for sm_90a on a GPU of this capability."""
    return capability == (9, 0) and "90a" in module().archs().split()

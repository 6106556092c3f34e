"""The whole CUDA backend on the CPU: the module `_native_cuda` from its own text, over the model of tests/support/simt."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from memnet_fast import native_cuda
from memnet_fast.backends import cuda

_ROOT = Path(__file__).resolve().parents[2]
_CUDA, _SIMT = _ROOT / "csrc" / "cuda", _ROOT / "tests" / "support" / "simt"
STREAM = 0x5EED  # of the modelled runtime: never followed


@dataclass(frozen=True)
class Twin:
    module: ModuleType
    runtime: ctypes.CDLL  # tests/support/simt/runtime_entries.cpp

    @contextmanager
    def failing_after(self, launches: int) -> Iterator[None]:
        """Within: that many launches go well, the next one reports that memory is short."""
        self.runtime.runtime_fail_after(launches)
        try:
            yield
        finally:
            self.runtime.runtime_fail_after(-1)


def why_not() -> str | None:
    if shutil.which("g++") is None:
        return "needs g++"
    return None if importlib.util.find_spec("pybind11") else "needs pybind11"


def build(directory: Path) -> Twin:
    """Compiles every file of csrc/cuda for the CPU; raises RuntimeError with the compiler's words where that fails."""
    import pybind11

    text = directory / "text"
    text.mkdir()
    modelled = {path.name for path in _SIMT.iterdir()}
    for path in _CUDA.iterdir():
        if path.suffix in (".h", ".cuh", ".cu", ".cpp") and path.name not in modelled:
            shutil.copy(path, text / path.name)
    headers = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    defines = {"MEMNET_VERSION": "twin", "MEMNET_CUDA_ARCHS": "80 90a", "MEMNET_CUDA_COMPILER": "twin"}
    # _FORTIFY_SOURCE takes a switch of fibers for a jump into a frame that has ended.
    common = ["g++", "-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    # A namespace of its own: pybind11 keeps one table of types for all modules of a process, and the real one is a module too.
    common += ["-Dmemnet=memnet_twin"]
    common += ["-Wno-attributes", f"-I{_SIMT}", f"-I{text}", "-DMEMNET_HOPPER", *(f'-D{k}="{v}"' for k, v in defines.items())]
    sources = [*text.glob("*.cu"), *text.glob("*.cpp"), _SIMT / "simt.cpp", _SIMT / "runtime_entries.cpp"]

    def compile_one(source: Path) -> str:
        target = directory / f"{source.name}.o"
        level = ["-O0", *(f"-I{h}" for h in headers)] if source.name == "bindings.cpp" else ["-O1"]
        _call([*common, *level, "-x", "c++", "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(sources, key=lambda p: p.name != "bindings.cpp")))
    library = directory / "_native_cuda.so"
    _call(["g++", "-shared", "-o", str(library), *objects])
    loader = importlib.machinery.ExtensionFileLoader("_native_cuda", str(library))
    spec = importlib.util.spec_from_loader("_native_cuda", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    runtime = ctypes.CDLL(str(library))
    for name in ("runtime_launches", "runtime_uploads", "runtime_allocated", "runtime_events", "runtime_open_ranges"):
        getattr(runtime, name).restype = ctypes.c_long
    runtime.runtime_within.restype = ctypes.c_char_p
    runtime.runtime_within.argtypes = [ctypes.c_long]
    runtime.runtime_all_on.argtypes = [ctypes.c_int, ctypes.c_uint64]
    return Twin(module, runtime)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def install(twin: Twin, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Lets the CUDA backend take the CPU for a GPU of this capability."""
    monkeypatch.setattr(native_cuda, "module", lambda: twin.module)
    monkeypatch.setattr(native_cuda, "why_missing", lambda: None)
    monkeypatch.setattr(cuda, "why_not", lambda *args: None)
    monkeypatch.setattr(cuda, "_indexed", lambda device: device)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    cuda._live_plan.cache_clear()
    twin.runtime.runtime_fail_after(-1)
    twin.runtime.runtime_forget()

"""Builds the native modules with CMake and Ninja. Everything declarative stands in pyproject.toml.

There are two, built apart: memnet_fast._native for the CPU, and memnet_fast._native_cuda where nvcc is found (a GPU is not
needed). The build never fails for want of a compiler: the package then installs without what could not be built, one warning
says so, and ``memnet_fast/_build_info.json`` keeps the reasons for ``memnet doctor``.

Environment:
MAX_JOBS limits parallel compilation.
MEMNET_NO_NATIVE=1 skips both modules, MEMNET_NO_CUDA=1 the one for GPUs.
MEMNET_CUDA_ARCHS lists what to compile for, such as "80;86;90a" (90a: Hopper with its own kernels). Default: the GPUs of this
machine, otherwise 80 and 90a. Newer GPUs compile the PTX of the lowest one when it is first used.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

_ROOT = Path(__file__).resolve().parent
_VERSION = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
_LOG_LINES = 40


class _BuildFailed(Exception):
    """A native module cannot be built; the message is the reason, the second argument the end of the log."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = "\n".join(log.strip().splitlines()[-_LOG_LINES:])


class _NothingToBuild(_BuildFailed):
    """Nothing went wrong: the module was not wanted, or there is no compiler for it."""


def _run(step: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise _BuildFailed(f"{step} could not start: {error}") from error
    print(done.stdout, flush=True)
    if done.returncode != 0:
        errors = [line.strip() for line in done.stdout.splitlines() if "error" in line.lower()]
        detail = f": {errors[0]}" if errors else ""
        raise _BuildFailed(f"{step} failed with exit code {done.returncode}{detail}", done.stdout)


def _pybind11_dir() -> str:
    try:
        import pybind11
    except ImportError as error:
        raise _BuildFailed(f"pybind11 is missing: {error}") from error
    return pybind11.get_cmake_dir()


def _tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise _BuildFailed(f"{name} was not found; install it (pip install {name}) and build again")
    return found


def _build_module(target: Path, build_dir: Path, sources: Path, options: list[str]) -> None:
    """Configures the CMake project in `sources` in build_dir and puts the finished module at target."""
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdecimal() and int(jobs) > 0):
        raise _BuildFailed(f"MAX_JOBS must be a positive number, not {jobs!r}")
    cmake, ninja = _tool("cmake"), _tool("ninja")
    # An old cache may name an interpreter or a temporary build environment that is gone.
    (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
    build_dir.mkdir(parents=True, exist_ok=True)
    configure = [
        cmake,
        *("-S", str(sources), "-B", str(build_dir), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={_pybind11_dir()}",
        f"-DMEMNET_VERSION={_VERSION}",
        *options,
    ]
    _run("cmake configure", configure)
    _run("compile", [cmake, "--build", str(build_dir), *(["--parallel", jobs] if jobs else [])])
    built = build_dir / target.name
    if not built.is_file():
        raise _BuildFailed(f"the build finished without {target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(built, target)


def _set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def _nvcc() -> str:
    """The CUDA compiler: $CUDACXX, of the PATH, of $CUDA_HOME or $CUDA_PATH, or of /usr/local/cuda."""
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [
        os.environ.get("CUDACXX"),
        "nvcc",
        *(str(folder / "nvcc") for folder in [*folders, Path("/usr/local/cuda/bin")]),
    ]
    found = next(filter(None, (shutil.which(name) for name in candidates if name)), None)
    if found is None:
        raise _NothingToBuild("nvcc was not found when the package was built")
    return found


def _cuda_archs() -> list[str]:
    """What to compile for, from MEMNET_CUDA_ARCHS or the GPUs of this machine."""
    asked = re.split(r"[;,\s]+", os.environ.get("MEMNET_CUDA_ARCHS", "").strip(" ;,"))
    if asked != [""]:
        for name in asked:
            if not re.fullmatch(r"90a|(8|9|1[0-9])[0-9]", name):
                raise _BuildFailed(f"MEMNET_CUDA_ARCHS lists numbers such as 80, 86 or 90a, not {name!r}")
        return list(dict.fromkeys(asked))
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    here = {int(major) * 10 + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", said, re.MULTILINE)}
    return ["90a" if arch == 90 else str(arch) for arch in sorted(here) if arch >= 80] or ["80", "90a"]


def _compile_log(build_dir: Path) -> dict[str, object]:
    spec = importlib.util.spec_from_file_location("compile_log", _ROOT / "csrc" / "cuda" / "compile_log.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.collect(build_dir)


class _CMakeBuild(build_ext):
    """Builds both extensions, or records why one could not be built."""

    def build_extensions(self) -> None:
        builds = {"memnet_fast._native": self._build_cpu, "memnet_fast._native_cuda": self._build_cuda}
        info: dict[str, object] = {"version": _VERSION}
        for ext in self.extensions:
            # A path from setuptools is relative to the project; the inplace flag is off here, so this is under build_lib.
            target = (_ROOT / self.get_ext_fullpath(ext.name)).resolve()
            target.unlink(missing_ok=True)
            record = builds[ext.name](target, (_ROOT / self.build_temp).resolve())
            if ext.name == "memnet_fast._native":
                info.update(record)
            else:
                info["cuda"] = record
            if self.editable_mode and record["reason"] is not None:
                # A module left from an earlier build would contradict the record.
                (_ROOT / "memnet_fast" / target.name).unlink(missing_ok=True)
        text = json.dumps(info, indent=2) + "\n"
        folders = [target.parent, *([_ROOT / "memnet_fast"] if self.editable_mode else [])]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build_info.json").write_text(text, encoding="utf-8")

    def _build_cpu(self, target: Path, build_dir: Path) -> dict[str, object]:
        try:
            if _set("MEMNET_NO_NATIVE"):
                raise _NothingToBuild("MEMNET_NO_NATIVE was set when the package was built")
            _build_module(target, build_dir / "native", _ROOT / "csrc", [])
        except _BuildFailed as failure:
            self.warn(f"memnet_fast installs WITHOUT its native CPU code: {failure}")
            return {"native": False, "reason": str(failure), "log": failure.log}
        return {"native": True, "reason": None, "log": ""}

    def _build_cuda(self, target: Path, build_dir: Path) -> dict[str, object]:
        record: dict[str, object] = {"native": False, "reason": None, "log": ""}
        try:
            for variable in ("MEMNET_NO_NATIVE", "MEMNET_NO_CUDA"):
                if _set(variable):
                    raise _NothingToBuild(f"{variable} was set when the package was built")
            nvcc, archs = _nvcc(), _cuda_archs()
            record.update(nvcc=nvcc, archs=archs)
            start = time.monotonic()
            folder = build_dir / "native_cuda"
            options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DMEMNET_CUDA_ARCHS={';'.join(archs)}"]
            _build_module(target, folder, _ROOT / "csrc" / "cuda", options)
            record.update(native=True, seconds=round(time.monotonic() - start), **_compile_log(folder))
        except _BuildFailed as failure:
            if not isinstance(failure, _NothingToBuild):
                self.warn(f"memnet_fast installs WITHOUT its CUDA code: {failure}")
            record.update(reason=str(failure), log=failure.log)
        return record


_packages = find_packages(include=["memnet_fast", "memnet_fast.*"])
_package_dir = {}
if (_ROOT / "kernels" / "__init__.py").is_file():
    _packages.append("memnet_fast.kernels")
    _package_dir["memnet_fast.kernels"] = "kernels"

setup(
    packages=_packages,
    package_dir=_package_dir,
    # optional: setuptools then accepts that the file is absent.
    ext_modules=[Extension(f"memnet_fast.{name}", sources=[], optional=True) for name in ("_native", "_native_cuda")],
    cmdclass={"build_ext": _CMakeBuild},
)

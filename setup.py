"""Builds the native module with CMake and Ninja. Everything declarative stands in pyproject.toml.

The build never fails for want of a compiler: the package then installs as pure Python, one warning says so, and
``memnet_fast/_build_info.json`` keeps the reason for ``memnet doctor``.

Environment: MAX_JOBS limits parallel compilation; MEMNET_NO_NATIVE=1 skips the native module.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

_ROOT = Path(__file__).resolve().parent
_VERSION = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
_LOG_LINES = 40


class _BuildFailed(Exception):
    """The native module cannot be built; the message is the reason, the second argument the end of the log."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = "\n".join(log.strip().splitlines()[-_LOG_LINES:])


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


def _build_native(target: Path, build_dir: Path) -> None:
    """Configures csrc/ in build_dir and puts the finished module at target."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    # An old cache may name an interpreter or a temporary build environment that is gone.
    (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
    build_dir.mkdir(parents=True, exist_ok=True)
    configure = [
        cmake,
        *("-S", str(_ROOT / "csrc"), "-B", str(build_dir), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={_pybind11_dir()}",
        f"-DMEMNET_VERSION={_VERSION}",
    ]
    _run("cmake configure", configure)
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdecimal() and int(jobs) > 0):
        raise _BuildFailed(f"MAX_JOBS must be a positive number, not {jobs!r}")
    _run("compile", [cmake, "--build", str(build_dir), *(["--parallel", jobs] if jobs else [])])
    built = build_dir / target.name
    if not built.is_file():
        raise _BuildFailed(f"the build finished without {target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(built, target)


class _CMakeBuild(build_ext):
    """Builds the one extension, or records why it could not be built."""

    def build_extension(self, ext: Extension) -> None:
        # A path from setuptools is relative to the project; the inplace flag is off here, so this is under build_lib.
        target = (_ROOT / self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        info: dict[str, object] = {"version": _VERSION, "native": True, "reason": None, "log": ""}
        try:
            if os.environ.get("MEMNET_NO_NATIVE", "") not in ("", "0"):
                raise _BuildFailed("MEMNET_NO_NATIVE was set when the package was built")
            _build_native(target, (_ROOT / self.build_temp).resolve() / "native")
        except _BuildFailed as failure:
            info.update(native=False, reason=str(failure), log=failure.log)
            self.warn(f"memnet_fast installs WITHOUT its native CPU code: {failure}")
        text = json.dumps(info, indent=2) + "\n"
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / "_build_info.json").write_text(text, encoding="utf-8")
        if self.editable_mode:
            source = _ROOT / "memnet_fast"
            (source / "_build_info.json").write_text(text, encoding="utf-8")
            if not info["native"]:
                # A module left from an earlier build would contradict the record.
                (source / target.name).unlink(missing_ok=True)


_packages = find_packages(include=["memnet_fast", "memnet_fast.*"])
_package_dir = {}
if (_ROOT / "kernels" / "__init__.py").is_file():
    _packages.append("memnet_fast.kernels")
    _package_dir["memnet_fast.kernels"] = "kernels"

setup(
    packages=_packages,
    package_dir=_package_dir,
    # optional: setuptools then accepts that the file is absent.
    ext_modules=[Extension("memnet_fast._native", sources=[], optional=True)],
    cmdclass={"build_ext": _CMakeBuild},
)

"""Builds kernels of csrc/cuda for the CPU, over the model of tests/support/simt, from their own text."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_CUDA, _SIMT = _ROOT / "csrc" / "cuda", _ROOT / "tests" / "support" / "simt"
# _FORTIFY_SOURCE takes a switch of fibers for a jump into a frame that has ended.
_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-Wno-attributes"]

# A fault to plant: (file, text as it stands there once, text in its place).
Edit = tuple[str, str, str]


def why_not() -> str | None:
    return None if shutil.which("g++") else "needs g++"


def build(directory: Path, sources: Sequence[str], edits: Sequence[Edit] = ()) -> ctypes.CDLL:
    """The kernels of the named sources (`gate.cu`) with their launchers as `run_gate`: see simt/entries.cpp.

    Raises ValueError if the text of an edit is not there exactly once: the fault would not be the one that a test means.
    """
    text = directory / "text"
    shutil.rmtree(text, ignore_errors=True)
    text.mkdir(parents=True)
    replaced = {path.name for path in _SIMT.iterdir()}
    for path in _CUDA.iterdir():
        if path.suffix in (".h", ".cuh", ".cu") and path.name not in replaced:
            shutil.copy(path, text / path.name)
    for name, old, new in edits:
        before = (text / name).read_text(encoding="utf-8")
        if before.count(old) != 1:
            raise ValueError(f"{name} has {before.count(old)} times, not once: {old}")
        (text / name).write_text(before.replace(old, new), encoding="utf-8")
    model = directory.parent / "simt.o"
    if not model.exists():
        _compile(_SIMT / "simt.cpp", model)
    objects = [model]
    for name in sources:
        objects.append(text / f"{name}.o")
        _compile(text / name, objects[-1], f"-I{_SIMT}", f"-I{text}")
    entries = text / "entries.o"
    _compile(_SIMT / "entries.cpp", entries, f"-I{_SIMT}", f"-I{text}", *(f"-DMEMNET_ENTRY_{Path(n).stem}" for n in sources))
    library = text / "kernels.so"
    _call(["g++", "-shared", "-o", str(library), *map(str, objects), str(entries)])
    return ctypes.CDLL(str(library))


def _compile(path: Path, target: Path, *options: str) -> None:
    _call(["g++", *_FLAGS, *options, "-x", "c++", "-c", str(path), "-o", str(target)])


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

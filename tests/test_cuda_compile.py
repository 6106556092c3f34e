"""What nvcc made of the kernels, read from the built module and the record of its build: nothing is compiled again here.

The tests of single kernels look for the instructions that they are made of; these hold for every kernel there is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from memnet_fast import native_cuda

CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
pytestmark = pytest.mark.skipif(native_cuda.why_missing() is not None, reason=native_cuda.why_missing() or "built")


@pytest.fixture(scope="module")
def kernels():
    found = native_cuda.build_info().get("kernels")
    if not found:
        pytest.skip("the build left no record of its kernels")
    return found


@pytest.fixture(scope="module")
def module():
    path = native_cuda.module().__file__
    newer = [
        f.name for f in CSRC.iterdir() if f.suffix in (".cu", ".cuh", ".h") and f.stat().st_mtime > Path(path).stat().st_mtime
    ]
    if newer:
        pytest.skip(f"sources are newer than the module: {', '.join(sorted(newer))}; build it again")
    return path


def _archs() -> list[str]:
    """What every file but those for Hopper is compiled for."""
    return sorted({arch.removesuffix("a") for arch in native_cuda.module().archs().split()}, key=int)


def test_every_file_is_compiled_for_every_architecture(module, kernels):
    made = {(k["file"], k["arch"]) for k in kernels}
    with_kernels = {f.name for f in CSRC.glob("*.cu") if "__global__" in f.read_text() or re.search(r"_\d+\.cu$", f.name)}
    for name in with_kernels:
        archs = {arch for file, arch in made if file == name}
        if name.startswith("residual_block_sm90"):
            assert archs == ({"sm_90a"} if "90a" in native_cuda.module().archs().split() else set()), name
        else:
            assert archs == {f"sm_{arch}" for arch in _archs()}, name
    assert len(with_kernels) >= 6


def test_no_kernel_spills_or_uses_a_stack(module, kernels):
    bad = [k for k in kernels if k["spill"] or k["stack"]]
    assert not bad, bad
    assert all(0 < k["registers"] <= 255 for k in kernels)


def test_the_compiler_has_nothing_to_say(module, kernels):
    """No warning, and no C75xx note: products of Hopper that are not overlapped."""
    assert native_cuda.build_info()["notes"] == []


def _dump(*options: str, path: str) -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton, which brings one")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return subprocess.run([tool, *options, path], capture_output=True, text=True, check=True).stdout


def test_what_lies_in_the_module(module):
    """Code for each architecture, and the PTX of the lowest one for GPUs to come."""
    elves, ptx = _dump("-lelf", path=module), _dump("-lptx", path=module)
    for arch in native_cuda.module().archs().split():
        assert re.search(rf"\.sm_{arch}\.cubin", elves), arch
    assert set(re.findall(r"\.sm_(\d+a?)\.ptx", ptx)) == {_archs()[0]}


def test_no_local_memory_in_the_machine_code(module, kernels):
    """As the compiler's own figures say, and in all of it: each function of the record is in the module."""
    current, counts, functions = "", {}, set()
    for line in _dump("-sass", path=module).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            current = found[1]
            functions.add(current)
        if found := re.search(r"\s(LDL|STL)\b", line):
            counts[current, found[1]] = counts.get((current, found[1]), 0) + 1
    assert not counts
    assert {k["function"] for k in kernels} <= functions

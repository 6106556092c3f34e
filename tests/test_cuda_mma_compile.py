"""What nvcc makes of the mma.sync kernels and the image path: registers, no local memory, the instructions that they are about.

No GPU is needed. The convolution and the gate are compiled for every architecture that has a line of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

_CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


def _cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton, which brings one")
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.is_file() else None
    return found


pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# Source: architectures, template instances, most registers (65,536 for all threads that a multiprocessor shall hold), and how
# often instructions stand in one instance. Numbers are those of the loops, all unrolled but the outermost.
KERNELS = {
    # 4 steps of 16 channels x 8 products x (4 + 3) row blocks; an ldmatrix for each step and row block; 12 turns of the end.
    "residual_block_sm80": ((80, 86, 89, 90), 4, 255, {"HMMA.16816": 224, "LDSM": 28, "STG.E.128": 12}),
    # 4 steps x 8 products x 2 row blocks; 8 rows of pixels.
    "gate": ((80, 86, 89, 90), 6, 255, {"HMMA.16816": 64, "LDSM": 8, "STG.E.128": 8}),
    "first_conv": ((80, 90), 2, 128, {"STG.E.128": 8}),
    "reconstruct": ((80, 90), 4, 128, {}),
}
COPIES = {"residual_block_sm80", "gate"}  # pixels by cp.async, 16 bytes for each thread


@cache
def _compiled(folder: Path, name: str) -> tuple[str, str]:
    """What ptxas says, and the machine code, for all architectures."""
    target = folder / f"{name}.o"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in KERNELS[name][0]]
    command = ["nvcc", "-std=c++17", "-O3", *codes, "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    done = subprocess.run([*command, "-c", str(_CUDA / f"{name}.cu"), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    code = subprocess.run([tool, "-sass", str(target)], capture_output=True, text=True, check=True).stdout
    return done.stdout + done.stderr, code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nvcc")


@pytest.mark.parametrize("name", KERNELS)
def test_resources(folder, name):
    log, _ = _compiled(folder, name)
    architectures, instances, most, _ = KERNELS[name]
    used = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(used) == len(spills) == len(architectures) * instances
    assert all(s == ("0", "0", "0") for s in spills), spills
    assert max(used) <= most
    assert "warning" not in log.lower(), log


@pytest.mark.parametrize("name", KERNELS)
def test_instructions(folder, name):
    _, code = _compiled(folder, name)
    architectures, instances, _, expected = KERNELS[name]
    functions = re.split(r"\n\s*Function : ", code)[1:]
    assert len(functions) == len(architectures) * instances
    for function in functions:
        found = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", function, re.M))

        def count(prefix, found=found):
            return sum(n for name, n in found.items() if name.startswith(prefix))

        assert count("LDL") == count("STL") == 0, "local memory"
        for prefix, number in expected.items():
            assert count(prefix) == number, (prefix, count(prefix), function[:120])
        copies = count("LDGSTS")
        assert (copies > 0) == (name in COPIES) and copies == count("LDGSTS.E.BYPASS.LTC128B.128")
        if name == "reconstruct":  # slots are read 16 bytes at a time, never 2
            assert count("LDG.E.128") >= 4 and count("LDG.E.U16") == 0

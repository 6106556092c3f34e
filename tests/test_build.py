"""The build: what the sources may contain, and that the package installs without a compiler."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
_COPIED = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "csrc", "memnet_fast", "kernels"]


def test_no_torch_header_in_native_code():
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert len(sources) >= 10
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert "#include <torch" not in text and "#include <ATen" not in text and "#include <c10" not in text, path


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm")
@pytest.mark.parametrize(("isa", "flags"), [("baseline", []), ("avx2", ["-mavx2", "-mfma"])])
def test_isa_object_shares_no_symbol(tmp_path, isa, flags):
    """Without optimisation every inline function and template is emitted: none may be one that another file could share."""
    if flags and os.uname().machine != "x86_64":
        pytest.skip("x86-64 flags")
    target = tmp_path / "isa.o"
    command = ["g++", "-std=c++17", "-O0", "-fopenmp", "-fno-exceptions", f"-DMEMNET_ISA={isa}", *flags]
    command += ["-c", str(CSRC / "cpu/isa.cpp")]
    subprocess.run([*command, "-o", str(target)], check=True)
    listed = subprocess.run(["nm", "-C", "--defined-only", str(target)], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
    shared = [name for kind, name in symbols if kind.upper() in "TWVDBRU" and kind.isupper()]
    assert any(f"memnet::{isa}::" in name for name in shared)
    strangers = [n for n in shared if f"memnet::{isa}::" not in n and f"memnet::{isa}_kernels" not in n]
    assert not strangers, strangers


def _build_wheel(tmp_path: Path, **environment: str) -> tuple[str, zipfile.ZipFile]:
    source = tmp_path / "source"
    source.mkdir()
    for name in _COPIED:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "*.safetensors")
            shutil.copytree(path, source / name, ignore=ignored)
        elif path.exists():
            shutil.copy2(path, source / name)
    command = [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_wheel('.'))"]
    done = subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = source.glob("*.whl")
    return done.stdout + done.stderr, zipfile.ZipFile(wheel)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MEMNET_NO_NATIVE": "1"}, "MEMNET_NO_NATIVE"),
        ({"CXX": "/nonexistent/c++"}, "cmake configure failed"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a positive number"),
    ],
    ids=["asked", "no compiler", "bad MAX_JOBS"],
)
def test_package_builds_without_native_code(tmp_path, environment, reason):
    pytest.importorskip("pybind11")
    output, wheel = _build_wheel(tmp_path, **environment)
    names = wheel.namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "memnet_fast/native.py" in names
    info = json.loads(wheel.read("memnet_fast/_build_info.json"))
    assert info["native"] is False
    assert reason in info["reason"]
    assert output.count("installs WITHOUT its native CPU code") == 1

"""The build: what the sources may contain, and that the package installs without a compiler."""

import importlib.util
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


def _build_wheel(tmp_path: Path, quick: bool = False, **environment: str) -> tuple[str, zipfile.ZipFile]:
    source = tmp_path / "source"
    source.mkdir()
    for name in _COPIED:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "*.safetensors")
            shutil.copytree(path, source / name, ignore=ignored)
        elif path.exists():
            shutil.copy2(path, source / name)
    if quick:
        (source / "csrc" / "CMakeLists.txt").write_text(_QUICK_PROJECT, encoding="utf-8")
    command = [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_wheel('.'))"]
    done = subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = source.glob("*.whl")
    return done.stdout + done.stderr, zipfile.ZipFile(wheel)


def _info(wheel: zipfile.ZipFile) -> dict:
    return json.loads(wheel.read("memnet_fast/_build_info.json"))


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
    output, wheel = _build_wheel(tmp_path, **{"MEMNET_NO_CUDA": "1"}, **environment)
    names = wheel.namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "memnet_fast/native.py" in names
    info = _info(wheel)
    assert info["native"] is False and info["cuda"]["native"] is False
    assert reason in info["reason"]
    assert output.count("installs WITHOUT its native CPU code") == 1


# In place of the sources: a CPU module that compiles in no time, so that a test of the other one does not wait for it.
_QUICK_PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(quick LANGUAGES CXX)
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
file(WRITE ${CMAKE_BINARY_DIR}/quick.cpp "int quick;")
Python_add_library(_native MODULE WITH_SOABI ${CMAKE_BINARY_DIR}/quick.cpp)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("environment", "reason", "warned"),
    [
        ({"MEMNET_NO_CUDA": "1"}, "MEMNET_NO_CUDA was set", False),
        ({"PATH": "{tools}", "CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}, "nvcc was not found", False),
        ({"CUDACXX": "{tools}/nvcc"}, "cmake configure failed", True),
        ({"CUDACXX": "{tools}/nvcc", "MEMNET_CUDA_ARCHS": "80;sm_90"}, "not 'sm_90'", True),
        ({"CUDACXX": "{tools}/nvcc", "MEMNET_CUDA_ARCHS": "75"}, "not '75'", True),
    ],
    ids=["not wanted", "no nvcc", "nvcc fails", "bad arch", "old arch"],
)
def test_the_cpu_module_is_built_whatever_becomes_of_the_other(tmp_path, environment, reason, warned):
    pytest.importorskip("pybind11")
    if reason == "nvcc was not found" and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is where it is always found")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("g++", "c++", "cc", "gcc", "ld", "as", "cmake", "ninja", "sh", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    (tools / "nvcc").write_text("#!/bin/sh\necho nvcc fatal error: broken installation >&2\nexit 1\n")
    if reason != "nvcc was not found":
        (tools / "nvcc").chmod(0o755)
    environment = {key: value.format(tools=tools) for key, value in environment.items()}
    output, wheel = _build_wheel(tmp_path, quick=True, **environment)
    info = _info(wheel)
    assert info["native"] is True and info["reason"] is None
    assert info["cuda"]["native"] is False and reason in info["cuda"]["reason"]
    modules = [name for name in wheel.namelist() if name.endswith(".so")]
    assert len(modules) == 1 and "/_native." in modules[0]
    assert ("installs WITHOUT its CUDA code" in output) == warned and "WITHOUT its native CPU code" not in output


def _setup_functions() -> dict:
    """setup.py without its last statement."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    module: dict = {"__file__": str(ROOT / "setup.py"), "__name__": "setup_functions"}
    exec(compile(text[: text.index("_packages = find_packages")], "setup.py", "exec"), module)
    return module


def test_architectures_of_the_build(tmp_path, monkeypatch):
    functions = _setup_functions()
    archs, failed = functions["_cuda_archs"], functions["_BuildFailed"]
    monkeypatch.delenv("MEMNET_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert archs() == ["80", "90a"], "no GPU here"
    smi = tmp_path / "nvidia-smi"
    for said, expected in (
        ("9.0\n9.0\n", ["90a"]),
        ("8.6\n7.5\n8.0\n", ["80", "86"]),
        ("12.0\n", ["120"]),
        ("6.1\n", ["80", "90a"]),
    ):
        smi.write_text(f"#!/bin/sh\nprintf '{said}'\n".replace("\n'", "\\n'"))
        smi.chmod(0o755)
        assert archs() == expected, said
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert archs() == ["80", "90a"]
    for asked, expected in (
        ("80;90a", ["80", "90a"]),
        ("86", ["86"]),
        (" 80, 86 90a;", ["80", "86", "90a"]),
        ("89;89", ["89"]),
    ):
        monkeypatch.setenv("MEMNET_CUDA_ARCHS", asked)
        assert archs() == expected
    for wrong in ("8.6", "sm_80", "70", "100a", "80;;x"):
        monkeypatch.setenv("MEMNET_CUDA_ARCHS", wrong)
        with pytest.raises(failed, match="MEMNET_CUDA_ARCHS lists numbers"):
            archs()


def test_the_log_of_the_compiler_is_read():
    spec = importlib.util.spec_from_file_location("compile_log", CSRC / "cuda" / "compile_log.py")
    compile_log = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compile_log)
    kernels, notes = compile_log.parse(_PTXAS)
    assert [(k["function"], k["arch"]) for k in kernels] == [("_Z4goodv", "sm_80"), ("_Z3badv", "sm_90a")]
    assert {k: kernels[0][k] for k in ("registers", "stack", "spill", "shared")} == {
        "registers": 30,
        "stack": 0,
        "spill": 0,
        "shared": 1024,
    }
    assert (kernels[1]["registers"], kernels[1]["stack"], kernels[1]["spill"]) == (168, 48, 24)
    assert len(notes) == 2 and "C7510" in notes[0] and "spill" in notes[1].lower()


_PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 1024 bytes smem, 408 bytes cmem[0]
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
ptxas warning : Registers are spilled to local memory in function '_Z3badv', 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function '_Z3badv' for 'sm_90a'
ptxas info    : Function properties for _Z3badv
    48 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers
"""


def test_what_a_compiler_says_is_kept(tmp_path):
    """Beside the object, with the exit code of the compiler."""
    script, target = CSRC / "cuda" / "compile_log.py", tmp_path / "a.cu.o"
    for code in (0, 3):
        command = [sys.executable, str(script), "sh", "-c", f"echo words {code}; echo more >&2; exit {code}", "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code and done.stdout.splitlines() == [f"words {code}", "more"]
        assert (tmp_path / "a.cu.o.log").read_text().splitlines() == [f"words {code}", "more"]

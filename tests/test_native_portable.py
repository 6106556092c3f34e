"""The portable path of the native module: the real kernels compiled for 64-bit ARM (NEON) and run by QEMU, and compiled for no
instruction set at all (the compiler's own vectors) and run here; both against float64.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import native_harness as nh
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from native_harness import single
from support.unit_cases import Case, Raw, error, exact, values
from test_native_conv import LIMIT, block_parameters
from test_training_units import LIMITS as UNIT_LIMITS

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
_INTEGERS = ["kind", "src", "dst", "num_src", "kernel", "clamp"]
_ARRAYS = ["srcs", "scale", "shift", "weight_a", "bias_a", "weight_b", "bias_b", "head_weights"]
# struct Op of csrc/plan.h
OP = np.dtype(
    [(name, "i4") for name in _INTEGERS] + [("skip_weight", "f4"), ("reserved", "i4")] + [(name, "u8") for name in _ARRAYS]
)
# As the build compiles them (csrc/CMakeLists.txt).
FLAGS = ["-std=c++17", "-O2", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
TARGETS = {
    "neon": (["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64"]),
    "plain": (["g++", "-U__SSE2__", "-U__ARM_NEON"], []),
}


class Driver:
    """Stands in for the native module: runs each plan in a process of the other machine."""

    op_dtype = OP
    FIRST_CONV, RESIDUAL_BLOCK, GATE, RECONSTRUCT = range(4)

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command, self.folder = command, folder
        self.sizes: dict[int, int] = {}  # address -> bytes

    def _run(self, data: bytes) -> bytes:
        source, target = self.folder / "in", self.folder / "out"
        source.write_bytes(data)
        target.unlink(missing_ok=True)
        done = subprocess.run([*self.command, str(source), str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target.read_bytes()

    def _head(self, shape: tuple[int, ...], algorithm: str, threads: int, count: int) -> bytes:
        return np.array([*shape, ("direct", "winograd").index(algorithm), threads, count], np.int64).tobytes()

    def workspace_bytes(self, *arguments) -> int:
        *shape, algorithm, _, threads = arguments
        return int(self._run(self._head(tuple(shape), algorithm, threads, 0)))

    def run(self, ops, *arguments) -> None:
        shape, (workspace, size, image, out, algorithm, _, threads) = arguments[:7], arguments[7:]
        n, h, w, cin, cout = shape[:5]
        data = [self._head(shape, algorithm, threads, len(ops))]
        for op in ops:
            sized, arrays = op.copy(), []
            for name in _ARRAYS:
                if op[name]:
                    sized[name] = self.sizes[int(op[name])]
                    arrays.append(ctypes.string_at(int(op[name]), int(sized[name])))
            data += [sized.tobytes(), *arrays]
        data += [ctypes.string_at(image, n * cin * h * w * 4), np.int64(size).tobytes(), ctypes.string_at(workspace, size)]
        result = self._run(b"".join(data))
        assert len(result) == size + n * cout * h * w * 4
        ctypes.memmove(workspace, result[:size], size)
        ctypes.memmove(out, result[size:], len(result) - size)


class UnitDriver:
    """Stands in for the native module at support.unit_cases.Raw."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._driver = Driver(command, folder)

    def _head(self, fields: dict, backward: bool, asks: bool) -> bytes:
        names = ("n", "h", "w", "c", "kernel", "outputs")
        numbers = [fields[name] for name in names]
        numbers += [len(fields["x"]), fields["threads"], fields["batch_statistics"], bool(fields.get("skip"))]
        return np.array([backward, asks, *numbers], np.int64).tobytes()

    def unit_scratch(self, fields: dict, backward: bool, isa: str) -> int:
        return int(self._driver._run(self._head(fields, backward, True)))

    def unit_forward(self, fields: dict, *scratch) -> None:
        self._call(fields, False, ["bias", "skip"], ["out"])

    def unit_backward(self, fields: dict, *scratch) -> None:
        self._call(fields, True, ["grad"], ["grad_x", "grad_gamma", "grad_beta", "grad_weight", "grad_bias"])

    def _call(self, fields: dict, backward: bool, inputs: list[str], results: list[str]) -> None:
        c, sources, out = fields["c"], len(fields["x"]), fields["outputs"] or fields["c"]
        pixels = fields["n"] * fields["h"] * fields["w"]
        sizes = {"x": pixels * c, "grad_x": pixels * c, "skip": pixels * c, "out": pixels * out, "grad": pixels * out}
        sizes |= dict.fromkeys(("gamma", "beta", "mean", "invstd", "grad_gamma", "grad_beta"), sources * c)
        sizes |= dict.fromkeys(("weight", "grad_weight"), out * sources * c * fields["kernel"] ** 2)
        sizes |= dict.fromkeys(("bias", "grad_bias"), out)

        def arrays(names: list[str]) -> list[tuple[int, int]]:
            """(address, bytes) of each."""
            found = ((name, fields[name]) for name in names if fields.get(name))
            return [(a, sizes[name] * 4) for name, at in found for a in (at if isinstance(at, list) else [at])]

        given = arrays(["x", "gamma", "beta", "mean", "invstd", "weight", *inputs])
        said = self._driver._run(self._head(fields, backward, False) + b"".join(ctypes.string_at(*a) for a in given))
        for address, size in arrays(results):
            ctypes.memmove(address, said[:size], size)
            said = said[size:]
        assert not said


class Plan(nh.Plan):
    def _address(self, array: np.ndarray) -> int:
        address = super()._address(array)
        self.module.sizes[address] = self.keep[-1].nbytes
        return address


@pytest.fixture(scope="module", params=list(TARGETS))
def built(request, tmp_path_factory) -> tuple[str, Path]:
    """(target, folder): the kernels and the driver, compiled."""
    compiler, emulator = TARGETS[request.param]
    for tool in [compiler[0], *emulator]:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing")
    folder = tmp_path_factory.mktemp(request.param)
    sources = [CSRC / "cpu" / f"{name}.cpp" for name in ("isa", "runner", "training")]
    drivers = ["portable_driver", "portable_unit_driver"]
    sources += [ROOT / "tests/support" / f"{name}.cpp" for name in drivers]
    steps = [
        subprocess.Popen(
            [*compiler, *FLAGS, "-DMEMNET_ISA=baseline", "-I", str(CSRC), "-c", str(source), "-o", str(folder / source.stem)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for source in sources
    ]
    for step in steps:
        said = step.communicate()[0]
        assert step.returncode == 0, said
    for driver in drivers:
        objects = [str(folder / name) for name in ("isa", "runner", "training", driver)]
        subprocess.run([*compiler, "-fopenmp", *objects, "-o", str(folder / f"{driver}.out")], check=True)
    return request.param, folder


@pytest.fixture
def driver(built, tmp_path, monkeypatch) -> Driver:
    target, folder = built
    stand_in = Driver([*TARGETS[target][1], str(folder / "portable_driver.out")], tmp_path)
    monkeypatch.setattr(nh.native, "module", lambda: stand_in)
    return stand_in


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_residual_block_equals_float64(driver, algorithm):
    for (h, w), channels in (((1, 1), 5), ((7, 1), 16), ((15, 17), 64), ((33, 29), 20)):
        generator = torch.Generator().manual_seed(h * 100 + w)
        parameters = block_parameters(channels, generator)
        x = single(2, channels, h, w, generator=generator)
        plan = Plan(2, h, w, channels, algorithm=algorithm, threads=2)
        plan.set_slot(2, x)
        plan.residual_block(2, 0, **parameters)
        reference = nh.residual_block(x, **parameters)
        error = nh.worst_error(plan.run().slot(0), reference, reference - x)
        assert error <= LIMIT[algorithm], (h, w, channels, error)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_threads_and_batch_do_not_change_a_bit(driver, algorithm):
    generator = torch.Generator().manual_seed(5)
    parameters = block_parameters(16, generator)
    x = single(2, 16, 37, 41, generator=generator)

    def block(x: torch.Tensor, threads: int) -> torch.Tensor:
        plan = Plan(*x.shape[:1], 37, 41, 16, algorithm=algorithm, threads=threads)
        plan.set_slot(2, x)
        plan.residual_block(2, 0, **parameters)
        return plan.run().slot(0)

    alone = torch.cat([block(x[:1], 1), block(x[1:], 1)])
    assert torch.equal(block(x, 3), alone)


def test_direct_is_exact_on_integers(driver):
    generator = torch.Generator().manual_seed(9)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).double()

    parameters = {name: integers(20) for name in ("scale", "shift", "bias_a", "bias_b")}
    parameters |= {name: integers(20, 20, 3, 3) for name in ("weight_a", "weight_b")}
    x = integers(1, 20, 19, 53)
    plan = Plan(1, 19, 53, 20)
    plan.set_slot(2, x)
    plan.residual_block(2, 0, **parameters)
    assert torch.equal(plan.run().slot(0).double(), nh.residual_block(x, **parameters))


def test_the_other_operations_equal_float64(driver):
    """First convolution, gate and reconstruction on one colour image of odd size, one after the other."""
    generator = torch.Generator().manual_seed(1)
    c, h, w = 20, 13, 51
    image = torch.rand(1, 3, h, w, generator=generator).double()
    first = [single(3, generator=generator) + 2, single(3, generator=generator), single(c, 3, 3, 3, generator=generator)]
    bias = single(c, generator=generator)
    scale, shift = single(2, c, generator=generator, spread=0.3) + 1, single(2, c, generator=generator)
    weight = single(c, 2 * c, 1, 1, generator=generator, spread=0.2)
    recon = single(3, c, 3, 3, generator=generator, spread=0.1)
    heads, recon_bias = torch.tensor([0.5, 0.75], dtype=torch.float64), single(3, generator=generator)
    other = single(1, c, h, w, generator=generator)
    plan = Plan(1, h, w, c, cin=3, cout=3)
    plan.set_image(image)
    plan.set_slot(1, other)
    plan.first_conv(0, *first, bias)
    plan.gate([0, 1], 2, scale, shift, weight, bias)
    plan.reconstruct([0, 2], scale, shift, recon, recon_bias, heads, 1.0)
    plan.run()
    b0 = F.conv2d(nh.activate(image, *first[:2]), first[2], bias, padding=1)
    gate = nh.gate([b0, other], scale, shift, weight, bias)
    out = nh.reconstruct(image, [b0, gate], scale, shift, recon, recon_bias, heads, 1.0)
    for result, reference in ((plan.slot(0), b0), (plan.slot(2), gate), (plan.output(), out)):
        assert nh.worst_error(result, reference, reference) <= 4e-6


def test_a_nan_passes_through(driver):
    """relu must keep it: NEON's FMAX does, FMAXNM would not."""
    generator = torch.Generator().manual_seed(3)
    parameters = block_parameters(16, generator)
    x = single(1, 16, 9, 9, generator=generator)
    x[0, 3, 4, 4] = float("nan")
    plan = Plan(1, 9, 9, 16)
    plan.set_slot(2, x)
    plan.residual_block(2, 0, **parameters)
    expected = torch.zeros(1, 16, 9, 9, dtype=torch.bool)
    expected[..., 2:7, 2:7] = True
    assert torch.equal(plan.run().slot(0).isnan(), expected)


UNITS = [
    Case(16, 2, 7, 13, skip=True),
    Case(80, 1, 6, 5, bias=False),
    Case(64, 2, 5, 31, kernel=1, sources=3),
    Case(48, 1, 7, 13, outputs=1),
    Case(16, 3, 1, 9, kernel=1, outputs=3),
]


@pytest.mark.parametrize("case", UNITS, ids=lambda case: f"{case.kind}, {case.channels}")
def test_units_of_a_training_step_equal_float64(built, case, tmp_path, monkeypatch):
    target, folder = built
    stand_in = UnitDriver([*TARGETS[target][1], str(folder / "portable_unit_driver.out")], tmp_path)
    monkeypatch.setattr(nh.native, "module", lambda: stand_in)
    given = values(case)
    alone = Raw(case, given, True).run()
    expected = exact(given, True)
    for name, limit in UNIT_LIMITS[case.kind].items():
        if name in alone and name in expected:
            assert error(alone[name], expected[name]) <= limit, (name, error(alone[name], expected[name]))
    together = Raw(case, given, True, threads=3).run()
    assert all(torch.equal(together[name], t) for name, t in alone.items())
    given["gamma"][3], given["beta"][3] = 0.0, 0.0  # at zero it lets nothing through
    given["x"][0, 0, 0, 0] = float("nan")  # and what is no number it keeps
    found = Raw(case, given, False).run()
    assert all(found[name].isnan().any() for name in ("out", "weight", "gamma"))
    assert error(found["beta"], exact(given, False)["beta"]) <= UNIT_LIMITS[case.kind]["beta"]
    assert found["beta"][3] == 0.0 and not found["weight"][:, 3].any()


def test_products_use_the_vectors_of_the_machine(built):
    """64-bit ARM: each multiply-add of the kernels is one instruction on four values."""
    target, folder = built
    if target != "neon":
        pytest.skip("says nothing about the compiler's own vectors")
    tool = "aarch64-linux-gnu-objdump"
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is missing")
    code = subprocess.run([tool, "-d", str(folder / "isa")], capture_output=True, text=True, check=True).stdout
    vectors = re.findall(r"\bfmla\s+v\d+\.4s", code)
    scalars = re.findall(r"\bfmadd\s+s\d+", code)
    assert len(vectors) > 100 and len(scalars) < len(vectors) / 20

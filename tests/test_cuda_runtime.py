"""The CUDA backend without a GPU: the tables of its weights, when it says that it cannot run, and what the driver would see.

Its real text, kernels included, runs in test_cuda_network.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import networks
from support.cuda_tables import executed

import memnet_fast as mf
from memnet_fast import backends, engine, layouts, native, native_cuda
from memnet_fast.backends import cuda, cuda_tables
from memnet_fast.backends.torch import round_operand
from memnet_fast.config import PRESETS
from memnet_fast.layouts import CHANNELS, mma, wgmma
from memnet_fast.parameters import Parameters
from memnet_fast.plan import FirstConv, Gate, Reconstruct, ResidualBlock, lower, outline

CUDA = torch.device("cuda", 0)
NETWORKS = {**networks.VARIANTS, **PRESETS}


# Tables --------------------------------------------------------------------------------------------------------------


def _state(config: mf.MemNetConfig, dtype: torch.dtype = torch.float32) -> mf.MemNet:
    """A network whose every value is its own."""
    net = mf.MemNet.on_cpu(config).eval()
    g = networks.generator(5)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(
                torch.rand(tensor.shape, generator=g) + 0.05 if name.endswith("var") else torch.randn(tensor.shape, generator=g)
            )
    return net.to(dtype)


def _padded(weight: torch.Tensor, *shape: int) -> torch.Tensor:
    full = torch.zeros(shape, dtype=torch.float64)
    full[tuple(slice(n) for n in weight.shape)] = weight
    return full


def _expected(plan: mf.plan.FusedPlan, precision: str, hopper: bool) -> list[dict[str, torch.Tensor]]:
    """For each operation its arrays as kernels.h wants them, from the weights of the lowering."""
    w, c, kind = plan.weights, CHANNELS, {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    def laid(weight: torch.Tensor, layout: np.ndarray) -> torch.Tensor:
        return (
            round_operand(weight.float(), precision).to(kind).reshape(-1)[torch.from_numpy(layout.reshape(-1).astype(np.int64))]
        )

    conv = wgmma.conv3x3() if hopper else mma.conv3x3()
    rows = []
    for op in plan.ops:
        match op:
            case FirstConv():
                weight = _padded(w[op.weight], c, *w[op.weight].shape[1:])
                row = {"scale": w[op.scale], "shift": w[op.shift], "bias_a": _padded(w[op.bias], c)}
                row["weight_a"] = weight.permute(2, 3, 1, 0)
            case ResidualBlock():
                row = {key: _padded(w[getattr(op, key)], c) for key in ("scale", "shift", "bias_a", "bias_b")}
                row |= {key: laid(_padded(w[getattr(op, key)], c, c, 3, 3), conv) for key in ("weight_a", "weight_b")}
            case Gate():
                k = len(op.srcs)
                row = {"scale": _padded(w[op.scale], k, c), "shift": _padded(w[op.shift], k, c)}
                row |= {"bias_a": _padded(w[op.bias], c), "weight_a": laid(_padded(w[op.weight], c, k, c), mma.gate(k))}
            case Reconstruct():
                k, (planes, _, *kernel) = len(op.srcs), w[op.weight].shape
                row = {"scale": _padded(w[op.scale], k, c), "shift": _padded(w[op.shift], k, c), "bias_a": w[op.bias]}
                row |= {"head": w[op.head], "skip": w[op.skip]}
                row["weight_a"] = _padded(w[op.weight], planes, c, *kernel).permute(2, 3, 0, 1)
        rows.append(row)
    return rows


@pytest.mark.parametrize(("precision", "hopper"), [("fp16", True), ("bf16", False)])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "memnet_m10r10"])
def test_tables_give_the_weights_of_the_lowering_bit_for_bit(name, precision, hopper):
    config = NETWORKS[name]
    net = _state(config)
    plan, drawn, names = lower(net), outline(config), engine.state_names(config)
    tables = cuda_tables.build(drawn.ops, drawn.recipes, names, mf.plan.batch_norm_eps(net), precision, hopper, config.clamp)
    state = [net.state_dict()[n] for n in names]
    packed = executed(tables, state)
    used = np.zeros(len(packed), bool)
    for record, row in zip(tables.ops, _expected(plan, precision, hopper), strict=True):
        for key, value in row.items():
            value = value if value.dtype.itemsize == 2 else value.float()
            raw = value.contiguous().reshape(-1).view(torch.uint8).numpy()
            at = int(record[key])
            assert at % 16 == 0
            np.testing.assert_array_equal(packed[at : at + len(raw)], raw, err_msg=f"{key} of {record}")
            used[at : at + len(raw)] = True
    written = sum(int(j["count"]) * (4 if j["type"] == 0 else 2) for j in tables.pack_jobs)
    assert used.sum() == written, "arrays overlap, or somebody packs what no operation reads"


def test_tables_of_a_network_with_more_parameters_than_one_launch_takes():
    """221 normalisations: the 884 tensors of their folding travel in three launches."""
    test_tables_give_the_weights_of_the_lowering_bit_for_bit("memnet_m10r10", "bf16", True)


def test_a_wrong_recipe_or_layout_is_noticed(monkeypatch):
    def check() -> None:
        test_tables_give_the_weights_of_the_lowering_bit_for_bit("official", "fp16", False)

    check()
    shifted = mma.conv3x3()[::-1]
    with monkeypatch.context() as m:
        m.setattr(cuda_tables._Builder, "_conv3x3", lambda self: shifted)
        with pytest.raises(AssertionError):
            check()
    fold = cuda_tables._Builder._fold
    with monkeypatch.context() as m:
        m.setattr(
            cuda_tables._Builder, "_fold", lambda self, v, count: fold(self, v, count) + (type(v).__name__ == "NormShift")
        )
        with pytest.raises(AssertionError):
            check()


def test_tables_share_maps_and_weights():
    """M6R6: 36 first convolutions, 6 second ones that are shared, one map for all of them."""
    config = PRESETS["memnet_m6r6"]
    drawn, names = outline(config), engine.state_names(config)
    eps = dict.fromkeys((n.removesuffix(".running_var") for n in names if n.endswith("running_var")), 1e-5)
    tables = cuda_tables.build(drawn.ops, drawn.recipes, names, eps, "fp16", True, False)
    folded = [j for j in tables.pack_jobs if j["scale"] >= 0 and j["inner"] > 1]
    assert len(folded) == 36 and len({int(j["map"]) for j in folded}) == 1
    assert sum(j["map"] == folded[0]["map"] for j in tables.pack_jobs) == 36 + 6
    assert tables.packed_bytes < 5 << 20 and tables.maps.nbytes < 3 << 20


def test_operations_that_the_kernels_do_not_do():
    net = networks.build(networks.SMALL)
    plan = lower(net)
    gate = next(op for op in plan.ops if isinstance(op, Gate))
    recon = plan.ops[-1]
    drawn, names = outline(net.config), engine.state_names(net.config)

    def build(op):
        return cuda_tables.build([op], drawn.recipes, names, mf.plan.batch_norm_eps(net), "fp16", False, False)

    with pytest.raises(ValueError, match="slots 0 to 2 in order"):
        build(type(gate)((0, 2, 1), *list(vars(gate).values())[1:]))
    with pytest.raises(ValueError, match="consecutive slots"):
        build(type(recon)((3, 5), *list(vars(recon).values())[1:]))


def test_layouts_are_permutations():
    for layout in (
        layouts.first_conv(3),
        layouts.reconstruct(2, 3),
        layouts.reconstruct(1, 1),
        mma.conv3x3(),
        mma.gate(7),
        wgmma.conv3x3(),
    ):
        assert layout.dtype == np.int32
        np.testing.assert_array_equal(np.sort(layout.reshape(-1)), np.arange(layout.size))
    weight = np.arange(64 * 3 * 9).reshape(64, 3, 3, 3)
    assert weight.reshape(-1)[layouts.first_conv(3)][5, 2, 40] == weight[40, 2, 1, 2]
    weight = np.arange(2 * 64 * 9).reshape(2, 64, 3, 3)
    assert weight.reshape(-1)[layouts.reconstruct(2, 3)][7, 1, 63] == weight[1, 63, 2, 1]


def test_a_layout_of_a_smaller_weight():
    layout = layouts.into(layouts.rows(2, 4), (2, 4), (2, 3))
    np.testing.assert_array_equal(layout, [[0, 1, 2, -1], [3, 4, 5, -1]])
    layout = layouts.into(np.array([3, -1, 5], np.int32), (2, 4), (1, 4))
    np.testing.assert_array_equal(layout, [3, -1, -1])


# When it cannot run --------------------------------------------------------------------------------------------------


def _module(archs="80 90a", driver=13000, devices=1, error=None):
    status = {"driver": driver, "runtime": 13000, "devices": devices, "error": error}
    return SimpleNamespace(archs=lambda: archs, status=lambda: status)


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU, as far as why_not asks; called, it changes one thing."""

    def change(module=None, capability=(9, 0), missing=None):
        monkeypatch.setattr(native_cuda, "module", lambda: module or _module())
        monkeypatch.setattr(native_cuda, "why_missing", lambda: missing)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    change()
    return change


def _why_not(precision="fp16", device=CUDA, config=networks.SMALL, algorithm="direct"):
    return cuda.why_not(config, device, precision, algorithm)


def test_it_runs_where_all_is_well(machine):
    assert _why_not() is None and _why_not("bf16") is None
    assert _why_not(config=mf.MemNetConfig(channels=64)) is None


def test_each_reason(machine, monkeypatch):
    assert _why_not("fp32") == "it computes in fp16, bf16, fp8, not fp32"
    assert "'winograd'" in _why_not(algorithm="winograd")
    assert _why_not(config=mf.MemNetConfig(channels=65)) == "its kernels hold 64 channels, the network has 65"
    assert "the network is on cpu" in _why_not(device=torch.device("cpu"))
    machine(missing="the CUDA module was not built: nvcc was not found when the package was built")
    assert "nvcc was not found" in _why_not()
    machine()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in _why_not()
    machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _why_not() == "torch sees no CUDA device"


def test_the_driver(machine):
    machine(_module(driver=0, devices=0, error="no CUDA-capable device is detected"))
    assert _why_not() == "there is no NVIDIA driver"
    machine(_module(driver=12040, devices=0, error="CUDA driver version is insufficient for CUDA runtime version"))
    assert "supports CUDA 12.4, the module was built with CUDA 13.0" in _why_not()
    machine(_module(driver=13000, devices=0, error="no CUDA-capable device is detected"))
    assert _why_not() == "the CUDA runtime reports: no CUDA-capable device is detected"
    machine(_module(driver=12080))
    assert _why_not() is None, "an older driver of the same generation runs it, says the runtime"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80 90a", (7, 5), False),
        ("80 90a", (8, 0), True),
        ("80 90a", (8, 6), True),
        ("80 90a", (12, 0), True),
        ("90a", (8, 9), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), True),
        ("89", (8, 6), False),
        ("86", (9, 0), True),
    ],
)
def test_the_architectures_of_the_build(machine, archs, capability, runs):
    machine(_module(archs), capability)
    reason = _why_not()
    assert (reason is None) == runs
    if not runs:
        assert f"{capability[0]}.{capability[1]}" in reason
        assert capability < (8, 0) or f"MEMNET_CUDA_ARCHS={capability[0]}{capability[1]}" in reason


def test_hopper_needs_its_own_code(machine):
    assert native_cuda.hopper((9, 0)) and not native_cuda.hopper((8, 0)) and not native_cuda.hopper((10, 0))
    assert _why_not("fp8") is None
    machine(_module("80 90"))
    assert not native_cuda.hopper((9, 0)) and "MEMNET_CUDA_ARCHS=90a" in _why_not("fp8")
    machine(capability=(8, 9))
    assert "this one has 8.9" in _why_not("fp8")


def test_auto_passes_over_it(machine, monkeypatch):
    """Only its name brings it, in the call or in the environment; the line alone holds it back."""
    monkeypatch.setattr(backends.triton, "why_not", lambda *args: "not here")
    choice = backends.choose(networks.SMALL, CUDA, "auto", "auto", "auto")
    assert choice.backend == "torch" and choice.not_taken[0] == f"cuda: {cuda.ON_REQUEST_ONLY}"
    asked = backends.choose(networks.SMALL, CUDA, "cuda", "auto", "auto")
    assert (asked.backend, asked.precision, asked.algorithm) == ("cuda", "fp16", "direct")
    monkeypatch.setattr(cuda, "ON_REQUEST_ONLY", None)
    assert backends.choose(networks.SMALL, CUDA, "auto", "auto", "auto").backend == "cuda"
    assert backends.choose(networks.SMALL, CUDA, "auto", "fp32", "auto").backend == "torch"
    assert list(backends.LADDER) == ["cuda", "triton", "cpu", "torch"]


def test_a_wish_that_cannot_be_met_says_why():
    with pytest.raises(mf.BackendUnavailable) as caught:
        mf.fuse(networks.build(networks.SMALL), backend="cuda")
    assert caught.value.backend == "cuda" and caught.value.reason
    with pytest.raises(mf.BackendUnavailable, match="fp16, bf16, fp8, not fp32"):
        mf.fuse(networks.build(networks.SMALL), backend="cuda", precision="fp32")


def test_reasons_of_a_build_that_failed(monkeypatch):
    monkeypatch.setattr(native_cuda, "_load", lambda: (None, ImportError("no such file")))
    monkeypatch.setattr(native, "build_info", lambda: {"cuda": {"native": False, "reason": "compile failed: nvcc error"}})
    assert native_cuda.why_missing() == "the CUDA module was not built: compile failed: nvcc error"
    monkeypatch.setattr(native, "build_info", dict)
    assert "not built or installed (no such file)" in native_cuda.why_missing()
    monkeypatch.setattr(native, "build_info", lambda: {"cuda": {"native": True}})
    assert "cannot be loaded: no such file" in native_cuda.why_missing()
    with pytest.raises(ImportError, match="cannot be loaded"):
        native_cuda.module()


# The engine ----------------------------------------------------------------------------------------------------------


def test_a_backend_that_packs_on_the_host_under_capture(monkeypatch):
    """It may neither compare weights nor pack: it uses what it packed, if the tensors are where they were, or says so."""
    net = networks.build(networks.SMALL)
    fast = mf.fuse(net, backend="torch")
    runner = engine.engine(fast._spec)
    x = networks.image(1, 1, 6, 5)
    state = fast._state()
    with monkeypatch.context() as m:
        m.setattr(engine, "capturing", lambda device: True)
        with pytest.raises(mf.InputError, match="call the network once before the capture"):
            runner.packed(state)
    fast(x)
    runner._seen_at = engine._fingerprint(state)  # on a GPU the call itself notes it
    with monkeypatch.context() as m:
        m.setattr(engine, "capturing", lambda device: True)
        m.setattr(torch, "equal", lambda *args: pytest.fail("values were compared"))
        _, packed = runner.packed(state)
        assert packed is runner._packed[1]
        with torch.no_grad():
            net.head_weights.mul_(2)
        with pytest.raises(mf.InputError, match="capture"):
            runner.packed(fast._state())


def _bound(tensors):
    return cuda.Bound.of(None, torch.device("cpu"), Parameters.of(tensors))


def test_parameters_that_cannot_be_read():
    good = torch.ones(3)
    with pytest.raises(mf.InputError, match="several devices"):
        _bound([good, torch.ones(3, device="meta")])
    with pytest.raises(mf.InputError, match="on meta, not on cpu"):
        _bound([torch.ones(3, device="meta")])
    with pytest.raises(mf.InputError, match="dtype torch.int32"):
        _bound([good, torch.ones(3, dtype=torch.int32)])


def test_parameters_are_read_where_they_lie():
    plain = torch.randn(4, 6, 3, 3)
    strided = plain.to(memory_format=torch.channels_last)
    negative = torch._neg_view(plain)
    known = _bound([plain, plain.half(), plain.bfloat16(), plain.double()])
    assert known.parameters.addresses[0] == plain.data_ptr() and known.types.tolist() == [1, 2, 3, 0]
    assert known.parameters.in_place
    for odd in (strided, negative):
        copied = _bound([plain, odd]).parameters
        assert not copied.in_place and copied.tensors[1].is_contiguous() and not copied.tensors[1].is_neg()
        assert copied.addresses[1] == copied.tensors[1].data_ptr() and torch.equal(copied.tensors[1], odd)


# The built module ----------------------------------------------------------------------------------------------------

BUILT = pytest.mark.skipif(native_cuda.why_missing() is not None, reason=native_cuda.why_missing() or "built")


@BUILT
def test_the_structures_of_both_languages_are_the_same():
    module = native_cuda.module()
    assert module.op_dtype == cuda_tables.OP
    assert module.fold_job_dtype == cuda_tables.FOLD_JOB
    assert module.quantise_job_dtype == cuda_tables.QUANTISE_JOB
    assert module.pack_job_dtype == cuda_tables.PACK_JOB
    assert module.version() == mf.__version__ and "nvcc" in module.compiler()


@BUILT
def test_the_module_loads_without_a_driver_and_without_other_libraries():
    """It asks for no CUDA library, and importing it or the package makes no context."""
    code = """
import torch
import memnet_fast as mf
from memnet_fast import native_cuda
module = native_cuda.module()
assert not torch.cuda.is_initialized()
status = module.status()
assert (status["devices"] == 0) == (status["error"] is not None), status
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    listed = subprocess.run(["readelf", "-d", native_cuda.module().__file__], capture_output=True, text=True, check=True).stdout
    needed = [line for line in listed.splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if "cuda" in line.lower() or "torch" in line]


@BUILT
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_run_raises_what_cuda_says():
    net = networks.build(networks.SMALL)
    names = engine.state_names(net.config)
    plan = cuda._live_plan(net.config, tuple(mf.plan.batch_norm_eps(net).items()), names, "fp16", False)
    n, h, w = 1, 4, 5
    memory = np.zeros(plan.workspace_bytes(n, h, w) + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :]
    addresses, types = np.full(len(names), 64, np.uint64), np.ones(len(names), np.uint8)
    with pytest.raises(RuntimeError) as caught:
        plan.run(
            0, 0, addresses, types, aligned.ctypes.data, len(memory) - 64, memory.ctypes.data + 4, memory.ctypes.data, n, h, w
        )
    assert type(caught.value).__name__ == "CudaError" and "(cudaError" in str(caught.value)

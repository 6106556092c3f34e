"""PyTorch's own machinery around a fused network (rows T20, T30, T40 to T45, T64, T66, T67 of the project's list)."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from support import checks, layers, networks
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import memnet_fast as mf
from memnet_fast import ops

LIMIT = checks.UNIT["fp32"] * layers.NSR_LIMIT_WINOGRAD


@pytest.fixture(scope="module")
def fast():
    return mf.fuse(networks.build(networks.SMALL))


@pytest.fixture(scope="module")
def x():
    return networks.image(2, 1, 17, 19)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# The operator --------------------------------------------------------------------------------------------------------


def test_opcheck(fast, x):
    """T20, T30, T31: schema, fake tensor, autograd registration, dynamic shapes."""
    result = torch.library.opcheck(torch.ops.memnet_fast.forward.default, (x, fast._state(), fast._spec))
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4


def test_t20_fake_tensors(fast, x):
    """No memory is touched: the fake image has none."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for dtype in (torch.float32, torch.bfloat16):
            y = fast(mode.from_tensor(x.to(dtype)))
            assert type(y).__name__ == "FakeTensor"
            assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous()


def test_the_operator_has_no_derivative_and_says_so(fast, x):
    """T30: whoever goes around the module gets an error, not a detached result."""
    y = ops.forward(x.clone().requires_grad_(True), fast._state(), fast._spec)
    with pytest.raises(RuntimeError, match="no derivative"):
        y.sum().backward()


# torch.compile -------------------------------------------------------------------------------------------------------


def test_t40_compile_static(fast, x):
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), fast(x))


def test_t40_compile_dynamic_with_bounded_recompiles(fast):
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, backend=count, fullgraph=True, dynamic=True)
    for n, h, w in ((2, 17, 19), (3, 5, 7), (2, 8, 8), (4, 33, 21), (5, 6, 90)):
        x = networks.image(n, 1, h, w)
        assert torch.equal(compiled(x), fast(x))
    assert count.frame_count <= 2


def test_t40_compile_inductor(fast, x):
    """A network inside a larger graph, through the real code generator."""

    def brighter(image):
        return fast(image * 0.5 + 0.25) + 1

    compiled = torch.compile(brighter, fullgraph=True)
    assert torch.equal(compiled(x), fast(x * 0.5 + 0.25) + 1)


def test_t40_compiled_networks_notice_changed_weights(x):
    """T63 under T40"""
    net = networks.build(networks.SMALL)
    fast = mf.fuse(net)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    before = compiled(x)
    net.blocks[0].conv_b[0].weight.data.mul_(1.5)
    assert not torch.equal(compiled(x), before)
    assert torch.equal(compiled(x), mf.fuse(net)(x))


def test_t40_compiled_networks_notice_a_changed_eps(x):
    """The program stops, and asks for the call that looks at the network anew."""
    net = networks.build(networks.SMALL)
    fast = mf.fuse(net)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    before = compiled(x)
    net.blocks[0].bn_a[0].eps = 0.5
    with pytest.raises(Exception, match="call it once|InputError"):
        compiled(x)
    expected = fast(x)
    assert torch.equal(compiled(x), expected) and not torch.equal(expected, before)


def test_t64_hooks_stop_a_compilation(x):
    net = networks.build(networks.SMALL)
    fast = mf.fuse(net)
    net.recon.register_forward_hook(lambda m, a, o: o * 2)
    with pytest.raises(mf.InputError, match="hooks"):
        fast(x)
    with pytest.raises(Exception, match="hooks|InputError"):
        torch.compile(fast, backend="aot_eager", fullgraph=True)(x)


# Export --------------------------------------------------------------------------------------------------------------

_LOADER = """
import sys
import torch
import memnet_fast.ops
x, y = torch.load(sys.argv[2])
if sys.argv[1].endswith(".pt2"):
    program = torch.export.load(sys.argv[1]).module()
else:
    program = torch.jit.load(sys.argv[1])
assert torch.equal(program(x), y), "other bits"
other = torch.rand(3, 1, 9, 31)
if sys.argv[3] == "dynamic":
    assert program(other).shape == other.shape
print("same bits")
"""


def _load_elsewhere(path, data, kind):
    command = [sys.executable, "-W", "ignore", "-c", _LOADER, str(path), str(data), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "same bits" in done.stdout, done.stderr[-2000:]


def test_t44_export_loads_in_a_fresh_process(fast, x, tmp_path):
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    program = torch.export.export(fast, (x,), dynamic_shapes=(sizes,))
    y = fast(x)
    assert torch.equal(program.module()(x), y)
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save((x, y), tmp_path / "data.pt")
    _load_elsewhere(tmp_path / "net.pt2", tmp_path / "data.pt", "dynamic")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_t44_traces_load_in_a_fresh_process(fast, x, tmp_path):
    traced = torch.jit.trace(fast, x)
    y = fast(x)
    assert torch.equal(traced(x), y)
    torch.jit.save(traced, str(tmp_path / "net.pt"))
    torch.save((x, y), tmp_path / "data.pt")
    _load_elsewhere(tmp_path / "net.pt", tmp_path / "data.pt", "static")


def test_t44_an_exported_program_outlives_its_network(x):
    fast = mf.fuse(networks.build(networks.SMALL))
    y = fast(x)
    program = torch.export.export(fast, (x,)).module()
    del fast
    assert torch.equal(program(x), y)


# Transforms ----------------------------------------------------------------------------------------------------------


def test_t41_vmap(fast):
    x = networks.image(6, 1, 9, 8).view(3, 2, 1, 9, 8)
    expected = fast(x.flatten(0, 1)).view_as(x)
    assert torch.equal(torch.func.vmap(fast)(x), expected)
    assert torch.equal(torch.func.vmap(fast, in_dims=3, out_dims=1)(x.movedim(0, 3)), expected.movedim(0, 1))
    nested = torch.func.vmap(torch.func.vmap(fast))(x[None])
    assert torch.equal(nested[0], expected)


def test_t41_vmap_over_weights_is_refused(fast, x):
    state = [torch.stack([t, t]) for t in fast._state()]
    with pytest.raises(mf.InputError, match="weights"):
        torch.func.vmap(lambda s: ops.forward(x, s, fast._spec))(state)


def test_t42_autocast(fast, x):
    """Autocast changes neither dtype nor bits: the precision of a fused network is its own. Nested regions too."""
    y = fast(x)
    half = fast(x.half())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert fast(x).dtype == torch.float32 and torch.equal(fast(x), y)
            assert torch.equal(fast(x.half()), half)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(fast(x), y)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(fast(x), y)
    torch_backend = mf.fuse(fast, backend="torch")
    y = torch_backend(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch_backend(x), y)


def test_t43_grad_modes(fast, x):
    y = fast(x)
    assert not y.requires_grad
    with torch.no_grad():
        assert torch.equal(fast(x), y)
        with torch.enable_grad():
            assert torch.equal(fast(x), y)
    with torch.inference_mode():
        inside = fast(x)
        assert inside.is_inference() and torch.equal(inside, y)
        image = x.clone()
    assert torch.equal(fast(image), y), "an inference tensor outside of inference mode"
    with torch.no_grad():
        assert not fast(x.clone().requires_grad_(True)).requires_grad


# Derivatives ---------------------------------------------------------------------------------------------------------


def test_t30_input_that_requires_grad(fast, x):
    z = x.clone().requires_grad_(True)
    y = fast(z)
    assert y.requires_grad and torch.equal(y, fast.reference(z))
    weight = torch.randn(y.shape)
    (y * weight).sum().backward()
    given = z.grad.clone()
    z.grad = None
    (fast.reference(z) * weight).sum().backward()
    assert torch.equal(given, z.grad) and bool(given.abs().sum() > 0)


def test_t30_half_precision_input_that_requires_grad(fast, x):
    z = x.half().requires_grad_(True)
    y = fast(z)
    assert y.dtype == torch.float16
    y.float().sum().backward()
    assert z.grad.dtype == torch.float16 and bool(torch.isfinite(z.grad).all())


def test_t30_parameters_get_no_gradient_in_eval_mode(x):
    """Documented: a fused network in eval mode is for inference. A training step that forgot train() fails loudly."""
    net = networks.build(networks.SMALL).requires_grad_(True)
    y = mf.fuse(net)(x)
    assert not y.requires_grad
    with pytest.raises(RuntimeError):
        y.sum().backward()


def test_t45_forward_mode(fast, x):
    """A tangent is carried, not dropped."""
    tangent = torch.randn(x.shape)
    y, moved = torch.func.jvp(fast, (x,), (tangent,))
    expected_y, expected = torch.func.jvp(fast.reference, (x,), (tangent,))
    assert torch.equal(y, expected_y) and torch.equal(moved, expected)
    assert bool(moved.abs().sum() > 0)


def test_t45_derivatives_of_the_reference():
    """First and second, against finite differences, in float64 on a tiny network."""
    config = networks.MemNetConfig(channels=3, num_memory_blocks=2, num_recursions=1)
    net = networks.build(config, seed=1).double()
    x = networks.image(1, 1, 3, 4).double().requires_grad_(True)
    assert torch.autograd.gradcheck(net, (x,))
    assert torch.autograd.gradgradcheck(net, (x,))


def test_t45_double_backward_and_retained_graphs(fast, x):
    z = x.clone().requires_grad_(True)
    y = fast(z).square().sum()
    first = torch.autograd.grad(y, z, retain_graph=True)[0]
    second = torch.autograd.grad(y, z, create_graph=True)[0]
    assert torch.equal(first, second)
    twice = torch.autograd.grad(second.square().sum(), z)[0]
    assert bool(torch.isfinite(twice).all()) and bool(twice.abs().sum() > 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_t45_checkpoint(fast, x, reentrant):
    z = x.clone().requires_grad_(True)
    checkpoint(fast, z, use_reentrant=reentrant).square().sum().backward()
    given = z.grad.clone()
    z.grad = None
    fast(z).square().sum().backward()
    if reentrant:  # its first pass runs without grad, fused; what flows back differs by that rounding
        assert float((given - z.grad).abs().max()) <= 1e-5 * float(z.grad.abs().max())
    else:
        assert torch.equal(given, z.grad)


# Global settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_t66_deterministic_algorithms(x, backend):
    fast = mf.fuse(networks.build(networks.SMALL), backend=backend)
    y = fast(x)  # the setting is on in every test
    torch.use_deterministic_algorithms(False)
    try:
        fast.release_workspace()
        assert torch.equal(fast(x), y)
    finally:
        torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_t67_default_dtype_and_device(x, backend):
    net = networks.build(networks.SMALL)
    fast = mf.fuse(net, backend=backend)
    y = fast(x)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        assert torch.equal(fast(x), y)
        fresh = mf.fuse(copy.deepcopy(net), backend=backend)
        result = fresh(x)
        assert result.dtype == torch.float32 and torch.equal(result, y)
        fresh.workspace_bytes(1, 8, 8)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_gradients_through_vmap(fast, x):
    """T30 and T41 together: per-sample gradients are those of the reference."""

    def loss(function):
        return lambda image: function(image[None]).square().sum()

    given = torch.func.vmap(torch.func.grad(loss(fast)))(x)
    expected = torch.func.vmap(torch.func.grad(loss(fast.reference)))(x)
    assert torch.allclose(given, expected, rtol=1e-4, atol=1e-5)
    assert bool(given.abs().sum() > 0)
    checks.require_nsr(fast(x), networks.oracle(fast.reference, x), x, LIMIT)

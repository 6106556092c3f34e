"""FusedMemNet: equal to the reference for every preset, and as alive as any module: changed weights, copies, modes, memory."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import pickle

import pytest
import torch
from support import checks, layers, networks
from support.candidates import isas
from torch.utils._python_dispatch import TorchDispatchMode

import memnet_fast as mf
from memnet_fast import backends, engine, native
from memnet_fast.config import PRESETS, MemNetConfig

NATIVE = pytest.mark.skipif(native.why_missing() is not None, reason=f"no native module: {native.why_missing()}")
WAYS = [
    pytest.param("torch", "direct", id="torch"),
    pytest.param("cpu", "direct", id="cpu-direct", marks=NATIVE),
    pytest.param("cpu", "winograd", id="cpu-winograd", marks=NATIVE),
]
SMALL_SIZES = [(1, 1, 1), (1, 1, 7), (1, 7, 1), (3, 33, 29)]
U = checks.UNIT["fp32"]


def limit(algorithm: str) -> float:
    """NSR of a whole network in float32 (support.layers says where the numbers come from)."""
    return U * (layers.NSR_LIMIT_WINOGRAD if algorithm == "winograd" else layers.NSR_LIMIT["fp32"])


@pytest.fixture(scope="module")
def net():
    return networks.build(networks.SMALL)


@pytest.fixture(scope="module")
def presets():
    made = {}

    def get(name):
        if name not in made:
            made[name] = networks.randomise(mf.create_model(name, pretrained=False), seed=7).requires_grad_(False)
        return made[name]

    return get


# Equal to the reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "algorithm"), WAYS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_the_reference(presets, name, backend, algorithm):
    """1x1, 1x7, 7x1, and 33x29 in a batch of 3, against float64."""
    reference = presets(name)
    fast = mf.fuse(reference, backend=backend, algorithm=algorithm)
    for n, h, w in SMALL_SIZES:
        x = networks.image(n, reference.config.in_channels, h, w, seed=h * 100 + w)
        y = fast(x)
        assert y.dtype == torch.float32 and y.is_contiguous()
        free = _oracle(name, reference, x)
        require_small_error(y, free.clamp(0, 1) if reference.config.clamp else free, free, x, limit(algorithm))


_truths: dict[tuple, torch.Tensor] = {}


def _oracle(name: str, reference: mf.MemNet, x: torch.Tensor) -> torch.Tensor:
    """Float64 result before any clamping."""
    key = (name, *x.shape)
    if key not in _truths:
        _truths[key] = networks.oracle(unclamped(reference), x)
    return _truths[key]


def unclamped(reference: mf.MemNet) -> mf.MemNet:
    twin = mf.MemNet(dataclasses.replace(reference.config, clamp=False)).eval().requires_grad_(False)
    twin.load_state_dict(reference.state_dict())
    return twin


def require_small_error(y, truth, free, x, allowed):
    """NSR with the residual before clamping as its measure: clamping shrinks errors, never enlarges them."""
    checks.same_frame(y, truth)
    value = checks.rms(y.double() - truth) / checks.rms(free - x)
    checks.require(value <= allowed, f"NSR {value / U:.1f}u above {allowed / U:.1f}u")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_the_reference_at_150x151(presets, name):
    """On the default backend. Truth is the reference in float32, whose own error (below 60u) adds to the limit."""
    reference = presets(name)
    x = networks.image(1, reference.config.in_channels, 150, 151)
    free = unclamped(reference)(x).double()
    fast = mf.fuse(reference)
    truth = free.clamp(0, 1) if reference.config.clamp else free
    require_small_error(fast(x), truth, free, x, limit(fast.algorithm) + limit("direct"))


@pytest.mark.parametrize(("backend", "algorithm"), WAYS)
def test_batch_of_three_at_150x151(backend, algorithm):
    """Several passes over the batch, several bands of each image; a smaller network for the time's sake."""
    reference = networks.build(MemNetConfig(channels=64, num_memory_blocks=1, num_recursions=2))
    x = networks.image(3, 1, 150, 151)
    with torch.no_grad():
        truth = reference(x)
    y = mf.fuse(reference, backend=backend, algorithm=algorithm)(x)
    checks.require_nsr(y, truth.double(), x, limit(algorithm) + limit("direct"))


@NATIVE
def test_official_network_at_150x151_direct(presets):
    reference = presets("memnet_m6r6")
    x = networks.image(1, 1, 150, 151)
    with torch.no_grad():
        truth = reference(x)
    y = mf.fuse(reference, algorithm="direct")(x)
    checks.require_nsr(y, truth.double(), x, 2 * limit("direct"))


@pytest.mark.parametrize(("backend", "algorithm"), WAYS)
@pytest.mark.parametrize("name", networks.VARIANTS)
def test_variants_equal_the_reference(name, backend, algorithm):
    reference = networks.build(networks.VARIANTS[name], 2, tiny_variance=True)
    fast = mf.fuse(reference, backend=backend, algorithm=algorithm)
    for n, h, w in SMALL_SIZES:
        x = networks.image(n, reference.config.in_channels, h, w, seed=w)
        truth = networks.oracle(reference, x)
        error = float((fast(x) - truth).abs().max())
        assert error <= 8 * limit(algorithm) * max(1.0, checks.rms(truth)), "a largest error is some RMS errors"


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_precisions_of_the_torch_backend(net, precision):
    fast = mf.fuse(net, backend="torch", precision=precision)
    x = networks.image(2, 1, 20, 21)
    y = fast(x)
    assert fast.precision == precision and y.dtype == torch.float32
    value = checks.nsr(y, networks.oracle(net, x), x)
    assert 0.1 * checks.UNIT[precision] < value <= 12 * checks.UNIT[precision]


# Choice of backend ---------------------------------------------------------------------------------------------------


@NATIVE
def test_auto_takes_the_native_backend(net):
    fast = mf.fuse(net)
    assert (fast.backend, fast.precision, fast.algorithm) == ("cpu", "fp32", "winograd")
    fast = mf.fuse(fast, algorithm="direct")
    assert fast.algorithm == "direct" and fast.reference is net


@pytest.mark.parametrize(
    "options", [{"backend": "tpu"}, {"precision": "int8"}, {"algorithm": "fft"}, {"backend": "cpu", "precision": "half"}]
)
def test_unknown_names_are_refused(net, options):
    with pytest.raises(mf.InputError, match="choose from"):
        mf.fuse(net, **options)


def test_what_cannot_run_says_why(net):
    with pytest.raises(mf.BackendUnavailable) as caught:
        mf.fuse(net, backend="cpu", precision="fp16")
    assert caught.value.backend == "cpu" and "fp16" in caught.value.reason
    with pytest.raises(mf.BackendUnavailable, match="direct"):
        mf.fuse(net, backend="torch", algorithm="winograd")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.backend, again.reason) == (caught.value.backend, caught.value.reason)


@NATIVE
def test_environment_names_backend_and_instruction_set(net, monkeypatch):
    x = networks.image(1, 1, 16, 17)
    monkeypatch.setenv("MEMNET_BACKEND", "torch")
    assert mf.fuse(net).backend == "torch"
    monkeypatch.setenv("MEMNET_BACKEND", "nothing")
    with pytest.raises(mf.InputError, match=r"'nothing' \(by MEMNET_BACKEND\)"):
        mf.fuse(net)
    monkeypatch.setenv("MEMNET_BACKEND", "cuda")
    with pytest.raises(mf.BackendUnavailable, match="; MEMNET_BACKEND=cuda asks for it"):
        mf.fuse(net)
    monkeypatch.delenv("MEMNET_BACKEND")
    truth = networks.oracle(net, x)
    for isa in isas():
        monkeypatch.setenv("MEMNET_ISA", isa)
        fast = mf.fuse(net)
        checks.require_nsr(fast(x), truth, x, limit("winograd"))
        assert engine.engine(fast._spec)._packed[1].isa == isa


def test_native_module_missing(net, monkeypatch, caplog):
    """T54, T55: without native code everything runs, the log says why, and an explicit wish raises the reason."""
    monkeypatch.setattr(native, "why_missing", lambda: "no compiler was found")
    fast = mf.fuse(net)
    x = networks.image(1, 1, 9, 8)
    with caplog.at_level(logging.INFO, "memnet_fast"):
        y = fast(x)
    assert fast.backend == "torch" and "no compiler was found" in caplog.text
    checks.require_nsr(y, networks.oracle(net, x), x, limit("direct"))
    with pytest.raises(mf.BackendUnavailable, match="no compiler was found"):
        mf.fuse(net, backend="cpu")


# Weights that change -------------------------------------------------------------------------------------------------


def _scaled_data(net, fast):
    net.blocks[0].conv_a[0].weight.data.mul_(1.5)  # changes no version counter


def _optimizer_step(net, fast):
    net.requires_grad_(True)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    net(networks.image(2, 1, 12, 12)).square().mean().backward()
    optimizer.step()
    net.eval()


def _loaded(net, fast):
    fast.reference.load_state_dict(networks.build(net.config, seed=99).state_dict())


def _loaded_through_fused(net, fast):
    other = mf.fuse(networks.build(net.config, seed=98))
    fast.load_state_dict(other.state_dict())


def _ema_swap(net, fast):
    average = torch.optim.swa_utils.AveragedModel(net, avg_fn=lambda a, p, n: 0.5 * a + 0.5 * p)
    average.update_parameters(networks.build(net.config, seed=97))
    average.update_parameters(networks.build(net.config, seed=96))
    for p, q in zip(net.parameters(), average.module.parameters(), strict=True):
        p.data, q.data = q.data, p.data


def _running_statistics(net, fast):
    net.blocks[1].gate.bn.running_var.mul_(1.7)


def _new_parameter(net, fast):
    net.recon.weight = torch.nn.Parameter(net.recon.weight.detach() * 0.5)


def _numpy_view(net, fast):
    net.head_weights.detach().numpy()[0] += 0.25


def _last_bit(net, fast):
    bias = net.recon.bias.data
    bias.copy_(torch.nextafter(bias, torch.full_like(bias, 9.0)))


CHANGES = [
    _scaled_data,
    _optimizer_step,
    _loaded,
    _loaded_through_fused,
    _ema_swap,
    _running_statistics,
    _new_parameter,
    _numpy_view,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_changed_weights_are_noticed(change):
    """T63"""
    net = networks.build(networks.SMALL)
    fast = mf.fuse(net)
    x = networks.image(2, 1, 15, 14)
    before = fast(x)
    change(net, fast)
    after = fast(x)
    assert not torch.equal(before, after)
    checks.equal(after, mf.fuse(net)(x).double())
    checks.require_nsr(after, networks.oracle(net, x), x, limit(fast.algorithm))


def test_one_changed_bit_is_noticed_and_nothing_else_packs_again():
    """T63"""
    net = networks.build(networks.SMALL)
    fast = mf.fuse(net)
    x = networks.image(1, 1, 8, 8)
    fast(x)
    running = engine.engine(fast._spec)
    packed = running._packed[1]
    fast(x)
    assert running._packed[1] is packed
    _last_bit(net, fast)
    fast(x)
    assert running._packed[1] is not packed


def test_a_nan_parameter_does_not_pack_at_every_call():
    net = networks.build(networks.SMALL)
    net.recon.bias.data.fill_(float("nan"))
    fast = mf.fuse(net)
    x = networks.image(1, 1, 8, 8)
    assert torch.isnan(fast(x)).all()
    packed = engine.engine(fast._spec)._packed[1]
    fast(x)
    assert engine.engine(fast._spec)._packed[1] is packed


# Copies and conversions ----------------------------------------------------------------------------------------------


def _through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def _through_file(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _state_dict_round_trip(module):
    other = mf.fuse(mf.MemNet(module.config))
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, _through_pickle, _through_file, _state_dict_round_trip, lambda m: copy.deepcopy(m).share_memory()],
    ids=["deepcopy", "pickle", "torch.save", "state_dict", "share_memory"],
)
def test_copies_compute_the_same_and_live_apart(duplicate):
    """T60"""
    fast = mf.fuse(networks.build(networks.SMALL))
    x = networks.image(2, 1, 13, 11)
    y = fast(x)
    other = duplicate(fast)
    assert torch.equal(other(x), y)
    other.reference.recon.weight.data.mul_(2)
    assert not torch.equal(other(x), y)
    assert torch.equal(fast(x), y)


def test_engines_go_when_their_networks_do():
    import gc

    fast = mf.fuse(networks.build(networks.SMALL))
    fast(networks.image(1, 1, 8, 8))
    spec = fast._spec
    assert spec in engine._engines
    del fast
    gc.collect()
    assert spec not in engine._engines


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_converted_networks(dtype):
    """T62: parameters in another dtype are packed again; input and output stay what the caller uses."""
    net = networks.build(networks.SMALL)
    fast = mf.fuse(net)
    x = networks.image(2, 1, 12, 13)
    before = fast(x)
    fast.to(dtype)
    assert net.recon.weight.dtype == dtype
    after = fast(x)
    assert after.dtype == torch.float32
    # The oracle takes the rounded parameters, so the limit is that of float32.
    checks.require_nsr(after, networks.oracle(net, x), x, limit(fast.algorithm))
    fast.to(torch.float32)
    if dtype == torch.float64:
        assert torch.equal(fast(x), before)


def test_memory_format_of_parameters_changes_nothing():
    """T62"""
    fast = mf.fuse(networks.build(networks.SMALL))
    x = networks.image(2, 1, 12, 13)
    y = fast(x)
    assert torch.equal(fast.to(memory_format=torch.channels_last)(x), y)
    assert torch.equal(fast.cpu()(x), y)


# Modes ---------------------------------------------------------------------------------------------------------------


def test_training_mode_uses_batch_statistics():
    """T61"""
    net, twin = (networks.build(networks.SMALL) for _ in range(2))
    fast = mf.fuse(net)
    x = networks.image(2, 1, 16, 15)
    evaluated = fast(x)
    fast.train()
    twin.train()
    assert torch.equal(fast(x), twin(x))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))
    assert not torch.equal(fast.eval()(x), evaluated), "the running statistics moved, and the packed weights with them"
    checks.require_nsr(fast(x), networks.oracle(net, x), x, limit(fast.algorithm))


def test_one_layer_in_training_mode_is_enough():
    """T61"""
    net = networks.build(networks.SMALL)
    fast = mf.fuse(net)
    net.blocks[0].bn_a[1].train()
    x = networks.image(2, 1, 9, 9)
    twin = copy.deepcopy(net)
    assert torch.equal(fast(x), twin(x))


def test_fuse_puts_the_network_into_eval_mode():
    net = networks.build(networks.SMALL).train()
    mf.fuse(net)
    assert not any(m.training for m in net.modules())


# Memory --------------------------------------------------------------------------------------------------------------


class _Allocations(TorchDispatchMode):
    """Records the bytes of every tensor that an operation returns with memory of its own, and the operations."""

    def __init__(self):
        super().__init__()
        self.sizes = []
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        inputs = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.sizes.append(t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("backend", "algorithm"), WAYS)
def test_one_workspace_and_no_concatenation(backend, algorithm):
    net = networks.build(MemNetConfig(channels=16, num_memory_blocks=3, num_recursions=3))
    fast = mf.fuse(net, backend=backend, algorithm=algorithm)
    n, h, w = 2, 64, 65
    x = networks.image(n, 1, h, w)
    fast(x)
    fast.release_workspace()
    running, state = engine.engine(fast._spec), fast._state()
    with _Allocations() as seen:
        running.run(x, state)
    workspace = fast.workspace_bytes(n, h, w)
    slot = n * 16 * h * w * 4
    assert seen.sizes.count(workspace) == 1, "the workspace is what workspace_bytes says, and allocated once"
    others = [s for s in seen.sizes if s != workspace]
    assert max(others) <= slot, "nothing else is larger than one feature map"
    assert workspace <= 16 * slot
    weights = sum(t.numel() for t in state) * 4
    with _Allocations() as seen:
        running.run(x, state)
    assert workspace not in seen.sizes, "the second call finds the workspace of the first"
    assert sum(seen.sizes) <= 4 * x.numel() * 4 + 2 * weights or backend == "torch"


@pytest.mark.parametrize("poison", ["nan", "ones", "zero", "other size"])
@pytest.mark.parametrize(("backend", "algorithm"), WAYS)
def test_what_lies_in_the_workspace_does_not_matter(net, backend, algorithm, poison):
    """T68"""
    fast = mf.fuse(net, backend=backend, algorithm=algorithm)
    x = networks.image(2, 1, 19, 21)
    clean = fast(x)
    if poison == "other size":
        fast(networks.image(3, 1, 31, 8, seed=5))
    for kept in engine.engine(fast._spec)._free.values():
        if poison == "nan":
            kept[: kept.numel() // 4 * 4].view(torch.float32).fill_(float("nan"))
        elif poison != "other size":
            kept.fill_(255 if poison == "ones" else 0)
    assert torch.equal(fast(x), clean)


def test_workspace_is_kept_grows_and_goes(net):
    fast = mf.fuse(net)
    free = engine.engine(fast._spec)._free
    sizes = []
    for h in (8, 30, 16):
        fast(networks.image(1, 1, h, h))
        sizes.append(sum(t.numel() for t in free.values()))
    assert sizes[0] < sizes[1] == sizes[2] >= fast.workspace_bytes(1, 30, 30)
    fast.release_workspace()
    assert not free


@NATIVE
def test_a_pass_of_fewer_images_fits_the_workspace(net, monkeypatch):
    """The last pass over a batch may hold fewer images, and schedules differ with their number: fewer may need more."""
    fast = mf.fuse(net, backend="cpu")
    x = networks.image(5, 1, 12, 10)
    whole = fast(x)
    _, packed = engine.engine(fast._spec).packed(fast._state())
    kind, passes = type(packed), []
    needed, run = kind.workspace_bytes, kind.run

    def more_for_fewer(self, n, h, w):
        return needed(self, n, h, w) + (1 << 20) // n

    def watched(self, image, out, workspace):
        passes.append((image.shape[0], workspace.numel() >= more_for_fewer(self, *image.shape[::2], image.shape[3])))
        run(self, image, out, workspace)

    monkeypatch.setattr(engine, "PIXELS_PER_PASS", 250)
    monkeypatch.setattr(kind, "workspace_bytes", more_for_fewer)
    monkeypatch.setattr(kind, "run", watched)
    fast.release_workspace()
    assert torch.equal(fast(x), whole)
    assert passes == [(2, True), (2, True), (1, True)]
    assert fast.workspace_bytes(5, 12, 10) == more_for_fewer(packed, 1, 12, 10)


def test_large_batches_run_in_passes(net, monkeypatch):
    fast = mf.fuse(net)
    x = networks.image(7, 1, 12, 10)
    whole = fast(x)
    needed = fast.workspace_bytes(7, 12, 10)
    monkeypatch.setattr(engine, "PIXELS_PER_PASS", 250)
    assert engine.images_per_pass(7, 12, 10) == 2
    # The torch backend holds one image at a time whatever the batch.
    assert fast.workspace_bytes(7, 12, 10) < needed or fast.backend == "torch"
    fast.release_workspace()
    assert torch.equal(fast(x), whole)


def test_out_of_memory_is_said_and_survived(net, monkeypatch):
    """T56: at every allocation of the call; the next call works, with the same bits."""
    fast = mf.fuse(net)
    x = networks.image(1, 1, 10, 10)
    y = fast(x)
    fast.release_workspace()
    real = torch.empty
    for k, what in enumerate(("output", "workspace")):
        left = [k]

        def failing(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(engine.torch, "empty", failing)
            with pytest.raises(mf.DeviceOOM, match=f"MiB of {what} on cpu: .*memory"):
                fast(x)
        assert torch.equal(fast(x), y)
        fast.release_workspace()


def test_other_errors_are_not_called_out_of_memory(net, monkeypatch):
    fast = mf.fuse(net)

    def failing(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(engine.torch, "empty", failing)
    with pytest.raises(RuntimeError, match="something else") as caught:
        fast(networks.image(1, 1, 5, 5))
    assert not isinstance(caught.value, mf.MemNetError)


def test_choices_are_logged(net, caplog):
    fast = mf.fuse(net)
    with caplog.at_level(logging.INFO, "memnet_fast"):
        for _ in range(2):
            fast(networks.image(1, 1, 5, 5))
    said = [r.getMessage() for r in caplog.records if "precision" in r.getMessage()]
    assert len(said) == 1 and fast.backend in said[0] and fast.algorithm in said[0], "once, when the weights are packed"
    assert set(backends.LADDER) == {"cuda", "triton", "cpu", "torch"}


def test_repr_names_the_request(net):
    assert "backend=torch" in repr(mf.fuse(net, backend="torch"))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_calls_of_different_modes_follow_each_other(backend):
    """What is kept for the next call is no inference tensor, which could not be written outside inference mode."""
    fast = mf.fuse(networks.build(networks.SMALL), backend=backend)
    x = networks.image(1, 1, 6, 7)
    with torch.inference_mode():
        first = fast(x)
    with torch.no_grad():
        second = fast(x)
    third = fast(x)
    assert torch.equal(first, second) and torch.equal(second, third)

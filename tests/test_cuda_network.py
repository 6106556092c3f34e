"""The CUDA backend as it stands, run on the CPU: Python, the native module and every kernel, over a model of the GPU.

The module is compiled from csrc/cuda by a C++ compiler against tests/support/simt (see simt.h for what is modelled). The
kernels by themselves are tested in test_cuda_mma.py and test_cuda_sm90.py; here it is the whole: packing, plans, passes,
graphs, errors.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from support import cuda_twin, networks
from support.cuda_tables import executed

import memnet_fast as mf
from memnet_fast import engine, fp8_gate
from memnet_fast.backends import cuda, cuda_graphs, cuda_tables
from memnet_fast.backends import torch as reference
from memnet_fast.layouts import wgmma
from memnet_fast.parameters import Parameters
from memnet_fast.plan import Gate, Recipe, ResidualBlock, State, lower, outline

pytestmark = pytest.mark.skipif(cuda_twin.why_not() is not None, reason=cuda_twin.why_not() or "")
CPU = torch.device("cpu")
SMALL = mf.MemNetConfig(channels=16, num_memory_blocks=1, num_recursions=1)


@pytest.fixture
def twin(twin_build, monkeypatch):
    cuda_twin.install(twin_build, monkeypatch)
    return twin_build


def _run(packed, plan, x):
    n, _, h, w = x.shape
    workspace = torch.full((packed.workspace_bytes(n, h, w),), 0xFF, dtype=torch.uint8)
    out = torch.full((n, plan.config.out_channels, h, w), float("nan"))
    packed.run(x, out, workspace)
    return out, workspace


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "capability"), [("fp16", 90), ("bf16", 90), ("fp16", 80), ("bf16", 80)])
@pytest.mark.parametrize("name", ["official", "no_bias", "gray_to_colour", "unshared", "last_output", "lornatang"])
def test_networks_agree_with_the_policy_matched_reference(twin, name, precision, capability):
    """Against float64: no larger an error than the reference of the same rounding has, by the rule of the parity suite."""
    config = dataclasses.replace(networks.VARIANTS[name], num_memory_blocks=min(2, networks.VARIANTS[name].num_memory_blocks))
    net = networks.build(config)
    plan = lower(net)
    x = networks.image(2, config.in_channels, 7, 9)
    packed = dataclasses.replace(cuda.pack(plan, CPU, precision, "direct"), capability=capability)
    out, _ = _run(packed, plan, x)
    same_rounding, _ = _run(reference.pack(plan, CPU, precision), plan, x)
    assert out.shape == same_rounding.shape and bool(out.isfinite().all())
    rounded = {
        k: reference.round_operand(v.float(), precision).double() if v.ndim > 2 and "first" not in k and "recon" not in k else v
        for k, v in plan.weights.items()
    }
    exact = reference.pack(dataclasses.replace(plan, weights=rounded), CPU, "fp64")
    oracle = torch.empty(out.shape, dtype=torch.float64)
    exact.run(x.double(), oracle, torch.empty(exact.workspace_bytes(2, 7, 9), dtype=torch.uint8))
    error, allowed = (out - oracle).square().mean().sqrt(), (same_rounding - oracle).square().mean().sqrt()
    assert float(error) <= 1.25 * float(allowed) + 1e-7


def test_fp8_looks_at_weights_that_come_later(twin, monkeypatch):
    """They are read only where they lie elsewhere or autograd saw them change; under capture that cannot be done."""
    errors = []
    monkeypatch.setattr(fp8_gate, "fp8_loss", lambda plan: errors.append(float(plan.weights["first.shift"].sum())) or wrong)
    wrong = 0.04
    fast = mf.fuse(networks.build(SMALL), backend="cuda", precision="fp8")
    x = networks.image(1, 1, 5, 6)
    expected = fast(x)
    assert len(errors) == 1, "the call knows the answer of fuse"
    wrong = 0.06
    assert torch.equal(fast(x), expected) and len(errors) == 1
    other = networks.build(SMALL, seed=5).state_dict()
    fast.reference.load_state_dict(other)
    with monkeypatch.context() as m:
        m.setattr(engine, "capturing", lambda device: True)
        with pytest.raises(mf.InputError, match="call the network once before the capture"):
            fast(x)
    for _ in range(2):
        with pytest.raises(mf.BackendUnavailable, match=r"fp8 loses 0\.06 dB .*running statistics"):
            fast(x)
    wrong = float("nan")
    with pytest.raises(mf.BackendUnavailable, match="not finite"):
        fast(x)
    wrong = 0.05
    assert not torch.equal(fast(x), expected)
    assert torch.equal(fast(x), fast(x)) and len(errors) == 5 and len(set(errors)) == 2


@pytest.mark.parametrize("name", ["official", "no_bias", "unshared", "chain"])
def test_fp8_networks_agree_with_the_reference(twin, name):
    """The same e4m3 operands up to what the order of a float32 sum can change: those few move to a neighbour, a 16th away."""
    net = networks.build(networks.VARIANTS[name])
    plan = lower(net)
    x = networks.image(2, net.config.in_channels, 7, 9)
    out, _ = _run(cuda.pack(plan, CPU, "fp8", "direct"), plan, x)
    expected, _ = _run(reference.pack(plan, CPU, "fp8"), plan, x)
    fp16, _ = _run(reference.pack(plan, CPU, "fp16"), plan, x)
    distance, error_of_fp8 = (out - expected).square().mean().sqrt(), (fp16 - expected).square().mean().sqrt()
    assert bool(out.isfinite().all()) and float(distance) <= 0.25 * float(error_of_fp8)


@pytest.mark.parametrize("live", [False, True])
def test_fp8_weights_are_those_of_the_reference(twin, live):
    """Every array of every residual block, byte by byte; also of output channels without weights and of equal taps."""
    net = networks.build(networks.VARIANTS["no_bias"])
    with torch.no_grad():
        conv = net.blocks[0].conv_b[0].weight
        conv[1] = 0
        conv[2, :, 1] = conv[2, :, 0]
        net.blocks[1].bn_a[1].weight.zero_()
        net.blocks[1].bn_a[1].bias.fill_(-1)
    plan, drawn = lower(net), outline(net.config)
    names, eps = engine.state_names(net.config), mf.plan.batch_norm_eps(net)
    if live:
        parameters = Parameters.of([net.state_dict()[n] for n in names])
        bound = cuda.live(net.config, eps, names, CPU, "fp8", "direct").bind(parameters)
        tables = cuda_tables.build(drawn.ops, drawn.recipes, names, eps, "fp8", True, False)
    else:
        recipes = {k: Recipe(tuple(v.shape), (State(k),)) for k, v in plan.weights.items()}
        bound = cuda.pack(plan, CPU, "fp8", "direct")
        tables = cuda_tables.build(plan.ops, recipes, list(recipes), {}, "fp8", True, False)
    _, memory = _run(bound, plan, networks.image(1, 1, 2, 2))
    packed = memory[-(-plan.num_slots * 4 * 64 * 2 // 256) * 256 :].numpy()
    c = net.config.channels
    for op, record in zip(plan.ops, tables.ops, strict=True):
        if not isinstance(op, ResidualBlock):
            continue
        block = reference.fp8_block(plan, op)
        for key in ("scale", "shift", "gain_a", "bias_a", "gain_b", "bias_b"):
            got = packed[int(record[key]) :][: 64 * 4].view(np.float32)
            np.testing.assert_array_equal(got[:c], getattr(block, key).numpy(), err_msg=f"{key} of {op}")
            assert not got[c:].any()
        for key, layout in (("weight_a", wgmma.conv3x3_fp8_a()), ("weight_b", wgmma.conv3x3_fp8_b())):
            full = torch.zeros(64, 64, 3, 3)
            full[:c, :c] = getattr(block, key)
            expected = full.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(-1)[layout.reshape(-1)]
            np.testing.assert_array_equal(packed[int(record[key]) :][:36864], expected, err_msg=f"{key} of {op}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_device_packs_what_the_tables_say(twin, dtype):
    """Byte by byte, whatever the parameters are; test_cuda_runtime.py holds the tables against the lowering."""
    net = networks.build(networks.VARIANTS["shared_head_bn"]).to(dtype)
    names, eps, drawn = engine.state_names(net.config), mf.plan.batch_norm_eps(net), outline(net.config)
    state = [net.state_dict()[n] for n in names]
    bound = cuda.live(net.config, eps, names, CPU, "fp16", "direct").bind(Parameters.of(state))
    x = networks.image(1, net.config.in_channels, 3, 5)
    out, memory = _run(bound, drawn, x)
    tables = cuda_tables.build(drawn.ops, drawn.recipes, names, eps, "fp16", True, False)
    at = -(-drawn.num_slots * 3 * 5 * 64 * 2 // 256) * 256
    np.testing.assert_array_equal(memory[at : at + tables.packed_bytes].numpy(), executed(tables, state))
    of_plan, _ = _run(cuda.pack(lower(net), CPU, "fp16", "direct"), drawn, x)
    assert torch.equal(out, of_plan), "a plan with its weights runs as the network with its parameters does"


# Calls ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast(twin):
    fused = mf.fuse(networks.build(SMALL), backend="cuda", precision="fp16")
    engine.engine(fused._spec).replays.limit = 0
    return fused


def _replays(fused):
    return engine.engine(fused._spec).replays


def _fresh(fused, x):
    """What a network made just now from the same parameters computes."""
    other = mf.fuse(copy.deepcopy(fused.reference), backend="cuda", precision="fp16")
    _replays(other).limit = 0
    return other(x)


def test_one_call_launches_everything_where_it_should(twin, fast):
    x = networks.image(1, 1, 5, 6)
    first = fast(x)
    twin.runtime.runtime_forget()
    assert torch.equal(fast(x), first)
    operations = 4
    assert twin.runtime.runtime_launches() == operations + 2, "fold, pack and one kernel for each operation"
    assert twin.runtime.runtime_uploads() == 0, "the tables are uploaded once"
    assert twin.runtime.runtime_all_on(0, cuda_twin.STREAM) and not twin.runtime.runtime_all_on(1, cuda_twin.STREAM)
    assert (fast.backend, fast.precision) == ("cuda", "fp16")


def test_the_device_of_the_call_is_used(twin, fast):
    plan = lower(fast.reference)
    bound = dataclasses.replace(cuda.pack(plan, CPU, "fp16", "direct")._bound, device=torch.device("cpu", 1))
    x = networks.image(1, 1, 4, 4)
    twin.runtime.runtime_forget()
    out, _ = _run(bound, plan, x)
    assert twin.runtime.runtime_all_on(1, cuda_twin.STREAM)
    assert torch.equal(out, fast(x))


def test_inputs_of_every_kind(fast):
    x = networks.image(2, 1, 6, 7).half()
    expected = fast(x.float())
    assert torch.equal(fast(x), expected.half()) and torch.equal(fast(x.bfloat16()), fast(x.bfloat16().float()).bfloat16())
    for same in (
        x.float().transpose(2, 3).contiguous().transpose(2, 3),
        torch._neg_view(-x.float()),
        x.float()[:1].expand(2, 1, 6, 7),
    ):
        assert torch.equal(fast(same), fast(same.contiguous().clone()))
    assert fast(x[:0]).shape == (0, 1, 6, 7)


def test_a_batch_is_computed_in_passes(fast, monkeypatch):
    x = networks.image(5, 1, 6, 7)
    whole, needed = fast(x), fast.workspace_bytes(5, 6, 7)
    monkeypatch.setattr(cuda, "PIXELS_PER_PASS", 100)
    assert engine.images_per_pass(5, 6, 7, "cuda") == 2 and fast.workspace_bytes(5, 6, 7) < needed
    assert torch.equal(fast(x), whole)


@pytest.mark.parametrize("change", ["data", "load", "half", "channels_last", "statistics", "replaced"])
def test_changed_weights_are_used(fast, change):
    x, net = networks.image(1, 1, 5, 6), fast.reference
    before = fast(x)
    with torch.no_grad():
        match change:
            case "data":
                net.blocks[0].conv_a[0].weight.data.mul_(1.5)
            case "load":
                fast.load_state_dict({k: v * 1.25 for k, v in fast.state_dict().items()})
            case "half":
                fast.half()
            case "channels_last":
                fast.to(memory_format=torch.channels_last)
                assert not net.blocks[0].conv_a[0].weight.is_contiguous()
            case "statistics":
                net.blocks[0].gate.bn.running_var.mul_(3)
            case "replaced":
                net.head_weights = torch.nn.Parameter(net.head_weights * 2)
    after = fast(x)
    assert torch.equal(after, before) == (change == "channels_last")
    assert torch.equal(after, _fresh(fast, x))


def test_short_memory_at_any_launch(twin, fast):
    x = networks.image(1, 1, 5, 6)
    expected = fast(x)
    for k, where in enumerate(
        ("folding", "packing", "op 0 (first_conv)", "op 1 (residual_block)", "op 2 (gate)", "op 3 (reconstruct)")
    ):
        with twin.failing_after(k), pytest.raises(mf.errors.DeviceOOM) as caught:
            fast(x)
        assert where in str(caught.value) and "\n" not in str(caught.value)
        assert not engine.engine(fast._spec)._free, "a kept workspace would be missing where memory is short"
        assert torch.equal(fast(x), expected)


def test_arguments_are_checked(fast):
    plan = lower(fast.reference)
    packed = cuda.pack(plan, CPU, "fp16", "direct")
    x, out = networks.image(1, 1, 4, 4), torch.empty(1, 1, 4, 4)
    workspace = torch.empty(packed.workspace_bytes(1, 4, 4), dtype=torch.uint8)
    with pytest.raises(ValueError, match="bytes are needed|are needed"):
        packed.run(x, out, workspace[:-64])
    with pytest.raises(ValueError, match="not aligned to 64"):
        packed.run(x, out, torch.empty(len(workspace) + 64, dtype=torch.uint8)[4:])
    with pytest.raises(ValueError, match=r"2\^40"):
        packed.workspace_bytes(1 << 20, 1 << 20, 2)
    wrong = dataclasses.replace(packed._bound.parameters, addresses=np.zeros_like(packed._bound.parameters.addresses))
    with pytest.raises(ValueError, match="parameter 0 has no address"):
        dataclasses.replace(packed._bound, parameters=wrong).run(x, out, workspace)
    short = dataclasses.replace(wrong, addresses=wrong.addresses[:-1])
    with pytest.raises(ValueError, match="one address and one type for each parameter"):
        dataclasses.replace(packed._bound, parameters=short).run(x, out, workspace)


def test_a_plan_without_an_image(twin, fast):
    """As the tests of single kernels on a GPU run them."""
    plan = lower(fast.reference)
    gate = next(op for op in plan.ops if isinstance(op, Gate))
    alone = dataclasses.replace(plan, ops=(gate,), num_slots=gate.dst + 1)
    packed = cuda.pack(alone, CPU, "fp16", "direct")
    workspace = torch.zeros(packed.workspace_bytes(1, 3, 3), dtype=torch.uint8)
    slots = workspace[: alone.num_slots * 9 * 64 * 2].view(torch.float16).view(alone.num_slots, 9, 64)
    slots[:2, :, :16] = torch.randn(2, 9, 16, generator=networks.generator(1)).half()
    x = torch.full((1, 1, 3, 3), 7.0)
    out = x.clone()
    packed.run(x, out, workspace)
    w = plan.weights
    values = [torch.relu(slots[j, :, :16].float() * w[gate.scale][j] + w[gate.shift][j]).half().double() for j in gate.srcs]
    expected = w[gate.bias] + sum(v @ w[gate.weight][:, j].half().double().T for j, v in enumerate(values))
    torch.testing.assert_close(slots[gate.dst, :, :16].double(), expected, rtol=2e-3, atol=2e-3)
    assert bool((slots[gate.dst, :, 16:] == 0).all()) and torch.equal(out, x)


def test_eight_threads(fast):
    inputs = [networks.image(1, 1, 3 + i % 3, 4, seed=i) for i in range(8)]
    expected, got = [fast(x) for x in inputs], [None] * 8

    def work(i):
        got[i] = [fast(inputs[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, e) for ys, e in zip(got, expected, strict=True) for y in ys)


def test_compile_export_and_opcheck(fast):
    x = networks.image(1, 1, 5, 6)
    expected = fast(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(fast, (x,)).module()(x), expected)
    torch.library.opcheck(torch.ops.memnet_fast.forward.default, (x, fast._state(), fast._spec))


# Graphs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def replaying(twin, fast):
    _replays(fast).limit = 64
    return fast


def test_a_network_that_moves_leaves_no_graph_and_no_parameters_behind(twin, replaying):
    x = networks.image(1, 1, 5, 6)
    for _ in range(3):
        replaying(x)
    runner = engine.engine(replaying._spec)
    replaying(networks.image(1, 1, 9, 9))
    held = [*runner._free.values(), *runner.replays._workspaces.values(), runner._live[CPU][1]._last.parameters]
    assert len(held) == 3 and runner.replays._entries
    held = [weakref.ref(kept) for kept in held]
    replaying.to("meta")
    gc.collect()
    assert [ref() for ref in held] == [None] * 3 and not runner.replays._entries and not runner._live


def test_the_second_call_is_captured_and_all_later_ones_replay(twin, replaying):
    replays = _replays(replaying)
    inputs = [networks.image(1, 1, 5, 6, seed=i) for i in range(4)]
    results = [replaying(x) for x in inputs]
    assert (replays.captures, replays.replays) == (1, 3)
    kept = [r.clone() for r in results]
    results[1].fill_(7)
    assert torch.equal(results[2], kept[2]) and torch.equal(results[3], kept[3]), "results are nobody else's memory"
    replays.limit = 0
    assert all(torch.equal(replaying(x), r) for x, r in zip(inputs, kept, strict=True))
    assert replays.replays == 3


def test_other_dtypes_and_strides_share_a_graph(replaying):
    x = networks.image(1, 1, 6, 6).half()
    expected = _fresh(replaying, x)
    for same in (x, x, x.float(), torch._neg_view(-x), x.transpose(2, 3).contiguous().transpose(2, 3)):
        y = replaying(same)
        assert y.dtype == same.dtype and torch.equal(y.half(), expected)
    assert _replays(replaying).captures == 1 and _replays(replaying).replays == 4


def test_large_images_and_captures_of_the_caller_are_left_alone(replaying, monkeypatch):
    replays, large, small = _replays(replaying), networks.image(1, 1, 9, 8), networks.image(1, 1, 4, 4)
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device: True)
    for x in (large, large, small, small):
        assert torch.equal(replaying(x), _fresh(replaying, x))
    monkeypatch.undo()
    assert replays.captures == 0


def test_a_graph_reads_the_weights_of_the_moment(replaying):
    replays, x = _replays(replaying), networks.image(1, 1, 5, 6)
    before = [replaying(x), replaying(x)][1]
    replaying.reference.blocks[0].conv_b[0].weight.data.mul_(1.5)
    after = replaying(x)
    assert (replays.captures, replays.replays) == (1, 2)
    assert not torch.equal(after, before) and torch.equal(after, _fresh(replaying, x))


def test_moved_parameters_are_captured_again(replaying):
    replays, x = _replays(replaying), networks.image(1, 1, 5, 6)
    before = [replaying(x), replaying(x)][1]
    replaying.reference.head_weights = torch.nn.Parameter(replaying.reference.head_weights * 2)
    results = [replaying(x) for _ in range(3)]
    assert replays.captures == 2
    assert all(torch.equal(y, _fresh(replaying, x)) for y in results) and not torch.equal(results[0], before)


def test_copies_of_parameters_are_never_captured(replaying):
    replaying.to(memory_format=torch.channels_last)
    x = networks.image(1, 1, 5, 6)
    results = [replaying(x) for _ in range(3)]
    assert _replays(replaying).captures == 0 and torch.equal(results[2], _fresh(replaying, x))


def test_graphs_are_few_and_can_be_given_back(replaying):
    replays = _replays(replaying)
    images = [networks.image(1, 1, 3, w) for w in range(1, cuda_graphs.CAPACITY + 4)]
    expected = [_fresh(replaying, x) for x in images]
    for _ in range(2):
        for x in images:
            replaying(x)
    assert len(replays._entries) == cuda_graphs.CAPACITY and replays.captures == len(images)
    assert all(torch.equal(replaying(x), y) for x, y in zip(images, expected, strict=True))
    replaying.release_workspace()
    assert not replays._entries and not replays._workspaces
    assert torch.equal(replaying(images[0]), expected[0])


def test_short_memory_for_a_graph(twin, replaying):
    """The call is computed without one, and says so only if that fails too."""
    x = networks.image(1, 1, 5, 6)
    expected = replaying(x)
    with twin.failing_after(3):  # within the capture
        assert torch.equal(replaying(x), expected)
    assert not _replays(replaying)._entries
    with twin.failing_after(0), pytest.raises(mf.errors.DeviceOOM):
        replaying(x)
    assert torch.equal(replaying(x), expected)


def test_a_broken_capture_costs_the_graph_and_says_so(twin, replaying, monkeypatch, caplog):
    """Another thread may synchronise the device meanwhile. Any other error is one of ours, and comes out."""
    x = networks.image(1, 1, 5, 6)
    expected = _fresh(replaying, x)

    def broken(error):
        def capture(*args):
            raise error

        monkeypatch.setattr(cuda.Bound, "capture", capture)
        return [replaying(x) for _ in range(2)]

    with caplog.at_level("WARNING", "memnet_fast"):
        results = broken(twin.module.CudaError("operation not permitted"))
    assert all(torch.equal(y, expected) for y in results) and _replays(replaying).captures == 0
    assert "not replayed as a graph: operation not permitted" in caplog.text
    with pytest.raises(RuntimeError, match="a fault of the package"):
        broken(RuntimeError("a fault of the package"))


def test_tables_are_given_back(twin, fast):
    before = twin.runtime.runtime_allocated()
    packed = cuda.pack(lower(fast.reference), CPU, "fp16", "direct")
    _run(packed, packed.plan, networks.image(1, 1, 3, 3))
    assert twin.runtime.runtime_allocated() == before + 1
    del packed
    assert twin.runtime.runtime_allocated() == before

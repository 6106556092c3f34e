"""What may change about a fused network between two calls is noticed at the next one, though nothing is walked."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from support import checks, networks
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import memnet_fast as mf
from memnet_fast import engine, native
from memnet_fast.config import MemNetConfig
from memnet_fast.parameters import Followed, Parameters, Values
from memnet_fast.plan import batch_norm_eps
from memnet_fast.watch import Watch

CONFIG = MemNetConfig(channels=8, num_memory_blocks=2, num_recursions=2)


@pytest.fixture
def net():
    return networks.build(CONFIG)


@pytest.fixture
def x():
    return networks.image(2, 1, 7, 6)


def _first(net):
    return net.blocks[0].conv_a[0]


# Changes that give other results -------------------------------------------------------------------------------------


def _values_in_place(net):
    _first(net).weight.data.mul_(1.5)


def _one_bit_of_the_last_tensor(net):
    net.head_weights.data.view(torch.int32)[-1] += 1 << 20


def _statistic(net):
    net.recon_bn[1].running_mean.add_(0.5)


def _data(net):
    _first(net).weight.data = _first(net).weight.data * 1.5


def _data_at_the_same_address(net):
    weight = _first(net).weight
    before = weight.data_ptr()
    weight.data = weight.data.transpose(2, 3)
    assert weight.data_ptr() == before


def _layout_in_place(net):
    with torch.no_grad():
        _first(net).weight.transpose_(2, 3)


def _sign_bit_of_a_view(net):
    weight = _first(net).weight
    weight.data = torch._neg_view(weight.data)


def _bits_taken_for_another_dtype(net):
    bias = net.half().recon.bias
    bias.data = bias.data.view(torch.bfloat16)


def _swapped_tensors(net):
    torch.utils.swap_tensors(net.blocks[0].conv_a[0].weight, net.blocks[1].conv_a[0].weight)


def _parameter(net):
    net.recon.weight = nn.Parameter(net.recon.weight.detach() * 0.5)


def _exchanged_parameters(net):
    a, b = net.blocks[0].bn_a
    a.weight, b.weight = b.weight, a.weight


def _buffer(net):
    net.first.bn.running_var = net.first.bn.running_var * 3


def _dictionary(net):
    conv = _first(net)
    conv._parameters = {name: nn.Parameter(p.detach() * 1.5) for name, p in conv._parameters.items()}


def _module(net):
    net.blocks[1].conv_b[0] = nn.Conv2d(8, 8, 3, padding=1)


def _exchanged_modules(net):
    block = net.blocks[0]
    block.conv_a, block.conv_b = block.conv_b, block.conv_a


def _one_module_in_two_places(net):
    net.blocks[1].bn_a[1] = net.blocks[1].bn_a[0]


def _eps(net):
    net.blocks[0].bn_a[0].eps = 0.5


def _module_with_another_eps(net):
    old = net.blocks[1].bn_b[0]
    new = nn.BatchNorm2d(8, eps=0.5).eval()
    new.load_state_dict(old.state_dict())
    net.blocks[1].bn_b[0] = new


def _loaded(net):
    net.load_state_dict(networks.build(CONFIG, seed=9).state_dict())


def _loaded_by_assignment(net):
    net.load_state_dict(networks.build(CONFIG, seed=9).state_dict(), assign=True)


def _converted(net):
    net.to(torch.bfloat16).to(torch.float32)


CHANGES = [
    _values_in_place,
    _one_bit_of_the_last_tensor,
    _statistic,
    _data,
    _data_at_the_same_address,
    _layout_in_place,
    _sign_bit_of_a_view,
    _bits_taken_for_another_dtype,
    _swapped_tensors,
    _parameter,
    _exchanged_parameters,
    _buffer,
    _dictionary,
    _module,
    _exchanged_modules,
    _one_module_in_two_places,
    _eps,
    _module_with_another_eps,
    _loaded,
    _loaded_by_assignment,
    _converted,
]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_change_is_noticed(net, x, change, backend):
    fast = mf.fuse(net, backend=backend)
    fast(x)
    before = fast(x)
    change(net)
    net.eval()
    after = fast(x)
    assert not torch.equal(before, after)
    checks.equal(after, mf.fuse(copy.deepcopy(net), backend=backend)(x).double())
    assert torch.equal(fast(x), after)


def test_without_the_native_module(net, x, monkeypatch):
    monkeypatch.setattr(native, "why_missing", lambda: "not built")
    fast = mf.fuse(net, backend="torch")
    before = fast(x)
    packed = engine.engine(fast._spec)._packed
    assert torch.equal(fast(x), before) and engine.engine(fast._spec)._packed is packed
    _one_bit_of_the_last_tensor(net)
    assert not torch.equal(fast(x), before)


def test_other_parameters_for_one_call(net, x):
    """functional_call puts tensors into the modules and takes them out again."""
    fast = mf.fuse(net)
    own = fast(x)
    other = networks.build(CONFIG, seed=9)
    state = {f"reference.{name}": tensor for name, tensor in other.state_dict().items()}
    assert torch.equal(torch.func.functional_call(fast, state, (x,)), mf.fuse(other)(x))
    assert torch.equal(fast(x), own)


def test_another_network_of_another_configuration(net, x):
    fast = mf.fuse(net)
    fast(x)
    spec = fast._spec
    other = networks.build(MemNetConfig(channels=16, num_memory_blocks=1, num_recursions=1))
    fast.reference = other
    assert torch.equal(fast(x), mf.fuse(other)(x))
    assert spec not in engine._engines, "the old engine goes"


# Changes that cannot be computed -------------------------------------------------------------------------------------


def _stride(net):
    net.blocks[0].conv_a[0] = nn.Conv2d(8, 8, 3, stride=2, padding=1)


def _hook(net):
    net.blocks[1].register_forward_hook(lambda *args: None)


def _hook_in_a_new_dictionary(net):
    net.recon._forward_hooks = {}
    net.recon.register_forward_pre_hook(lambda *args: None)


def _backward_hook(net):
    net.recon.register_full_backward_hook(lambda *args: None)


def _weight_norm(net):
    parametrizations.weight_norm(_first(net))


def _pruned(net):
    prune.random_unstructured(_first(net), "weight", 0.5)


def _no_bias(net):
    net.recon.bias = None


def _no_head_weights(net):
    del net.head_weights


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_stride, r"blocks\.0\.conv_a\.0: not the module"),
        (_hook, r"blocks\.1 has hooks"),
        (_hook_in_a_new_dictionary, "recon has hooks"),
        (_backward_hook, "recon has hooks"),
        (_weight_norm, r"blocks\.0\.conv_a\.0 is parametrised"),
        (_pruned, r"blocks\.0\.conv_a\.0 has hooks"),
        (_no_bias, r"the network has lost recon\.bias"),
        (_no_head_weights, "the network has lost head_weights"),
    ],
)
def test_a_change_that_fusing_would_ignore_is_refused(net, x, change, said):
    fast = mf.fuse(net)
    fast(x)
    change(net)
    net.eval()
    for _ in range(2):
        with pytest.raises(mf.InputError, match=said):
            fast(x)


def test_a_hook_that_goes_again(net, x):
    fast = mf.fuse(net)
    y = fast(x)
    handle = net.recon.register_forward_hook(lambda *args: None)
    with pytest.raises(mf.InputError, match="hooks"):
        fast(x)
    handle.remove()
    assert torch.equal(fast(x), y)


@pytest.mark.parametrize("path", ["", "blocks", "blocks.1", "blocks.1.bn_a", "blocks.1.bn_a.1", "recon", "recon_bn.0"])
def test_training_mode_of_any_layer(net, x, path):
    fast = mf.fuse(net.requires_grad_(True))
    y = fast(x)
    net.get_submodule(path).training = True
    expected = copy.deepcopy(net)(x)
    assert torch.equal(fast(x), expected) and expected.requires_grad
    net.eval()
    assert not fast(x).requires_grad
    fast.training = True
    assert fast(x).requires_grad
    fast.training = False
    if path in ("", "blocks", "blocks.1", "blocks.1.bn_a", "recon"):  # no running statistic has moved
        assert torch.equal(fast(x), y)


# Other threads -------------------------------------------------------------------------------------------------------


def test_a_change_while_weights_are_packed_that_is_taken_back(net, x, monkeypatch):
    """As another thread makes it that measures with averaged weights: what is packed is what was compared."""
    expected = mf.fuse(net, backend="torch")(x)
    lower_state, weight = engine.lower_state, _first(net).weight

    def disturbed(*args):
        weight.data.mul_(2)
        plan = lower_state(*args)
        weight.data.mul_(0.5)
        return plan

    fast = mf.fuse(net, backend="torch")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "lower_state", disturbed)
        assert torch.equal(fast(x), expected)
    assert torch.equal(fast(x), expected)


def test_memory_that_is_exchanged_meanwhile_and_given_back(net, monkeypatch):
    tensors = [p for p in net.parameters()]
    own, other = tensors[0].data, tensors[0].data + 1
    original = Parameters.of

    def exchanged(given):
        tensors[0].data = other
        known = original(given)
        tensors[0].data = own
        return known

    followed = Followed()
    with monkeypatch.context() as patch:
        patch.setattr(Parameters, "of", exchanged)
        followed.of(tensors)
    assert torch.equal(followed.of(tensors).tensors[0], own)


def test_a_call_while_parameters_are_replaced_sees_none_of_them_or_all(net, x, monkeypatch):
    """load_state_dict(assign=True) puts one tensor after the other into the modules."""
    fast, new = mf.fuse(net, backend="torch"), networks.build(CONFIG, seed=9)
    old, expected = fast(x), mf.fuse(new, backend="torch")(x)
    half, go_on, last = threading.Event(), threading.Event(), net.recon
    load = last._load_from_state_dict

    def paused(*args):
        half.set()
        go_on.wait(30)
        load(*args)

    monkeypatch.setattr(last, "_load_from_state_dict", paused)
    results = []
    state = {f"reference.{name}": tensor for name, tensor in new.state_dict().items()}
    threads = [threading.Thread(target=lambda: fast.load_state_dict(state, assign=True))]
    threads[0].start()
    assert half.wait(30)
    threads.append(threading.Thread(target=lambda: results.append(fast(x))))
    threads[1].start()
    threads[1].join(0.3)  # it cannot end, and without the lock has looked at half of the new ones
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert torch.equal(results[0], expected) or torch.equal(results[0], old)
    assert torch.equal(fast(x), expected)


def test_a_network_that_is_collected_while_an_engine_is_made(net, x, monkeypatch):
    """In a thread of its own, which may be lost."""
    lost = mf.fuse(copy.deepcopy(net), backend="torch")
    lost(x)
    spec, lost.itself = lost._spec, [lost]
    fast = mf.fuse(net, backend="torch")

    class Collecting(engine.Engine):
        def __init__(self, spec):
            gc.collect()
            super().__init__(spec)

    results = []
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Engine", Collecting)
        patch.setattr(engine, "_engines_lock", type(engine._engines_lock)())
        del lost
        thread = threading.Thread(target=lambda: results.append(fast(x)), daemon=True)
        thread.start()
        thread.join(60)
    assert len(results) == 1 and spec not in engine._engines


def test_the_workspace_is_that_of_the_network_as_it_is_now(net):
    fast = mf.fuse(net)
    fast.workspace_bytes(1, 7, 6)
    wider = networks.build(MemNetConfig(channels=40, num_memory_blocks=3, num_recursions=2))
    expected = mf.fuse(wider).workspace_bytes(1, 7, 6)
    assert fast.workspace_bytes(1, 7, 6) < expected
    fast.reference = wider
    assert fast.workspace_bytes(1, 7, 6) == expected
    wider.recon = nn.Conv2d(40, 1, 3, padding=1, stride=2)
    with pytest.raises(mf.InputError):
        fast.workspace_bytes(1, 7, 6)


def test_memory_that_the_network_has_left_is_free(net, x):
    fast = mf.fuse(net, backend="torch")
    fast(x)
    address = _first(net).weight.data_ptr()
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    fast(x)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Parameters and address in o.addresses.tolist()]


def _held(runner):
    """Weak references to the memory that an engine keeps for later calls."""
    weights = [t for t in vars(runner._packed[1])["weights"].values()]
    return [weakref.ref(t) for t in (*runner._free.values(), runner._seen._bytes, *weights)]


@pytest.mark.parametrize(
    "move", [lambda fast: fast.to("meta"), lambda fast: nn.Sequential(fast).to("meta")], ids=["it", "around"]
)
def test_a_network_that_moves_leaves_nothing_behind(net, x, move):
    fast = mf.fuse(net, backend="torch")
    fast(x)
    held, statistic = _held(engine.engine(fast._spec)), weakref.ref(net.first.bn.running_mean)
    assert len(held) > 10 and all(ref() is not None for ref in held)
    fast.double().float()
    assert engine.engine(fast._spec)._free, "it has not moved"
    statistic = weakref.ref(net.first.bn.running_mean)
    fast(x)
    held += _held(engine.engine(fast._spec))
    move(fast)
    gc.collect()
    assert statistic() is None and not [ref for ref in held if ref() is not None]


def test_a_network_whose_reference_moved_leaves_nothing_behind(net, x):
    """Nobody tells the fused one; its next call finds out."""
    fast = mf.fuse(net, backend="torch")
    expected = fast(x)
    runner, elsewhere = engine.engine(fast._spec), torch.device("cuda", 0)
    held = _held(runner)
    # As if that call had been on a GPU.
    runner._device = elsewhere
    runner._free = {(elsewhere, 7): runner._free.popitem()[1]}
    runner._live = {elsewhere: runner._live.popitem()[1]}
    runner.replays._workspaces[elsewhere, 7] = torch.zeros(5)
    assert torch.equal(fast(x), expected)
    assert (
        list(runner._live) == [x.device] and [key[0] for key in runner._free] == [x.device] and not runner.replays._workspaces
    )
    gc.collect()
    assert not [ref for ref in held if ref() is not None]


def test_a_call_that_the_network_leaves_keeps_no_workspace(net, x, monkeypatch):
    fast = mf.fuse(net, backend="torch")
    fast(x)
    runner = engine.engine(fast._spec)
    kind = type(runner._packed[1])
    run = kind.run
    monkeypatch.setattr(kind, "run", lambda *given: (run(*given), fast.to("meta"))[0])
    fast(x)
    assert not runner._free and runner._packed is None


# Who looks at operators ----------------------------------------------------------------------------------------------


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_whoever_looks_at_operators_sees_one(net, x):
    fast = mf.fuse(net)
    y = fast(x)
    with _Seen() as seen:
        assert torch.equal(fast(x), y)
    assert "memnet_fast::forward" in seen.names
    with torch.profiler.profile() as profile:
        assert torch.equal(fast(x), y)
    assert "memnet_fast::forward" in {event.key for event in profile.key_averages()}


# The parts -----------------------------------------------------------------------------------------------------------


def test_nothing_new_as_long_as_nothing_changes(net):
    names = engine.state_names(CONFIG)
    watch, followed = Watch(net, names), Followed()
    state = watch.state()
    assert [t is net.state_dict(keep_vars=True)[n] for n, t in zip(names, state, strict=True)] == [True] * len(names)
    assert watch.state() is state and watch.eps == batch_norm_eps(net) and not watch.disturbed()
    known = followed.of(state)
    assert followed.of(state) is known and followed.of([t.detach() for t in state]) is known
    assert not any(t.requires_grad for t in known.tensors)
    assert Values(known).are_in(known) and Values(known).are_in(Parameters.of(state))


def test_freed_memory_is_not_taken_for_the_old(net):
    """The allocator likes to give the same address again: the tensors seen last are kept, so that it cannot."""
    followed = Followed()
    parameter = nn.Parameter(torch.randn(1 << 16))
    known = followed.of([parameter])
    for _ in range(20):
        parameter.data = torch.empty(0)
        parameter.data = torch.randn(1 << 15).double()
        assert followed.of([parameter]) is not known
        known = followed.of([parameter])
        assert known.dtypes == (torch.float64,) and int(known.sizes[0]) == parameter.nbytes


def test_copies_of_what_is_not_contiguous_are_not_kept():
    followed = Followed()
    odd = torch.randn(4, 4, 3, 3).to(memory_format=torch.channels_last)
    first = followed.of([odd])
    assert followed.of([odd]) is not first and not first.in_place
    values = Values(first)
    assert values.are_in(followed.of([odd]))
    odd[1, 2, 0, 1] += 1
    assert not values.are_in(followed.of([odd]))


def test_values_are_kept_as_tensors():
    tensors = [torch.arange(3, dtype=torch.float16), torch.randn(2, 3), torch.randn(4, 1).double().mT]
    kept = Values(Parameters.of(tensors)).tensors()
    for value, tensor in zip(kept, tensors, strict=True):
        assert torch.equal(value, tensor) and value.dtype == tensor.dtype and value.data_ptr() != tensor.data_ptr()


def test_values_of_another_size_or_dtype():
    tensor = torch.zeros(6)
    values = Values(Parameters.of([tensor]))
    assert not values.are_in(Parameters.of([torch.zeros(7)]))
    assert not values.are_in(Parameters.of([tensor.view(torch.int32)]))
    assert not values.are_in(Parameters.of([tensor[:3], tensor[3:]]))
    assert not values.are_in(Parameters.of([-tensor])), "-0.0 has other bits"
    assert not values.are_in(Parameters.of([torch.zeros(6, device="meta")]))


@pytest.mark.skipif(native.why_missing() is not None, reason=f"no native module: {native.why_missing()}")
def test_same_bytes_checks_its_arguments():
    data = np.arange(10, dtype=np.uint8)
    at, size = np.array([data.ctypes.data, data.ctypes.data + 4], np.uint64), np.array([4, 6], np.int64)
    same = native.module().same_bytes
    assert same(at, size, data.copy())
    for i in range(10):
        other = data.copy()
        other[i] ^= 1
        assert not same(at, size, other)
    empty = np.zeros(0, np.int64)
    assert same(empty.astype(np.uint64), empty, empty.astype(np.uint8))
    for sizes in ([4, 5], [4, 7], [-1, 11], [10], [2**62, 2**62]):
        with pytest.raises(ValueError, match="sizes"):
            same(at, np.array(sizes, np.int64), data.copy())
    with pytest.raises(TypeError):
        same(at.astype(np.int64), size, data)

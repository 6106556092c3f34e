"""Whole networks and trainings on the native training units (training.lean with native, recipes with kernels)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import network, recipe, recipe_file
from test_training_lean import CONFIGS
from torch import Tensor, nn

from memnet_fast import cli, native
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError
from memnet_fast.reference import MemNet
from memnet_fast.training import lean
from memnet_fast.training.recipe import differences, load_recipe

pytest.importorskip("lightning", reason="training needs the extra 'train'")

from support.stops import StopAt, new_run

from memnet_fast.training import run
from memnet_fast.training.results import load_result

CPU = run.Hardware("cpu")
needs_native = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
NETWORKS = {name: dataclasses.replace(config, channels=16) for name, config in CONFIGS.items()}
NETWORKS["48 channels"] = dataclasses.replace(CONFIGS["official"], channels=48, num_memory_blocks=2)
OFFICIAL = NETWORKS["official"]


def _net(config: MemNetConfig, train: bool = True, seed: int = 1) -> MemNet:
    return network(config, seed).train(train)


def _loss(heads: list[Tensor], net: MemNet) -> Tensor:
    """Weighs every output differently, the weights of the heads included."""
    weights = torch.ones(len(heads)) if net.head_weights is None else net.head_weights
    return sum(((w + k) * h.double().sin()).sum() for k, (w, h) in enumerate(zip(weights, heads, strict=True)))  # type: ignore


def _native(net: MemNet, x: Tensor) -> list[Tensor]:
    return lean.heads(net, x, native=True)


def _gradients(net: MemNet, x: Tensor, heads: Callable[[MemNet, Tensor], list[Tensor]] = _native) -> dict[str, Tensor]:
    """Of everything, and the outputs under numbers."""
    leaf = x.detach().requires_grad_()
    outputs = heads(net, leaf)
    _loss(outputs, net).backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {**grads, "x": leaf.grad, **{str(k): h.detach() for k, h in enumerate(outputs)}}  # type: ignore[dict-item]


def _all_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert torch.equal(t, expected[name]), name


def _nearest_to_zero(net: MemNet, x: Tensor) -> float:
    """Among all that any ReLU is given."""
    least = []
    net = copy.deepcopy(net)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(lambda module, inputs, out: least.append(float(out.abs().min())))
    with torch.no_grad():
        net.heads(x)
    return min(least)


def _prepared(config: MemNetConfig, size: tuple[int, ...], train: bool) -> tuple[MemNet, Tensor]:
    """A network and an input. Where rounding decides whether a ReLU lets a gradient through, there would be nothing to compare:
    the first seed without such a place."""
    for seed in range(60):
        net = _net(config, train, seed)
        x = torch.rand(size[0], config.in_channels, *size[1:])
        if _nearest_to_zero(copy.deepcopy(net).double(), x.double()) > 2e-5:
            return net, x
    raise AssertionError("some input of a ReLU is near zero with each of the seeds")


# RMS error of a gradient tensor over the RMS of the network's largest, of an output and of a statistic over its own RMS, the
# largest of all networks and sizes; measured -> limit.
LIMIT_OF_GRADIENTS = 5e-5  # 2.5e-5, with batch statistics of 8 values; 2.0e-5 elsewhere, where PyTorch's float32 has 4e-6
LIMIT_OF_OUTPUTS = 1.5e-5  # 7.3e-6
LIMIT_OF_STATISTICS = 9e-7  # 4.3e-7


def _rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


def _close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    # A bias before a batch normalisation has gradient 0 but for rounding.
    largest = max(_rms(t) for key, t in expected.items() if not key.isdigit())
    for key, t in expected.items():
        error = _rms(found[key].double() - t)
        if key.isdigit():
            assert error <= LIMIT_OF_OUTPUTS * _rms(t), (key, error / _rms(t))
        else:
            assert error <= LIMIT_OF_GRADIENTS * largest, (key, error / largest)


@needs_native
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [(2, 5, 7), (1, 16, 9), (3, 1, 13), (1, 1, 2)])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_those_of_float64(name: str, size: tuple[int, int, int], train: bool) -> None:
    if size == (1, 1, 2) and train:
        size = (4, 1, 2)  # two values for each channel are all statistics
    net, x = _prepared(NETWORKS[name], size, train)
    exact, before = copy.deepcopy(net).double(), copy.deepcopy(net)
    _close(_gradients(net, x), _gradients(exact, x.double(), MemNet.heads))
    for (key, a), b in zip(net.named_buffers(), exact.buffers(), strict=True):
        assert _rms(a.double() - b) <= LIMIT_OF_STATISTICS * _rms(b), (key, _rms(a.double() - b) / _rms(b))
    changed = [not torch.equal(a, b) for a, b in zip(net.buffers(), before.buffers(), strict=True)]
    assert all(changed) if train else not any(changed)


@needs_native
@pytest.mark.parametrize("train", [True, False])
def test_where_values_lie_does_not_matter(train: bool) -> None:
    """But for what PyTorch makes of the first convolution, which has other kernels for other layouts."""
    net, x = _prepared(NETWORKS["chain, 1x1 reconstruction, colour"], (2, 9, 7), train)
    expected = _gradients(copy.deepcopy(net), x)
    strided = torch.rand(2, 5, 9, 14)[:, 1:4, :, ::2]
    strided.copy_(x)
    for layout in (x.contiguous(memory_format=torch.channels_last), strided):
        assert not layout.is_contiguous()
        _close(_gradients(copy.deepcopy(net), layout), expected)
    _close(_gradients(copy.deepcopy(net).to(memory_format=torch.channels_last), x), expected)
    gaps = copy.deepcopy(net)
    for m in gaps.modules():
        for name, t in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)):
            if t.ndim:
                t.data = torch.stack([t.data, torch.full_like(t, 1e9)], -1)[..., 0]
                assert t.numel() == 1 or not t.is_contiguous(), name
    _close(_gradients(gaps, x), expected)


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_map_is_kept_once(layout: torch.memory_format) -> None:
    """Also what PyTorch makes of the first convolution, in whichever memory format."""
    net, x = _net(OFFICIAL).to(memory_format=layout), torch.rand(2, 1, 9, 7)  # type: ignore[call-overload]
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.shape == (2, 16, 9, 7):
            kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _native(net, x)
    maps = list(kept.values())
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in maps)
    assert not any(torch.equal(a, b) for i, a in enumerate(maps) for b in maps[:i])
    # The first convolution; of each block two for each recursion, and what its gate makes.
    config = net.config
    assert len(maps) == 1 + config.num_memory_blocks * (2 * config.num_recursions + 1)


@needs_native
def test_without_gradients_it_computes_the_same() -> None:
    net, x = _net(OFFICIAL), torch.rand(2, 1, 9, 7)
    other, expected = copy.deepcopy(net), _native(net, x)
    with torch.no_grad():
        found = _native(other, x)
    with torch.inference_mode():
        inferred = _native(copy.deepcopy(_net(OFFICIAL)), x)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, found, inferred, strict=True))
    assert expected[0].requires_grad and not found[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))


@needs_native
def test_autocast_changes_no_bit() -> None:
    net, x = _net(OFFICIAL), torch.rand(2, 1, 9, 7)
    expected = _gradients(copy.deepcopy(net), x)

    def under(net: MemNet, x: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = _native(net, x)
            assert torch.is_autocast_enabled("cpu")
        return outputs

    found = _gradients(copy.deepcopy(net), x, under)
    assert found["0"].dtype == torch.float32
    _all_equal(found, expected)
    narrow = x.bfloat16()
    assert torch.equal(under(copy.deepcopy(net), narrow)[0], _native(copy.deepcopy(net), narrow.float())[0])


@needs_native
def test_frozen_parameters_get_no_gradient_and_change_no_other() -> None:
    x = torch.rand(2, 1, 9, 7)
    expected = _gradients(_net(OFFICIAL), x)
    kinds: list[Callable[[str], bool]] = [
        lambda name: name.endswith("weight") and "conv" in name,
        lambda name: name.endswith("bias") and "conv" in name,
        lambda name: "bn" in name and name.endswith("weight"),
        lambda name: "blocks.0" in name,
    ]
    for frozen in kinds:
        net = _net(OFFICIAL)
        for name, p in net.named_parameters():
            p.requires_grad_(not frozen(name))
        assert any(not p.requires_grad for p in net.parameters())
        found = _gradients(net, x)
        _all_equal(found, {name: t for name, t in expected.items() if not frozen(name)})


@needs_native
def test_passes_do_not_disturb_one_another() -> None:
    """Each has a scratch of its own, whichever is asked for its gradients first."""
    sizes = [(2, 1, 9, 7), (1, 1, 16, 30), (3, 1, 4, 5)]
    xs = [torch.rand(*size) for size in sizes]
    alone = [_gradients(_net(OFFICIAL, False), x) for x in xs]
    net = _net(OFFICIAL, False)
    leaves = [x.clone().requires_grad_() for x in xs]
    losses = [_loss(_native(net, x), net) for x in leaves]
    for k in (1, 0, 2):
        net.zero_grad()
        losses[k].backward()
        found = {name: p.grad for name, p in net.named_parameters()}
        _all_equal(
            {**found, "x": leaves[k].grad},  # type: ignore[dict-item]
            {name: t for name, t in alone[k].items() if not name.isdigit()},
        )


@needs_native
def test_backward_twice_is_the_same_twice_and_not_a_derivative_of_a_derivative() -> None:
    net, x = _net(OFFICIAL), torch.rand(2, 1, 9, 7, requires_grad=True)
    loss = _loss(_native(net, x), net)
    inputs = [x, *net.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second[0].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        _loss(_native(net, x), net).backward()
        loss.backward()
        loss.backward()


CHANGED = ["blocks.0.conv_a.0.weight", "blocks.1.gate.conv.weight", "recon.weight", "blocks.0.bn_a.0.weight", "recon_bn.1.bias"]


@needs_native
@pytest.mark.parametrize("name", CHANGED)
def test_parameters_that_changed_in_between_are_noticed(name: str) -> None:
    net, x = _net(OFFICIAL), torch.rand(2, 1, 9, 7)
    loss = _loss(_native(net, x), net)
    with torch.no_grad():
        net.get_parameter(name).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_native
def test_a_weight_that_was_copied_for_the_kernels_counts_as_it_was() -> None:
    """Of another memory format: autograd cannot notice the change, and the gradient must be that of the forward pass."""
    x = torch.rand(2, 1, 9, 7)
    found = []
    for change in (False, True):
        net = _net(OFFICIAL).to(memory_format=torch.channels_last)
        loss = _loss(_native(net, x), net)
        if change:
            with torch.no_grad():
                net.get_parameter("blocks.0.conv_a.0.weight").mul_(1.5)
        loss.backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    _all_equal(found[1], found[0])  # type: ignore[arg-type]


def _refused(net: MemNet, x: Tensor, **how: bool) -> str:
    before = [b.clone() for b in net.buffers()]
    with pytest.raises(InputError) as raised:
        lean.heads(net, x, native=True, **how)
    if x.device.type == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    said = str(raised.value)
    assert len(said.splitlines()) == 1
    return said


def test_networks_that_the_kernels_cannot_train_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, prefix = torch.rand(1, 1, 4, 4), "the native kernels cannot train this network: "
    eight = _net(CONFIGS["official"])
    assert _refused(eight, x) == prefix + "the network's 8 channels are no multiple of 16"
    net = _net(OFFICIAL)
    assert "float64, not float32" in _refused(copy.deepcopy(net).double(), x.double())
    partly = copy.deepcopy(net)
    partly.blocks[1].gate.double()
    assert _refused(partly, x) == prefix + "the network's blocks.1.gate.bn.weight is float64, not float32"
    partly = copy.deepcopy(net)
    partly.recon_bn[0].running_var = partly.recon_bn[0].running_var.half()
    assert _refused(partly, x) == prefix + "the network's recon_bn.0.running_var is float16, not float32"
    assert "is on meta" in _refused(copy.deepcopy(net).to("meta"), x.to("meta"))
    assert _refused(net, x, compiled=True) == prefix + "torch.compile makes others"
    assert "1 channels" in _refused(net, torch.rand(1, 2, 4, 4))
    monkeypatch.setattr(native, "why_missing", lambda: "the native module was not built: no compiler")
    assert _refused(net, x) == prefix + "the native module was not built: no compiler"


# Recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("training.kernels=cuda",), "kernels must be one of auto, native, torch"),
        (("training.kernels=native", "training.memory=plain"), "kernels = 'native' needs memory = 'lean' and compile = false"),
        (("training.kernels=native", "training.compile=true"), "kernels = 'native' needs memory = 'lean' and compile = false"),
        (("training.kernels=native", "network.channels=8"), "kernels = 'native' needs a multiple of 16 channels, not 8"),
        (("stages.1.kernels=native",), "kernels = 'native' needs a multiple of 16 channels, not 4"),
        (("network.sharing=none",), "recursions of 1, 2: stages only grow, and only networks with sharing = 'conv' do"),
        (("stages.0.recursions=3",), "recursions of 3, 2: stages only grow, and only networks with sharing = 'conv' do"),
        (("identity_start=1",), "identity_start must be true or false"),
    ],
)
def test_recipes_that_contradict_themselves(
    overrides: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tmp_path)
    with pytest.raises(InputError, match=said):
        load_recipe(path, overrides)
    with pytest.raises(SystemExit) as left:
        cli.main(("train", str(path), *overrides))
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "run").exists()


def _trained(folder: Path, **changes: Any) -> tuple[MemNet, list[dict[str, Any]]]:
    folder.mkdir(exist_ok=True)
    assert run.train(recipe(folder, **{"network__channels": 16} | changes), hardware=CPU).done
    return load_result(folder / "run" / "result")


def _weights(net: MemNet) -> dict[str, Tensor]:
    return net.state_dict()


@needs_native
def test_the_first_steps_are_those_of_torch(tmp_path: Path) -> None:
    """Three steps, and then three of a network that has grown. With SGD: Adam makes full steps of gradients that are zero but
    for rounding, those of biases before a batch normalisation."""
    changes = {"training__optimizer": "sgd", "training__lr": 0.05}
    nets = {k: _trained(tmp_path / k, training__kernels=k, **changes) for k in ("native", "torch")}
    start = _start(tmp_path / "native", **changes)
    for kernels, (_, history) in nets.items():
        assert [stage["kernels"] for stage in history] == [kernels, kernels]
    found, expected = (_weights(nets[k][0]) for k in ("native", "torch"))
    assert any(not torch.equal(found[name], value) for name, value in expected.items())  # other kernels
    for name, value in expected.items():
        if value.ndim == 4:
            error, before = _rms(found[name] - value), start.get(name)
            assert error <= LIMIT_OF_STEPS * _rms(value), (name, error / _rms(value))
            if before is not None and before.shape == value.shape:  # gates have grown
                assert _rms(value - before) > 100 * error, (name, _rms(value - before) / error)


# Measured: 7e-7 (three seeds). With room for a ReLU whose input rounding moves across zero.
LIMIT_OF_STEPS = 1e-4


def _start(folder: Path, **changes: Any) -> dict[str, Tensor]:
    loaded = recipe(folder, **{"network__channels": 16} | changes)
    net, state = new_run(loaded, folder / "new").start(False, False)
    assert state is None
    return _weights(net)


@needs_native
def test_auto_is_native_where_that_can_be(tmp_path: Path) -> None:
    one = {"training__steps": 1, "training__accumulate": 1, "stages__1__recursions": 1}
    for folder, kernels, changes in (
        ("sixteen", "native", {}),
        ("eight", "torch", {"network__channels": 8}),
        ("plain", "torch", {"training__memory": "plain"}),
        ("asked", "torch", {"training__kernels": "torch"}),
    ):
        _, history = _trained(tmp_path / folder, **one | changes)
        assert [stage["kernels"] for stage in history] == [kernels, kernels], folder


@needs_native
def test_precision_is_float32_with_native_kernels(tmp_path: Path) -> None:
    results = [_weights(_trained(tmp_path / p, training__precision=p)[0]) for p in ("fp32", "bf16")]
    _all_equal(*results)


@needs_native
def test_without_the_module_auto_is_torch_and_native_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"training__steps": 1, "training__accumulate": 1, "stages__1__recursions": 1}
    asked = _trained(tmp_path / "asked", training__kernels="torch", **one)[0]
    monkeypatch.setattr(native, "why_missing", lambda: "the native module was not built: no compiler")
    net, history = _trained(tmp_path / "auto", **one)
    assert [stage["kernels"] for stage in history] == ["torch", "torch"]
    _all_equal(_weights(net), _weights(asked))
    loaded = recipe(tmp_path, network__channels=16, training__kernels="native")
    with pytest.raises(InputError) as raised:
        run.train(loaded, hardware=CPU)
    assert str(raised.value) == "kernels = 'native' cannot train here: the native module was not built: no compiler"
    with pytest.raises(InputError, match="kernels = 'native' cannot train here"):  # not when it is the second stage's turn
        run.train(recipe(tmp_path, network__channels=16, stages__1__kernels="native"), hardware=CPU)
    assert not (tmp_path / "run").exists()


@needs_native
@pytest.mark.parametrize("stop", [1, 2, 4, 5])
def test_an_interrupted_native_training_resumes_to_the_same_bits(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 has the steps 1 to 3, stage 2 the steps 4 to 6."""
    expected = _weights(_trained(tmp_path / "whole", training__kernels="native")[0])
    StopAt.left = stop
    with monkeypatch.context() as patch:
        patch.setattr(run, "_Stopping", StopAt)
        stopped = run.train(recipe(tmp_path, network__channels=16, training__kernels="native"), hardware=CPU)
    assert not stopped.done
    torch.manual_seed(99)
    resumed = run.train(recipe(tmp_path, network__channels=16, training__kernels="native"), resume=True, hardware=CPU)
    assert resumed.done
    _all_equal(_weights(load_result(tmp_path / "run" / "result")[0]), expected)


# A network that begins as the identity ------------------------------------------------------------------------------


@pytest.mark.parametrize("recon", [{}, {"network__recon_kernel": 1, "network__bias": False}])
def test_a_new_network_begins_as_the_identity(recon: dict[str, Any], tmp_path: Path) -> None:
    changes = {"network__channels": 16, **recon}
    nets = {}
    for start in (True, False):
        loaded = recipe(tmp_path, identity_start=start, **changes)
        nets[start] = new_run(loaded, tmp_path / "run").start(False, False)[0].train()
    x = torch.rand(2, 1, 9, 7)
    for heads in (MemNet.heads, lean.heads, *([_native] if native.why_missing() is None else [])):
        for train in (True, False):
            outputs = heads(copy.deepcopy(nets[True]).train(train), x)
            assert len(outputs) == 2 and all(torch.equal(h, x) for h in outputs)
        assert not torch.equal(heads(copy.deepcopy(nets[False]), x)[0], x)
    for name, value in nets[False].state_dict().items():
        other = nets[True].state_dict()[name]
        assert not other.any() if name.startswith("recon.") else torch.equal(value, other), name


def test_what_was_trained_stays_when_it_grows_resumes_or_is_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = _trained(tmp_path / "whole", identity_start=True)
    assert _weights(net)["recon.weight"].any()
    StopAt.left = 4
    with monkeypatch.context() as patch:
        patch.setattr(run, "_Stopping", StopAt)
        assert not run.train(recipe(tmp_path, network__channels=16, identity_start=True), hardware=CPU).done
    assert run.train(recipe(tmp_path, network__channels=16, identity_start=True), resume=True, hardware=CPU).done
    _all_equal(_weights(load_result(tmp_path / "run" / "result")[0]), _weights(net))
    first, _ = load_result(tmp_path / "whole" / "run" / "stage1.result")
    assert _weights(first)["recon.weight"].any()
    loaded = recipe(tmp_path, network__channels=16, identity_start=True, init=f'"{tmp_path}/whole/run/stage1.result"')
    begun, _ = new_run(loaded, tmp_path / "other").start(False, False)
    _all_equal(_weights(begun), _weights(first))


def test_a_training_of_an_older_program_goes_on(tmp_path: Path) -> None:
    """What that did not know was as it is by default."""
    new = recipe(tmp_path, network__channels=16).to_dict()
    old = {key: value for key, value in new.items() if key != "identity_start"}
    old["stages"] = [{key: value for key, value in stage.items() if key != "kernels"} for stage in new["stages"]]
    assert differences(old, new) == []
    changed = recipe(tmp_path, network__channels=16, identity_start=True, training__kernels="torch").to_dict()
    said = ["identity_start: False -> True", *(f"stages.{k}.kernels: auto -> torch" for k in (0, 1))]
    assert sorted(differences(old, changed)) == said

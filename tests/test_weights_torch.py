"""PyTorch files of the ports: every format, container, prefix and thing beside the weights; C09, C11, C12, C18, C19, C21."""

from __future__ import annotations

import argparse
import collections
import datetime
import logging
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from support import checkpoints as make
from support import networks
from test_reference import PORTS
from torch import Tensor, nn

import memnet_fast as mf
from memnet_fast import weights
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointTooLarge

M, R, C = 2, 3, 5
NAMES = [name for name in PORTS if name != "official"]


def _config(port: str, **options) -> MemNetConfig:
    values = {"channels": C, "num_memory_blocks": M, "num_recursions": R, **PORTS[port][1], **options}
    return MemNetConfig(**values)


def _state(port: str, config: MemNetConfig | None = None) -> dict[str, Tensor]:
    """A random state dict with the port's own names, num_batches_tracked included."""
    config = config or _config(port)
    own = networks.build(config, seed=4).state_dict()
    state = collections.OrderedDict()
    for theirs, ours in PORTS[port][0].keys(config.num_memory_blocks, config.num_recursions).items():
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if f"{ours}.{leaf}" in own:
                state[f"{theirs}.{leaf}"] = own[f"{ours}.{leaf}"].clone()
    if port == "A2":
        state["weights"] = own["head_weights"].clone()[None]
    return state


def _check(net: mf.MemNet, port: str, state: dict[str, Tensor]) -> None:
    """The converted network against the port's own forward, in float64."""
    c = net.config
    forward = PORTS[port][0](
        {k: v.double() for k, v in state.items() if v.is_floating_point()}, c.num_memory_blocks, c.num_recursions, False
    )
    x = networks.image(2, c.in_channels, 7, 6).double()
    with torch.no_grad():
        y, truth = net.double()(x), forward(x)
    assert not torch.equal(truth, x)
    assert float((y - truth).abs().max()) <= 1e-12 * float(truth.abs().max())


@pytest.fixture
def save(tmp_path):
    def write(content, name: str = "net.pth", legacy: bool = False):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else make.torch_bytes(content, legacy))
        return path

    return write


@pytest.mark.parametrize("format", ["zip", "legacy", "tar", "safetensors"])
@pytest.mark.parametrize("port", NAMES)
def test_ports(save, port, format, caplog):
    state = _state(port)
    if format == "tar":
        floats = {k: v for k, v in state.items() if v.is_floating_point()}
        path = save(make.tar_file({"state_dict": floats}, list(floats.values())), "net.pth.tar")
    elif format == "safetensors":
        path = save(safetensors.torch.save(dict(state)))
    else:
        path = save(state, legacy=format == "legacy")
    with caplog.at_level(logging.INFO, "memnet_fast.weights"):
        net = weights.load_weights(path)
    assert net.config == _config(port)
    _check(net, port, state)
    (record,) = caplog.records
    line = record.getMessage()
    assert "M2R3, 5 channels" in line and f"port {port[0]}" in line and "\n" not in line


@pytest.mark.parametrize(
    ("port", "options"),
    [
        ("A", {"in_channels": 31, "out_channels": 31}),
        ("A", {"in_channels": 3, "out_channels": 3, "bias": True, "num_recursions": 1}),
        ("A", {"num_memory_blocks": 1, "channels": 16}),
        ("A2", {"num_memory_blocks": 1, "share_recon_bn": True}),
        ("B", {"in_channels": 1, "out_channels": 1, "recon_kernel": 3, "num_recursions": 1}),
    ],
    ids=str,
)
def test_hyperparameters_follow_from_names_and_shapes(save, port, options):
    config = _config(port, **options)
    net = weights.load_weights(save(_state(port, config)))
    assert net.config == config


def test_port_a_m6r6_with_optimiser(save):
    """As its training script stores it: 2,905,474 parameters, and SGD with momentum."""
    config = mf.config.PRESETS["memnet_m6r6_vandermode"]
    state = _state("A", config)
    momenta = {i: {"momentum_buffer": torch.zeros(3)} for i in range(50)}
    path = save({"epoch": 50, "state_dict": state, "optimizer": {"state": momenta, "param_groups": [{"lr": 0.1}]}})
    net = mf.create_model("memnet_m6r6_vandermode", checkpoint=path)
    assert sum(p.numel() for p in net.parameters()) == 2_905_474


CONTAINERS = {
    "state_dict": lambda s: {"state_dict": s},
    "net": lambda s: {"net": s, "epoch": 3},
    "model": lambda s: {"model": s, "best": torch.tensor(30.0)},
    "params": lambda s: {"params": s},
    "params_ema": lambda s: {"params": {k: torch.zeros_like(v) for k, v in s.items()}, "params_ema": s},
    "weights": lambda s: {"weights": s},
    "nested": lambda s: {"model": {"state_dict": s}, "optimizer": {"state": {}}},
    "a container without tensors first": lambda s: {"model": {"name": "MemNet"}, "net": s},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "net.": lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}},
    "model.": lambda s: {f"model.{k}": v for k, v in s.items()},
    "_orig_mod.": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "nested prefixes": lambda s: {"state_dict": {f"module._orig_mod.model.{k}": v for k, v in s.items()}},
    "prefix of a trainer": lambda s: {f"generator.memnet.{k}": v for k, v in s.items()},
    "prefix of some": lambda s: {(f"module.{k}" if "recon" in k else k): v for k, v in s.items()},
    "compiled inside": lambda s: {k.replace("gate_unit.", "gate_unit._orig_mod."): v for k, v in s.items()},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("port", ["A2", "B"])
def test_containers_and_prefixes(save, port, container):
    state = _state(port)
    loaded = weights.load_any(save(CONTAINERS[container](state)))
    _check(loaded.net, port, state)
    for word in container.split():
        if word in ("state_dict", "net", "model", "params", "params_ema") or word.endswith("."):
            assert word in loaded.line


class Model(nn.Module):
    """A network of somebody's own program, port A, that is stored whole."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.options = argparse.Namespace(lr=0.1)
        for name, value in state.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.BatchNorm2d(1) if part == "bn" else nn.Module())
                module = module._modules[part]
            if leaf in ("weight", "bias"):
                module._parameters[leaf] = nn.Parameter(value)
            else:
                module._buffers[leaf] = value


def _beside(state) -> dict[str, object]:
    counts = collections.defaultdict(list)
    counts["loss"] += [1.5, 2.5]
    return {
        "best_psnr": np.float64(31.5),
        "array": np.arange(3),
        "options": argparse.Namespace(path=pathlib.PurePosixPath("a/b"), dtype=torch.float32, device=torch.device("cpu")),
        "when": datetime.datetime(2020, 1, 2),
        "counts": counts,
        "sets": ({1, 2}, frozenset([3]), slice(1, 2), complex(1, 2), bytearray(b"x"), 10**30, -(10**30), b"bytes"),
        "keys": {1 << 40: 1, 2.5: 2, (1, (2, 3)): 3},
        "size": torch.zeros(2, 3).size(),
        "state_dict": state,
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_other_objects_beside_the_tensors_are_inert(save, legacy, protocol, tmp_path):
    state = _state("A")
    path = tmp_path / "x.pth.tar"
    torch.save(_beside(state), path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    _check(weights.load_weights(path), "A", state)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_whole_networks(save, legacy, inside):
    """No class of the file is needed: it is removed before loading."""
    state = _state("A")
    model = nn.DataParallel(Model(state))
    module = types.ModuleType("somebodys_model")
    sys.modules["somebodys_model"] = module
    Model.__module__, module.Model = "somebodys_model", Model
    try:
        content = make.torch_bytes({"net": model} if inside else model, legacy)
    finally:
        Model.__module__ = __name__
        del sys.modules["somebodys_model"]
    loaded = weights.load_any(save(content))
    _check(loaded.net, "A", state)
    assert "torch.nn.parallel" in loaded.line and "module." in loaded.line


def test_eps_of_a_whole_network_is_honoured(save):
    state = _state("A")
    model = Model(state)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    net = weights.load_weights(save(model))
    before = state["feature_extractor.bn.running_var"]
    assert torch.allclose(net.first.bn.running_var, before + (1e-3 - 1e-5), rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("legacy", [False, True])
def test_other_floats_become_float32(save, dtype, legacy):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in _state("A").items()}
    net = weights.load_weights(save(state, legacy=legacy))
    assert torch.equal(net.first.conv.weight, state["feature_extractor.conv.weight"].float())
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_strided_shared_and_offset_tensors(save):
    state = _state("A")
    big = torch.zeros(40)
    big[7 : 7 + C] = state["reconstructor.bn.weight"]
    state["reconstructor.bn.weight"] = big[7 : 7 + C]
    state["reconstructor.bn.bias"] = big[7 : 7 + C]  # the same memory twice
    name = "dense_memory.0.recursive_unit.0.relu_conv1.conv.weight"
    state[name] = state[name].to(memory_format=torch.channels_last)
    state["reconstructor.bn.running_var"] = torch.ones(1).expand(C)
    for legacy in (False, True):
        _check(weights.load_weights(save(state, legacy=legacy)), "A", state)


def test_expanded_tensors_are_no_bombs(save):
    state = _state("A")
    c = 600
    for name, value in state.items():
        if value.ndim == 4:
            out, into = (c if n == C else c * n // C if n % C == 0 and n > 1 else n for n in value.shape[:2])
            state[name] = torch.zeros(1).expand(out, into, *value.shape[2:])
        elif value.ndim == 1:
            state[name] = torch.ones(1).expand(c * value.numel() // C if value.numel() > 1 else 1)
    path = save(state)
    assert path.stat().st_size < 200_000
    with pytest.raises(CheckpointTooLarge, match="share"):
        weights.load_weights(path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_is_not_dense_or_not_float_is_listed(save):
    state = _state("A")
    state["feature_extractor.conv.weight"] = state["feature_extractor.conv.weight"].to_sparse()
    state["reconstructor.bn.weight"] = torch.ones(C, dtype=torch.int64)
    state["reconstructor.bn.bias"] = torch.quantize_per_tensor(torch.ones(C), 0.1, 0, torch.qint8)
    with pytest.raises(CheckpointMismatch) as caught:
        weights.load_weights(save(state))
    for part in ("conv.weight has dtype 'sparse'", "bn.weight has dtype long", "bn.bias has dtype 'quantised'"):
        assert part in str(caught.value)


def test_all_misfits_at_once_with_the_names_of_the_file(save):
    state = {f"module.{k}": v for k, v in _state("A2").items()}
    del state["module.dense_memory.1.recursive_unit.0.relu_conv2.bn.running_var"]
    state["module.stranger"] = torch.ones(1)
    state["module.dense_memory.0.gate_unit.conv.weight"] = state["module.dense_memory.0.gate_unit.conv.weight"].transpose(0, 1)
    state["module.weights"] = torch.ones(1, 3)
    state["module.reconstructor.bn.running_var"] = -torch.ones(C)
    state["module.reconstructor.conv.bias"] = torch.full((1,), 1e30)
    with pytest.raises(CheckpointMismatch) as caught:
        weights.load_weights(save(state))
    message = str(caught.value)
    for part in (
        "net.pth",
        "missing dense_memory.1.recursive_unit.0.relu_conv2.bn.running_var",
        "unexpected stranger",
        "dense_memory.0.gate_unit.conv.weight has shape [20, 5, 1, 1], not [5, 20, 1, 1] (input and output swapped?)",
        "weights has shape [1, 3], not [2]",
        "reconstructor.bn.running_var is negative",
        "reconstructor.conv.bias holds values beyond 1e+15",
        "num_memory_blocks=2",
    ):
        assert part in message, part
    assert "\n" not in message


def test_nonfinite_values_only_on_demand(save):
    state = _state("A")
    state["reconstructor.bn.bias"][0] = float("nan")
    state["reconstructor.bn.weight"] = torch.full((C,), 1e300, dtype=torch.float64)
    path = save(state)
    with pytest.raises(CheckpointMismatch, match=r"bias is not finite.*weight is not finite|weight is not.*bias is not"):
        weights.load_weights(path)
    net = weights.load_weights(path, allow_nonfinite=True)
    assert net.recon_bn[0].bias[0].isnan() and net.recon_bn[0].weight[0].isinf()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"epoch": 3}, "no tensors of a network were found; it holds epoch"),
        ([], "no tensors"),
        ({"fc.weight": torch.ones(3)}, "not named as in a known port"),
        (networks.build(networks.SMALL).state_dict(), "save_weights"),
        ({"module.reconstructor.bn.weight": torch.ones(2), "reconstructor.bn.weight": torch.ones(2)}, "appear twice"),
        ({"dense_memory.9999.gate_unit.bn.weight": torch.ones(2)}, "more than a file can hold"),
        (
            {"reconstructor.conv.weight": torch.ones(4, 5, 3, 3), "feature_extractor.conv.weight": torch.ones(5, 3, 3, 3)},
            "equal",
        ),
    ],
    ids=["no network", "a list", "another network", "ours", "two prefixes", "absurd", "3 to 4 channels"],
)
def test_other_networks(save, content, match):
    with pytest.raises(CheckpointMismatch, match=match):
        weights.load_weights(save(content))


def test_content_counts_not_the_name(save, tmp_path):
    """C12: every format under every extension."""
    state = _state("A")
    own = tmp_path / "own"
    weights.save_weights(networks.build(networks.SMALL), own)
    contents = {
        "zip": make.torch_bytes(state),
        "legacy": make.torch_bytes(state, True),
        "own": own.read_bytes(),
        "caffe": make.caffemodel(make.official_blobs(1, 1, 4)),
    }
    for content in contents.values():
        for name in ("a.pth", "a.safetensors", "a.caffemodel", "a.pth.tar", "a"):
            assert isinstance(weights.load_weights(save(content, name)), mf.MemNet)


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (b"", CheckpointCorrupt, "empty"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, CheckpointMismatch, "HDF5"),
        (b"name: 'MemNet'\nlayer {}", CheckpointCorrupt, "neither"),
        (b"<html>" * 100, CheckpointCorrupt, "neither"),
        (pickle.dumps([1], 2), CheckpointMismatch, "not one of torch.save"),
    ],
    ids=["empty", "hdf5", "prototxt", "html", "pickle"],
)
def test_other_files(save, content, error, match):
    with pytest.raises(error, match=match):
        weights.load_weights(save(content))


@pytest.mark.parametrize("format", ["zip", "legacy", "tar"])
def test_every_truncation(save, format):
    state = {k: v for k, v in _state("A", _config("A", num_recursions=1)).items() if v.is_floating_point()}
    data = make.tar_file(state, list(state.values())) if format == "tar" else make.torch_bytes(state, format == "legacy")
    for length in [0, 1, len(data) - 1, *(len(data) * i // 64 for i in range(64))]:
        if format == "tar" and length == len(data) - 1:
            continue  # the end of a tar archive is zeros that mean nothing
        try:
            weights.load_weights(save(data[:length]))
        except CheckpointCorrupt as error:
            assert "net.pth" in str(error)
        else:
            assert format == "tar" and not any(data[length:]), length


def test_flipped_bits_of_a_zip_file_are_noticed(save):
    """Its CRC-32 is verified, which torch.load does not do."""
    state = _state("A")
    data = make.torch_bytes(state)
    needle = state["dense_memory.0.gate_unit.conv.weight"].numpy().tobytes()
    start = data.index(needle)
    for i in range(0, len(needle), 7):
        with pytest.raises(CheckpointCorrupt, match="CRC-32"):
            weights.load_weights(save(data[: start + i] + bytes([data[start + i] ^ 1 << i % 8]) + data[start + i + 1 :]))


def test_create_model_with_a_checkpoint(save):
    state = _state("A")
    path = save(state)
    net = mf.create_model(checkpoint=path)
    assert net.config == _config("A")
    other = mf.create_model(checkpoint=path, gate_order="long_short", clamp=True)
    assert other.config.gate_order == "long_short" and other.config.clamp and not other.training
    x = networks.image(1, 1, 5, 5)
    assert not torch.equal(net(x).clamp(0, 1), other(x))
    small = {"channels": C, "num_memory_blocks": M, "num_recursions": R}
    assert mf.create_model("memnet_m6r6_vandermode", checkpoint=path, **small).config == net.config
    with pytest.raises(CheckpointMismatch, match=r"channels=5, not 64; num_memory_blocks=2, not 6; num_recursions=3, not 6"):
        mf.create_model("memnet_m6r6_vandermode", checkpoint=path)
    with pytest.raises(CheckpointMismatch, match="bias=False, not True"):
        mf.create_model(checkpoint=path, bias=True)
    for bad in ({"name": "memnet_m6r6.denoise"}, {"pretrained": False}, {"depth": 3}):
        with pytest.raises(mf.InputError):
            mf.create_model(checkpoint=path, **bad)
    with pytest.raises(mf.InputError, match="name of a model or a checkpoint"):
        mf.create_model()

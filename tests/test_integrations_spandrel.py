"""spandrel opens our files and those of the ports, and knows what they are."""

from __future__ import annotations

import sys

import pytest
import safetensors.torch
import torch
from support import checkpoints as make
from support import networks
from test_weights_torch import _config, _state

from memnet_fast import weights
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointMismatch, MissingExtra

PORTS = ("A", "A2", "B")


@pytest.fixture
def spandrel():
    return pytest.importorskip("spandrel", exc_type=ImportError)


@pytest.fixture
def loader(spandrel):
    """With all of spandrel's own architectures, and ours."""
    from memnet_fast.integrations import spandrel as ours

    registry = spandrel.MAIN_REGISTRY.copy()
    ours.install(registry)
    ours.install(registry)
    return spandrel.ModelLoader(registry=registry)


def _only_memnet(loader, state) -> None:
    assert [str(a.architecture.id) for a in loader.registry.architectures() if a.detect(state)] == ["MemNet"]


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("port", PORTS)
def test_ports(spandrel, loader, tmp_path, port, suffix):
    state, path = _state(port), tmp_path / f"net{suffix}"
    path.write_bytes(
        safetensors.torch.save(dict(state)) if suffix == ".safetensors" else make.torch_bytes({"state_dict": state})
    )
    _only_memnet(loader, state)
    model = loader.load_from_file(path)
    net, config = weights.load_weights(path), _config(port)
    assert isinstance(model, spandrel.ImageModelDescriptor)
    assert (model.architecture.id, model.purpose, model.scale) == ("MemNet", "Restoration", 1)
    assert (model.input_channels, model.output_channels) == (config.in_channels, config.out_channels)
    assert model.tags == ["M2R3", "5nf"] and model.size_requirements.none
    assert not model.supports_half and not model.supports_bfloat16
    x = networks.image(1, config.in_channels, 9, 7)
    with torch.no_grad():
        assert torch.equal(model(x), net(x).clamp(0, 1))


@pytest.mark.parametrize("r", [1, 2])
def test_our_files_of_the_official_network(loader, tmp_path, r):
    net = networks.build(MemNetConfig(channels=5, num_memory_blocks=2, num_recursions=r))
    weights.save_weights(net, tmp_path / "net.safetensors")
    _only_memnet(loader, net.state_dict())
    x = networks.image(1, 1, 5, 9)
    with torch.no_grad():
        assert torch.equal(loader.load_from_file(tmp_path / "net.safetensors")(x), net(x).clamp(0, 1))


def test_bundled_weights(loader):
    for path in weights.bundled().values():
        assert loader.load_from_file(path).tags == ["M6R6", "64nf"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "model.module."])
def test_prefixes(loader, prefix):
    for state in (_state("A2"), networks.build(networks.SMALL).state_dict()):
        model = loader.load_from_state_dict({f"{prefix}{k}": v for k, v in state.items()})
        assert model.architecture.id == "MemNet"


def test_colour_images_through_a_network_for_luma(loader):
    net = networks.build(networks.SMALL)
    model = loader.load_from_state_dict(net.state_dict())
    x = networks.image(1, 3, 8, 11) * 0.5 + 0.25
    y = model(x)
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    with torch.no_grad():
        change = (net(luma[:, None]) - luma[:, None]).expand(-1, 3, -1, -1)
    assert y.shape == x.shape and float(change.abs().max()) > 1e-3
    assert torch.allclose(y, (x + change).clamp(0, 1), atol=1e-6)


def test_other_networks_are_left_to_others(loader, spandrel):
    with pytest.raises(spandrel.UnsupportedModelError):
        loader.load_from_state_dict({"first.conv.weight": torch.ones(4, 1, 3, 3), "head.weight": torch.ones(3)})
    with pytest.raises(spandrel.UnsupportedModelError):
        loader.load_from_state_dict({"a": torch.ones(1), "module.a": torch.ones(1)})


def test_misfits_are_listed(loader):
    state = _state("A")
    state["stranger"] = torch.ones(1)
    state["reconstructor.bn.running_var"] = -torch.ones(5)
    with pytest.raises(CheckpointMismatch, match=r"unexpected stranger.*running_var is negative"):
        loader.load_from_state_dict(state)


def test_state_dicts_in_memory():
    """The part that needs no spandrel."""
    net = networks.build(networks.SMALL)
    state = {**net.double().state_dict(), "epoch": 3}
    loaded = weights.from_state_dict(state)
    assert loaded.net.config == networks.SMALL and "official network, M2R2, 16 channels" in loaded.line
    for name, value in loaded.net.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value.double(), state[name])
    assert weights.from_state_dict(_state("B")).net.config == _config("B")
    for name in ("unshared", "shared_head_bn", "lornatang", "last_output", "no_bias"):
        with pytest.raises(CheckpointMismatch, match="does not say its configuration"):
            weights.from_state_dict(networks.build(networks.VARIANTS[name]).state_dict())
    state = _state("A")
    state["feature_extractor.conv.weight"] = state["feature_extractor.conv.weight"].to_sparse()
    with pytest.raises(CheckpointMismatch, match="conv.weight has dtype 'not dense'"):
        weights.from_state_dict(state)


def test_without_spandrel_the_import_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    monkeypatch.delitem(sys.modules, "memnet_fast.integrations.spandrel", raising=False)
    with pytest.raises(MissingExtra, match=r"pip install memnet_fast\[spandrel\]"):
        import memnet_fast.integrations.spandrel  # noqa: F401

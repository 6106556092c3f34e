"""Our own format beyond the round trip: advice for misfits, digests of the metadata, odd paths (C17, C18, C27)."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import networks

from memnet_fast import weights
from memnet_fast.config import PRESETS, MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointMismatch, InputError
from memnet_fast.weights import safetensors_file
from memnet_fast.weights.fitting import guess_config, show_config, tensor_shapes


def _parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return safetensors.torch.load(data), header["__metadata__"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    weights.save_weights(networks.build(networks.SMALL), path, {"psnr": {"30": 28.5}})
    return path


@pytest.mark.parametrize("config", [*networks.VARIANTS.values(), *PRESETS.values()], ids=show_config)
def test_configuration_from_shapes(config: MemNetConfig) -> None:
    """All that shapes can tell: a network with one recursion shares nothing, and a chain looks like its residual blocks."""
    guess = guess_config(tensor_shapes(config))
    assert guess is not None and tensor_shapes(guess) == tensor_shapes(config)
    for field in ("in_channels", "out_channels", "channels", "num_memory_blocks", "num_recursions", "bias", "recon_kernel"):
        assert getattr(guess, field) == getattr(config, field)


def test_no_configuration_from_nonsense() -> None:
    shapes = tensor_shapes(networks.SMALL)
    assert guess_config({}) is None
    assert guess_config({k: v for k, v in shapes.items() if k != "blocks.0.bn_a.1.bias"}) is None
    assert guess_config({**shapes, "recon.weight": (2, 16, 5, 5)}) is None


@pytest.mark.parametrize(
    ("claimed", "advice"),
    [
        ({"num_recursions": 3}, "the tensors would fit MemNetConfig(num_recursions=2)"),
        ({"channels": 8, "num_memory_blocks": 4}, "the tensors would fit MemNetConfig(channels=16, num_memory_blocks=2)"),
        ({"multi_supervised": False}, "the tensors would fit MemNetConfig(multi_supervised=True)"),
    ],
    ids=str,
)
def test_misfits_come_with_the_configuration_that_would_fit(file: Path, claimed: dict, advice: str) -> None:
    tensors, metadata = _parts(file)
    metadata["config"] = json.dumps({**networks.SMALL.to_dict(), **claimed})
    del metadata["metadata_sha256"]
    file.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(CheckpointMismatch) as caught:
        weights.load_weights(file)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [("config", '"clamp": false', '"clamp": true'), ("config", "long_short", "short_long"), ("info", "28.5", "29.5")],
)
def test_changed_metadata_are_noticed(file: Path, key: str, old: str, new: str) -> None:
    tensors, metadata = _parts(file)
    assert old in metadata[key]
    metadata[key] = metadata[key].replace(old, new)
    file.write_bytes(safetensors.torch.save(tensors, metadata))
    for read in (weights.load_weights, weights.load_info):
        with pytest.raises(CheckpointCorrupt, match="metadata"):
            read(file)


def test_files_from_before_the_digest_of_the_metadata(file: Path) -> None:
    tensors, metadata = _parts(file)
    del metadata["metadata_sha256"]
    file.write_bytes(safetensors.torch.save(tensors, metadata))
    assert weights.load_weights(file).config == networks.SMALL


def test_strict_reader_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.randn(4).half(),
        "c": torch.randn(3, 1).bfloat16(),
        "d": torch.randn(()).double(),
        "e": torch.empty(0, 4),
        "f": torch.arange(5),
        "g": torch.tensor([True, False, True]),
    }
    data = bytearray(safetensors.torch.save(tensors, {"format": "x"}))
    read, metadata = safetensors_file.read(data)
    assert metadata == {"format": "x"} and read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value)
    assert weights.digest(read) == weights.digest(tensors)


def test_information_of_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointMismatch, match="not a file of this package"):
        weights.load_info(path)


@pytest.mark.parametrize("path", ["https://example.org/net.pth", "~/no such file", "null\0byte", "no/such/ünïcode\n.pth", ""])
def test_odd_paths(path: str) -> None:
    with pytest.raises(InputError):
        weights.load_weights(path)


def test_networks_in_half_precision_and_in_training_mode_are_stored(tmp_path: Path) -> None:
    net = networks.build(networks.SMALL).bfloat16().train()
    weights.save_weights(net, tmp_path / "x")
    back = weights.load_weights(tmp_path / "x")
    assert not back.training and torch.equal(back.recon.weight, net.recon.weight.float())


def test_defaults_of_the_program_do_not_matter(file: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        net = weights.load_weights(file)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(v.dtype in (torch.float32, torch.int64) for v in net.state_dict().values())


def test_the_first_load_does_not_wait_for_parts_of_torch(file: Path) -> None:
    """Networks on the meta device import hundreds of modules at their first use."""
    code = (
        "import sys, torch\nfrom memnet_fast import weights\nbefore = len(sys.modules)\n"
        f"weights.load_weights({str(file)!r})\nassert len(sys.modules) - before < 20, len(sys.modules) - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_loaded_networks_train(file: Path) -> None:
    net = weights.load_weights(file).train()
    net(torch.rand(1, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert int(net.first.bn.num_batches_tracked) == 1

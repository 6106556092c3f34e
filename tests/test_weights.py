"""Weight files: round trip, damage, misfits, and paths that are no files: C01 to C03, C17, C18, C27."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from memnet_fast import weights
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointTooLarge, InputError, OutputError
from memnet_fast.reference import MemNet

SMALL = MemNetConfig(channels=4, num_memory_blocks=2, num_recursions=2)


def _net(seed: int = 0) -> MemNet:
    torch.manual_seed(seed)
    net = MemNet(SMALL)
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_()
    return net


def _rewrite(path: Path, change) -> None:
    """Stores changed tensors under a right digest, so that only the change itself can be refused."""
    tensors = safetensors.torch.load_file(path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    metadata = header["__metadata__"]
    change(tensors, metadata)
    metadata["sha256"] = weights.digest(tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    weights.save_weights(_net(), path, {"author": "a test"})
    return path


def test_round_trip_keeps_every_bit(file: Path) -> None:
    net, back = _net().eval(), weights.load_weights(file)
    assert back.config == SMALL and not back.training
    x = torch.rand(1, 1, 9, 7)
    assert torch.equal(net(x), back(x))
    info = weights.load_info(file)
    assert info["author"] == "a test" and len(info["sha256"]) == 64


def test_file_is_readable_like_any_other(file: Path) -> None:
    other = file.with_name("plain")
    other.write_bytes(b"")
    assert file.stat().st_mode == other.stat().st_mode


def test_every_truncation_is_noticed(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [0, 1, 7, 8, 9, len(data) - 1, *(len(data) * i // 64 for i in range(64))]:
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointCorrupt, match="cut"):
            weights.load_weights(cut)


def test_every_flipped_bit_of_the_tensors_is_noticed(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    generator = torch.Generator().manual_seed(0)
    flipped = tmp_path / "flipped.safetensors"
    for _ in range(200):
        position = start + int(torch.randint(len(data) - start, (1,), generator=generator))
        bit = int(torch.randint(8, (1,), generator=generator))
        flipped.write_bytes(data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :])
        with pytest.raises(CheckpointCorrupt, match="digest"):
            weights.load_weights(flipped)


def test_all_misfits_are_listed_at_once(file: Path) -> None:
    def change(tensors, metadata):
        del tensors["first.conv.bias"]
        tensors["stranger"] = torch.zeros(1)
        tensors["recon.weight"] = torch.zeros(1, 4, 1, 1)
        tensors["recon.bias"] = torch.tensor([float("nan")])
        tensors["first.bn.running_var"] = torch.tensor([-1.0])
        tensors["head_weights"] = torch.zeros(2, dtype=torch.int64)

    _rewrite(file, change)
    with pytest.raises(CheckpointMismatch) as caught:
        weights.load_weights(file)
    for part in (
        "missing first.conv.bias",
        "unexpected stranger",
        "recon.weight has shape [1, 4, 1, 1], not [1, 4, 3, 3]",
        "recon.bias is not finite",
        "first.bn.running_var is negative",
        "head_weights has dtype",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", ['{"channels": 0}', '{"strange": 1}', "[]", "nonsense"])
def test_bad_configuration(file: Path, bad: str) -> None:
    _rewrite(file, lambda tensors, metadata: metadata.update(config=bad))
    with pytest.raises(CheckpointMismatch, match="configuration"):
        weights.load_weights(file)


@pytest.mark.parametrize("key,value", [("format", "other"), ("version", "2")])
def test_other_formats_and_versions_are_named(file: Path, key: str, value: str) -> None:
    _rewrite(file, lambda tensors, metadata: metadata.update({key: value}))
    with pytest.raises(CheckpointMismatch):
        weights.load_weights(file)


def test_half_precision_storage_is_loaded_as_float32(file: Path) -> None:
    _rewrite(file, lambda tensors, metadata: tensors.update({k: v.half() for k, v in tensors.items()}))
    assert all(p.dtype == torch.float32 for p in weights.load_weights(file).parameters())


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo, loop, broken = tmp_path / "fifo", tmp_path / "loop", tmp_path / "broken"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    broken.symlink_to("nothing")
    for path in (tmp_path, fifo, loop, broken, tmp_path / "missing", Path("/dev/zero"), tmp_path / ("n" * 300)):
        with pytest.raises(InputError):
            weights.load_weights(path)


def test_size_limit(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_BYTES", 100)
    with pytest.raises(CheckpointTooLarge):
        weights.load_weights(file)


def test_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        weights.save_weights(_net(1), file)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


def test_other_eps_is_refused(tmp_path: Path) -> None:
    net = _net()
    net.first.bn.eps = 1e-3
    with pytest.raises(InputError, match="eps"):
        weights.save_weights(net, tmp_path / "x")


def test_bundled_files_are_sound() -> None:
    for name, path in weights.bundled().items():
        net = weights.load_weights(path)
        info = weights.load_info(path)
        assert path.stat().st_size < 3_000_000
        assert {"recipe", "data", "psnr"} <= info.keys(), name
        assert net.config == MemNetConfig()

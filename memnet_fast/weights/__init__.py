"""Weight files: safetensors with the configuration, a description and a digest in the metadata; and the bundled ones.

Metadata of a file: `format` "memnet_fast", `version` "1", `config` (JSON of MemNetConfig), `sha256` (of names, dtypes, shapes
and bytes of all tensors), `info` (JSON: recipe, data, PSNR and whatever else the author states). Batch normalisation has
eps 1e-5, as in every published MemNet.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointTooLarge, InputError
from memnet_fast.files import write_whole
from memnet_fast.reference import MemNet

_FORMAT, _VERSION = "memnet_fast", "1"
_EPS = 1e-5
MAX_BYTES = 1 << 30
_FOLDER = Path(__file__).parent


def bundled() -> dict[str, Path]:
    """Names of the bundled weights, as create_model takes them, and their files."""
    return {p.stem: p for p in sorted(_FOLDER.glob("*.safetensors"))}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_weights(net: MemNet, path: str | os.PathLike[str], info: Mapping[str, Any] | None = None) -> None:
    """Writes parameters and running statistics as safetensors, whole or not at all. info: stored as JSON.

    Raises InputError for a batch normalisation with another eps than 1e-5, OutputError if the file cannot be written.
    """
    if any(m.eps != _EPS for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        raise InputError(f"a weight file holds networks whose batch normalisations have eps {_EPS}")
    tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": json.dumps(net.config.to_dict()),
        "sha256": digest(tensors),
        "info": json.dumps(dict(info or {})),
    }
    write_whole(Path(path), safetensors.torch.save(tensors, metadata))


def load_weights(path: str | os.PathLike[str]) -> MemNet:
    """The network in a weight file of this package, in eval mode, float32, on the CPU.

    Raises CheckpointCorrupt (damaged, or the digest differs), CheckpointMismatch (every problem in one message),
    CheckpointTooLarge (over 1 GiB), InputError (no such file).
    """
    path = Path(path)
    tensors, metadata = _read(path)
    try:
        config = MemNetConfig.from_dict(json.loads(metadata["config"]))
    except (json.JSONDecodeError, TypeError, InputError) as error:
        raise CheckpointMismatch(f"{path}: no usable configuration in the metadata: {error}") from error
    net = MemNet(config)
    expected = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        value, want = tensors[name], expected[name].shape
        if not value.dtype.is_floating_point:
            problems.append(f"{name} has dtype {value.dtype}, a float is needed")
        elif value.shape != want:
            problems.append(f"{name} has shape {list(value.shape)}, not {list(want)}")
        elif not torch.isfinite(value.float()).all():
            problems.append(f"{name} is not finite")
        elif name.endswith("running_var") and (value < 0).any():
            problems.append(f"{name} is negative")
    if problems:
        raise CheckpointMismatch(f"{path}: {'; '.join(problems)}")
    net.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    return net.eval()


def load_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the author of a weight file states about it, and its digest; the tensors are verified. Raises as load_weights."""
    _, metadata = _read(Path(path))
    try:
        return {**json.loads(metadata.get("info", "{}")), "sha256": metadata["sha256"]}
    except (json.JSONDecodeError, TypeError) as error:
        raise CheckpointMismatch(f"{path}: the description in the metadata is not JSON") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Verified tensors and metadata. The file is read, not mapped: it may change under a map."""
    try:
        # Non-blocking, so that a FIFO without a writer does not hang.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path} is not a file")
            if status.st_size > MAX_BYTES:
                raise CheckpointTooLarge(f"{path} has {status.st_size} bytes, more than {MAX_BYTES}")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read weights {path}: {error.strerror}") from error
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    except (safetensors.SafetensorError, ValueError, KeyError, struct.error, RecursionError) as error:
        raise CheckpointCorrupt(f"{path} is not a sound safetensors file: {error}") from error
    metadata = header.get("__metadata__") or {}
    if metadata.get("format") != _FORMAT:
        raise CheckpointMismatch(f"{path} is a safetensors file, but not one of this package")
    if metadata.get("version") != _VERSION:
        raise CheckpointMismatch(f"{path} has version {metadata.get('version')}; this package reads version {_VERSION}")
    if metadata.get("sha256") != digest(tensors):
        raise CheckpointCorrupt(f"{path}: the tensors do not have the digest that was stored with them")
    return tensors, metadata

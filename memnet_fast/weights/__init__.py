"""Weight files. Ours are safetensors with the configuration, a description and digests in the metadata; some are bundled.
`load_weights` also opens the authors' .caffemodel, its conversions to MXNet and the PyTorch files of the ports, whatever they
are called.

Metadata of our files: `format` "memnet_fast", `version` "1", `config` (JSON of MemNetConfig), `sha256` (of names, dtypes,
shapes and bytes of all tensors), `info` (JSON: recipe, data, PSNR and whatever else the author states), `metadata_sha256` (of
the four texts but sha256). Batch normalisation has eps 1e-5, as in every published MemNet; another eps in a foreign file is
folded into the variance.

No reader here runs, imports or maps anything: a file is read once, checked, and its tensors are copied out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch, InputError
from memnet_fast.files import write_whole
from memnet_fast.reference import MemNet
from memnet_fast.weights import caffe, mxnet, ports, safetensors_file, torch_file
from memnet_fast.weights.fitting import EPS, Contents, Stored, build, guess_config, short, tensor_shapes
from memnet_fast.weights.source import read_file, sniff

__all__ = ["Loaded", "bundled", "digest", "from_state_dict", "load_any", "load_info", "load_weights", "save_weights"]

_FORMAT, _VERSION = "memnet_fast", "1"
_METADATA = ("format", "version", "config", "sha256", "info", "metadata_sha256")
MAX_BYTES = 1 << 30
_FOLDER = Path(__file__).parent
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A network from a file; line: what was recognised; info: what the author states (our files only); sha256: of the file."""

    net: MemNet
    line: str
    info: dict[str, Any]
    sha256: str


def bundled() -> dict[str, Path]:
    """Names of the bundled weights, as create_model takes them, and their files."""
    return {p.stem: p for p in sorted(_FOLDER.glob("*.safetensors"))}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {t.dtype} {list(t.shape)}\n".encode("utf-8", "surrogatepass"))
        total.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    texts = {k: metadata[k] for k in ("format", "version", "config", "info") if k in metadata}
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def save_weights(net: MemNet, path: str | os.PathLike[str], info: Mapping[str, Any] | None = None, half: bool = False) -> None:
    """Writes parameters and running statistics as safetensors, whole or not at all. info: stored as JSON.

    half: kernels of convolutions are rounded to float16, for a file of about half the size; it loads as float32.

    Raises InputError for a batch normalisation with another eps than 1e-5, OutputError if the file cannot be written.
    """
    if any(m.eps != EPS for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        raise InputError(f"a weight file holds networks whose batch normalisations have eps {EPS}")
    tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    if half:
        tensors = {k: v.half() if v.ndim == 4 else v for k, v in tensors.items()}
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": json.dumps(net.config.to_dict()),
        "sha256": digest(tensors),
        "info": json.dumps(dict(info or {})),
    }
    metadata["metadata_sha256"] = _metadata_digest(metadata)
    write_whole(Path(path), safetensors.torch.save(tensors, metadata))


def load_weights(path: str | os.PathLike[str], allow_nonfinite: bool = False) -> MemNet:
    """The network in a weight file, in eval mode, float32, on the CPU.

    path: a file of this package, an official .caffemodel, its conversion to MXNet (.params, with the -symbol.json in the same
        folder), or a PyTorch or safetensors file of a port (see weights/ports.py); its content says which, not its name. One
        line in the log (memnet_fast.weights, level INFO) tells what was recognised.
    allow_nonfinite: NaN, infinite and huge values and negative variances are loaded as they are, not refused.
    Raises InputError (no such file), CheckpointCorrupt (damaged, or a digest differs), CheckpointMismatch (every problem in
    one message), CheckpointUnsafe (it asks for code to be run), CheckpointTooLarge (over 1 GiB, or more parts than any MemNet).
    """
    return load_any(path, allow_nonfinite).net


def load_any(path: str | os.PathLike[str], allow_nonfinite: bool = False) -> Loaded:
    """As load_weights, with what was recognised."""
    path = Path(path)
    data = read_file(path, MAX_BYTES)
    try:
        contents, info = _contents(data, path)
        net = build(contents, len(data), allow_nonfinite)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    _log.info("%s: %s", path, contents.line)
    return Loaded(net, contents.line, info, hashlib.sha256(data).hexdigest())


def from_state_dict(tensors: Mapping[str, Any], allow_nonfinite: bool = False) -> Loaded:
    """The network of a state_dict in memory: of a port, or of this package where its tensors are those of the official network.

    tensors: by name; what is no tensor is left out. The other arguments and errors are those of load_weights; sha256 is the
    digest of the tensors. The order of the gate's inputs and the clamp do not follow from tensors: they are taken to be those
    of the port, or of the official network. Raises CheckpointMismatch for other state_dicts of this package.
    """
    found = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    stored = {name: _stored(name, t) for name, t in found.items()}
    contents = _official_contents(stored) or ports.read(stored, {}, [])
    net = build(contents, sum(t.numel() * t.element_size() for t in found.values()), allow_nonfinite)
    return Loaded(net, contents.line, {}, digest(found))


def load_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the author of a file of this package states about it, and its digest; the tensors are verified.

    Raises as load_weights, and CheckpointMismatch for other formats.
    """
    path = Path(path)
    data = read_file(path, MAX_BYTES)
    try:
        if sniff(data) != "safetensors":
            raise CheckpointMismatch("not a file of this package: it states nothing about its weights")
        _, metadata = _own_file(data)
        return {**_info(metadata), "sha256": metadata["sha256"]}
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error


def _contents(data: bytearray, path: Path) -> tuple[Contents, dict[str, Any]]:
    kind = sniff(data)
    if kind == "safetensors":
        return _own_contents(data)
    if kind == "caffe":
        return caffe.read(data), {}
    if kind == "mxnet":
        return mxnet.read(data, _symbol(path)), {}
    return ports.read(*torch_file.read(data, kind)), {}


def _symbol(path: Path) -> mxnet.Symbol:
    """The other half of an MXNet network, which lies beside it."""
    beside = mxnet.symbol_path(path)
    try:
        data = read_file(beside, mxnet.MAX_SYMBOL)
    except InputError as error:
        raise CheckpointMismatch(
            f"MXNet keeps a part of the network in {beside.name}, which must lie in the same folder ({error})"
        ) from error
    return mxnet.read_symbol(data, beside.name)


def _own_contents(data: bytearray) -> tuple[Contents, dict[str, Any]]:
    tensors, metadata = safetensors_file.read(data)
    if metadata.get("format") != _FORMAT:
        stored = {name: _stored(name, t) for name, t in tensors.items()}
        return ports.read(stored, {}, ["safetensors"]), {}
    tensors, metadata = _verified(tensors, metadata)
    try:
        config = MemNetConfig.from_dict(json.loads(metadata["config"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointMismatch(f"no usable configuration in the metadata: {error}") from error
    info = _info(metadata)
    expected = tensor_shapes(config)
    stored = {name: _stored(name, t) for name, t in tensors.items()}
    problems = [f"unexpected {name[:200]}" for name in sorted(stored.keys() - expected.keys())]
    line = f"a file of this package, M{config.num_memory_blocks}R{config.num_recursions}, {config.channels} channels"
    return Contents(config, stored, {}, line, problems), info


def _official_contents(stored: dict[str, Stored]) -> Contents | None:
    """Names of this package, and shapes of an official network: nobody else shares convolutions or has one output for each
    block with a batch normalisation of its own."""
    renamed, removed = ports.strip_prefixes(stored)
    ours = {new: stored[old] for old, new in renamed.items() if not new.endswith("num_batches_tracked")}
    config = guess_config({name: s.shape for name, s in ours.items()})
    if config is None or config.sharing != "conv" or not config.multi_supervised or config.share_recon_bn or not config.bias:
        return None
    line = f"the official network, M{config.num_memory_blocks}R{config.num_recursions}, {config.channels} channels"
    return Contents(config, ours, {}, line + (f"; without prefix {' '.join(map(short, removed))}" if removed else ""))


def _stored(name: str, tensor: Tensor) -> Stored:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return Stored(name, "'not dense'", tuple(tensor.shape), lambda: np.empty(0))
    dtype = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.detach()
    # NumPy has no bfloat16; float32 holds it exactly.
    return Stored(name, dtype, tuple(tensor.shape), lambda: (plain.float() if dtype == "bfloat16" else plain).cpu().numpy())


def _own_file(data: bytearray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Verified tensors and metadata."""
    return _verified(*safetensors_file.read(data))


def _verified(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    if metadata.get("format") != _FORMAT:
        raise CheckpointMismatch("a safetensors file, but not one of this package")
    if metadata.get("version") != _VERSION:
        raise CheckpointMismatch(f"version {metadata.get('version')}; this package reads version {_VERSION}")
    if metadata.get("sha256") != digest(tensors):
        raise CheckpointCorrupt("the tensors do not have the digest that was stored with them")
    return tensors, metadata


def _info(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The author's description; the digest of the metadata is verified."""
    strange = sorted(metadata.keys() - set(_METADATA))
    if strange or metadata.get("metadata_sha256", _metadata_digest(metadata)) != _metadata_digest(metadata):
        raise CheckpointCorrupt("the metadata do not have the digest that was stored with them")
    try:
        info = json.loads(metadata.get("info", "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointMismatch("the description in the metadata is not JSON") from error
    if not isinstance(info, dict):
        raise CheckpointMismatch("the description in the metadata is not a JSON object")
    return info

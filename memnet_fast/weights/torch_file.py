"""PyTorch files (.pth, .pt, .pth.tar): finding the network's tensors among everything else, and reading only those."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from memnet_fast.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointTooLarge
from memnet_fast.weights.archives import ITEM_SIZES, Archive, read_legacy, read_tar, read_zip
from memnet_fast.weights.fitting import MAX_NAME, MAX_TENSORS, Stored, short
from memnet_fast.weights.pickles import OddTensor, Record, TensorRecord

# What trainers call the weights, the better ones first: an average of the parameters is what its author would use.
_CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "params_ema",
    "params",
    "net",
    "model",
    "network",
    "module",
    "weights",
)
_FLOATS = {"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64"}
# Modules, parameters and buffers of a network that is stored whole.
_MAX_MEMBERS = 1 << 16
# Tensors whose elements share memory (expanded ones) are read up to this size: a scalar given to every channel is one.
_MAX_OVERLAPPING = 1 << 16
_READERS = {"zip": read_zip, "legacy": read_legacy, "tar": read_tar}

Tensors = dict[str, TensorRecord | OddTensor]


def read(data: bytearray, kind: str) -> tuple[dict[str, Stored], dict[str, float], list[str]]:
    """Tensors by their names in the file, eps of batch normalisations (of networks stored whole), and the names of the
    containers in which they were. kind: "zip", "legacy" or "tar".

    Raises CheckpointCorrupt, CheckpointMismatch (no tensors), CheckpointUnsafe, CheckpointTooLarge.
    """
    archive = _READERS[kind](data)
    found = _find(archive.root, [], set())
    if found is None:
        names = [short(k) for k in archive.root if type(k) is str][:8] if type(archive.root) is dict else []
        raise CheckpointMismatch("no tensors of a network were found" + (f"; it holds {', '.join(names)}" if names else ""))
    tensors, eps, where = found
    if len(tensors) > MAX_TENSORS:
        raise CheckpointTooLarge(f"{len(tensors)} tensors, more than {MAX_TENSORS}")
    return {name: _stored(archive, name, record) for name, record in tensors.items()}, eps, where


def _find(obj: Any, where: list[str], seen: set[int]) -> tuple[Tensors, dict[str, float], list[str]] | None:
    """A state dict, or a network that was stored whole: the object itself, or in a container of a known name."""
    if id(obj) in seen or len(where) > 8:
        return None
    seen.add(id(obj))  # the objects live as long as the root, so that numbers are not used again
    if type(obj) is Record:
        modules = _modules(obj)
        return None if modules is None else (*modules, [*where, str(obj.kind)])
    if type(obj) is not dict:
        return None
    for name in _CONTAINERS:
        found = _find(obj[name], [*where, name], seen) if type(obj.get(name)) in (dict, Record) else None
        if found is not None:
            return found
    tensors = {k: v for k, v in obj.items() if type(k) is str and type(v) in (TensorRecord, OddTensor)}
    return (tensors, {}, where) if tensors else None


def _modules(root: Record) -> tuple[Tensors, dict[str, float]] | None:
    """Parameters and buffers of a torch.nn.Module, as its state_dict() would name them; None if it is none."""
    tensors: Tensors = {}
    eps: dict[str, float] = {}
    waiting, count = [("", root)], 0
    while waiting:
        prefix, module = waiting.pop()
        state = module.state
        if type(state) is not dict or type(state.get("_modules")) is not dict:
            continue
        for part in ("_parameters", "_buffers", "_modules"):
            members = state.get(part)
            if type(members) is not dict:
                continue
            # Counted before they are looked at: a few modules that hold each other would make a tree without end.
            count += len(members)
            if count > _MAX_MEMBERS:
                raise CheckpointTooLarge("a network of too many modules")
            for name, value in members.items():
                if type(name) is not str or len(prefix) + len(name) > MAX_NAME:
                    raise CheckpointTooLarge("a network of too deeply nested modules, or with too long names")
                if type(value) is Record and part == "_modules":
                    waiting.append((f"{prefix}{name}.", value))
                elif type(value) in (TensorRecord, OddTensor):
                    tensors[prefix + name] = value
                    if name == "running_var" and type(state.get("eps")) is float:
                        eps[prefix.removesuffix(".")] = state["eps"]
    return (tensors, eps) if tensors else None


def _stored(archive: Archive, name: str, record: TensorRecord | OddTensor) -> Stored:
    if isinstance(record, OddTensor):
        return Stored(name, f"'{record.kind}'", (), lambda: np.empty(0))
    kind = record.storage.type
    dtype = _FLOATS.get(kind, kind.lower())
    return Stored(name, dtype, record.shape, lambda: _array(archive, name, record))


def _array(archive: Archive, name: str, record: TensorRecord) -> np.ndarray:
    """The numbers, where they lie in the file (bfloat16: as float32)."""
    storage, shape = record.storage, record.shape
    begin, end = archive.places[storage.key]
    size = ITEM_SIZES[storage.type]
    first = storage.first + record.offset
    last = first + sum((n - 1) * step for n, step in zip(shape, record.stride, strict=True))
    if 0 in shape:
        return np.empty(shape, np.float32)
    if last >= min(storage.count, (end - begin) // size):
        raise CheckpointCorrupt(f"{short(name)} reaches beyond its storage")
    if math.prod(shape) > _MAX_OVERLAPPING and _overlaps(shape, record.stride):
        raise CheckpointTooLarge(f"{short(name)}: its {math.prod(shape)} elements share memory, as expand() leaves it")
    order = ">" if archive.big_endian else "<"
    dtype = f"{order}u2" if storage.type == "BFloat16" else f"{order}f{size}"
    flat = np.frombuffer(archive.data, dtype, last - first + 1, begin + first * size)
    strides = tuple(step * size for step in record.stride)
    values = np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)
    if storage.type == "BFloat16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _overlaps(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether two elements could be one: each step must go beyond everything that the smaller ones reach."""
    reach = 0
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step <= reach:
            return True
        reach += step * (size - 1)
    return False

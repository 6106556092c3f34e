"""Safetensors, strictly: the header is checked before a tensor exists.

The format forbids duplicate names, holes and overlaps, but readers differ in what they notice; a file that two readers
understand differently is refused here.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any, NoReturn

import torch
from torch import Tensor

from memnet_fast.errors import CheckpointCorrupt
from memnet_fast.weights.fitting import MAX_TENSORS

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# JSON may need twenty times its size in memory; 4096 tensors need half of this.
_MAX_HEADER = 1 << 20
_MAX_DIMENSIONS = 8


def read(data: bytearray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, which share the memory of data, and metadata. Raises CheckpointCorrupt."""
    header, start = _header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail("the metadata are not text")
    if len(header) > MAX_TENSORS:
        _fail(f"{len(header)} tensors, more than {MAX_TENSORS}")
    pieces = sorted(((*_checked(name, entry), name) for name, entry in header.items()), key=lambda p: (p[0], p[1]))
    at = 0
    for begin, end, _, _, name in pieces:
        if begin != at:
            _fail(f"{name[:200]!r} begins at {begin}, not at {at}: there is a hole or an overlap")
        at = end
    if at != len(data) - start:
        _fail(f"{len(data) - start} bytes of tensors, but the header declares {at}")
    tensors = {}
    for begin, end, dtype, shape, name in pieces:
        if end > begin:
            flat = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=start + begin)
        else:
            flat = torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    return tensors, metadata


def _header(data: bytearray) -> tuple[dict[str, Any], int]:
    """The JSON object and the offset of the first tensor."""
    if len(data) < 8:
        _fail("no header")
    length = struct.unpack_from("<Q", data)[0]
    if length > min(_MAX_HEADER, len(data) - 8):
        _fail(f"a header of {length} bytes in a file of {len(data)}; at most {_MAX_HEADER} are read")
    try:
        header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_unique, parse_constant=_fail)
    except (ValueError, RecursionError) as error:
        _fail(f"the header is not JSON: {str(error)[:200]}")
    if not isinstance(header, dict):
        _fail("the header is not a JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        _fail("a name appears twice in the header")
    return result


def _checked(name: str, entry: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """begin, end, dtype and shape of one tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _fail(f"the entry of {name[:200]!r} is not one of a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _fail(f"{name[:200]!r} has the unknown dtype {str(dtype)[:20]!r}")
    if not _integers(shape) or len(shape) > _MAX_DIMENSIONS or not _integers(offsets) or len(offsets) != 2:
        _fail(f"{name[:200]!r} has no sound shape and offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        _fail(f"{name[:200]!r} has shape {shape} and {end - begin} bytes")
    return begin, end, _DTYPES[dtype], tuple(shape)


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _fail(reason: str) -> NoReturn:
    raise CheckpointCorrupt(f"not a sound safetensors file: {reason}")

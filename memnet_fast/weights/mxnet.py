"""MXNet's .params: a list of arrays and their names, as `mx.nd.save` writes it, and the symbol (JSON) that belongs to it.

MXNet keeps a network in two files, NAME-symbol.json and NAME-0000.params, and the arrays are not all of it: the published
conversions of MemNet have the learned weights w_m of the outputs, and the eps of the batch normalisations (1e-4, which their
converter puts in the place of Caffe's 1e-5), in the symbol alone. So the symbol is needed, and it lies beside the arrays.

Known names are those of the official layers with MXNet's endings (conv01_01_a_weight, bn_conv01_01_a_gamma, ..., behind
`arg:` or `aux:`), and learned_1, learned_2, ..., which are the tensors of port A' in the order of its state_dict.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from memnet_fast.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointTooLarge
from memnet_fast.weights import official, ports
from memnet_fast.weights.fitting import EPS, MAX_NAME, MAX_TENSORS, Contents, Stored, same_bits, short

MAGIC = struct.pack("<QQ", 0x112, 0)
# An array begins with the version of its layout; the oldest has its number of dimensions there.
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_MAX_DIMENSIONS = 32
# By MXNet's number of the element type: NumPy's type in the file, and the name in messages.
_DTYPES = {
    0: ("<f4", "float32"),
    1: ("<f8", "float64"),
    2: ("<f2", "float16"),
    3: ("u1", "uint8"),
    4: ("<i4", "int32"),
    5: ("i1", "int8"),
    6: ("<i8", "int64"),
    7: ("u1", "bool"),
    12: ("<u2", "bfloat16"),
}
# JSON may need thirty times its size in memory. The official M6R6 has 230 kB, an M10R10 three times as many.
MAX_SYMBOL = 2 << 20
_CONV = {"weight": "weight", "bias": "bias"}
_BATCH_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
_ARRAY = re.compile(rf"(.+)_({'|'.join([*_CONV.values(), *_BATCH_NORM.values()])})")
_LEARNED = re.compile(r"learned_([1-9]\d{0,4})")


def _corrupt(reason: str) -> NoReturn:
    raise CheckpointCorrupt(f"not a sound MXNet file: {reason}")


# Arrays -------------------------------------------------------------------------------------------------------------------


class _Bytes:
    def __init__(self, data: bytearray) -> None:
        self.data, self.at = data, 0

    def take(self, size: int, what: str) -> int:
        """Steps over them and tells where they begin."""
        if size > len(self.data) - self.at:
            _corrupt(f"{what} at byte {self.at} needs {size} bytes, where {len(self.data) - self.at} are left")
        self.at += size
        return self.at - size

    def numbers(self, format: str, what: str) -> tuple[int, ...]:
        return struct.unpack_from(format, self.data, self.take(struct.calcsize(format), what))


def read_arrays(data: bytearray) -> dict[str, Stored]:
    """Arrays by name, without `arg:` and `aux:`. They share the memory of data.

    Raises CheckpointCorrupt, CheckpointMismatch (sparse arrays, or no names), CheckpointTooLarge.
    """
    file = _Bytes(data)
    if data[: len(MAGIC)] != MAGIC:
        _corrupt("its first bytes are wrong")
    file.at = len(MAGIC)
    (count,) = file.numbers("<Q", "the number of arrays")
    if count > MAX_TENSORS:
        raise CheckpointTooLarge(f"{count} arrays, more than {MAX_TENSORS}")
    arrays = [_array(file, f"array {i}") for i in range(count)]
    (named,) = file.numbers("<Q", "the number of names")
    if not named and count:
        raise CheckpointMismatch("its arrays have no names")
    if named != count:
        _corrupt(f"{named} names for {count} arrays")
    result: dict[str, Stored] = {}
    for dtype, shape, kind, begin in arrays:
        name = _name(file)
        if name in result:
            _corrupt(f"two arrays are called {short(name)}")
        result[name] = Stored(name, dtype, shape, partial(_values, data, kind, shape, begin))
    if file.at != len(data):
        _corrupt(f"{len(data) - file.at} bytes after the last name")
    return result


def _array(file: _Bytes, what: str) -> tuple[str, tuple[int, ...], str, int]:
    """dtype, shape, NumPy's type and where the values begin."""
    (version,) = file.numbers("<I", what)
    if version in (_V2, _V3):
        (storage,) = file.numbers("<i", what)
        if storage != 0:
            raise CheckpointMismatch(f"{what} is not dense; only dense arrays are read")
    dimensions = version if version not in (_V1, _V2, _V3) else file.numbers("<i", what)[0]
    if not 0 <= dimensions <= _MAX_DIMENSIONS:
        _corrupt(f"{what} has {dimensions} dimensions or is of an unknown version")
    shape = file.numbers(f"<{dimensions}{'q' if version in (_V1, _V2, _V3) else 'I'}", what)
    if dimensions == 0 and version != _V3:  # an array that was never filled ends here
        return "float32", (0,), "<f4", file.at
    if any(not 0 <= size < 1 << 48 for size in shape):
        _corrupt(f"{what} has shape {list(shape)}")
    _, _, dtype = file.numbers("<iii", what)  # the device and its number do not matter
    if dtype not in _DTYPES:
        _corrupt(f"{what} has the unknown type {dtype}")
    kind, name = _DTYPES[dtype]
    return name, shape, kind, file.take(math.prod(shape) * np.dtype(kind).itemsize, what)


def _name(file: _Bytes) -> str:
    (length,) = file.numbers("<Q", "a name")
    if length > MAX_NAME:
        raise CheckpointTooLarge(f"an array whose name has {length} bytes, more than {MAX_NAME}")
    begin = file.take(length, "a name")
    try:
        name = file.data[begin : file.at].decode()
    except UnicodeDecodeError:
        _corrupt(f"the name at byte {begin} is no text")
    return name[4:] if name.startswith(("arg:", "aux:")) else name


def _values(data: bytearray, kind: str, shape: tuple[int, ...], begin: int) -> np.ndarray:
    values = np.frombuffer(data, kind, math.prod(shape), begin) if 0 not in shape else np.empty(0, kind)
    if kind == "<u2":  # bfloat16 is the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape)


# Symbol -------------------------------------------------------------------------------------------------------------------


@dataclass
class Symbol:
    """What the arrays do not tell. eps, fixed: by the name of the array gamma (fixed: gamma is 1 whatever is stored);
    weights: each factor, and the names of the two steps before it."""

    name: str
    eps: dict[str, float] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    weights: list[tuple[float, set[str]]] = field(default_factory=list)


def symbol_path(path: Path) -> Path:
    """NAME-symbol.json of NAME-0000.params (or of NAME.params)."""
    stem = path.name.removesuffix(".params")
    return path.with_name(f"{re.sub(r'-[0-9]{4}$', '', stem)}-symbol.json")


def read_symbol(data: bytearray, name: str) -> Symbol:
    """Raises CheckpointCorrupt, CheckpointTooLarge. name: of the file, for messages."""
    if len(data) > MAX_SYMBOL:
        raise CheckpointTooLarge(f"{name} has {len(data)} bytes, more than {MAX_SYMBOL}")
    try:
        nodes = json.loads(data.decode())["nodes"]
        symbol, names = Symbol(name), [str(node["name"])[:MAX_NAME] for node in nodes]
        for node in nodes:
            # Older versions call the attributes "attr" or "param".
            attributes = node.get("attrs") or node.get("attr") or node.get("param") or {}
            if node["op"] == "BatchNorm":
                gamma = names[_index(node["inputs"][1], len(names))]
                symbol.eps[gamma] = float(attributes.get("eps", 1e-3))
                if str(attributes.get("fix_gamma", "True")).lower() in ("true", "1"):
                    symbol.fixed.add(gamma)
            elif node["op"] in ("_mul_scalar", "_MulScalar"):
                before = _index(node["inputs"][0], len(names))
                inputs = [_index(i, len(names)) for i in nodes[before].get("inputs", [])[:8]]
                symbol.weights.append((float(attributes["scalar"]), {names[i] for i in (before, *inputs)}))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointCorrupt(f"{name} is not a sound MXNet symbol") from error
    return symbol


def _index(reference: Any, count: int) -> int:
    """The node of [node, output, version]."""
    if type(reference[0]) is not int or not 0 <= reference[0] < count:
        raise ValueError("no such node")
    return reference[0]


# Networks -----------------------------------------------------------------------------------------------------------------


def read(data: bytearray, symbol: Symbol) -> Contents:
    """Raises CheckpointCorrupt, CheckpointMismatch (no MemNet), CheckpointTooLarge."""
    arrays = read_arrays(data)
    for name in symbol.fixed & arrays.keys():
        arrays[name] = Stored(name, "float32", arrays[name].shape, partial(np.ones, arrays[name].shape, np.float32))
    learned = sorted(int(match[1]) for name in arrays if (match := _LEARNED.fullmatch(name)))
    if learned and len(learned) == len(arrays):
        return _read_learned(arrays, learned, symbol)
    keys: dict[official.Key, str] = {}
    for name in arrays:
        match = _ARRAY.fullmatch(name)
        key = official.parse(match[1]) if match else None
        if match and key and (key[0] == "bn") == (match[2] in _BATCH_NORM.values()) and key[0] in ("bn", "conv"):
            keys[key[0] + "_" + match[2], key[1]] = name
    if not keys:
        found = ", ".join(short(n) for n in sorted(arrays)[:4])
        raise CheckpointMismatch(f"its arrays ({found}, ...) are not named as in a known conversion of MemNet")
    return _read_official(arrays, keys, symbol)


def _read_official(arrays: dict[str, Stored], keys: Mapping[official.Key, str], symbol: Symbol) -> Contents:
    convs = {unit: arrays[name].shape for (part, unit), name in keys.items() if part == "conv_weight"}
    bias = not convs or any(part == "conv_bias" for part, _ in keys)
    config = official.infer_config((unit for _, unit in keys), convs, bias)
    problems: list[str] = []
    tensors: dict[str, Stored] = {}
    names: dict[str, str] = {}
    eps: dict[str, float] = {}
    reported: set[str] = set()
    used: set[str] = set()
    for unit, bn, conv in official.units(config):
        wanted = [(f"{bn}.{leaf}", "bn", ending) for leaf, ending in _BATCH_NORM.items()]
        wanted += [(f"{conv}.{leaf}", "conv", leaf) for leaf in (("weight", "bias") if bias else ("weight",))]
        for ours, part, ending in wanted:
            layer = official.layer_name(part, unit)
            name = keys.get((f"{part}_{ending}", unit))
            if name is None:
                problems.append(f"missing {layer}_{ending}")
                reported.add(ours)
                names.setdefault(ours, f"{layer}_{ending}")
                continue
            used.add(name)
            if ours not in tensors:
                tensors[ours], names[ours] = arrays[name], name
            elif not same_bits(tensors[ours].read(), arrays[name].read()):
                problems.append(f"{name} differs from {tensors[ours].name}, with which it is shared")
            if ending == "gamma":
                if name not in symbol.eps:
                    problems.append(f"{symbol.name} has no BatchNorm of {name}")
                elif not math.isclose(symbol.eps[name], EPS, rel_tol=1e-5):
                    eps[bn] = symbol.eps[name]
    problems += _strange_eps(symbol, eps, official.layer_name("bn", ("first",)))
    heads = [
        [w for w, before in symbol.weights if official.layer_name("conv", ("end", m)) in before]
        for m in range(1, config.num_memory_blocks + 1)
    ]
    for m, found in enumerate(heads, 1):
        if len(found) != 1:
            layer = official.layer_name("conv", ("end", m))
            problems.append(f"{symbol.name} has {len(found) or 'no'} factors (_mul_scalar) of the output behind {layer}, not 1")
    names["head_weights"] = f"the factors in {symbol.name}"
    if all(len(found) == 1 for found in heads):
        tensors["head_weights"] = _factors(symbol, [found[0] for found in heads])
    else:
        reported.add("head_weights")
    problems += [f"unexpected {short(name)}" for name in arrays if name not in used]
    line = (
        f"official network in MXNet's format, M{config.num_memory_blocks}R{config.num_recursions}, {config.channels} channels, "
        f"{config.in_channels} -> {config.out_channels}; with {symbol.name}"
    )
    return Contents(config, tensors, names, line, problems, eps, reported)


def _strange_eps(symbol: Symbol, eps: Mapping[str, float], example: str) -> list[str]:
    strange = {value for value in eps.values() if not 0 <= value < math.inf}
    return [f"{symbol.name} has eps {value} in batch normalisations such as {example}" for value in strange]


def _factors(symbol: Symbol, values: list[float]) -> Stored:
    return Stored(f"the factors in {symbol.name}", "float64", (len(values),), lambda: np.array(values))


def _read_learned(arrays: dict[str, Stored], numbers: list[int], symbol: Symbol) -> Contents:
    """Six arrays for each unit: gamma, beta, mean, variance, weight, bias; the first layer, the reconstruction, then the
    blocks, each of recursions of two units and a gate, which is the one with a 1x1 kernel."""
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) % 6 or len(numbers) < 12:
        raise CheckpointMismatch("learned_1, learned_2, ... have gaps, or are not six for each convolution of port A'")
    units = [numbers[i : i + 6] for i in range(0, len(numbers), 6)]
    stems, block, inside = ["feature_extractor", "reconstructor"], 0, 0
    for unit in units[2:]:
        if arrays[f"learned_{unit[4]}"].shape[2:] == (1, 1):
            stems.append(f"dense_memory.{block}.gate_unit")
            block, inside = block + 1, 0
        else:
            stems.append(f"dense_memory.{block}.recursive_unit.{inside // 2}.relu_conv{inside % 2 + 1}")
            inside += 1
    leaves = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "conv.weight", "conv.bias")
    stored, eps = {}, {}
    for stem, unit in zip(stems, units, strict=True):
        for leaf, number in zip(leaves, unit, strict=True):
            stored[f"{stem}.{leaf}"] = arrays[f"learned_{number}"]
        gamma = f"learned_{unit[0]}"
        if gamma not in symbol.eps:
            raise CheckpointMismatch(f"{symbol.name} has no BatchNorm of {gamma}")
        if not math.isclose(symbol.eps[gamma], EPS, rel_tol=1e-5):
            eps[f"{stem}.bn"] = symbol.eps[gamma]
    stored["weights"] = _factors(symbol, [w for w, _ in symbol.weights])
    contents = ports.read(stored, eps, [])
    contents.line += f"; in MXNet's format, with {symbol.name}"
    return contents

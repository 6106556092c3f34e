"""Files of other programs, written from their descriptions: .caffemodel, MXNet, and the PyTorch formats that torch no longer
writes.

Nothing here is shared with the readers of the package.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Blobs = dict[str, list[np.ndarray]]

# Protocol buffers ---------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def tag(number: int, wire: int) -> bytes:
    return varint(number << 3 | wire)


def piece(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return tag(number, 2) + varint(len(content)) + content


def packed(values: np.ndarray) -> bytes:
    return piece(5, values.astype("<f4").tobytes())


def packed_in_three(values: np.ndarray) -> bytes:
    return b"".join(packed(part) for part in np.array_split(values, 3))


def unpacked(values: np.ndarray) -> bytes:
    return b"".join(tag(5, 5) + struct.pack("<f", v) for v in values)


def doubles(values: np.ndarray) -> bytes:
    return piece(8, values.astype("<f8").tobytes())


def unpacked_doubles(values: np.ndarray) -> bytes:
    return b"".join(tag(8, 1) + struct.pack("<d", v) for v in values)


def shape_message(shape: tuple[int, ...]) -> bytes:
    return piece(7, piece(1, b"".join(varint(n) for n in shape)))


def shape_unpacked(shape: tuple[int, ...]) -> bytes:
    return piece(7, b"".join(tag(1, 0) + varint(n) for n in shape))


def legacy_shape(shape: tuple[int, ...]) -> bytes:
    four = (1,) * (4 - len(shape)) + tuple(shape)
    return b"".join(tag(i + 1, 0) + varint(n) for i, n in enumerate(four))


def caffe_layer(
    name: str,
    blobs: list[np.ndarray],
    v1: bool = False,
    data: Callable[[np.ndarray], bytes] = packed,
    shape: Callable[[tuple[int, ...]], bytes] = shape_message,
    eps: float | None = None,
) -> bytes:
    """A field of NetParameter: V2 (100: name 1, blobs 7) or V1 (2: name 4, blobs 6)."""
    number_name, number_blobs = (4, 6) if v1 else (1, 7)
    content = piece(number_name, name.encode()) + (b"" if v1 else piece(2, b"Convolution")) + piece(3, b"bottom")
    for blob in blobs:
        content += piece(number_blobs, shape(blob.shape) + data(blob.reshape(-1)))
    if eps is not None:
        content += piece(139, tag(1, 0) + b"\x01" + tag(3, 5) + struct.pack("<f", eps))
    return piece(2 if v1 else 100, content)


def caffemodel(blobs: Blobs, v1: bool = False, eps: float | None = None, **how) -> bytes:
    """A NetParameter with the layers, between layers without blobs and with a field that nobody knows."""
    out = piece(1, b"MemNet") + piece(100, piece(1, b"data") + piece(2, b"Input")) + tag(77, 0) + varint(5)
    for name, values in blobs.items():
        out += caffe_layer(name, values, v1, eps=eps if name.startswith("bn_") else None, **how)
    return out + piece(100, piece(1, b"loss") + piece(2, b"EuclideanLoss") + piece(7, shape_message((1,)) + packed(np.ones(1))))


def official_blobs(m: int, r: int, c: int, seed: int = 0, factor: float = 3.0) -> Blobs:
    """A random official network. Means and variances are stored times the factor."""
    g = np.random.default_rng(seed)
    blobs: Blobs = {}

    def normal(*shape: int, gain: float = 1.0) -> np.ndarray:
        return (g.standard_normal(shape) * gain).astype(np.float32)

    def bn(name: str, channels: int) -> None:
        variance = g.uniform(0.5, 2, channels).astype(np.float32) * np.float32(factor)
        blobs[f"bn_{name}"] = [normal(channels) * np.float32(0.3 * factor), variance, np.array([factor], np.float32)]
        blobs[f"scale_{name}"] = [g.uniform(0.5, 1.5, channels).astype(np.float32), normal(channels, gain=0.3)]

    def conv(out: int, into: int, k: int) -> list[np.ndarray]:
        return [normal(out, into, k, k, gain=(1 / (into * k * k)) ** 0.5), normal(out, gain=0.1)]

    bn("conv1", 1)
    blobs["conv1"] = conv(c, 1, 3)
    end = conv(1, c, 3)
    for i in range(1, m + 1):
        shared = {x: conv(c, c, 3) for x in "ab"}
        for j in range(1, r + 1):
            for x in "ab":
                name = f"conv{i:02d}_{j:02d}_{x}"
                bn(name, c)
                blobs[name] = [blob.copy() for blob in shared[x]]
        bn(f"conv_transition_{i:02d}", c * (r + i))
        blobs[f"conv_transition_{i:02d}"] = conv(c, c * (r + i), 1)
        bn(f"conv_end_{i:02d}", c)
        blobs[f"conv_end_{i:02d}"] = [blob.copy() for blob in end]
        blobs[f"weight_output_end_{i:02d}"] = [normal(1)]
    return blobs


def caffe_forward(blobs: Blobs, m: int, r: int, x: Tensor, eps: float = 1e-5) -> Tensor:
    """What Caffe computes from the blobs, in float64. x: [N, 1, H, W]"""

    def unit(h: Tensor, name: str, padding: int) -> Tensor:
        mean, variance, factor = (torch.from_numpy(b).double() for b in blobs[f"bn_{name}"])
        scale = 0.0 if factor.item() == 0 else 1 / factor
        gamma, beta = (torch.from_numpy(b).double().view(1, -1, 1, 1) for b in blobs[f"scale_{name}"])
        h = (h - (mean * scale).view(1, -1, 1, 1)) / (variance * scale + eps).sqrt().view(1, -1, 1, 1) * gamma + beta
        weight, bias = (torch.from_numpy(b).double() for b in blobs[name])
        return F.conv2d(h.clamp(min=0), weight, bias, padding=padding)

    x = x.double()
    long, y = [unit(x, "conv1", 1)], torch.zeros_like(x)
    for i in range(1, m + 1):
        h, short = long[-1], []
        for j in range(1, r + 1):
            h = h + unit(unit(h, f"conv{i:02d}_{j:02d}_a", 1), f"conv{i:02d}_{j:02d}_b", 1)
            short.append(h)
        long.append(unit(torch.cat(long + short, 1), f"conv_transition_{i:02d}", 0))
        y = y + float(blobs[f"weight_output_end_{i:02d}"][0][0]) * (x + unit(long[-1], f"conv_end_{i:02d}", 1))
    return y


# MXNet --------------------------------------------------------------------------------------------------------------------

MXNET_TYPES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6, "bool": 7}


def mxnet_array(values: np.ndarray, version: int = 2) -> bytes:
    """version: 0 (32-bit dimensions, no magic number) to 3."""
    values = np.ascontiguousarray(values)
    if version == 0:
        head = struct.pack(f"<I{values.ndim}I", values.ndim, *values.shape)
    else:
        head = struct.pack("<I", 0xF993FAC7 + version) + (struct.pack("<i", 0) if version > 1 else b"")
        head += struct.pack(f"<I{values.ndim}q", values.ndim, *values.shape)
    device = struct.pack("<ii", 1, 0)
    return head + device + struct.pack("<i", MXNET_TYPES[values.dtype.name]) + values.tobytes()


def mxnet_params(arrays: dict[str, np.ndarray], version: int = 2) -> bytes:
    """The list of arrays and the list of names."""
    out = struct.pack("<QQQ", 0x112, 0, len(arrays)) + b"".join(mxnet_array(a, version) for a in arrays.values())
    names = (name.encode() for name in arrays)
    return out + struct.pack("<Q", len(arrays)) + b"".join(struct.pack("<Q", len(n)) + n for n in names)


class _Symbol:
    """A graph in the JSON of MXNet 1.x."""

    def __init__(self) -> None:
        self.nodes: list[dict] = []

    def add(self, op: str, name: str, *inputs: int, **attributes: object) -> int:
        node = {"op": op, "name": name, "inputs": [[i, 0, 0] for i in inputs]}
        if attributes:
            node["attrs"] = {k: str(v) for k, v in attributes.items()}
        self.nodes.append(node)
        return len(self.nodes) - 1

    def unit(self, x: int, names: list[str], eps: float, bn: str, conv: str) -> int:
        """Batch normalisation, ReLU and convolution; names: of gamma, beta, mean, variance, weight and bias."""
        arrays = [self.add("null", name) for name in names]
        x = self.add("BatchNorm", bn, x, *arrays[:4], eps=eps, fix_gamma=False)
        return self.add("Convolution", conv, self.add("Activation", f"relu_{conv}", x), *arrays[4:], no_bias=False)

    def text(self, heads: int) -> bytes:
        return json.dumps({"nodes": self.nodes, "heads": [[heads, 0, 0]], "attrs": {"mxnet_version": ["int", 10300]}}).encode()


def mxnet_official(blobs: Blobs, m: int, r: int, eps: float = 1e-4) -> tuple[dict[str, np.ndarray], bytes]:
    """Arrays and symbol as the published conversions have them: the w_m are numbers in the symbol."""
    arrays: dict[str, np.ndarray] = {}
    symbol = _Symbol()
    data = symbol.add("null", "data")

    def unit(x: int, name: str) -> int:
        mean, variance, factor = blobs[f"bn_{name}"]
        gamma, beta = blobs[f"scale_{name}"]
        scale = np.float32(0 if factor[0] == 0 else 1 / factor[0])
        named = {
            f"bn_{name}_gamma": gamma,
            f"bn_{name}_beta": beta,
            f"bn_{name}_moving_mean": mean * scale,
            f"bn_{name}_moving_var": variance * scale,
            f"{name}_weight": blobs[name][0],
            f"{name}_bias": blobs[name][1],
        }
        arrays.update({f"{'aux' if 'moving' in k else 'arg'}:{k}": v for k, v in named.items()})
        return symbol.unit(x, list(named), eps, f"bn_{name}", name)

    long, outputs = [unit(data, "conv1")], []
    for i in range(1, m + 1):
        h, short = long[-1], []
        for j in range(1, r + 1):
            t = unit(unit(h, f"conv{i:02d}_{j:02d}_a"), f"conv{i:02d}_{j:02d}_b")
            h = symbol.add("broadcast_add", f"eltwise{i:02d}_{j:02d}", h, t)
            short.append(h)
        gate = symbol.add("Concat", f"concat_{i:02d}", *long, *short, dim=1, num_args=len(long + short))
        long.append(unit(gate, f"conv_transition_{i:02d}"))
        y = symbol.add("broadcast_add", f"HR_recovery_{i:02d}", data, unit(long[-1], f"conv_end_{i:02d}"))
        weight = float(blobs[f"weight_output_end_{i:02d}"][0][0])
        outputs.append(symbol.add("_mul_scalar", f"_mulscalar{i - 1}", y, scalar=weight))
    return arrays, symbol.text(symbol.add("add_n", "HR_recovery", *outputs, num_args=m))


def mxnet_learned(state: dict[str, np.ndarray], m: int, r: int, eps: float = 1e-5) -> tuple[dict[str, np.ndarray], bytes]:
    """Port A' as its conversion through ONNX names it: learned_1, ..., in the order of the state dict; `weights` in the symbol.

    state: with the port's own names.
    """
    stems = ["feature_extractor", "reconstructor"]
    for i in range(m):
        stems += [f"dense_memory.{i}.recursive_unit.{j}.relu_conv{k}" for j in range(r) for k in (1, 2)]
        stems.append(f"dense_memory.{i}.gate_unit")
    leaves = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "conv.weight", "conv.bias")
    names = {f"{stem}.{leaf}": f"learned_{6 * s + k + 1}" for s, stem in enumerate(stems) for k, leaf in enumerate(leaves)}
    symbol = _Symbol()
    data = symbol.add("null", "data")
    used: dict[str, int] = {}

    def unit(x: int, stem: str) -> int:
        used[stem] = number = len(used)
        return symbol.unit(x, [names[f"{stem}.{leaf}"] for leaf in leaves], eps, f"batchnorm{number}", f"convolution{number}")

    long, total = [unit(data, "feature_extractor")], None
    for i in range(m):
        h, short = long[-1], []
        for j in range(r):
            t = unit(
                unit(h, f"dense_memory.{i}.recursive_unit.{j}.relu_conv1"), f"dense_memory.{i}.recursive_unit.{j}.relu_conv2"
            )
            h = symbol.add("broadcast_add", f"broadcast_add{i}_{j}", t, h)
            short.append(h)
        long.append(unit(symbol.add("Concat", f"concat{i}", *short, *long), f"dense_memory.{i}.gate_unit"))
        y = symbol.add("broadcast_add", f"broadcast_add{i}", unit(long[-1], "reconstructor"), data)
        y = symbol.add("_mul_scalar", f"_mulscalar{i}", y, scalar=float(state["weights"].reshape(-1)[i]))
        total = y if total is None else symbol.add("broadcast_add", f"sum{i}", total, y)
    assert total is not None
    return {names[k]: v for k, v in state.items() if k in names}, symbol.text(total)


# PyTorch ------------------------------------------------------------------------------------------------------------------


class _Persistent(pickle.Pickler):
    """Tensors become persistent ids, as in PyTorch 0.1."""

    ids: dict[int, int]

    def persistent_id(self, obj):
        return self.ids.setdefault(id(obj), len(self.ids) + 1) if isinstance(obj, Tensor) else None


def tar_file(obj, tensors: list[Tensor]) -> bytes:
    """The tar format: every tensor has a storage of its own. `tensors`: all that obj holds, float32."""
    buffer = io.BytesIO()
    pickler = _Persistent(buffer, 2)
    pickler.ids = {}
    pickler.dump(obj)
    kept = {pickler.ids[id(t)]: t for t in tensors}
    # The names of storage classes are written by hand, as pickles of protocol 2: torch 2 has other classes.
    storages = pickle.dumps(len(kept), 2)
    views, described = pickle.dumps([], 2), pickle.dumps(len(kept), 2)
    for key, t in kept.items():
        kind = b"ctorch\nFloatStorage\n"
        storages += b"\x80\x02(" + b"J" + struct.pack("<i", key + 1000) + b"U\x03cpu" + kind + b"t."
        storages += struct.pack("<q", t.numel()) + t.contiguous().numpy().tobytes()
        described += b"\x80\x02(" + b"J" + struct.pack("<i", key) + b"J" + struct.pack("<i", key + 1000)
        described += b"ctorch\nFloatTensor\nt."
        described += struct.pack("<ii", t.ndim, 0) + struct.pack(f"<{2 * t.ndim + 1}q", *t.shape, *t.contiguous().stride(), 0)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (
            ("sys_info", pickle.dumps({}, 2)),
            ("pickle", buffer.getvalue()),
            ("tensors", described),
            ("storages", storages + views),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def stored_zip(members: dict[str, bytes], method: int = 0) -> bytes:
    """A zip archive as torch.save makes it, of any members."""
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def torch_bytes(obj, legacy: bool = False) -> bytes:
    out = io.BytesIO()
    torch.save(obj, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()

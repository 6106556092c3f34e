"""Files of other programs, written from their descriptions: .caffemodel, and the PyTorch formats that torch no longer writes.

Nothing here is shared with the readers of the package.
"""

from __future__ import annotations

import io
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

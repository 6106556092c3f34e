"""Files made to attack a reader, as tables: name -> (how to make it, what it must end in), and sound files of 27 MB."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable

import numpy as np
import safetensors.torch
import torch

from memnet_fast import weights
from memnet_fast.config import MemNetConfig
from memnet_fast.reference import MemNet
from support import checkpoints as make
from support import networks

UNSAFE, CORRUPT, MISMATCH, LARGE = "CheckpointUnsafe", "CheckpointCorrupt", "CheckpointMismatch", "CheckpointTooLarge"

# Pickles ------------------------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


CANARY = "/tmp/memnet_fast_canary"
_OS = os.system.__module__.encode()
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
_STORAGE = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x04tQ"
_ONE_TENSOR = _TENSOR + b"(" + _STORAGE + b"K\x00K\x04\x85K\x01\x85\x89" + b"ccollections\nOrderedDict\n)R" + b"tR"
_LAUGHS = b"".join(b"](" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1]) for i in range(60))
_TUPLES = b")q\x000" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0" for i in range(60))


def _colliding_keys() -> bytes:
    """Integers with one hash: a dictionary of them would need quadratic time."""
    modulus = sys.hash_info.modulus
    keys = (k * modulus for k in range(1, 40_001))
    return b"}(" + b"".join(b"\x8a\x0c" + k.to_bytes(12, "little", signed=True) + b"N" for k in keys) + b"u."


PICKLES = {
    "os.system": (pickle.dumps(Calls(os.system, f"touch {CANARY}"), 2), UNSAFE),
    "eval": (pickle.dumps(Calls(eval, f"open('{CANARY}', 'w')"), 2), UNSAFE),
    "exec, protocol 4": (pickle.dumps({"state_dict": Calls(exec, "1/0")}, 4), UNSAFE),
    "subprocess": (pickle.dumps([Calls(subprocess.Popen, ["touch", CANARY])], 2), UNSAFE),
    "protocol 0": (b"c" + _OS + b"\nsystem\n(S'touch " + CANARY.encode() + b"'\ntR.", UNSAFE),
    "old instance": (b"(S'touch " + CANARY.encode() + b"'\ni" + _OS + b"\nsystem\n.", UNSAFE),
    "old object": (b"(c" + _OS + b"\nsystem\nS'touch " + CANARY.encode() + b"'\no.", UNSAFE),
    "new object": (b"\x80\x02csubprocess\nPopen\n" + _text(CANARY) + b"\x85\x81.", UNSAFE),
    "getattr chain": (pickle.dumps(Calls(getattr, "", "join"), 2), UNSAFE),
    "name in a name": (b"\x80\x04" + _text("torch") + _text("os.system") + b"\x93" + _text("x") + b"\x85R.", UNSAFE),
    "only named": (b"\x80\x02}" + _text("x") + b"cos\nsystem\ns.", UNSAFE),
    "call of an argument": (b"\x80\x02" + _text("x") + b")R.", UNSAFE),
    "torch function": (b"\x80\x02ctorch.hub\nload\n" + _text("a/b") + b"\x85R.", UNSAFE),
    "torch.load inside": (b"\x80\x02ctorch\nload\n" + _text("/etc/passwd") + b"\x85R.", UNSAFE),
    "numpy function": (b"\x80\x02cnumpy.testing._private.utils\nrunstring\n" + _text("1/0") + b"}\x86R.", UNSAFE),
    "foreign function": (b"\x80\x02csomebody\nrun\n)R.", UNSAFE),
    "registry": (b"\x80\x02\x82\x01.", UNSAFE),
    "items of a tensor": (b"\x80\x02" + _ONE_TENSOR + b"K\x00K\x01s.", UNSAFE),
    "state of a tensor": (b"\x80\x02" + _ONE_TENSOR + b"}b.", UNSAFE),
    "state of a class": (b"\x80\x02csomebody\nClass\n}b.", UNSAFE),
    "control characters in a name of code": (b"\x80\x04" + _text("somebody\n") + _text("\x1b[2J") + b"\x93)R.", UNSAFE),
    "control characters in a name": (b"\x80\x02}" + _text("reconstructor.\n\x1b[31m") + _ONE_TENSOR + b"s.", MISMATCH),
    "wide nested lists": (b"\x80\x02]q\x00" + _LAUGHS + b".", MISMATCH),
    "wide nested keys": (b"\x80\x02" + _TUPLES + b"}h\x3cNs.", MISMATCH),
    "deep lists": (b"\x80\x02" + b"(" * 120_000 + b"l" * 120_000 + b".", MISMATCH),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 350_000 + b".", MISMATCH),
    "deep state_dicts": (b"\x80\x02" + (b"}" + _text("state_dict")) * 20_000 + b"}" + b"s" * 20_000 + b".", MISMATCH),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", MISMATCH),
    "a dictionary in itself": (b"\x80\x02}q\x00" + _text("model") + b"h\x00s.", MISMATCH),
    "a module in itself": (
        b"\x80\x02cm\nNet\n)\x81q\x00}" + _text("_modules") + b"}" + _text("a") + b"h\x00ssb.",
        LARGE,
    ),
    "modules in modules": (
        b"\x80\x02cm\nNet\n)\x81q\x00}("
        + _text("_modules")
        + b"}("
        + b"".join(_text(f"{i}") + b"h\x00" for i in range(20_000))
        + b"uub.",
        LARGE,
    ),
    "endless prefix": (b"\x80\x02}" + _text("module." * 200_000) + _ONE_TENSOR + b"s.", LARGE),
    "long prefix": (b"\x80\x02}" + _text("a." * 200 + "b") + _ONE_TENSOR + b"s.", MISMATCH),
    "long names of classes": (
        b"\x80\x02c" + b"m" * 190 + b"\n" + b"n" * 190 + b"\nq\x00(" + b"h\x00)\x81" * 90_000 + b"l.",
        MISMATCH,
    ),
    "colliding keys": (b"\x80\x02" + _colliding_keys(), MISMATCH),
    "copied lists": (
        b"\x80\x02](" + b"N" * 100_000 + b"eq\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 30_000 + b".",
        CORRUPT,
    ),
    "many pairs": (
        b"\x80\x02](NN\x86q\x01" + b"h\x01" * 100_000 + b"eq\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 10_000 + b".",
        LARGE,
    ),
    "empty dictionaries": (b"\x80\x02(" + b"}" * 3_000_000 + b"l.", LARGE),
    "memo": (b"\x80\x02" + b"}\x94" * 2_000_000 + b".", LARGE),
    "long number": (b"\x80\x02\x8b" + struct.pack("<i", 4_000_000) + b"\xff" * 4_000_000 + b".", MISMATCH),
    "long decimal number": (b"L" + b"9" * 60_000 + b"L\n.", CORRUPT),
    "long line": (b"c" + b"a" * 4_000_000 + b"\nx\n.", CORRUPT),
    "huge text": (b"\x80\x02X\xff\xff\xff\xffabc.", CORRUPT),
    "huge bytes": (b"\x80\x04\x8e" + b"\xff" * 8 + b"abc.", CORRUPT),
    "negative length": (b"\x80\x02T\xff\xff\xff\xffabc.", CORRUPT),
    "too large": (b"\x80\x02B" + struct.pack("<I", 20 << 20) + b"\0" * (20 << 20) + b".", LARGE),
    "empty stack": (b"\x80\x020000s.", CORRUPT),
    "no end": (b"\x80\x02}", CORRUPT),
    "memo missing": (b"\x80\x02h\x05.", CORRUPT),
    "unknown step": (b"\x80\x02\xff.", CORRUPT),
    "buffers": (b"\x80\x05\x97.", CORRUPT),
    "no text": (b"\x80\x02X\x02\x00\x00\x00\xff\xff.", CORRUPT),
    "tensor of nothing": (b"\x80\x02" + _TENSOR + b")R.", CORRUPT),
    "tensor with a negative stride": (
        b"\x80\x02" + _TENSOR + b"(" + _STORAGE + b"K\x00K\x04\x85J\xff\xff\xff\xff\x85\x89}tR.",
        CORRUPT,
    ),
    "storage of a function": (b"\x80\x02(" + _text("storage") + b"cm\nf\n" + _text("0") + _text("c") + b"K\x04tQ.", CORRUPT),
    "storage outside": (_ONE_TENSOR.replace(_text("0"), _text("../../etc/passwd")) + b".", CORRUPT),
}
_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)


def _tar(**members: bytes) -> bytes:
    """The format of CVE-2025-32434: three pickles, each of which torch.load once ran with no check. Sound but for `members`."""
    empty = {"storages": pickle.dumps(0, 2) + pickle.dumps([], 2), "tensors": pickle.dumps(0, 2), "pickle": pickle.dumps({}, 2)}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as archive:
        for name, content in {"sys_info": pickle.dumps({}, 2), **empty, **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _zip(pickled: bytes, **others: bytes) -> bytes:
    return make.stored_zip({"data.pkl": pickled, "data/0": b"\0" * 16, **others})


# Zip archives -------------------------------------------------------------------------------------------------------------


def _plain(shape=(4,)) -> dict[str, torch.Tensor]:
    return {"reconstructor.bn.weight": torch.zeros(shape)}


def _bomb() -> bytes:
    """100 MB of zeros in 100 kB, as C04."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", b"\0" * (100 << 20))
    return out.getvalue()


def _lie() -> bytes:
    """A storage that declares a thousand times what it has (CVE-2026-24747)."""
    return _zip(b"\x80\x02}" + _text("a") + _ONE_TENSOR.replace(b"K\x04tQ", b"M\xa0\x0ftQ") + b"s.")


def _beyond() -> bytes:
    """Tensors of a network that would fit, and reach beyond their storage."""
    tensor = _TENSOR + b"(" + _STORAGE + b"K\x02K\x04\x85K\x01\x85\x89}tR"
    names = [f"reconstructor.bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
    first = _TENSOR + b"(" + _STORAGE + b"K\x00(K\x04K\x01K\x01K\x01t(K\x01K\x01K\x01K\x01t\x89}tR"
    return _zip(
        b"\x80\x02}(" + b"".join(_text(n) + tensor for n in names) + _text("feature_extractor.conv.weight") + first + b"u."
    )


def _patched(data: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    at = data.rindex(signature) + offset
    return data[:at] + value + data[at + len(value) :]


def _many_entries() -> bytes:
    return make.stored_zip({"data.pkl": b"\x80\x02}.", **{f"data/{i}": b"" for i in range(60_000)}})


ZIPS = {
    "compressed": (_bomb, CORRUPT),
    "declared size": (lambda: _patched(make.torch_bytes(_plain()), b"PK\x01\x02", 20, b"\xf0\xff\xff\x7f" * 2), CORRUPT),
    "encrypted": (lambda: _patched(make.torch_bytes(_plain()), b"PK\x01\x02", 8, b"\x01"), CORRUPT),
    "storage that lies": (_lie, CORRUPT),
    "beyond its storage": (_beyond, CORRUPT),
    "overlapping entries": (lambda: _patched(_zip(b"\x80\x02}."), b"PK\x01\x02", 42, struct.pack("<I", 0)), CORRUPT),
    "entry outside": (lambda: _patched(_zip(b"\x80\x02}."), b"PK\x01\x02", 42, b"\xf0\xff\xff\x7f"), CORRUPT),
    "list of entries outside": (lambda: _patched(_zip(b"\x80\x02}."), b"PK\x05\x06", 16, b"\xf0\xff\xff\x7f"), CORRUPT),
    "too many entries": (_many_entries, LARGE),
    "no pickle": (lambda: make.stored_zip({"data/0": b""}), CORRUPT),
    "TorchScript": (lambda: _zip(b"\x80\x02}.", **{"code/model.py": b"1/0", "constants.pkl": b"."}), UNSAFE),
    "sparse with bad invariants": (lambda: _sparse(), MISMATCH),
    "unknown byte order": (lambda: _zip(b"\x80\x02}.", byteorder=b"middle"), CORRUPT),
}


def _sparse() -> bytes:
    parts = [torch.tensor(v) for v in ([0, 99], [7])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is beta
        bad = torch.sparse_csr_tensor(*parts, torch.ones(1), size=(1, 4), check_invariants=False)
    return make.torch_bytes({"reconstructor.bn.weight": bad})


# Safetensors --------------------------------------------------------------------------------------------------------------


def _safe(header: bytes | dict, tensors: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + tensors


def _entry(begin: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def own_file(change: Callable[[dict[str, torch.Tensor], dict[str, str]], None], net: MemNet | None = None) -> bytes:
    net = net or networks.build(MemNetConfig(channels=4, num_memory_blocks=1, num_recursions=1))
    tensors = {k: v for k, v in net.state_dict().items() if not k.endswith("tracked")}
    metadata = {"format": "memnet_fast", "version": "1", "config": json.dumps(net.config.to_dict())}
    change(tensors, metadata)
    return safetensors.torch.save(tensors, {**metadata, "sha256": weights.digest(tensors)})


def _configured(**config) -> bytes:
    return own_file(lambda tensors, metadata: metadata.update(config=json.dumps({**json.loads(metadata["config"]), **config})))


SAFETENSORS = {
    "header of 2^63": (lambda: _safe(b"{}", length=1 << 63), CORRUPT),
    "header of 120 MB": (lambda: _safe(b"{" + b" " * (120 << 20) + b"}"), CORRUPT),
    "not UTF-8": (lambda: _safe(b'{"\xff": 1}'), CORRUPT),
    "not JSON": (lambda: _safe(b"{nonsense}"), CORRUPT),
    "no object": (lambda: _safe(b"{}[]"), CORRUPT),
    "nesting of 1e5": (lambda: _safe(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), CORRUPT),
    "objects of 1e5": (lambda: _safe(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), CORRUPT),
    "many lists": (lambda: _safe(b'{"a":[' + b"[]," * 340_000 + b"1]}"), CORRUPT),
    "duplicate name": (lambda: _safe(b'{"a":%s,"a":%s}' % ((json.dumps(_entry(0, 4)).encode(),) * 2), b"\0" * 4), CORRUPT),
    "duplicate field": (
        lambda: _safe(json.dumps({"a": _entry(0, 4)}).encode().replace(b'"shape"', b'"dtype"'), b"0000"),
        CORRUPT,
    ),
    "overlap": (lambda: _safe({"a": _entry(0, 8), "b": _entry(4, 12)}, b"\0" * 12), CORRUPT),
    "hole": (lambda: _safe({"a": _entry(0, 4), "b": _entry(8, 12)}, b"\0" * 12), CORRUPT),
    "rest": (lambda: _safe({"a": _entry(0, 4)}, b"\0" * 8), CORRUPT),
    "beyond": (lambda: _safe({"a": _entry(0, 1 << 40)}, b"\0" * 8), CORRUPT),
    "wrong shape": (lambda: _safe({"a": _entry(0, 8, [3])}, b"\0" * 8), CORRUPT),
    "negative": (lambda: _safe({"a": _entry(0, 4, [-1])}, b"\0" * 4), CORRUPT),
    "true as a number": (lambda: _safe({"a": _entry(0, 4, [True])}, b"\0" * 4), CORRUPT),
    "huge numbers": (
        lambda: _safe(json.dumps({"a": _entry(0, 4)}).encode().replace(b"[1]", b"[" + b"9" * 5000 + b"]"), b"0000"),
        CORRUPT,
    ),
    "NaN": (lambda: _safe(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"0000"), CORRUPT),
    "many dimensions": (lambda: _safe({"a": _entry(0, 4, [1] * 60_000)}, b"\0" * 4), CORRUPT),
    "unknown dtype": (lambda: _safe({"a": _entry(0, 4, [4], "F8_E5M2")}, b"\0" * 4), CORRUPT),
    "unknown field": (lambda: _safe({"a": {**_entry(0, 4), "code": "1/0"}}, b"\0" * 4), CORRUPT),
    "metadata that are no text": (lambda: _safe({"__metadata__": {"format": 1}}), CORRUPT),
    "15,000 empty tensors": (lambda: _safe({f"{i}": _entry(0, 0, [0]) for i in range(15_000)}), CORRUPT),
    "200,000 empty tensors": (lambda: _safe({f"{i}": _entry(0, 0, [0]) for i in range(200_000)}), CORRUPT),
    "long names": (lambda: _safe({"module." * 20_000: _entry(0, 4)}, b"0000"), LARGE),
    "no tensors": (lambda: _safe({}), MISMATCH),
    "huge channels": (lambda: _configured(channels=10**9), MISMATCH),
    "absurd channels": (lambda: _configured(channels=10**4200), MISMATCH),
    "many channels": (lambda: _configured(channels=30_000), MISMATCH),
    "huge blocks": (lambda: _configured(num_memory_blocks=10**9), MISMATCH),
    "deep configuration": (lambda: own_file(lambda t, m: m.update(config='{"a":' * 50_000)), MISMATCH),
    "deep description": (lambda: own_file(lambda t, m: m.update(info="[" * 100_000)), MISMATCH),
    "unknown metadata": (lambda: own_file(lambda t, m: m.update(other="x")), CORRUPT),
    "lone surrogate": (lambda: _safe({"__metadata__": {"format": "\ud800"}, "\ud800": _entry(0, 4)}, b"\0" * 4), MISMATCH),
}

# .caffemodel --------------------------------------------------------------------------------------------------------------

_NAME = make.piece(1, b"x")
_HUGE = make.shape_message((1 << 40,) * 30)
CAFFE = {
    "1e6 groups": (lambda: _NAME + make.tag(9, 3) * 1_000_000, CORRUPT),
    "1e6 fields": (lambda: _NAME + (make.tag(9, 0) + b"\0") * 1_000_000, LARGE),
    "short runs of floats": (
        lambda: make.caffe_layer(
            "conv1", [np.ones(300_000)], data=lambda v: (make.tag(5, 5) + b"\0\0\0\0" + make.tag(1, 0) + b"\1") * v.size
        ),
        LARGE,
    ),
    "long runs of floats": (
        lambda: make.caffe_layer(
            "conv1", [np.ones(1)], data=lambda v: ((make.tag(5, 5) + b"\0\0\0\0") * 400 + b"\x08\1") * 4_000
        ),
        CORRUPT,
    ),
    "empty pieces": (lambda: make.caffe_layer("conv1", [np.ones(0)], data=lambda v: make.piece(5, b"") * 1_000_000), LARGE),
    "deep messages": (lambda: _NAME + make.piece(100, make.piece(100, b"") * 300_000), LARGE),
    "huge shape": (lambda: make.caffe_layer("conv1", [np.ones(1)], shape=lambda s: _HUGE), CORRUPT),
    "absurd width": (lambda: _NAME + make.caffe_layer("conv_transition_01", [np.zeros((9_000_000, 0))]), MISMATCH),
}

# MXNet --------------------------------------------------------------------------------------------------------------------


def mxnet_list(arrays: bytes, count: int, names: bytes = b"") -> bytes:
    return struct.pack("<QQQ", 0x112, 0, count) + arrays + names


_EMPTY = struct.pack("<IiI", 0xF993FAC9, 0, 0)
SCALAR = make.mxnet_array(np.ones(1, np.float32))
_WIDE = struct.pack("<IiI32q", 0xF993FAC9, 0, 32, *[1 << 40] * 32) + struct.pack("<iii", 1, 0, 0)


def _twice(name: str) -> bytes:
    """A shared convolution of 24 MB, stored for two recursions, in a network that lacks everything else."""
    a = np.zeros((800, 800, 3, 3), np.float32)
    return make.mxnet_params({name: a, name.replace("01_01", "01_02"): a})


MXNET = {
    "2^63 arrays": (lambda: mxnet_list(b"", 1 << 63), LARGE),
    "1e6 empty arrays": (lambda: mxnet_list(_EMPTY * 1_000_000, 1_000_000), LARGE),
    "4096 empty arrays without names": (lambda: mxnet_list(_EMPTY * 4096, 4096), CORRUPT),
    "2^63 names": (lambda: mxnet_list(SCALAR, 1, struct.pack("<Q", 1 << 63)), CORRUPT),
    "a name of 2^63 bytes": (lambda: mxnet_list(SCALAR, 1, struct.pack("<QQ", 1, 1 << 63)), LARGE),
    "product beyond all bounds": (lambda: mxnet_list(_WIDE, 1), CORRUPT),
    "2^31 dimensions": (lambda: mxnet_list(struct.pack("<I", 1 << 31) + b"\1" * 100, 1), CORRUPT),
    "large arrays of nothing else": (lambda: _twice("conv01_01_a_weight"), MISMATCH),
    "absurd blocks": (lambda: make.mxnet_params({"conv9999_9999_a_weight": np.ones((1, 1, 3, 3), np.float32)}), MISMATCH),
    "a million numbers": (lambda: make.mxnet_params({"learned_99999": np.ones(1 << 20, np.float32)}), MISMATCH),
}

# The symbols beside them: small files that are as large as they may be.
SOUND_SYMBOL = make.mxnet_official(make.official_blobs(1, 1, 2), 1, 1)[1]
_NODE = b'{"op":"BatchNorm","name":"x","inputs":[[0],[0]]}'
SYMBOLS = {
    "lists": b'{"nodes":[' + b"[]," * 690_000 + b"[]]}",
    "nesting": b'{"nodes":' + b"[" * 1_000_000,
    "objects": b'{"nodes":[' + b'{"":{}},' * 250_000 + b"{}]}",
    "nodes": b'{"nodes":[' + (_NODE + b",") * 42_000 + _NODE + b"]}",
    "too large": b"[" * (2 << 20) + b"[",
    "numbers": b'{"nodes":[' + b"1," * 1_000_000 + b"1]}",
    "one number": b'{"nodes":[' + b"9" * 2_000_000 + b"]}",
}
MXNET |= {
    f"symbol, {name}": (lambda: make.mxnet_params({"a": np.ones(1, np.float32)}), error)
    for name, error in zip(SYMBOLS, (CORRUPT, CORRUPT, CORRUPT, MISMATCH, LARGE, CORRUPT, CORRUPT), strict=True)
}

# Sound files, which must keep within the same memory ------------------------------------------------------------------------


def _wide_port() -> dict[str, torch.Tensor]:
    """27 MB: two convolutions of 600 channels, and the rest."""
    c, state = 600, {}
    for stem, (out, into, k) in {
        "feature_extractor": (c, 1, 3),
        "dense_memory.0.recursive_unit.0.relu_conv1": (c, c, 3),
        "dense_memory.0.recursive_unit.0.relu_conv2": (c, c, 3),
        "dense_memory.0.gate_unit": (c, 2 * c, 1),
        "reconstructor": (1, c, 3),
    }.items():
        state |= {f"{stem}.bn.{leaf}": torch.ones(into) for leaf in ("weight", "bias", "running_mean", "running_var")}
        state[f"{stem}.conv.weight"] = torch.full((out, into, k, k), 0.5)
    return state


def _wide_own() -> bytes:
    net = MemNet(MemNetConfig(channels=600, num_memory_blocks=1, num_recursions=1))
    return own_file(lambda tensors, metadata: None, net)


def _wide_blobs() -> make.Blobs:
    blobs = make.official_blobs(1, 1, 2)
    wide = {2: 600, 4: 1200}  # the channels of a block, and those of the gate
    return {
        name: [np.full([wide.get(n, n) for n in blob.shape], 0.5, np.float32) for blob in values]
        for name, values in blobs.items()
    }


SOUND = {
    "zip": (lambda: make.torch_bytes(_wide_port()), "loaded"),
    "stream": (lambda: make.torch_bytes(_wide_port(), True), "loaded"),
    "half": (lambda: make.torch_bytes({k: v.half() for k, v in _wide_port().items()}), "loaded"),
    "safetensors": (_wide_own, "loaded"),
    "caffemodel": (lambda: make.caffemodel(_wide_blobs()), "loaded"),
}
MXNET["sound"] = (lambda: make.mxnet_params(make.mxnet_official(_wide_blobs(), 1, 1)[0]), "loaded")


TABLES = {
    "pickle in zip": {n.replace("/", "_"): (lambda p=p: _zip(p), e) for n, (p, e) in PICKLES.items()},
    "pickle in a stream": {
        n: (lambda p=p: _MAGIC + p, e) for n, (p, e) in PICKLES.items() if e == UNSAFE and "tensor" not in n
    },
    "pickle alone": {
        n: (lambda p=p: p, e) for n, (p, e) in PICKLES.items() if e == UNSAFE and p[0] == 0x80 and "tensor" not in n
    },
    **{
        f"pickle in tar, {member}": {
            n: (lambda p=p, m=member: _tar(**{m: p}), e) for n, (p, e) in PICKLES.items() if e == UNSAFE and "tensor" not in n
        }
        for member in ("pickle", "tensors", "storages")
    },
    "zip": ZIPS,
    "safetensors": SAFETENSORS,
    "caffemodel": CAFFE,
    "mxnet": MXNET,
    "sound": SOUND,
}

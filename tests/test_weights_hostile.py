"""Files made to attack a reader: C03, C04, C06 to C08, C13 to C16, C21, C22, C28, C29.

All are loaded in one other process, in which an audit hook sees what Python does, and in which time and memory are measured.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import checkpoints as make
from support import networks

from memnet_fast import weights
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointError

UNSAFE, CORRUPT, MISMATCH, LARGE = "CheckpointUnsafe", "CheckpointCorrupt", "CheckpointMismatch", "CheckpointTooLarge"
SECONDS = 1.0
EXTRA_BYTES = 64 << 20

# Pickles ------------------------------------------------------------------------------------------------------------------


class _Calls:
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
    "os.system": (pickle.dumps(_Calls(os.system, f"touch {CANARY}"), 2), UNSAFE),
    "eval": (pickle.dumps(_Calls(eval, f"open('{CANARY}', 'w')"), 2), UNSAFE),
    "exec, protocol 4": (pickle.dumps({"state_dict": _Calls(exec, "1/0")}, 4), UNSAFE),
    "subprocess": (pickle.dumps([_Calls(subprocess.Popen, ["touch", CANARY])], 2), UNSAFE),
    "protocol 0": (b"c" + _OS + b"\nsystem\n(S'touch " + CANARY.encode() + b"'\ntR.", UNSAFE),
    "old instance": (b"(S'touch " + CANARY.encode() + b"'\ni" + _OS + b"\nsystem\n.", UNSAFE),
    "old object": (b"(c" + _OS + b"\nsystem\nS'touch " + CANARY.encode() + b"'\no.", UNSAFE),
    "new object": (b"\x80\x02csubprocess\nPopen\n" + _text(CANARY) + b"\x85\x81.", UNSAFE),
    "getattr chain": (pickle.dumps(_Calls(getattr, "", "join"), 2), UNSAFE),
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


def _own(change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> bytes:
    net = networks.build(MemNetConfig(channels=4, num_memory_blocks=1, num_recursions=1))
    tensors = {k: v for k, v in net.state_dict().items() if not k.endswith("tracked")}
    metadata = {"format": "memnet_fast", "version": "1", "config": json.dumps(net.config.to_dict())}
    change(tensors, metadata)
    return safetensors.torch.save(tensors, {**metadata, "sha256": weights.digest(tensors)})


def _configured(**config) -> bytes:
    return _own(lambda tensors, metadata: metadata.update(config=json.dumps({**json.loads(metadata["config"]), **config})))


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
    "deep configuration": (lambda: _own(lambda t, m: m.update(config='{"a":' * 50_000)), MISMATCH),
    "deep description": (lambda: _own(lambda t, m: m.update(info="[" * 100_000)), MISMATCH),
    "unknown metadata": (lambda: _own(lambda t, m: m.update(other="x")), CORRUPT),
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


def _list(arrays: bytes, count: int, names: bytes = b"") -> bytes:
    return struct.pack("<QQQ", 0x112, 0, count) + arrays + names


_EMPTY = struct.pack("<IiI", 0xF993FAC9, 0, 0)
_SCALAR = make.mxnet_array(np.ones(1, np.float32))
_WIDE = struct.pack("<IiI32q", 0xF993FAC9, 0, 32, *[1 << 40] * 32) + struct.pack("<iii", 1, 0, 0)


def _twice(name: str) -> bytes:
    """A shared convolution of 24 MB, stored for two recursions, in a network that lacks everything else."""
    a = np.zeros((800, 800, 3, 3), np.float32)
    return make.mxnet_params({name: a, name.replace("01_01", "01_02"): a})


MXNET = {
    "2^63 arrays": (lambda: _list(b"", 1 << 63), LARGE),
    "1e6 empty arrays": (lambda: _list(_EMPTY * 1_000_000, 1_000_000), LARGE),
    "4096 empty arrays without names": (lambda: _list(_EMPTY * 4096, 4096), CORRUPT),
    "2^63 names": (lambda: _list(_SCALAR, 1, struct.pack("<Q", 1 << 63)), CORRUPT),
    "a name of 2^63 bytes": (lambda: _list(_SCALAR, 1, struct.pack("<QQ", 1, 1 << 63)), LARGE),
    "product beyond all bounds": (lambda: _list(_WIDE, 1), CORRUPT),
    "2^31 dimensions": (lambda: _list(struct.pack("<I", 1 << 31) + b"\1" * 100, 1), CORRUPT),
    "large arrays of nothing else": (lambda: _twice("conv01_01_a_weight"), MISMATCH),
    "absurd blocks": (lambda: make.mxnet_params({"conv9999_9999_a_weight": np.ones((1, 1, 3, 3), np.float32)}), MISMATCH),
    "a million numbers": (lambda: make.mxnet_params({"learned_99999": np.ones(1 << 20, np.float32)}), MISMATCH),
}

# The symbols beside them: small files that are as large as they may be.
_SOUND_SYMBOL = make.mxnet_official(make.official_blobs(1, 1, 2), 1, 1)[1]
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

_CHILD = """
import json, sys, time
import memnet_fast.weights as weights
folder, first, *names = sys.argv[1:]
weights.load_weights(f"{folder}/{first}")
events, watching = [], False
def hook(event, args):
    # Not what does nothing: id(), and open() of a descriptor, which was opened before by its name.
    if watching and event != "builtins.id" and not (event == "open" and isinstance(args[0], int)):
        events.append([event, str(args[0])[:200] if args else ""])
sys.addaudithook(hook)
def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024
for name in names:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak
    before, result = memory("VmRSS"), "loaded"
    del events[:]
    start = time.process_time()
    watching = True
    try:
        weights.load_weights(f"{folder}/{name}")
    except weights.CheckpointError as error:
        result, text = type(error).__name__, str(error)
        assert name in text and "\\n" not in text, text
    watching = False
    seconds = time.process_time() - start
    print(json.dumps([name, result, seconds, memory("VmHWM") - before, list(events)]), flush=True)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, dict[str, list]]:
    folder = tmp_path_factory.mktemp("hostile")
    contents = {f"{kind}/{name}": made() for kind, table in TABLES.items() for name, (made, _) in table.items()}
    names = [name for name in _write(folder, contents)]
    (folder / "sound.safetensors").write_bytes(_own(lambda tensors, metadata: None))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), "sound.safetensors", *names], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, {row[0]: row[1:] for row in map(json.loads, done.stdout.splitlines())}


def _write(folder: Path, contents: dict[str, bytes]) -> list[str]:
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        if name.startswith("mxnet/"):
            _symbol(folder / name).write_bytes(SYMBOLS.get(name.removeprefix("mxnet/symbol, "), _SOUND_SYMBOL))
    return list(contents)


def _symbol(path: Path) -> Path:
    return path.with_name(f"{path.name}-symbol.json")


TABLES = {
    "pickle in zip": {n.replace("/", "_"): (lambda p=p: _zip(p), e) for n, (p, e) in PICKLES.items()},
    "pickle in a stream": {
        n: (lambda p=p: _MAGIC + p, e) for n, (p, e) in PICKLES.items() if e == UNSAFE and "tensor" not in n
    },
    "pickle alone": {
        n: (lambda p=p: p, e) for n, (p, e) in PICKLES.items() if e == UNSAFE and p[0] == 0x80 and "tensor" not in n
    },
    "zip": ZIPS,
    "safetensors": SAFETENSORS,
    "caffemodel": CAFFE,
    "mxnet": MXNET,
}
CASES = [(f"{kind}/{name}", error) for kind, table in TABLES.items() for name, (_, error) in table.items()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "error"), CASES, ids=[name for name, _ in CASES])
def test_hostile_files(results, name, error):
    folder, rows = results
    result, seconds, extra, events = rows[name]
    assert result == error
    files = [folder / name] + [_symbol(folder / name)] * name.startswith("mxnet/")
    opened = [["open", str(file)] for file in files]
    assert [e for e in events if e not in opened] == [], "only the file itself was opened, nothing imported"
    assert extra <= 2 * sum(file.stat().st_size for file in files) + EXTRA_BYTES
    assert seconds <= SECONDS
    assert not os.path.exists(CANARY)


def test_the_watch_sees_what_it_must(tmp_path):
    """The harness itself: torch.load of an attack runs it, and a hook like the one above notices."""
    seen = []
    watching = True
    sys.addaudithook(lambda event, args: seen.append(event) if watching and event in ("import", "pickle.find_class") else None)
    pickle.loads(pickle.dumps(_Calls(os.getenv, "HOME"), 2))
    watching = False
    assert "pickle.find_class" in seen


def test_no_reader_uses_pickle_or_torch_load():
    """C08: there is nothing to fall back to."""
    for path in Path(weights.__file__).parent.glob("*.py"):
        source = path.read_text()
        for word in (
            r"\bpickle\b import",
            r"import (pickle|importlib)\b",
            r"torch\.load\(",
            r"(?<![.\w])(eval|exec|__import__)\(",
        ):
            assert not re.search(word, source), (path.name, word)


def test_random_damage_never_escapes(tmp_path):
    """Damaged pickles, archives and headers end in an error of the package, or in a network."""
    port = _port()
    own = _own(lambda tensors, metadata: None)
    files = [make.torch_bytes(port), make.torch_bytes(port, True), make.tar_file(port, list(port.values())), own]
    g = np.random.default_rng(0)
    path, refused = tmp_path / "x", 0
    for data in files:
        text = bytes(data)
        # Mostly where structure is: the pickles, headers and lists of entries, not the numbers.
        spots = [i for i, b in enumerate(text) if b != 0]
        for _ in range(300):
            changed = bytearray(data)
            for _ in range(1 + int(g.integers(3))):
                changed[spots[int(g.integers(len(spots)))]] = int(g.integers(256))
            path.write_bytes(bytes(changed))
            try:
                weights.load_weights(path)
            except CheckpointError:
                refused += 1
    assert refused > 400


def _port() -> dict[str, torch.Tensor]:
    from test_reference import PORTS

    net = networks.build(MemNetConfig(channels=2, num_memory_blocks=1, num_recursions=1, **PORTS["A"][1]))
    own = net.state_dict()
    return {
        f"{theirs}.{leaf}": own[f"{ours}.{leaf}"]
        for theirs, ours in PORTS["A"][0].keys(1, 1).items()
        for leaf in ("weight", "bias", "running_mean", "running_var")
        if f"{ours}.{leaf}" in own
    }


def test_ten_thousand_flipped_bits_of_our_files_are_noticed(tmp_path):
    """Anywhere: in the tensors, in the header, in the configuration and the description, which have a digest of their own."""
    path = tmp_path / "net.safetensors"
    net = networks.build(MemNetConfig(channels=2, num_memory_blocks=1, num_recursions=1))
    weights.save_weights(net, path, {"psnr": {"30": 28.1}, "author": 'Zoë "x"'})
    data = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for i in map(int, np.random.default_rng(0).choice(8 * len(data), 10_000, replace=False)):
            os.pwrite(file.fileno(), bytes([data[i // 8] ^ 1 << i % 8]), i // 8)
            with pytest.raises(CheckpointError):
                weights.load_weights(path)
            os.pwrite(file.fileno(), data[i // 8 : i // 8 + 1], i // 8)
    assert weights.load_info(path)["psnr"] == {"30": 28.1}


def test_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """C28: it shrinks or grows between the look at its size and the last byte."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(_own(lambda tensors, metadata: None))
    real = os.fstat
    for size in (-5, 5):

        def look(descriptor, size=size):
            status = real(descriptor)
            return os.stat_result((*status[:6], status.st_size + size, *status[7:10]))

        monkeypatch.setattr(os, "fstat", look)
        with pytest.raises(CheckpointCorrupt, match="changed while it was read"):
            weights.load_weights(path)
        monkeypatch.undo()


def test_concurrent_loads(tmp_path):
    """C29."""
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "net.pth"
    path.write_bytes(make.torch_bytes(_port()))
    with ThreadPoolExecutor(8) as pool:
        nets = list(pool.map(weights.load_weights, [path] * 100))
    first = nets[0].state_dict()
    assert all(torch.equal(first[k], v) for net in nets for k, v in net.state_dict().items())

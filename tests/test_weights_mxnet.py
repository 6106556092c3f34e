"""MXNet's .params: the published conversions' names through an independent writer, every version, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
import struct

import numpy as np
import pytest
import torch
from support import checkpoints as make
from support import networks
from test_weights_torch import _check, _config, _state

import memnet_fast as mf
from memnet_fast import weights
from memnet_fast.config import PRESETS, MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch, CheckpointTooLarge
from memnet_fast.weights import mxnet

M, R, C = 2, 3, 4
NAME = "MemNet_M2R3-0000.params"
SYMBOL = "MemNet_M2R3-symbol.json"


@pytest.fixture
def save(tmp_path):
    def write(arrays, symbol: bytes | None, version: int = 2, name: str = NAME):
        path = tmp_path / name
        path.write_bytes(arrays if isinstance(arrays, bytes) else make.mxnet_params(arrays, version))
        if symbol is not None:
            (tmp_path / SYMBOL).write_bytes(symbol)
        return path

    return write


def _same(net: mf.MemNet, blobs: make.Blobs, m: int, r: int, eps: float = 1e-4) -> None:
    x = networks.image(1, 1, 9, 8)
    truth = make.caffe_forward(blobs, m, r, x, eps)
    with torch.no_grad():
        error = float((net.double()(x.double()) - truth).abs().max())
    assert error <= 1e-5 * float(truth.abs().max()), error


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_official_conversion(save, version, caplog):
    blobs = make.official_blobs(M, R, C)
    arrays, symbol = make.mxnet_official(blobs, M, R)
    path = save(arrays, symbol, version)
    with caplog.at_level(logging.INFO, "memnet_fast.weights"):
        net = weights.load_weights(path)
    assert net.config == MemNetConfig(channels=C, num_memory_blocks=M, num_recursions=R) and not net.training
    _same(net, blobs, M, R)
    (record,) = caplog.records
    line = record.getMessage()
    assert "official network in MXNet's format, M2R3, 4 channels" in line and SYMBOL in line and "\n" not in line


def test_it_is_the_caffemodel(save, tmp_path):
    """An eps that MXNet's users had to raise comes with variances that were lowered by as much."""
    blobs = make.official_blobs(M, R, C)
    caffe = tmp_path / "net.caffemodel"
    caffe.write_bytes(make.caffemodel(blobs))
    arrays, symbol = make.mxnet_official(blobs, M, R)
    arrays = {k: v - np.float32(9e-5) if k.endswith("var") else v for k, v in arrays.items()}
    first, second = weights.load_weights(caffe).state_dict(), weights.load_weights(save(arrays, symbol)).state_dict()
    assert all(torch.allclose(v, second[k], rtol=1e-6, atol=1e-9) for k, v in first.items())


def test_official_m6r6_fused(save):
    blobs = make.official_blobs(6, 6, 64, seed=1)
    path = save(*make.mxnet_official(blobs, 6, 6, eps=1e-5))
    net = mf.create_model("memnet_m6r6", checkpoint=path)
    assert net.config == PRESETS["memnet_m6r6"]
    x = networks.image(1, 1, 7, 6)
    truth = make.caffe_forward(blobs, 6, 6, x)
    fused = mf.fuse(net, backend="torch", precision="fp32")(x).double()
    scale = float((truth - x).square().mean().sqrt())
    assert float((fused - truth).square().mean().sqrt()) <= 60 * 2**-24 * scale


def test_conversion_of_port_a2(save):
    state = _state("A2")
    arrays, symbol = make.mxnet_learned({k: v.numpy() for k, v in state.items()}, M, R)
    loaded = weights.load_any(save(arrays, symbol))
    assert loaded.net.config == _config("A2")
    _check(loaded.net, "A2", state)
    assert "port A'" in loaded.line and SYMBOL in loaded.line


def test_learned_names_with_gaps_are_refused(save):
    state = {k: v.numpy() for k, v in _state("A2").items()}
    arrays, symbol = make.mxnet_learned(state, M, R)
    del arrays["learned_7"]
    with pytest.raises(CheckpointMismatch, match="have gaps"):
        weights.load_weights(save(arrays, symbol))


@pytest.mark.parametrize("name", [NAME, "MemNet_M2R3.params", "MemNet_M2R3-0123.params", "MemNet_M2R3"])
def test_symbol_is_found_beside_every_epoch(save, name):
    blobs = make.official_blobs(M, R, C)
    assert weights.load_weights(save(*make.mxnet_official(blobs, M, R), name=name)).config.num_recursions == R


def test_gamma_that_is_fixed_is_one(save):
    blobs = make.official_blobs(M, R, C)
    arrays, symbol = make.mxnet_official(blobs, M, R)
    changed = json.loads(symbol)
    node = next(n for n in changed["nodes"] if n["name"] == "bn_conv1")
    del node["attrs"]["fix_gamma"]  # it is True unless somebody says otherwise
    net = weights.load_weights(save(arrays, json.dumps(changed).encode()))
    assert net.first.bn.weight.item() == 1 != float(blobs["scale_conv1"][0][0])


@pytest.mark.parametrize("key", ["attr", "param"])
def test_attributes_of_older_symbols(save, key):
    blobs = make.official_blobs(M, R, C)
    arrays, symbol = make.mxnet_official(blobs, M, R, eps=1e-3)
    _same(weights.load_weights(save(arrays, symbol.replace(b'"attrs": {"eps', f'"{key}": {{"eps'.encode()))), blobs, M, R, 1e-3)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_become_float32(save, dtype):
    arrays, symbol = make.mxnet_official(make.official_blobs(M, R, C), M, R)
    net = weights.load_weights(save({k: v.astype(dtype) for k, v in arrays.items()}, symbol))
    assert np.array_equal(net.first.conv.weight.detach().numpy(), arrays["arg:conv1_weight"].astype(dtype).astype(np.float32))


def test_bfloat16(save):
    """Type 12, the upper halves of float32; NumPy has no such type, so the array is put in by hand."""
    arrays, symbol = make.mxnet_official(make.official_blobs(M, R, C), M, R)
    halves = (np.array([1.5, -2.0, 0.0, 0.25], np.float32).view(np.uint32) >> 16).astype("<u2")
    data = make.mxnet_params(arrays)
    single = make.mxnet_array(arrays["arg:conv1_bias"])
    assert data.count(single) == 1
    head = len(single) - 4 * C - 4
    net = weights.load_weights(save(data.replace(single, single[:head] + struct.pack("<i", 12) + halves.tobytes()), symbol))
    assert net.first.conv.bias.tolist() == [1.5, -2.0, 0.0, 0.25]


def test_without_the_symbol(save):
    arrays, _ = make.mxnet_official(make.official_blobs(M, R, C), M, R)
    with pytest.raises(CheckpointMismatch, match=rf"{NAME}: MXNet keeps a part of the network in {SYMBOL}.*No such file"):
        weights.load_weights(save(arrays, None))


def test_all_problems_at_once(save):
    blobs = make.official_blobs(M, R, C)
    arrays, symbol = make.mxnet_official(blobs, M, R)
    del arrays["aux:bn_conv01_02_a_moving_var"], arrays["arg:conv02_01_a_bias"]
    arrays["arg:conv02_03_b_weight"] = arrays["arg:conv02_03_b_weight"] + 1
    arrays["arg:stranger"] = np.ones(3, np.float32)
    arrays["arg:conv1_bias"] = np.ones(C, np.int32)
    arrays["arg:conv_transition_01_weight"] = arrays["arg:conv_transition_01_weight"].transpose(1, 0, 2, 3)
    arrays["arg:bn_conv1_beta"] = np.full(1, np.nan, np.float32)
    arrays["aux:bn_conv_end_01_moving_var"] = -arrays["aux:bn_conv_end_01_moving_var"]
    changed = json.loads(symbol)
    for node in changed["nodes"]:
        if node["name"] == "_mulscalar1":
            node["op"] = "identity"
        if node["name"] == "bn_conv_end_02":
            node["op"] = "Dropout"
        if node["name"] == "bn_conv_transition_02":
            node["attrs"]["eps"] = "-1"
    with pytest.raises(CheckpointMismatch) as caught:
        weights.load_weights(save(arrays, json.dumps(changed).encode()))
    message = str(caught.value)
    for part in (
        NAME,
        "missing bn_conv01_02_a_moving_var",
        "missing conv02_01_a_bias",
        "conv02_03_b_weight differs from conv02_01_b_weight, with which it is shared",
        "unexpected stranger",
        "conv1_bias has dtype int32, a float is needed",
        "conv_transition_01_weight has shape [16, 4, 1, 1], not [4, 16, 1, 1] (input and output swapped?)",
        "bn_conv1_beta is not finite",
        "bn_conv_end_01_moving_var is negative",
        f"{SYMBOL} has no factors (_mul_scalar) of the output behind conv_end_02, not 1",
        f"{SYMBOL} has no BatchNorm of bn_conv_end_02_gamma",
        f"{SYMBOL} has eps -1.0",
        "num_recursions=3",
    ):
        assert part in message, part
    assert "\n" not in message and message.count("bn_conv01_02_a_moving_var") == 1


def test_other_networks(save):
    _, symbol = make.mxnet_official(make.official_blobs(M, R, C), M, R)
    with pytest.raises(CheckpointMismatch, match="not named as in a known conversion"):
        weights.load_weights(save({"arg:fc1_weight": np.ones((2, 3), np.float32)}, symbol))
    with pytest.raises(CheckpointMismatch, match="no names"):
        weights.load_weights(save(_list(ONE, 1, struct.pack("<Q", 0)), symbol))
    arrays = {"arg:conv9999_9999_a_weight": np.ones((4, 4, 3, 3), np.float32)}
    with pytest.raises(CheckpointMismatch, match="more than a file can hold"):
        weights.load_weights(save(arrays, symbol))


def _list(array: bytes, count: int = 1, rest: bytes = struct.pack("<QQ", 1, 1) + b"a") -> bytes:
    return struct.pack("<QQQ", 0x112, 0, count) + array + rest


V2 = struct.pack("<Ii", 0xF993FAC9, 0)
PLACE = struct.pack("<iii", 1, 0, 0)
ONE = make.mxnet_array(np.ones(1, np.float32))
BAD = {
    "no count": (struct.pack("<QQ", 0x112, 0), CheckpointCorrupt),
    "2^63 arrays": (_list(b"", 1 << 63), CheckpointTooLarge),
    "an array that is not there": (_list(b"", 1, b""), CheckpointCorrupt),
    "sparse": (_list(struct.pack("<Ii", 0xF993FAC9, 1)), CheckpointMismatch),
    "2^31 dimensions": (_list(V2 + struct.pack("<I", 1 << 31)), CheckpointCorrupt),
    "33 dimensions": (_list(V2 + struct.pack("<I33q", 33, *[1] * 33) + PLACE), CheckpointCorrupt),
    "unknown version": (_list(struct.pack("<I", 0xF993FACB) + b"\0" * 100), CheckpointCorrupt),
    "negative size": (_list(V2 + struct.pack("<Iqq", 2, -1, -4) + PLACE + b"\0" * 16), CheckpointCorrupt),
    "product beyond 64 bits": (_list(V2 + struct.pack("<I4q", 4, *[1 << 40] * 4) + PLACE), CheckpointCorrupt),
    "longer than the file": (_list(V2 + struct.pack("<Iq", 1, 1 << 30) + PLACE), CheckpointCorrupt),
    "unknown type": (_list(V2 + struct.pack("<Iq", 1, 1) + struct.pack("<iii", 1, 0, 9) + b"\0" * 8), CheckpointCorrupt),
    "fewer names": (_list(ONE * 2, 2), CheckpointCorrupt),
    "the same name": (
        _list(ONE * 2, 2, struct.pack("<QQ", 2, 5) + b"arg:a" + struct.pack("<Q", 1) + b"a"),
        CheckpointCorrupt,
    ),
    "a long name": (_list(ONE, 1, struct.pack("<QQ", 1, 1 << 40)), CheckpointTooLarge),
    "no text": (_list(ONE, 1, struct.pack("<QQ", 1, 1) + b"\xff"), CheckpointCorrupt),
    "rest": (_list(ONE) + b"x", CheckpointCorrupt),
}


@pytest.mark.parametrize("bad", BAD)
def test_damage(save, bad):
    _, symbol = make.mxnet_official(make.official_blobs(1, 1, C), 1, 1)
    content, error = BAD[bad]
    with pytest.raises(error, match=NAME):
        weights.load_weights(save(content, symbol))


SYMBOLS = {
    "empty": b"",
    "no text": b"\xff\xfe",
    "a list": b"[]",
    "no nodes": b"{}",
    "nodes that are none": b'{"nodes": [1, 2]}',
    "deep": b'{"nodes":' + b"[" * 100_000,
    "a node that is not there": b'{"nodes": [{"op": "BatchNorm", "name": "x", "inputs": [[0], [7]]}]}',
    "a factor that is none": b'{"nodes": [{"op": "_mul_scalar", "name": "x", "inputs": [[0]], "attrs": {"scalar": []}}]}',
    "attributes that are none": b'{"nodes": [{"op": "BatchNorm", "name": "x", "inputs": [[0], [0]], "attrs": [1]}]}',
    "an index that is none": b'{"nodes": [{"op": "BatchNorm", "name": "x", "inputs": [[0], [true]]}]}',
}


@pytest.mark.parametrize("bad", SYMBOLS)
def test_damaged_symbols(save, bad):
    arrays, _ = make.mxnet_official(make.official_blobs(1, 1, C), 1, 1)
    with pytest.raises(CheckpointCorrupt, match=f"{NAME}: {SYMBOL} is not a sound MXNet symbol"):
        weights.load_weights(save(arrays, SYMBOLS[bad]))


def test_huge_symbol(save):
    arrays, _ = make.mxnet_official(make.official_blobs(1, 1, C), 1, 1)
    with pytest.raises(CheckpointTooLarge, match=SYMBOL):
        weights.load_weights(save(arrays, b"[" * (mxnet.MAX_SYMBOL + 1)))


def test_every_truncation(save):
    arrays, symbol = make.mxnet_official(make.official_blobs(M, R, C), M, R)
    data = make.mxnet_params(arrays)
    for length in [16, 17, len(data) - 1, *(len(data) * i // 64 for i in range(1, 64))]:
        with pytest.raises(CheckpointCorrupt, match=NAME):
            weights.load_weights(save(data[:length], symbol))


def test_random_damage_never_escapes(save):
    arrays, symbol = make.mxnet_official(make.official_blobs(1, 1, 2), 1, 1)
    sound = {NAME: make.mxnet_params(arrays), SYMBOL: symbol}
    g = np.random.default_rng(0)
    refused = 0
    for i in range(400):
        files = dict(sound)
        which = (NAME, SYMBOL)[i % 2]
        data = bytearray(files[which])
        spots = [at for at, byte in enumerate(data) if byte]
        for _ in range(1 + int(g.integers(3))):
            data[spots[int(g.integers(len(spots)))]] = int(g.integers(256))
        files[which] = bytes(data)
        try:
            weights.load_weights(save(files[NAME], files[SYMBOL]))
        except CheckpointError:
            refused += 1
    assert 100 < refused < 400


def test_moved_without_its_symbol_and_back(save, tmp_path):
    """The pair belongs together by name: a folder of many networks does not mix them."""
    arrays, symbol = make.mxnet_official(make.official_blobs(M, R, C), M, R)
    path = save(arrays, symbol)
    other = tmp_path / "another-0000.params"
    shutil.copy(path, other)
    with pytest.raises(CheckpointMismatch, match="another-symbol.json"):
        weights.load_weights(other)
    assert weights.load_weights(path).config.channels == C

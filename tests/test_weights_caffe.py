"""The official .caffemodel: round trips through an independent writer, every encoding, and what is refused: C22 to C24."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from support import checkpoints as make
from support import networks

import memnet_fast as mf
from memnet_fast import weights
from memnet_fast.config import PRESETS, MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch, CheckpointTooLarge
from memnet_fast.reference import MemNet
from memnet_fast.weights.fitting import tensor_shapes

M, R, C = 2, 3, 4


@pytest.fixture
def save(tmp_path):
    def write(data: bytes, name: str = "net.caffemodel"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def _same(net: MemNet, blobs: make.Blobs, m: int, r: int, eps: float = 1e-5) -> None:
    x = networks.image(1, 1, 9, 8)
    net.requires_grad_(False)
    truth = make.caffe_forward(blobs, m, r, x, eps)
    error = float((net.double()(x.double()) - truth).abs().max())
    # Mean and variance are divided by the factor in float64 and rounded once to float32: a few 1e-7, grown by the depth.
    assert error <= 1e-5 * float(truth.abs().max()), error
    assert float((truth - x).abs().max()) > 0.1


def test_shapes_without_a_network_are_those_of_the_network():
    for config in (*networks.VARIANTS.values(), *PRESETS.values()):
        with torch.device("meta"):
            state = MemNet(config).state_dict()
        expected = {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}
        assert tensor_shapes(config) == expected


ENCODINGS = {
    "as released": {},
    "V1": {"v1": True},
    "three pieces": {"data": make.packed_in_three},
    "unpacked": {"data": make.unpacked},
    "double": {"data": make.doubles},
    "double, unpacked": {"data": make.unpacked_doubles},
    "legacy shape": {"shape": make.legacy_shape},
    "unpacked shape": {"shape": make.shape_unpacked},
    "V1, legacy shape, unpacked": {"v1": True, "shape": make.legacy_shape, "data": make.unpacked},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding(save, encoding):
    blobs = make.official_blobs(M, R, C)
    net = weights.load_weights(save(make.caffemodel(blobs, **ENCODINGS[encoding])))
    assert net.config == MemNetConfig(channels=C, num_memory_blocks=M, num_recursions=R) and not net.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())
    _same(net, blobs, M, R)


@pytest.mark.parametrize(("m", "r", "c"), [(1, 1, 4), (3, 1, 5), (1, 3, 16)])
def test_any_size(save, m, r, c):
    blobs = make.official_blobs(m, r, c)
    _same(weights.load_weights(save(make.caffemodel(blobs))), blobs, m, r)


@pytest.mark.parametrize(("preset", "n"), [("memnet_m6r6", 6), ("memnet_m10r10", 10)])
def test_official_models_fused(save, preset, n):
    blobs = make.official_blobs(n, n, 64, seed=1)
    path = save(make.caffemodel(blobs))
    net = mf.create_model(preset, checkpoint=path)
    assert net.config == PRESETS[preset]
    x = networks.image(1, 1, 7, 6)
    truth = make.caffe_forward(blobs, n, n, x)
    fused = mf.fuse(net, backend="torch", precision="fp32")(x).double()
    scale = float((truth - x).square().mean().sqrt())
    # The law of layer L3: 60 units of fp32 rounding against the size of what the network does.
    assert float((fused - truth).square().mean().sqrt()) <= 60 * 2**-24 * scale


@pytest.mark.parametrize("factor", [0.0, 1.0, 999.98236])
def test_factor(save, factor):
    blobs = make.official_blobs(M, R, C, factor=factor or 1.0)
    if factor == 0:
        for name, values in blobs.items():
            if name.startswith("bn_"):
                values[2][:] = 0
    net = weights.load_weights(save(make.caffemodel(blobs)))
    if factor == 0:
        assert float(net.first.bn.running_mean) == 0 == float(net.first.bn.running_var)
        state = net.state_dict()
        assert all(not v.any() for k, v in state.items() if k.endswith(("running_mean", "running_var")))
    else:
        _same(net, blobs, M, R)


def test_negative_factor_is_refused(save):
    blobs = make.official_blobs(M, R, C)
    blobs["bn_conv1"][2][:] = -2
    with pytest.raises(CheckpointMismatch, match=r"bn_conv1 \(running_var\) is negative"):
        weights.load_weights(save(make.caffemodel(blobs)))


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_eps_of_the_file_is_honoured(save, eps):
    blobs = make.official_blobs(M, R, C)
    _same(weights.load_weights(save(make.caffemodel(blobs, eps=eps))), blobs, M, R, eps)


def test_all_problems_at_once(save):
    blobs = make.official_blobs(M, R, C)
    del blobs["scale_conv01_02_a"], blobs["bn_conv_end_02"], blobs["weight_output_end_01"]
    blobs["conv02_03_b"][0][0, 0, 0, 0] += 1
    blobs["conv_end_02"][1][0] += 1
    blobs["conv_transition_01"][0] = blobs["conv_transition_01"][0].transpose(1, 0, 2, 3).copy()
    blobs["conv1"][0][0] = np.nan
    del blobs["scale_conv1"][1]
    with pytest.raises(CheckpointMismatch) as caught:
        weights.load_weights(save(make.caffemodel(blobs)))
    message = str(caught.value)
    for part in (
        "net.caffemodel",
        "missing layer scale_conv01_02_a",
        "missing layer bn_conv_end_02",
        "missing layer weight_output_end_01",
        "weight of layer conv02_03_b differs from conv02_01_b",
        "bias of layer conv_end_02 differs from conv_end_01",
        "conv_transition_01 (weight) has shape [16, 4, 1, 1], not [4, 16, 1, 1] (input and output swapped?)",
        "conv1 (weight) is not finite",
        "scale_conv1 has 1 blobs, not 2",
        "num_recursions=3",
    ):
        assert part in message, part
    assert "\n" not in message and message.count("scale_conv01_02_a") == 1


def test_twice_the_same_layer_and_no_known_layer(save):
    data = make.caffemodel(make.official_blobs(M, R, C))
    with pytest.raises(CheckpointMismatch, match="conv1 appears twice"):
        weights.load_weights(save(data + make.caffe_layer("conv1", make.official_blobs(M, R, C)["conv1"])))
    with pytest.raises(CheckpointMismatch, match="no layer has a name of the official MemNet"):
        weights.load_weights(save(make.piece(1, b"VGG") + make.caffe_layer("conv1_1", [np.ones(3)])))


def test_v0_layers_are_named(save):
    with pytest.raises(CheckpointMismatch, match="V0"):
        weights.load_weights(save(make.piece(1, b"old") + make.piece(2, make.piece(1, make.piece(1, b"conv1")))))


def test_every_truncation(save):
    data = make.caffemodel(make.official_blobs(M, R, C))
    # A cut between two layers is a sound message; then the layers are missing.
    for length in [1, len(data) - 1, *(len(data) * i // 64 for i in range(64))]:
        with pytest.raises((CheckpointCorrupt, CheckpointMismatch), match="net.caffemodel"):
            weights.load_weights(save(data[:length]))


BAD = {
    "endless varint": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    "varint over 64 bits": b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "longer than the file": make.piece(1, b"x") + make.tag(100, 2) + make.varint(1 << 40) + b"x" * 100,
    "layer longer than the file": make.piece(1, b"x") + make.tag(100, 2) + make.varint(50) + make.piece(1, b"conv1"),
    "field number 0": make.piece(1, b"x") + b"\x02\x00",
    "start of a group": make.piece(1, b"x") + make.tag(9, 3) * 1_000_000,
    "end of a group": make.piece(1, b"x") + make.tag(9, 4),
    "wire type 7": make.piece(1, b"x") + make.tag(9, 7),
    "floats cut": make.caffe_layer("conv1", [np.ones(3)], data=lambda v: make.piece(5, b"abcde")),
    "floats as text": make.caffe_layer("conv1", [np.ones(3)], data=lambda v: make.tag(5, 0) + b"\x01"),
    "wrong shape": make.caffe_layer("conv1", [np.ones(3)], shape=lambda s: make.shape_message((4,))),
    "huge shape": make.caffe_layer("conv1", [np.ones(3)], shape=lambda s: make.shape_message((1 << 62, 1 << 62))),
    "endless shape": make.caffe_layer("conv1", [np.ones(3)], shape=lambda s: make.shape_message((1,) * 100_000)),
}


@pytest.mark.parametrize("bad", BAD)
def test_damage(save, bad):
    with pytest.raises(CheckpointCorrupt, match="net.caffemodel"):
        weights.load_weights(save(BAD[bad]))


def _nested(depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        content = make.piece(9, content)[:400_000]
    return content


MANY = {
    "fields": make.piece(1, b"x") + (make.tag(9, 0) + b"\x00") * 1_000_000,
    "empty layers": make.piece(1, b"x") + make.piece(100, b"") * 500_000,
    "floats one by one": make.caffe_layer(
        "conv1", [np.ones(400_000)], data=lambda v: (make.tag(5, 5) + b"\0\0\0\0" + make.tag(1, 0) + b"\1") * v.size
    ),
    "blobs": make.piece(100, make.piece(1, b"conv1") + make.piece(7, b"") * 100_000),
}


@pytest.mark.parametrize("what", MANY)
def test_too_many(save, what):
    with pytest.raises(CheckpointTooLarge):
        weights.load_weights(save(MANY[what]))


def test_deep_messages_of_unknown_layers_are_stepped_over(save):
    blobs = make.official_blobs(1, 1, C)
    net = weights.load_weights(save(make.piece(100, _nested(20_000)) + make.caffemodel(blobs)))
    _same(net, blobs, 1, 1)


def test_absurd_numbers_of_blocks(save):
    blobs = make.official_blobs(1, 1, C)
    blobs["conv9999_9999_a"] = blobs["conv01_01_a"]
    with pytest.raises(CheckpointMismatch, match="more than a file can hold"):
        weights.load_weights(save(make.caffemodel(blobs)))


def test_random_damage_never_escapes(save):
    """Any damage ends in an error of the package, or in a network (a changed weight cannot be seen: there is no checksum)."""
    data = bytearray(make.caffemodel(make.official_blobs(1, 2, C)))
    g = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        changed = bytearray(data)
        for at in g.integers(0, len(data), 1 + int(g.integers(3))):
            changed[at] = int(g.integers(256))
        try:
            weights.load_weights(save(bytes(changed)))
        except CheckpointError:
            refused += 1
    assert 40 < refused < 400


def test_float_blob_of_the_wire_is_read_bit_for_bit(save):
    blobs = make.official_blobs(1, 1, C)
    net = weights.load_weights(save(make.caffemodel(blobs)))
    assert np.array_equal(net.first.conv.weight.detach().numpy(), blobs["conv1"][0])
    assert net.blocks[0].gate.conv.bias.tolist() == blobs["conv_transition_01"][1].tolist()
    assert struct.pack("<f", net.head_weights[0].item()) == blobs["weight_output_end_01"][0].tobytes()

"""The authors' .caffemodel: layers and blobs of a NetParameter (caffe.proto), and from them a MemNet of any M, R and width."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointTooLarge
from memnet_fast.weights import official
from memnet_fast.weights.fitting import EPS, MAX_TENSORS, Contents, Stored, same_bits, short, tensor_shapes
from memnet_fast.weights.official import Key, Unit
from memnet_fast.weights.protobuf import BYTES, FIXED32, VARINT, Budget, Message

_BLOBS = {"bn": 3, "scale": 2}


@dataclass
class Blob:
    shape: tuple[int, ...]
    data: np.ndarray  # [count] float32 or float64

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Legacy blobs are always 4-D: ones in front do not count."""
        return _without_ones_in_front(self.shape) == _without_ones_in_front(shape)


@dataclass
class Layer:
    name: str
    blobs: list[Blob] = field(default_factory=list)
    eps: float | None = None  # of batch normalisations that state one


def read_layers(data: bytearray) -> list[Layer]:
    """Layers that have blobs and a name of the official network; all others are stepped over.

    Both kinds of layer messages, V1 and V2. Raises CheckpointCorrupt, CheckpointMismatch (V0), CheckpointTooLarge.
    """
    budget, layers = Budget(), []
    net = Message(data, 0, len(data), budget)
    for number, wire in net:
        if number == 100 and wire == BYTES:
            layer = _read_layer(net.inner(), name=1, blobs=7, batch_norm=139)
        elif number == 2 and wire == BYTES:
            layer = _read_layer(net.inner(), name=4, blobs=6, v0=1)
        else:
            net.skip()
            continue
        if layer is not None:
            layers.append(layer)
    return layers


def _read_layer(message: Message, name: int, blobs: int, batch_norm: int = 0, v0: int = 0) -> Layer | None:
    """The arguments are the numbers of the fields; 0: there is none."""
    layer, pieces = Layer(""), []
    for number, wire in message:
        if wire != BYTES:
            message.skip()
        elif number == name:
            layer.name = message.text()
        elif number == blobs:
            pieces.append(message.piece())
        elif number == batch_norm:
            layer.eps = _read_eps(message.inner())
        elif number == v0:
            raise CheckpointMismatch("layers of the oldest kind (V0) are not read; run upgrade_net_proto_binary first")
        else:
            message.skip()
    if not pieces or official.parse(layer.name) is None:
        return None
    if len(pieces) > MAX_TENSORS:
        raise CheckpointTooLarge(f"layer {layer.name} has {len(pieces)} blobs")
    layer.blobs = [_read_blob(Message(message.data, start, end, message.budget)) for start, end in pieces]
    return layer


def _read_eps(message: Message) -> float | None:
    eps = None
    for number, wire in message:
        if number == 3 and wire == FIXED32:
            eps = float(message.floats("<f4")[-1])
        else:
            message.skip()
    return eps


def _read_blob(message: Message) -> Blob:
    single: list[np.ndarray] = []
    double: list[np.ndarray] = []
    shape: tuple[int, ...] | None = None
    legacy: dict[int, int] = {}
    for number, wire in message:
        if number == 5:
            single.append(message.floats("<f4"))
        elif number == 8:
            double.append(message.floats("<f8"))
        elif number == 7 and wire == BYTES:
            shape = (shape or ()) + _read_shape(message.inner())
        elif number <= 4 and wire == VARINT:
            legacy[number] = message.varint()
        else:
            message.skip()
        if len(single) + len(double) > MAX_TENSORS:
            raise CheckpointTooLarge(f"a blob in more than {MAX_TENSORS} pieces")
    parts = double or single  # as Caffe: doubles, where there are any
    data = np.empty(0, np.float32) if not parts else parts[0] if len(parts) == 1 else np.concatenate(parts)
    if shape is None:
        shape = tuple(legacy.get(i, 0) for i in range(1, 5)) if legacy else (data.size,)
    if math.prod(shape) != data.size:
        raise CheckpointCorrupt(f"a blob of shape {list(shape)[:8]} has {data.size} values")
    return Blob(shape, data)


def _read_shape(message: Message) -> tuple[int, ...]:
    shape = []
    for number, wire in message:
        if number == 1 and wire == VARINT:
            shape.append(message.varint())
        elif number == 1 and wire == BYTES:
            packed = message.inner()
            while packed.at < packed.end and len(shape) <= 32:
                shape.append(packed.varint())
        else:
            message.skip()
        if len(shape) > 32:  # Caffe's own limit
            raise CheckpointCorrupt("a blob has more than 32 dimensions")
    return tuple(shape)


def _without_ones_in_front(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.dropwhile(lambda size: size == 1, shape))


def read(data: bytearray) -> Contents:
    """Recognises the official network; M, R, width, channels and biases follow from the layers.

    Raises CheckpointCorrupt, CheckpointMismatch (no layer of a MemNet), CheckpointTooLarge.
    """
    problems: list[str] = []
    layers: dict[Key, Layer] = {}
    for layer in read_layers(data):
        key = official.parse(layer.name)
        assert key is not None, "read_layers returns no other names"
        if key in layers:
            problems.append(f"layer {short(layer.name)} appears twice")
        layers[key] = layer
    if not layers:
        raise CheckpointMismatch("no layer has a name of the official MemNet (conv1, conv01_01_a, ...)")
    config = _config(layers)
    return _Converter(layers, config, problems).contents()


def _config(layers: dict[Key, Layer]) -> MemNetConfig:
    convs = {unit: layer.blobs[0].shape for (part, unit), layer in layers.items() if part == "conv"}
    bias = not convs or any(len(layer.blobs) > 1 for (part, _), layer in layers.items() if part == "conv")
    return official.infer_config((unit for _, unit in layers), convs, bias)


class _Converter:
    """Goes through the units of the network and takes each one's layers."""

    def __init__(self, layers: dict[Key, Layer], config: MemNetConfig, problems: list[str]) -> None:
        self.layers, self.config, self.problems = layers, config, problems
        self.shapes = tensor_shapes(config)
        self.tensors: dict[str, Stored] = {}
        self.names: dict[str, str] = {}
        self.eps: dict[str, float] = {}
        self.reported: set[str] = set()
        self.used: set[Key] = set()

    def contents(self) -> Contents:
        c = self.config
        for unit, bn, conv in official.units(c):
            self.unit(unit, bn, conv)
        self.head_weights()
        line = (
            f"official .caffemodel, M{c.num_memory_blocks}R{c.num_recursions}, {c.channels} channels, "
            f"{c.in_channels} -> {c.out_channels}" + ("" if c.bias else ", no biases")
        )
        self.problems += [f"unexpected layer {short(layer.name)}" for k, layer in self.layers.items() if k not in self.used]
        return Contents(c, self.tensors, self.names, line, self.problems, self.eps, self.reported)

    def layer(self, part: str, unit: Unit, tensors: list[str], count: int) -> Layer | None:
        """The layer, if it is there and has as many blobs as it must."""
        name, layer = official.layer_name(part, unit), self.layers.get((part, unit))
        self.used.add((part, unit))
        for tensor in tensors:
            self.names.setdefault(tensor, name)
        if layer is None:
            self.problems.append(f"missing layer {name}")
        elif len(layer.blobs) != count:
            self.problems.append(f"layer {name} has {len(layer.blobs)} blobs, not {count}")
        else:
            return layer
        self.reported.update(t for t in tensors if t not in self.tensors)
        return None

    def unit(self, unit: Unit, bn: str, conv: str) -> None:
        self.batch_norm(unit, bn)
        scale = self.layer("scale", unit, [f"{bn}.weight", f"{bn}.bias"], _BLOBS["scale"])
        if scale is not None:
            self.take(f"{bn}.weight", scale.blobs[0])
            self.take(f"{bn}.bias", scale.blobs[1])
        tensors = [f"{conv}.weight"] + [f"{conv}.bias"] * self.config.bias
        layer = self.layer("conv", unit, tensors, len(tensors))
        if layer is None:
            return
        for tensor, blob in zip(tensors, layer.blobs, strict=True):
            if tensor in self.tensors:
                self.assert_equal(tensor, blob, layer.name)
            else:
                self.take(tensor, blob)

    def batch_norm(self, unit: Unit, bn: str) -> None:
        layer = self.layer("bn", unit, [f"{bn}.running_mean", f"{bn}.running_var"], _BLOBS["bn"])
        if layer is None:
            return
        mean, variance, factor = layer.blobs
        if factor.data.size != 1:
            self.problems.append(f"layer {layer.name} has {factor.data.size} factors, not 1")
            factor = Blob((1,), np.ones(1))
        # Caffe stores sums: mean and variance times a factor, and takes a factor of 0 for "nothing was summed yet".
        total = float(factor.data[0])
        times = 0.0 if total == 0 else 1 / total
        self.take(f"{bn}.running_mean", mean, lambda values: values.astype(np.float64) * times)
        self.take(f"{bn}.running_var", variance, lambda values: values.astype(np.float64) * times)
        if layer.eps is not None and not math.isclose(layer.eps, EPS, rel_tol=1e-5):
            if not 0 <= layer.eps < math.inf:
                self.problems.append(f"layer {layer.name} has eps {layer.eps}")
            self.eps[bn] = layer.eps

    def take(self, name: str, blob: Blob, change: Callable[[np.ndarray], np.ndarray] = lambda values: values) -> None:
        want = self.shapes[name]
        shape = want if blob.fits(want) else blob.shape
        self.tensors[name] = _stored(self.names[name], shape, lambda: change(blob.data).reshape(shape))
        self.names[name] = f"layer {self.names[name]} ({name.rpartition('.')[2]})"

    def assert_equal(self, name: str, blob: Blob, layer: str) -> None:
        """Convolutions that the network shares are stored many times."""
        if not same_bits(self.tensors[name].read().reshape(-1), blob.data):
            what = name.rpartition(".")[2]
            self.problems.append(f"the {what} of layer {layer} differs from {self.tensors[name].name}, with which it is shared")

    def head_weights(self) -> None:
        values, complete = [], True
        for m in range(1, self.config.num_memory_blocks + 1):
            layer = self.layer("weight", ("end", m), ["head_weights"], 1)
            if layer is not None and layer.blobs[0].data.size != 1:
                self.problems.append(f"layer {layer.name} has {layer.blobs[0].data.size} values, not 1")
                complete = False
            elif layer is not None:
                values.append(float(layer.blobs[0].data[0]))
            complete = complete and layer is not None
        self.names["head_weights"] = "weight_output_end"
        if complete:
            self.tensors["head_weights"] = _stored("weight_output_end", (len(values),), lambda: np.array(values))
        else:
            self.reported.add("head_weights")


def _stored(name: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> Stored:
    return Stored(name, "float64", shape, read)

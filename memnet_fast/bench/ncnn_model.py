"""A MemNet as ncnn reads it: the text of a .param file and the bytes of a .bin file, written from a plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from memnet_fast.errors import InputError
from memnet_fast.plan import FirstConv, FusedPlan, Gate, Reconstruct, ResidualBlock

_MAGIC = 7767517


@dataclass
class _Layer:
    kind: str
    inputs: list[str]
    outputs: list[str]
    parameters: str = ""
    data: bytes = b""


@dataclass
class _Writer:
    layers: list[_Layer] = field(default_factory=list)

    def add(self, kind: str, inputs: list[str], parameters: str = "", data: bytes = b"") -> str:
        """The name of the layer's output."""
        name = f"b{len(self.layers)}"
        self.layers.append(_Layer(kind, inputs, [name], parameters, data))
        return name

    def bn_relu(self, x: str, scale: Tensor, shift: Tensor) -> str:
        values = _floats(scale) + _floats(shift)
        return self.add("ReLU", [self.add("Scale", [x], f"0={scale.numel()} 1=1", values)])

    def conv(self, x: str, weight: Tensor, bias: Tensor, relu: bool = False) -> str:
        """weight [out, in, k, k], zeros around."""
        k = weight.shape[-1]
        parameters = f"0={weight.shape[0]} 1={k} 4={k // 2} 5=1 6={weight.numel()} 9={int(relu)}"
        # Weights begin with a word for their type, 0: float32. Biases do not.
        return self.add("Convolution", [x], parameters, bytes(4) + _floats(weight) + _floats(bias))

    def concat(self, parts: list[str]) -> str:
        return parts[0] if len(parts) == 1 else self.add("Concat", parts, "0=0")

    def split(self) -> None:
        """ncnn wants a copy of a value for each of its readers: they are made right after the value."""
        readers = Counter(name for layer in self.layers for name in layer.inputs)
        made = []
        copies: dict[str, list[str]] = {}
        for layer in self.layers:
            layer.inputs = [copies[name].pop() if name in copies else name for name in layer.inputs]
            made.append(layer)
            (name,) = layer.outputs
            if readers[name] > 1:
                copies[name] = [f"{name}_{i}" for i in range(readers[name])]
                made.append(_Layer("Split", [name], list(copies[name])))
        self.layers = made


def _floats(values: Tensor) -> bytes:
    return np.ascontiguousarray(values.detach().numpy(), "<f4").tobytes()


def write(plan: FusedPlan) -> tuple[str, bytes]:
    """(.param, .bin) with input "image" and output "restored", one image at a time. Raises InputError for a network with more
    output than input channels, whose image would have to be broadcast.
    """
    config, weights, writer = plan.config, plan.weights, _Writer()
    if config.in_channels != config.out_channels:
        raise InputError("the writer for ncnn takes networks with as many input as output channels")
    image = writer.add("Input", [])
    slots: dict[int, str] = {}
    result = ""
    for op in plan.ops:
        match op:
            case FirstConv():
                x = writer.bn_relu(image, weights[op.scale], weights[op.shift])
                slots[op.dst] = writer.conv(x, weights[op.weight], weights[op.bias])
            case ResidualBlock():
                x = writer.bn_relu(slots[op.src], weights[op.scale], weights[op.shift])
                x = writer.conv(x, weights[op.weight_a], weights[op.bias_a], relu=True)
                x = writer.conv(x, weights[op.weight_b], weights[op.bias_b])
                slots[op.dst] = writer.add("BinaryOp", [slots[op.src], x], "0=0")
            case Gate():
                x = writer.concat([slots[s] for s in op.srcs])
                x = writer.bn_relu(x, weights[op.scale], weights[op.shift])
                slots[op.dst] = writer.conv(x, weights[op.weight].flatten(1)[:, :, None, None], weights[op.bias])
            case Reconstruct():
                head, weight = weights[op.head], weights[op.weight]
                x = writer.concat([slots[s] for s in op.srcs])
                x = writer.bn_relu(x, weights[op.scale], weights[op.shift])
                heads = (head.view(1, -1, 1, 1, 1) * weight[:, None]).flatten(1, 2)
                x = writer.conv(x, heads, head.sum() * weights[op.bias])
                result = writer.add("Eltwise", [x, image], f"0=1 -23301=2,1.0,{float(weights[op.skip]):.9g}")
                if config.clamp:
                    result = writer.add("Clip", [result], "0=0.0 1=1.0")
    writer.split()
    names = {image: "image", result: "restored"}
    blobs = sum(len(layer.outputs) for layer in writer.layers)
    lines = [str(_MAGIC), f"{len(writer.layers)} {blobs}"]
    for i, layer in enumerate(writer.layers):
        inputs, outputs = ([names.get(n, n) for n in part] for part in (layer.inputs, layer.outputs))
        words = [layer.kind, f"l{i}", str(len(inputs)), str(len(outputs)), *inputs, *outputs, layer.parameters]
        lines.append(" ".join(words).rstrip())
    return "\n".join(lines) + "\n", b"".join(layer.data for layer in writer.layers)

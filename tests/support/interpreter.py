"""A second, independent reading of a plan: the oracle of single operations (float64) and the host of the mutants.

It shares no code with the backends. Each step is a method of its own, so that a mutant can spoil exactly one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memnet_fast.plan import FirstConv, FusedPlan, Gate, Op, Reconstruct, ResidualBlock

_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def round_to(x: Tensor, precision: str) -> Tensor:
    """x rounded to the nearest number of `precision`, ties to even, in the dtype of x (float32 or float64)."""
    if precision in _DTYPE:
        return x.to(_DTYPE[precision]).to(x.dtype)
    if precision == "tf32":
        # 11 significant bits: add and subtract a number 2^13 times as large in float32's own spacing.
        single = x.float()
        big = single * (2**13 + 1)
        rounded = big - (big - single)
        return torch.where(torch.isfinite(big), rounded, single).to(x.dtype)
    return x


class Interpreter:
    """Runs a plan on whole batches with a dictionary for slots.

    precision "fp64": everything in float64. Otherwise float32 with operands (after BN-ReLU) and stores rounded to precision;
    weights of residual blocks and gates are rounded to it, the image path is float32.
    """

    def __init__(self, plan: FusedPlan, precision: str = "fp64") -> None:
        self.plan = plan
        self.precision = precision
        self.compute = torch.float64 if precision == "fp64" else torch.float32
        self.slots: dict[int, Tensor] = {}

    def __call__(self, image: Tensor) -> Tensor:
        """image [N, C_in, H, W] -> [N, C_out, H, W] in the compute dtype."""
        self.slots = {}
        out = self.run_ops(self.plan.ops, image.to(self.compute))
        assert out is not None, "the plan has no Reconstruct"
        return out

    def run_ops(self, ops: tuple[Op, ...], image: Tensor) -> Tensor | None:
        result = None
        for op in ops:
            match op:
                case FirstConv():
                    self.write(op.dst, self.first_conv(op, image))
                case ResidualBlock():
                    self.write(op.dst, self.residual_block(op, self.read(op.src)))
                case Gate():
                    self.write(op.dst, self.gate(op, [self.read(s) for s in op.srcs]))
                case Reconstruct():
                    result = self.reconstruct(op, image, [self.read(s) for s in op.srcs])
        return result

    # Storage.
    def write(self, slot: int, value: Tensor) -> None:
        self.slots[slot] = self.store(value)

    def read(self, slot: int) -> Tensor:
        return self.slots[slot]

    def store(self, value: Tensor) -> Tensor:
        return round_to(value, self.precision) if self.precision in _DTYPE else value

    def operand(self, value: Tensor) -> Tensor:
        return round_to(value, self.precision)

    # Arithmetic.
    def weight(self, name: str) -> Tensor:
        return self.plan.weights[name].to(self.compute)

    def rounded_weight(self, name: str) -> Tensor:
        return round_to(self.weight(name), self.precision)

    def activate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """relu(x * scale + shift); x [N, C, H, W], scale and shift [C]"""
        return torch.relu(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def pre_convolve(self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        """Convolution of the activated, rounded input: padding comes after the activation."""
        return self.convolve(self.operand(self.activate(x, scale, shift)), weight)

    def bias(self, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias.view(1, -1, 1, 1)

    def first_conv(self, op: FirstConv, image: Tensor) -> Tensor:
        x = self.activate(image, self.weight(op.scale), self.weight(op.shift))
        return self.bias(self.convolve(x, self.weight(op.weight)), self.weight(op.bias))

    def residual_block(self, op: ResidualBlock, x: Tensor) -> Tensor:
        t = self.pre_convolve(x, self.weight(op.scale), self.weight(op.shift), self.rounded_weight(op.weight_a))
        t = self.operand(torch.relu(self.bias(t, self.weight(op.bias_a))))
        y = self.bias(self.convolve(t, self.rounded_weight(op.weight_b)), self.weight(op.bias_b))
        return self.skip(op, x, y)

    def skip(self, op: ResidualBlock, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def gate(self, op: Gate, sources: list[Tensor]) -> Tensor:
        scale, shift, weight = self.weight(op.scale), self.weight(op.shift), self.rounded_weight(op.weight)
        total = torch.zeros_like(sources[0])
        for j, x in enumerate(sources):
            total = total + self.pre_convolve(x, scale[j], shift[j], weight[:, j, :, None, None])
        return self.bias(total, self.weight(op.bias))

    def reconstruct(self, op: Reconstruct, image: Tensor, sources: list[Tensor]) -> Tensor:
        scale, shift, head = self.weight(op.scale), self.weight(op.shift), self.weight(op.head)
        total = self.weight(op.skip) * image
        for j, x in enumerate(sources):
            y = self.convolve(self.activate(x, scale[j], shift[j]), self.weight(op.weight))
            total = total + head[j] * self.bias(y, self.weight(op.bias))
        return total.clamp(0, 1) if self.plan.config.clamp else total

"""The policy-matched reference: every operation of a plan in plain PyTorch, rounding exactly where the kernels round.

It is the specification of the numerics, slow and always there. Operands are rounded after BN-ReLU, accumulation, bias and
skip are float32, each operation stores once, and the image path (image, first and last convolution, output) is float32 in
every precision. Each image of a batch is computed alone, so that a result cannot depend on its neighbours.

"fp8" is fp16 with the convolutions of residual blocks in e4m3: their operands are scaled so that the largest value to expect
becomes 448, the weights so that the largest of each output channel does; what is larger saturates. The largest value to expect
follows from the batch normalisation, whose running statistics must therefore be those of the network (`fp8_gate` tells).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from memnet_fast.config import MemNetConfig
from memnet_fast.plan import FirstConv, FusedPlan, Gate, Reconstruct, ResidualBlock
from memnet_fast.timing import Stopwatch, Timing

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")
ALGORITHMS = ("direct",)

_STORE = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float16,
}
E4M3_MAX = 448.0


def why_not(config: MemNetConfig, device: torch.device, precision: str, algorithm: str) -> str | None:
    if precision not in PRECISIONS:
        return f"precision '{precision}' is not among {', '.join(PRECISIONS)}"
    if algorithm not in ALGORITHMS:
        return f"it has only the algorithm 'direct', not '{algorithm}'"
    return None


def round_operand(x: Tensor, precision: str) -> Tensor:
    """x rounded to the nearest value that a tensor core takes in this precision (ties to even), in the dtype of x."""
    if precision in ("bf16", "fp16", "fp8"):
        return x.to(_STORE[precision]).to(x.dtype)
    if precision == "tf32":
        bits = x.float().contiguous().view(torch.int32)
        rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
        return torch.where(torch.isfinite(x), rounded.to(x.dtype), x)
    return x


def round_e4m3(x: Tensor) -> Tensor:
    """x rounded to the nearest e4m3 value (ties to even), saturated at +-448, NaN kept; in the dtype of x."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def _round_keeping_sums(weight: Tensor) -> Tensor:
    """weight [C, C, 3, 3] rounded to e4m3 so that the nine taps of a kernel keep their sum: from the largest to the smallest
    (of equals the first) each takes over the rounding error of the one before.

    In smooth parts of an image all taps see nearly the same value, and the errors of plain rounding would add up to a shift:
    0.6 dB on a dark photograph at sigma 15, where this costs 0.01 dB.
    """
    taps = weight.flatten(2)
    order = taps.abs().sort(dim=2, descending=True, stable=True).indices
    rounded = torch.empty_like(taps)
    carry = torch.zeros_like(taps[..., :1])
    for k in order.split(1, 2):
        wanted = taps.gather(2, k) + carry
        value = round_e4m3(wanted)
        carry = wanted - value
        rounded.scatter_(2, k, value)
    return rounded.view_as(weight)


@dataclass(frozen=True)
class Fp8Block:
    """A residual block in e4m3: act = e4m3(relu(x * scale + shift)), mid = e4m3(relu(gain_a * conv_a(act) + bias_a)),
    y = x + (gain_b * conv_b(mid) + bias_b). weight_a, weight_b: [C, C, 3, 3] of e4m3 values; the others [C]; all float32."""

    scale: Tensor
    shift: Tensor
    weight_a: Tensor
    gain_a: Tensor
    bias_a: Tensor
    weight_b: Tensor
    gain_b: Tensor
    bias_b: Tensor


def fp8_block(plan: FusedPlan, op: ResidualBlock) -> Fp8Block:
    """The e4m3 weights and scales of a residual block, computed in float64, rounded once. An output channel without weights and
    an operand that is never positive get the scale 1."""

    def quantised(name: str) -> tuple[Tensor, Tensor]:
        weight = plan.weights[name]
        largest = weight.abs().amax((1, 2, 3))
        step = torch.where(largest > 0, largest / E4M3_MAX, torch.ones_like(largest))
        return _round_keeping_sums((weight / step[:, None, None, None]).float()), step

    def step(name: str) -> Tensor:
        largest = plan.weights[name]
        return torch.where(largest > 0, largest / E4M3_MAX, torch.ones_like(largest))

    w = plan.weights
    (weight_a, step_wa), (weight_b, step_wb) = quantised(op.weight_a), quantised(op.weight_b)
    step_a, step_b = step(op.range_a), step(op.range_b)
    return Fp8Block(
        (w[op.scale] / step_a).float(),
        (w[op.shift] / step_a).float(),
        weight_a,
        (step_wa * step_a / step_b).float(),
        (w[op.bias_a] / step_b).float(),
        weight_b,
        (step_wb * step_b).float(),
        w[op.bias_b].float(),
    )


def pack(plan: FusedPlan, device: torch.device, precision: str, algorithm: str = "direct") -> TorchPacked:
    """Also takes precision "fp64": the plan in float64, to hold the lowering itself against the reference."""
    compute = torch.float64 if precision == "fp64" else torch.float32
    rounded = ("weight_a", "weight_b")
    weights = {}
    for op in plan.ops:
        for key, name in vars(op).items():
            if isinstance(name, str) and name:
                value = plan.weights[name].to(device, compute)
                if key in rounded or (key == "weight" and isinstance(op, Gate)):
                    value = round_operand(value, precision)
                weights[name] = value
    blocks: dict[ResidualBlock, Fp8Block] = {}
    if precision == "fp8":
        for op in plan.ops:
            if isinstance(op, ResidualBlock):
                block = fp8_block(plan, op)
                blocks[op] = Fp8Block(*(t.to(device) for t in vars(block).values()))
    return TorchPacked(plan, precision, weights, blocks)


@dataclass(frozen=True)
class TorchPacked:
    plan: FusedPlan
    precision: str
    weights: dict[str, Tensor]
    fp8_blocks: dict[ResidualBlock, Fp8Block] = field(default_factory=dict)

    def workspace_bytes(self, n: int, h: int, w: int) -> int:
        # One image at a time, whatever n is.
        return self.plan.num_slots * self.plan.config.channels * h * w * _STORE[self.precision].itemsize

    def run(self, image: Tensor, out: Tensor, workspace: Tensor) -> None:
        self._run(image, out, workspace, None)

    def run_timed(self, image: Tensor, out: Tensor, workspace: Tensor, names: Sequence[str]) -> Timing:
        with Stopwatch(image.device, names) as watch:
            self._run(image, out, workspace, watch)
        return watch.timing()

    @torch.no_grad()
    def _run(self, image: Tensor, out: Tensor, workspace: Tensor, watch: Stopwatch | None) -> None:
        c, h, w = self.plan.config.channels, *image.shape[2:]
        size = self.workspace_bytes(1, h, w)
        slots = workspace[:size].view(_STORE[self.precision]).view(self.plan.num_slots, 1, h, w, c).permute(0, 1, 4, 2, 3)
        with torch.autocast(image.device.type, enabled=False):
            for i in range(image.shape[0]):
                self._run_one(image[i : i + 1], out[i : i + 1], slots, watch)

    def _run_one(self, image: Tensor, out: Tensor, slots: Tensor, watch: Stopwatch | None) -> None:
        weights, compute = self.weights, next(iter(self.weights.values())).dtype
        image = image.to(compute)
        for i, op in enumerate(self.plan.ops):
            if watch is not None:
                watch.begin(i)
            match op:
                case FirstConv():
                    x = _bn_relu(image, weights[op.scale], weights[op.shift])
                    slots[op.dst].copy_(F.conv2d(x, weights[op.weight], weights[op.bias], padding=1))
                case ResidualBlock() if op in self.fp8_blocks:
                    block = self.fp8_blocks[op]
                    x = slots[op.src].to(compute)
                    t = round_e4m3(_bn_relu(x, block.scale, block.shift))
                    t = _affine(F.conv2d(t, block.weight_a, padding=1), block.gain_a, block.bias_a)
                    t = round_e4m3(torch.relu(t))
                    t = _affine(F.conv2d(t, block.weight_b, padding=1), block.gain_b, block.bias_b)
                    slots[op.dst].copy_(x + t)
                case ResidualBlock():
                    x = slots[op.src].to(compute)
                    t = self._operand(_bn_relu(x, weights[op.scale], weights[op.shift]))
                    t = F.conv2d(t, weights[op.weight_a], weights[op.bias_a], padding=1)
                    t = self._operand(torch.relu(t))
                    slots[op.dst].copy_(x + F.conv2d(t, weights[op.weight_b], weights[op.bias_b], padding=1))
                case Gate():
                    total = weights[op.bias].view(1, -1, 1, 1)
                    for j, slot in enumerate(op.srcs):
                        x = _bn_relu(slots[slot].to(compute), weights[op.scale][j], weights[op.shift][j])
                        total = total + F.conv2d(self._operand(x), weights[op.weight][:, j, :, None, None])
                    slots[op.dst].copy_(total)
                case Reconstruct():
                    total = weights[op.skip] * image
                    weight, head = weights[op.weight], weights[op.head]
                    for j, slot in enumerate(op.srcs):
                        x = _bn_relu(slots[slot].to(compute), weights[op.scale][j], weights[op.shift][j])
                        y = F.conv2d(x, weight, weights[op.bias], padding=weight.shape[-1] // 2)
                        total = total + head[j] * y
                    out.copy_(total.clamp(0, 1) if self.plan.config.clamp else total)

    def _operand(self, x: Tensor) -> Tensor:
        return round_operand(x, self.precision)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def _bn_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.relu(_affine(x, scale, shift))

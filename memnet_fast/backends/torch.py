"""The policy-matched reference: every operation of a plan in plain PyTorch, rounding exactly where the kernels round.

It is the specification of the numerics, slow and always there. Operands are rounded after BN-ReLU, accumulation, bias and
skip are float32, each operation stores once, and the image path (image, first and last convolution, output) is float32 in
every precision. Each image of a batch is computed alone, so that a result cannot depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memnet_fast.config import MemNetConfig
from memnet_fast.plan import FirstConv, FusedPlan, Gate, Reconstruct, ResidualBlock

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
ALGORITHMS = ("direct",)

_STORE = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def why_not(config: MemNetConfig, device: torch.device, precision: str, algorithm: str) -> str | None:
    if precision not in PRECISIONS:
        return f"precision '{precision}' is not among {', '.join(PRECISIONS)}"
    if algorithm not in ALGORITHMS:
        return f"it has only the algorithm 'direct', not '{algorithm}'"
    return None


def round_operand(x: Tensor, precision: str) -> Tensor:
    """x rounded to the nearest value that a tensor core takes in this precision (ties to even), in the dtype of x."""
    if precision in ("bf16", "fp16"):
        return x.to(_STORE[precision]).to(x.dtype)
    if precision == "tf32":
        bits = x.float().contiguous().view(torch.int32)
        rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
        return torch.where(torch.isfinite(x), rounded.to(x.dtype), x)
    return x


def pack(plan: FusedPlan, device: torch.device, precision: str, algorithm: str = "direct") -> TorchPacked:
    """Also takes precision "fp64": the plan in float64, to hold the lowering itself against the reference."""
    compute = torch.float64 if precision == "fp64" else torch.float32
    rounded = ("weight_a", "weight_b")
    weights = {}
    for op in plan.ops:
        for field, name in vars(op).items():
            if isinstance(name, str):
                value = plan.weights[name].to(device, compute)
                if field in rounded or (field == "weight" and isinstance(op, Gate)):
                    value = round_operand(value, precision)
                weights[name] = value
    return TorchPacked(plan, precision, weights)


@dataclass(frozen=True)
class TorchPacked:
    plan: FusedPlan
    precision: str
    weights: dict[str, Tensor]

    def workspace_bytes(self, n: int, h: int, w: int) -> int:
        # One image at a time, whatever n is.
        return self.plan.num_slots * self.plan.config.channels * h * w * _STORE[self.precision].itemsize

    @torch.no_grad()
    def run(self, image: Tensor, out: Tensor, workspace: Tensor) -> None:
        c, h, w = self.plan.config.channels, *image.shape[2:]
        size = self.workspace_bytes(1, h, w)
        slots = workspace[:size].view(_STORE[self.precision]).view(self.plan.num_slots, 1, h, w, c).permute(0, 1, 4, 2, 3)
        with torch.autocast(image.device.type, enabled=False):
            for i in range(image.shape[0]):
                self._run_one(image[i : i + 1], out[i : i + 1], slots)

    def _run_one(self, image: Tensor, out: Tensor, slots: Tensor) -> None:
        weights, compute = self.weights, next(iter(self.weights.values())).dtype
        image = image.to(compute)
        for op in self.plan.ops:
            match op:
                case FirstConv():
                    x = _bn_relu(image, weights[op.scale], weights[op.shift])
                    slots[op.dst].copy_(F.conv2d(x, weights[op.weight], weights[op.bias], padding=1))
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


def _bn_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.relu(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))

"""What is timed, with what it must compute: whole networks and single operations on images of any size.

Whole networks are held against the reference in float64 on the same device (memnet_fast/bench/truth.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memnet_fast.backends import torch as torch_backend
from memnet_fast.config import MemNetConfig
from memnet_fast.plan import FirstConv, FusedPlan, Gate, Op, Reconstruct, ResidualBlock

# name: images, height, width
SIZES: dict[str, tuple[int, int, int]] = {
    "256x256": (1, 256, 256),
    "512x512": (1, 512, 512),
    "1080p": (1, 1080, 1920),
    "4k": (1, 2160, 3840),
    "16x64x64": (16, 64, 64),
    "4x256x256": (4, 256, 256),
    "16x256x256": (16, 256, 256),
    "64x256x256": (64, 256, 256),
}
# Single operations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpCase:
    """A plan of one operation of a 64-channel network and what it costs: flop and byte for each pixel (every input read once,
    every output written once).
    """

    name: str
    plan: FusedPlan
    flop: int
    byte: int

    @property
    def op(self) -> Op:
        return self.plan.ops[0]


def op_cases(element: int = 2, gates: tuple[int, ...] = (7, 12), heads: int = 6) -> list[OpCase]:
    """The operations of M6R6. element: bytes of a stored value."""
    c, g = 64, torch.Generator().manual_seed(0)
    config = MemNetConfig()

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * spread

    def norm(*shape: int) -> dict[str, Tensor]:
        return {"s": 1 + normal(*shape, spread=0.2), "t": normal(*shape, spread=0.3)}

    def plan(op: Op, slots: int, **weights: Tensor) -> FusedPlan:
        return FusedPlan(config, (op,), weights, slots)

    spread = (2 / (9 * c)) ** 0.5
    block = ResidualBlock(0, 1, "s", "t", "a", "ba", "b", "bb", "ra", "rb")
    weights = {"a": normal(c, c, 3, 3, spread=spread), "ba": normal(c), "b": normal(c, c, 3, 3, spread=spread), "bb": normal(c)}
    first_norm = norm(c)
    # For fp8, eight deviations above the mean, as in a network: a slot's values have the deviation 1, and conv_a's sums too.
    weights |= {"ra": (first_norm["t"] + 8 * first_norm["s"].abs()).max().view(1), "rb": (weights["ba"] + 8).max().view(1)}
    cases = [OpCase("residual_block", plan(block, 2, **first_norm, **weights), 4 * 9 * c * c, 2 * c * element)]
    for k in gates:
        gate = Gate(tuple(range(k)), k, "s", "t", "w", "b")
        weights = {"w": normal(c, k, c, spread=(2 / (k * c)) ** 0.5), "b": normal(c)}
        cases.append(OpCase(f"gate_{k}", plan(gate, k + 1, **norm(k, c), **weights), 2 * k * c * c, (k + 1) * c * element))
    first = FirstConv(0, "s", "t", "w", "b")
    weights = {"w": normal(c, 1, 3, 3, spread=0.4), "b": normal(c)}
    cases.append(OpCase("first_conv", plan(first, 1, **norm(1), **weights), 18 * c, 4 + c * element))
    recon = Reconstruct(tuple(range(heads)), "s", "t", "w", "b", "h", "k")
    weights = {"w": normal(1, c, 3, 3, spread=spread), "b": normal(1), "h": normal(heads), "k": torch.ones(1).double()}
    cases.append(
        OpCase(f"reconstruct_{heads}", plan(recon, heads, **norm(heads, c), **weights), heads * 18 * c, heads * c * element + 8)
    )
    return cases


def op_truth(case: OpCase, slots: Tensor, image: Tensor) -> Tensor:
    """The result in float64 of one operation on slots [S, 1, C, H, W] and image [1, 1, H, W]."""
    packed = torch_backend.pack(case.plan, image.device, "fp64")
    h, w = image.shape[2:]
    work = torch.empty(packed.workspace_bytes(1, h, w), dtype=torch.uint8, device=image.device)
    own = work.view(torch.float64).view(slots.shape[0], 1, h, w, slots.shape[2]).permute(0, 1, 4, 2, 3)
    own.copy_(slots)
    out = torch.empty(image.shape, dtype=torch.float64, device=image.device)
    packed.run(image, out, work)
    return out if isinstance(case.op, Reconstruct) else own[case.op.dst]

"""What is timed, with what it must compute: whole networks and single operations on images of any size.

Whole networks are held against the reference in float64 on the same device, on windows (the corners, the edges and the middle)
with a halo of the receptive field, so that an image of any size has an oracle. Two different images pass through the same
memory, which a cache by address does not survive.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memnet_fast import degrade
from memnet_fast.backends import torch as torch_backend
from memnet_fast.config import MemNetConfig
from memnet_fast.plan import FirstConv, FusedPlan, Gate, Op, Reconstruct, ResidualBlock
from memnet_fast.reference import MemNet

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
_SIDE = 200  # of a window


@dataclass(frozen=True)
class _Window:
    image: int
    top: int
    left: int
    height: int
    width: int


def _windows(n: int, h: int, w: int) -> list[_Window]:
    def starts(size: int) -> list[int]:
        return [0] if size <= _SIDE else sorted({0, (size - _SIDE) // 2, size - _SIDE})

    images = sorted({0, n // 2, n - 1})
    side_h, side_w = min(h, _SIDE), min(w, _SIDE)
    return [_Window(i, top, left, side_h, side_w) for i in images for top in starts(h) for left in starts(w)]


class NetworkCase:
    """A network, an image [N, 1, H, W] in one place of memory, and the truth about two contents of that place."""

    def __init__(self, net: MemNet, shape: tuple[int, int, int], device: torch.device, seed: int = 0) -> None:
        n, h, w = shape
        self.net = copy.deepcopy(net).to(device).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self._contents = [_noisy(n, h, w, generator).to(device) for _ in range(2)]
        self.image = self._contents[0].clone()
        self._windows = _windows(n, h, w)
        double = copy.deepcopy(self.net).double()
        with torch.inference_mode():
            self._truths = [[self._truth(double, x, window) for window in self._windows] for x in self._contents]

    @staticmethod
    def _truth(net: MemNet, x: Tensor, at: _Window) -> Tensor:
        halo, (h, w) = net.config.receptive_radius, x.shape[2:]
        y0, x0 = max(0, at.top - halo), max(0, at.left - halo)
        y1, x1 = min(h, at.top + at.height + halo), min(w, at.left + at.width + halo)
        y = net(x[at.image : at.image + 1, :, y0:y1, x0:x1].double())
        return y[0, :, at.top - y0 :, at.left - x0 :][:, : at.height, : at.width]

    def errors(self, run: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """nsr: RMS of the error over RMS of the residual; line: the same for the worst row or column of a window.

        The larger of two images. NaN where the result is not finite or has another shape.
        """
        worst = {"nsr": 0.0, "line": 0.0}
        with torch.inference_mode():
            for content, truths in zip(self._contents, self._truths, strict=True):
                self.image.copy_(content)
                y = run(self.image)
                if y.shape != self.image.shape or y.device != self.image.device:
                    return {"nsr": float("nan"), "line": float("nan")}
                error, size, line = 0.0, 0.0, 0.0
                for at, truth in zip(self._windows, truths, strict=True):
                    place = (at.image, slice(None), slice(at.top, at.top + at.height), slice(at.left, at.left + at.width))
                    square = (y[place].double() - truth).square()
                    error += float(square.sum())
                    size += float((truth - content[place].double()).square().sum())
                    line = _max(line, float(torch.cat([square.mean((0, 1)), square.mean((0, 2))]).max()))
                count = len(self._windows) * self._windows[0].height * self._windows[0].width
                worst["nsr"] = _max(worst["nsr"], (error / size) ** 0.5)
                worst["line"] = _max(worst["line"], (line / (size / count)) ** 0.5)
            self.image.copy_(self._contents[0])
        return worst


def _max(a: float, b: float) -> float:
    """max() that keeps NaN whichever side it is on."""
    return a if a != a or a > b else b


def _noisy(n: int, h: int, w: int, generator: torch.Generator) -> Tensor:
    """Smooth images with noise of sigma 30, as the bundled weights expect them."""
    coarse = torch.rand((n, 1, h // 16 + 2, w // 16 + 2), generator=generator)
    clean = F.interpolate(coarse, (h, w), mode="bilinear").clamp(0, 1)
    return degrade.gaussian(clean, 30.0, generator)


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
    block = ResidualBlock(0, 1, "s", "t", "a", "ba", "b", "bb")
    weights = {"a": normal(c, c, 3, 3, spread=spread), "ba": normal(c), "b": normal(c, c, 3, 3, spread=spread), "bb": normal(c)}
    cases = [OpCase("residual_block", plan(block, 2, **norm(c), **weights), 4 * 9 * c * c, 2 * c * element)]
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

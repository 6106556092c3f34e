"""What a whole network must compute, for images of any size, and how far from it a result may be.

Results are held against the reference in float64, on windows with a halo of the receptive field, so that an image of any size
has an oracle. Two different images pass through the same memory, which a cache by address does not survive.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from memnet_fast import degrade
from memnet_fast.bench.kept import Kept
from memnet_fast.reference import MemNet

# Limits of the error, as root mean square over that of the residual: 12 units in the last place of the operands (fp32: right
# networks were measured at 1.0e-6 to 2.7e-6 with the bundled weights, a wrong kernel is at 1e-2 and more). With the bundled
# weights, in units: right fp16 and bf16 networks 1.4 where the image stays float32, 5.6 where it does not, as in the peers; a
# wrong kernel is beyond 20 in fp16. A line of pixels may have four times the error of all: measured 2.8 at most. fp8 is held
# by PSNR elsewhere; here it must only be no nonsense.
NSR = {"fp32": 2e-5, "tf32": 12 * 2.0**-11, "fp16": 12 * 2.0**-11, "bf16": 12 * 2.0**-8, "fp8": 0.5}
LINE = 4.0

_SIDE = 200  # of a window on a GPU
_FEW_SIDE = 32  # on a CPU, where float64 costs seconds
_WHOLE = 1 << 16  # pixels of a batch that a CPU checks all


def limits(precision: str) -> dict[str, float]:
    """What `NetworkCase.errors` may be at most."""
    return {"nsr": NSR[precision], "line": LINE * NSR[precision]}


def verdict(errors: dict[str, float], allowed: dict[str, float]) -> str | None:
    """None where every error is within its limit, otherwise what is wrong. NaN, or an error that is not there, is wrong."""
    values = {key: errors.get(key, float("nan")) for key in allowed}
    wrong = [f"{key} {values[key]:.2e} above {limit:.2e}" for key, limit in allowed.items() if not values[key] <= limit]
    return "; ".join(wrong) or None


@dataclass(frozen=True)
class Window:
    image: int
    top: int
    left: int
    height: int
    width: int


def windows(n: int, h: int, w: int) -> list[Window]:
    """The corners, the edges and the middle of the first, the middle and the last image."""

    def starts(size: int) -> list[int]:
        return [0] if size <= _SIDE else sorted({0, (size - _SIDE) // 2, size - _SIDE})

    images = sorted({0, n // 2, n - 1})
    side_h, side_w = min(h, _SIDE), min(w, _SIDE)
    return [Window(i, top, left, side_h, side_w) for i in images for top in starts(h) for left in starts(w)]


def few_windows(n: int, h: int, w: int, halo: int) -> list[Window]:
    """Everything where that is little work, otherwise the corners and the middle of the last image."""
    side_h, side_w = min(h, _FEW_SIDE), min(w, _FEW_SIDE)
    bottom, right = h - side_h, w - side_w
    places = sorted({(0, 0), (0, right), (bottom // 2, right // 2), (bottom, 0), (bottom, right)})
    # With its halo, a window in a corner is side + halo wide, one in the middle side + 2 halo.
    work = sum(
        min(h, side_h + (2 if 0 < y < bottom else 1) * halo) * min(w, side_w + (2 if 0 < x < right else 1) * halo)
        for y, x in places
    )
    if n * h * w <= max(_WHOLE, work):
        return [Window(i, 0, 0, h, w) for i in range(n)]
    return [Window(n - 1, y, x, side_h, side_w) for y, x in places]


class NetworkCase:
    """A network, an image [N, C, H, W] in one place of memory, and the truth about two contents of that place.

    thrifty: for a CPU, where float64 costs seconds: fewer windows of the first content, and of the second only a corner.
    cache: a folder that keeps the truth from run to run.
    """

    def __init__(
        self,
        net: MemNet,
        shape: tuple[int, int, int],
        device: torch.device,
        seed: int = 0,
        thrifty: bool = False,
        cache: Path | None = None,
    ) -> None:
        n, h, w = shape
        self.net = copy.deepcopy(net).to(device).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        channels = net.config.in_channels
        self.contents = [noisy(n, h, w, generator, channels).to(device) for _ in range(2)]
        self.image = self.contents[0].clone()
        if thrifty:
            side_h, side_w = min(h, _FEW_SIDE), min(w, _FEW_SIDE)
            corner = Window(n - 1, h - side_h, w - side_w, side_h, side_w)
            self._windows = [few_windows(n, h, w, net.config.receptive_radius), [corner]]
        else:
            self._windows = [windows(n, h, w)] * 2
        double = copy.deepcopy(self.net).double()

        def truths() -> bytes:
            with torch.inference_mode():
                found = [self._truth(double, x, at) for x, own in zip(self.contents, self._windows, strict=True) for at in own]
            return save({str(i): t.contiguous() for i, t in enumerate(found)})

        name = f"truth-{n}x{h}x{w}-{seed}-{device.type}-{'few' if thrifty else 'many'}"
        kept = load(Kept(cache, net).get(name, [sys.modules[__name__], degrade], truths))
        flat = [kept[str(i)].to(device) for i in range(len(kept))]
        first = len(self._windows[0])
        self._truths = [flat[:first], flat[first:]]

    @staticmethod
    def _truth(net: MemNet, x: Tensor, at: Window) -> Tensor:
        halo, (h, w) = net.config.receptive_radius, x.shape[2:]
        y0, x0 = max(0, at.top - halo), max(0, at.left - halo)
        y1, x1 = min(h, at.top + at.height + halo), min(w, at.left + at.width + halo)
        y = net(x[at.image : at.image + 1, :, y0:y1, x0:x1].double())
        return y[0, :, at.top - y0 :, at.left - x0 :][:, : at.height, : at.width]

    def errors(self, run: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Errors of run(image), for both contents of the image."""
        results = []
        with torch.inference_mode():
            for content in self.contents:
                self.image.copy_(content)
                results.append(run(self.image).clone())
            self.image.copy_(self.contents[0])
        return self.errors_of(results)

    def errors_of(self, results: Sequence[Tensor], clamped: bool = False) -> dict[str, float]:
        """Of the results for both contents. nsr: RMS of the error over RMS of the residual; line: the same for the worst row or
        column of a window. The larger of the two. NaN where a result is not finite, has another shape or lies elsewhere.

        clamped: the result is one of [0, 1], and so is the truth.
        """
        worst = {"nsr": 0.0, "line": 0.0}
        for content, places, truths, y in zip(self.contents, self._windows, self._truths, results, strict=True):
            expected = (content.shape[0], self.net.config.out_channels, *content.shape[2:])
            if y.shape != expected or y.device != content.device or not bool(torch.isfinite(y).all()):
                return {"nsr": float("nan"), "line": float("nan")}
            error, size, line = 0.0, 0.0, 0.0
            for at, truth in zip(places, truths, strict=True):
                place = (at.image, slice(None), slice(at.top, at.top + at.height), slice(at.left, at.left + at.width))
                right = truth.clamp(0, 1) if clamped else truth
                square = (y[place].double() - right).square()
                error += float(square.sum())
                size += float((truth - content[place].double()).square().sum())
                line = _max(line, float(torch.cat([square.mean((0, 1)), square.mean((0, 2))]).max()))
            count = len(places) * places[0].height * places[0].width * expected[1]
            worst["nsr"] = _max(worst["nsr"], (error / size) ** 0.5)
            worst["line"] = _max(worst["line"], (line / (size / count)) ** 0.5)
        return worst


def _max(a: float, b: float) -> float:
    """max() that keeps NaN whichever side it is on."""
    return a if a != a or a > b else b


def noisy(n: int, h: int, w: int, generator: torch.Generator, channels: int = 1) -> Tensor:
    """Smooth images [N, C, H, W] with noise of sigma 30, as the bundled weights expect them."""
    coarse = torch.rand((n, channels, h // 16 + 2, w // 16 + 2), generator=generator)
    clean = F.interpolate(coarse, (h, w), mode="bilinear").clamp(0, 1)
    return degrade.gaussian(clean, 30.0, generator)

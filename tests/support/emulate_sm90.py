"""The residual block for Hopper, run from its own text on the CPU (simt_build)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64 as _int64
from dataclasses import dataclass

import torch
from torch import Tensor

from memnet_fast.layouts import wgmma
from support.emulate_mma import CHANNELS, Emulation

WIDTHS = (32, 64, 80, 96)


def sources(widths: Sequence[int] = WIDTHS) -> list[str]:
    """Files of the kernels; that of fp8 holds all widths."""
    return ["residual_block_sm90.cu", *(f"residual_block_sm90_{width}.cu" for width in widths)]


@dataclass
class Hopper(Emulation):
    """early_weights: as in kernels.h; reading the source before waiting for the previous kernel is then an error."""

    capability: int = 90
    early_weights: bool = False

    def __post_init__(self) -> None:
        precision = self.precision
        if precision == "fp8":
            self.precision = "fp16"  # of slots
        super().__post_init__()
        self.precision = precision

    def width(self, n: int, h: int, w: int) -> int:
        return self.library.strip_width_sm90(*(_int64(v) for v in (n, h, w, self.sms)))

    def residual_block(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        n, _, h, w = x.shape
        self._begin()
        args = [self._buffer("the source", self._map(x), previous=True)]
        args += [self._buffer("the result", self._map(x), written=True)]
        args += [self._single("scale", p["scale"]), self._single("shift", p["shift"])]
        for name in ("a", "b"):
            weight = self._fragments(p[f"weight_{name}"], name)
            args += [self._buffer(f"weight_{name}", weight), self._single(f"bias_{name}", p[f"bias_{name}"])]
        args.append(int(self.early_weights))
        if self.precision == "fp8":
            args += [self._single("gain_a", p["gain_a"]), self._single("gain_b", p["gain_b"])]
        self._call("residual_block_sm90" + ("_fp8" if self.precision == "fp8" else ""), (n, h, w), *args)
        return self._result(self.dtype, (n, h, w, CHANNELS)).permute(0, 3, 1, 2).double()

    def _fragments(self, weight: Tensor, name: str) -> Tensor:
        if self.precision != "fp8":
            return self._packed(weight, torch.from_numpy(wgmma.conv3x3()))
        index = torch.from_numpy(wgmma.conv3x3_fp8_a() if name == "a" else wgmma.conv3x3_fp8_b())
        return weight.reshape(-1)[index.reshape(-1).long()].float().to(torch.float8_e4m3fn).view(torch.uint8)

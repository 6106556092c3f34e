"""The mma.sync residual block, the gate and the image convolutions, run from their own text on the CPU (simt_build).

Tensors as the package has them: maps [N, C, H, W] of 64 channels, weights [out, in, k, k]; here they are laid out, packed and
guarded as the runtime does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from memnet_fast.layouts import mma

TYPES = {"fp16": (0, torch.float16), "bf16": (1, torch.bfloat16)}
SOURCES = ("residual_block_sm80.cu", "gate.cu", "first_conv.cu", "reconstruct.cu")
CHANNELS = 64
_GUARD = 512  # bytes, a multiple of the 64 that buffers are aligned to


class EmulationError(AssertionError):
    """A kernel did what no kernel may do, or did not do its work."""


@dataclass
class Emulation:
    """order: 0, 1 or a seed, as simt_order. capability, sms: of the GPU that the launchers are told of."""

    library: ctypes.CDLL
    precision: str
    capability: int = 80
    sms: int = 2
    order: int = 0
    _buffers: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.type, self.dtype = TYPES[self.precision]
        self.library.simt_error.restype = ctypes.c_char_p
        self.library.simt_stored_bytes.restype = ctypes.c_uint64

    # ---- Memory

    def _buffer(self, name: str, value: Tensor, written: bool = False, previous: bool = False) -> int:
        """The address of a copy of value (written: of NaN instead) between guard bands of NaN. previous: see simt_range."""
        value = value.contiguous()
        size = value.numel() * value.element_size()
        raw = torch.empty(size + 2 * _GUARD + 64, dtype=torch.uint8)
        raw = raw[-raw.data_ptr() % 64 :][: size + 2 * _GUARD]
        raw.fill_(0xFF)
        inner = raw[_GUARD : _GUARD + size]
        if not written:
            inner.copy_(value.view(-1).view(torch.uint8))
        self._buffers.append((name, raw, inner))
        address = inner.data_ptr()
        self.library.simt_range(ctypes.c_void_p(address), ctypes.c_uint64(size), int(written), int(previous))
        return address

    def _single(self, name: str, value: Tensor) -> int:
        return self._buffer(name, value.to(torch.float32))

    def _call(self, name: str, shape: Sequence[int], *args: int) -> None:
        """Runs a launcher. args: integers and addresses, 64 bits each."""
        self.library.simt_order(ctypes.c_uint(self.order))
        before = {n: raw.clone() for n, raw, _ in self._buffers}
        entry = getattr(self.library, f"run_{name}")
        error = entry(*(ctypes.c_int64(v) for v in (self.type, self.capability, self.sms, *args, *shape)))
        if error:
            raise EmulationError(f"{name}: {self.library.simt_error().decode() or 'the launcher refused'}")
        for n, raw, _ in self._buffers:
            guards = torch.cat([raw[:_GUARD], raw[-_GUARD:]])
            if not bool((guards == 0xFF).all()):
                raise EmulationError(f"{name} wrote outside {n}")
            if n != "the result" and not torch.equal(raw, before[n]):
                raise EmulationError(f"{name} changed {n}")

    def _begin(self) -> None:
        self._buffers.clear()
        self.library.simt_clear_ranges()

    def _result(self, dtype: torch.dtype, shape: Sequence[int], every_byte_once: bool = True) -> Tensor:
        inner = next(inner for name, _, inner in self._buffers if name == "the result")
        if every_byte_once and self.library.simt_stored_bytes() != inner.numel():
            raise EmulationError(f"{self.library.simt_stored_bytes()} of {inner.numel()} bytes were written")
        return inner.view(dtype).view(shape).clone()

    def _map(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).permute(0, 2, 3, 1)

    def _packed(self, weight: Tensor, index: torch.Tensor) -> Tensor:
        return weight.reshape(-1)[index.reshape(-1).long()].to(self.dtype)

    # ---- Operations

    def residual_block(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        n, _, h, w = x.shape
        index = torch.from_numpy(mma.conv3x3())
        self._begin()
        args = [self._buffer("the source", self._map(x)), self._buffer("the result", self._map(x), written=True)]
        args += [self._single("scale", p["scale"]), self._single("shift", p["shift"])]
        args += [self._buffer("weight_a", self._packed(p["weight_a"], index)), self._single("bias_a", p["bias_a"])]
        args += [self._buffer("weight_b", self._packed(p["weight_b"], index)), self._single("bias_b", p["bias_b"])]
        self._call("residual_block_sm80", (n, h, w), *args)
        return self._result(self.dtype, (n, h, w, CHANNELS)).permute(0, 3, 1, 2).double()

    def gate(self, slots: Tensor, p: dict[str, Tensor], gap: int = 0) -> Tensor:
        """slots: [K, N, C, H, W]; gap: pixels of NaN between two slots."""
        k, n, _, h, w = slots.shape
        flat = torch.full((k, n * h * w + gap, CHANNELS), float("nan"), dtype=self.dtype)
        flat[:, : n * h * w] = slots.to(self.dtype).permute(0, 1, 3, 4, 2).reshape(k, -1, CHANNELS)
        stride = flat.stride(0)
        if gap:
            flat = torch.cat([flat.reshape(-1)[: stride * (k - 1)], flat[-1, : n * h * w].reshape(-1)])
        weight = self._packed(p["weight"], torch.from_numpy(mma.gate(k)))
        self._begin()
        args = [self._buffer("the slots", flat), stride, k, self._buffer("the result", flat.view(-1)[: n * h * w * 64], True)]
        args += [self._single("scale", p["scale"]), self._single("shift", p["shift"])]
        args += [self._buffer("weight", weight), self._single("bias", p["bias"])]
        self._call("gate", (n * h * w,), *args)
        return self._result(self.dtype, (n, h, w, CHANNELS)).permute(0, 3, 1, 2).double()

    def first_conv(self, image: Tensor, p: dict[str, Tensor]) -> Tensor:
        n, cin, h, w = image.shape
        result = torch.empty(n * h * w * CHANNELS, dtype=self.dtype)
        self._begin()
        args = [self._single("the image", image), self._buffer("the result", result, written=True)]
        args += [self._single("scale", p["scale"]), self._single("shift", p["shift"])]
        args += [self._single("weight", p["weight"].permute(2, 3, 1, 0)), self._single("bias", p["bias"])]
        self._call("first_conv", (n, cin, h, w), *args)
        return self._result(self.dtype, (n, h, w, CHANNELS)).permute(0, 3, 1, 2).double()

    def reconstruct(self, slots: Tensor, image: Tensor, p: dict[str, Tensor], clamp: bool = False) -> Tensor:
        """slots: [K, N, C, H, W]"""
        k, n, _, h, w = slots.shape
        cout, kernel = p["weight"].shape[0], p["weight"].shape[-1]
        flat = slots.to(self.dtype).permute(0, 1, 3, 4, 2)
        self._begin()
        args = [self._buffer("the slots", flat), n * h * w * CHANNELS, k, kernel, int(clamp)]
        args += [self._single("the image", image)]
        args += [self._buffer("the result", torch.empty(n * cout * h * w, dtype=torch.float32), written=True)]
        args += [self._single("scale", p["scale"]), self._single("shift", p["shift"])]
        args += [self._single("weight", p["weight"].permute(2, 3, 0, 1)), self._single("bias", p["bias"])]
        args += [self._single("head", p["head"]), self._single("skip", p["skip"])]
        self._call("reconstruct", (n, cout, h, w, image.shape[1]), *args)
        return self._result(torch.float32, (n, cout, h, w), every_byte_once=False).double()


# ---- What they compute, in float64, rounded where the kernels round


def activate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.relu(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))


def rounded(x: Tensor, precision: str) -> Tensor:
    return x.to(TYPES[precision][1]).double()


def residual_block(x: Tensor, p: dict[str, Tensor], precision: str) -> Tensor:
    a = rounded(activate(x, p["scale"], p["shift"]), precision)
    mid = F.conv2d(a, rounded(p["weight_a"], precision), p["bias_a"], padding=1)
    mid = rounded(torch.relu(mid), precision)
    return x + F.conv2d(mid, rounded(p["weight_b"], precision), p["bias_b"], padding=1)


def gate(slots: Tensor, p: dict[str, Tensor], precision: str) -> Tensor:
    total = p["bias"].view(-1, 1, 1)
    for j, slot in enumerate(slots):
        a = rounded(activate(slot, p["scale"][j], p["shift"][j]), precision)
        total = total + F.conv2d(a, rounded(p["weight"][:, j, :, None, None], precision))
    return total


def first_conv(image: Tensor, p: dict[str, Tensor]) -> Tensor:
    return F.conv2d(activate(image, p["scale"], p["shift"]), p["weight"], p["bias"], padding=1)


def reconstruct(slots: Tensor, image: Tensor, p: dict[str, Tensor], clamp: bool = False) -> Tensor:
    total = p["skip"] * image
    for j, slot in enumerate(slots):
        y = F.conv2d(activate(slot, p["scale"][j], p["shift"][j]), p["weight"], p["bias"], padding=p["weight"].shape[-1] // 2)
        total = total + p["head"][j] * y
    return total.clamp(0, 1) if clamp else total

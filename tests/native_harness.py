"""Runs single native operations between guard bands, and their float64 twins in plain torch."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from memnet_fast import native, packing

_GUARD = 1024  # floats on either side of every buffer
_POISONS = {"nan": np.float32(np.nan).view(np.uint32), "ones": np.uint32(0xFFFFFFFF)}


class Guarded:
    """A float32 array at a multiple of 64 bytes, poisoned, between two guard bands of NaN with a payload of their own."""

    def __init__(self, floats: int, poison: str = "nan") -> None:
        self._raw = packing.aligned_zeros((floats + 2 * _GUARD,))
        self._raw.view(np.uint32)[:] = 0x7FC0BEEF
        self.data = self._raw[_GUARD : _GUARD + floats]
        self.data.view(np.uint32)[:] = _POISONS[poison]

    @property
    def address(self) -> int:
        return self.data.ctypes.data

    def check(self, name: str) -> None:
        bits = self._raw.view(np.uint32)
        for band in (bits[:_GUARD], bits[-_GUARD:]):
            assert (band == 0x7FC0BEEF).all(), f"something wrote outside {name}"


@dataclass
class Plan:
    """A few native operations on tensors of one shape. Slots are set and read as [N, C, H, W] float64 tensors."""

    n: int
    h: int
    w: int
    channels: int = 64
    cin: int = 1
    cout: int = 1
    num_slots: int = 4
    algorithm: str = "direct"
    isa: str = "auto"
    threads: int = 2
    poison: str = "nan"
    ops: list = field(default_factory=list)
    keep: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cp = packing.padded_channels(self.channels)
        self.module = native.module()
        self.bytes = self.module.workspace_bytes(*self._shape(), self.algorithm, self.isa, self.threads)
        self.workspace = Guarded(self.bytes // 4, self.poison)
        self.image = Guarded(self.n * self.cin * self.h * self.w, self.poison)
        self.out = Guarded(self.n * self.cout * self.h * self.w, self.poison)

    def _shape(self) -> tuple[int, ...]:
        return (self.n, self.h, self.w, self.cin, self.cout, self.cp, self.num_slots)

    def _slot(self, index: int) -> np.ndarray:
        size = self.n * self.h * self.w * self.cp
        return self.workspace.data[index * size : (index + 1) * size].reshape(self.n, self.h, self.w, self.cp)

    def set_image(self, image: torch.Tensor) -> None:
        self.image.data[:] = image.numpy().ravel()

    def set_slot(self, index: int, value: torch.Tensor) -> None:
        slot = self._slot(index)
        slot[...] = 0
        slot[..., : self.channels] = value.permute(0, 2, 3, 1).numpy()

    def slot(self, index: int) -> torch.Tensor:
        slot = self._slot(index)
        if not np.isnan(slot).any():
            assert (slot[..., self.channels :] == 0).all(), "padding channels must stay zero"
        return torch.from_numpy(slot[..., : self.channels].copy()).permute(0, 3, 1, 2)

    def output(self) -> torch.Tensor:
        return torch.from_numpy(self.out.data.reshape(self.n, self.cout, self.h, self.w).copy())

    def _address(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array)
        self.keep.append(array)
        return array.ctypes.data

    def _add(self, **values: object) -> None:
        op = np.zeros((), self.module.op_dtype)
        for name, value in values.items():
            op[name] = self._address(value) if isinstance(value, np.ndarray) else value
        self.ops.append(op)

    def _pad(self, tensor: torch.Tensor) -> np.ndarray:
        return packing.pad_channels(tensor.numpy(), self.cp)

    def first_conv(self, dst, scale, shift, weight, bias) -> None:
        self._add(
            kind=self.module.FIRST_CONV,
            dst=dst,
            scale=scale.numpy().astype(np.float32),
            shift=shift.numpy().astype(np.float32),
            weight_a=packing.pack_first(weight.numpy(), self.cp),
            bias_a=self._pad(bias),
        )

    def residual_block(self, src, dst, scale, shift, weight_a, bias_a, weight_b, bias_b) -> None:
        pack = packing.pack_direct if self.algorithm == "direct" else packing.pack_winograd
        self._add(
            kind=self.module.RESIDUAL_BLOCK,
            src=src,
            dst=dst,
            scale=self._pad(scale),
            shift=self._pad(shift),
            weight_a=pack(weight_a.numpy(), self.cp),
            bias_a=self._pad(bias_a),
            weight_b=pack(weight_b.numpy(), self.cp),
            bias_b=self._pad(bias_b),
        )

    def gate(self, srcs, dst, scale, shift, weight, bias) -> None:
        self._add(
            kind=self.module.GATE,
            num_src=len(srcs),
            srcs=np.array(srcs, np.int32),
            dst=dst,
            scale=self._pad(scale),
            shift=self._pad(shift),
            weight_a=packing.pack_gate(weight.numpy(), len(srcs), self.cp),
            bias_a=self._pad(bias),
        )

    def reconstruct(self, srcs, scale, shift, weight, bias, heads, skip_weight, clamp=False) -> None:
        self._add(
            kind=self.module.RECONSTRUCT,
            num_src=len(srcs),
            srcs=np.array(srcs, np.int32),
            kernel=weight.shape[-1],
            clamp=clamp,
            skip_weight=skip_weight,
            scale=self._pad(scale),
            shift=self._pad(shift),
            weight_a=packing.pack_reconstruct(weight.numpy(), self.cp),
            bias_a=bias.numpy().astype(np.float32),
            head_weights=heads.numpy().astype(np.float32),
        )

    def arguments(self) -> list:
        ops = np.array(self.ops, self.module.op_dtype)
        memory = (self.workspace.address, self.bytes, self.image.address, self.out.address)
        return [ops, *self._shape(), *memory, self.algorithm, self.isa, self.threads]

    def run(self) -> "Plan":
        image = self.image.data.copy()
        self.module.run(*self.arguments())
        for name in ("workspace", "image", "out"):
            getattr(self, name).check(name)
        assert np.array_equal(image.view(np.uint32), self.image.data.view(np.uint32)), "the image was changed"
        return self


def single(*shape: int, generator: torch.Generator, spread: float = 1.0) -> torch.Tensor:
    """Normal values that fp32 holds exactly, as float64: then packing rounds nothing but Winograd's transformed weights."""
    return (torch.randn(*shape, generator=generator) * spread).double()


def activate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """relu(x * scale + shift) of [N, C, H, W]."""
    return torch.relu(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))


def residual_block(x, scale, shift, weight_a, bias_a, weight_b, bias_b) -> torch.Tensor:
    mid = torch.relu(F.conv2d(activate(x, scale, shift), weight_a, bias_a, padding=1))
    return x + F.conv2d(mid, weight_b, bias_b, padding=1)


def gate(sources, scale, shift, weight, bias) -> torch.Tensor:
    """sources: list of [N, C, H, W]; scale, shift: [len, C]; weight: [C, len * C, 1, 1]."""
    joined = torch.cat([activate(x, s, t) for x, s, t in zip(sources, scale, shift, strict=True)], 1)
    return F.conv2d(joined, weight, bias)


def reconstruct(image, sources, scale, shift, weight, bias, heads, skip_weight, clamp=False) -> torch.Tensor:
    total = skip_weight * image.expand(-1, weight.shape[0], -1, -1)
    for x, s, t, head in zip(sources, scale, shift, heads, strict=True):
        total = total + head * F.conv2d(activate(x, s, t), weight, bias, padding=weight.shape[-1] // 2)
    return total.clamp(0, 1) if clamp else total


def worst_error(result: torch.Tensor, reference: torch.Tensor, size: torch.Tensor) -> float:
    """Largest |result - reference| in units of RMS(size). NaN in the result gives inf."""
    error = (result.double() - reference).abs()
    if not torch.isfinite(error).all():
        return float("inf")
    return float(error.max() / size.square().mean().sqrt())


def isas() -> list[str]:
    return native.module().isas()

"""The Triton backend: the kernels of `memnet_fast.kernels`, launched one by one, on NVIDIA GPUs of compute capability 8.0 up.

Numerics are those of the torch backend: operands rounded after BN-ReLU, sums, bias and skip in float32, one store for each
operation, the image path in float32. Triton itself is imported on first use; without it everything else works.
With TRITON_INTERPRET=1 in the environment before that, the kernels run in Triton's interpreter on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memnet_fast import packing
from memnet_fast.backends.torch import round_operand
from memnet_fast.config import MemNetConfig
from memnet_fast.plan import FirstConv, FusedPlan, Gate, Reconstruct, ResidualBlock
from memnet_fast.timing import Stopwatch, Timing

# "auto" stays float32, as on the CPU: how much a restored image loses in a smaller precision was never measured on a GPU.
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
ALGORITHMS = ("direct",)
# `backends.choose` passes over a backend with this line unless it is asked for by name.
ON_REQUEST_ONLY = "its kernels were checked in the interpreter and by the compiler, but never on a GPU; ask for it by name"

_MODULES = ("activation", "first_conv", "residual_block", "gate", "reconstruct")
_STORE = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOWEST_CAPABILITY = (8, 0)
_INTERPRETED_AS = 90


@cache
def _load() -> tuple[dict[str, ModuleType], Exception | None]:
    """The kernel modules by name, or the error of their import."""
    import importlib

    try:
        return {name: importlib.import_module(f"memnet_fast.kernels.{name}") for name in _MODULES}, None
    except (ImportError, RuntimeError, OSError) as error:  # a broken installation fails in more ways than a missing one
        return {}, error


def _interpreted() -> bool:
    """Whether the kernels were imported with TRITON_INTERPRET=1."""
    return bool(_load()[0]["activation"].INTERPRETED.value)


def why_not(config: MemNetConfig, device: torch.device, precision: str, algorithm: str) -> str | None:
    if precision not in PRECISIONS:
        return f"precision '{precision}' is not among {', '.join(PRECISIONS)}"
    if algorithm not in ALGORITHMS:
        return f"it has only the algorithm 'direct', not '{algorithm}'"
    error = _load()[1]
    if error is not None:
        return f"Triton cannot be used ({type(error).__name__}: {' '.join(str(error).split())}); pip install triton"
    if _interpreted() and device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it runs on CUDA devices, the network is on {device} (on a CPU only with TRITON_INTERPRET=1, very slowly)"
    if torch.version.hip is not None:
        return "its tiles were chosen for NVIDIA GPUs, and this is a ROCm build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LOWEST_CAPABILITY:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    return None


def pack(plan: FusedPlan, device: torch.device, precision: str, algorithm: str) -> TritonPacked:
    """Weights of convolutions and gates rounded to the operand dtype, everything else float32, channels padded to 16."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        architecture = 10 * major + minor
    else:
        architecture = _INTERPRETED_AS
    cp = packing.padded_channels(plan.config.channels)
    packed: dict[tuple[str, ...], Tensor] = {}

    def tensor(name: str, *shape: int, order: tuple[int, ...] | None = None, rounded: bool = False) -> Tensor:
        """A weight permuted by `order` and padded with zeros to `shape`; operations that share a weight share the result."""
        key = (name, str(shape))
        if key not in packed:
            value = plan.weights[name]
            value = value if order is None else value.permute(order)
            full = torch.zeros(shape, dtype=torch.float32, device="cpu")
            full[tuple(slice(n) for n in value.shape)] = value.float()
            if rounded:
                full = round_operand(full, precision).to(_STORE[precision])
            packed[key] = full.to(device)
        return packed[key]

    weights: list[tuple[Tensor, ...]] = []
    tables: list[Tensor | None] = []
    for op in plan.ops:
        table = None
        args: tuple[Tensor, ...]
        match op:
            case FirstConv():
                w = plan.weights[op.weight].flatten(2)  # [C, planes, 9]
                planes = w.shape[1]
                weight = torch.zeros(planes, 9, cp, dtype=torch.float32, device="cpu")
                weight[..., : w.shape[0]] = w.permute(1, 2, 0).float()
                args = (weight.to(device), tensor(op.scale, planes), tensor(op.shift, planes), tensor(op.bias, cp))
            case ResidualBlock():
                weight_a, weight_b = (
                    tensor(name, 3, 3, cp, cp, order=(2, 3, 0, 1), rounded=True) for name in (op.weight_a, op.weight_b)
                )
                scale, shift = tensor(op.scale, cp), tensor(op.shift, cp)
                args = (scale, shift, weight_a, tensor(op.bias_a, cp), weight_b, tensor(op.bias_b, cp))
            case Gate():
                k = len(op.srcs)
                weight = tensor(op.weight, k, cp, cp, order=(1, 0, 2), rounded=True)
                args = (weight, tensor(op.scale, k, cp), tensor(op.shift, k, cp), tensor(op.bias, cp))
                table = torch.tensor(op.srcs, dtype=torch.int64, device=device)
            case Reconstruct():
                k, kernel = len(op.srcs), plan.weights[op.weight].shape[-1]
                planes = _padded_planes(plan.config.out_channels)
                weight = tensor(op.weight, kernel, kernel, planes, cp, order=(2, 3, 0, 1))
                scale, shift = tensor(op.scale, k, cp), tensor(op.shift, k, cp)
                args = (weight, scale, shift, tensor(op.bias, planes), tensor(op.head, k), tensor(op.skip, 1))
                table = torch.tensor(op.srcs, dtype=torch.int64, device=device)
        weights.append(args)
        tables.append(table)
    return TritonPacked(plan, precision, architecture, tuple(weights), tuple(tables))


def _padded_planes(channels: int) -> int:
    from memnet_fast.kernels.tile_config import out_block

    block = out_block(channels)
    return -(-channels // block) * block


@dataclass(frozen=True)
class TritonPacked:
    """weights, tables: for each operation of the plan, as its kernel takes them. architecture: 80 for capability 8.0.
    tma: False: gates read by address also where they could by descriptor."""

    plan: FusedPlan
    precision: str
    architecture: int
    weights: tuple[tuple[Tensor, ...], ...]
    tables: tuple[Tensor | None, ...]
    tma: bool = True

    @property
    def padded_channels(self) -> int:
        return packing.padded_channels(self.plan.config.channels)

    def workspace_bytes(self, n: int, h: int, w: int) -> int:
        """Every slot, and one more for the map between the two convolutions of a residual block."""
        return (self.plan.num_slots + 1) * n * h * w * self.padded_channels * _STORE[self.precision].itemsize

    def run(self, image: Tensor, out: Tensor, workspace: Tensor) -> None:
        """Launches on the current stream and waits for nothing."""
        self._run(image, out, workspace, None)

    def run_timed(self, image: Tensor, out: Tensor, workspace: Tensor, names: Sequence[str]) -> Timing:
        with Stopwatch(image.device, names) as watch:
            self._run(image, out, workspace, watch)
        return watch.timing()

    @torch.no_grad()
    def _run(self, image: Tensor, out: Tensor, workspace: Tensor, watch: Stopwatch | None) -> None:
        n, _, h, w = image.shape
        slots = workspace[: self.workspace_bytes(n, h, w)].view(_STORE[self.precision])
        slots = slots.view(self.plan.num_slots + 1, n, h, w, self.padded_channels)
        if image.device.type == "cuda":
            with torch.cuda.device(image.device):
                self._launch(image, out, slots, watch)
        else:
            self._launch(image, out, slots, watch)

    def _launch(self, image: Tensor, out: Tensor, slots: Tensor, watch: Stopwatch | None) -> None:
        kernels = _load()[0]
        channels, tf32 = self.plan.config.channels, self.precision == "tf32"
        for i, (op, weights, table) in enumerate(zip(self.plan.ops, self.weights, self.tables, strict=True)):
            if watch is not None:
                watch.begin(i)
            match op:
                case FirstConv():
                    kernels["first_conv"].launch(image, slots[op.dst], weights, channels, self._tile("first_conv"))
                case ResidualBlock():
                    x, mid, y = slots[op.src], slots[-1], slots[op.dst]
                    tiles = self._tile("conv_a"), self._tile("conv_b")
                    kernels["residual_block"].launch(x, mid, y, weights, channels, tf32, *tiles)
                case Gate():
                    kernels["gate"].launch(slots, op.srcs, table, op.dst, weights, channels, tf32, self._tile("gate"))
                case Reconstruct():
                    kernel, clamp = weights[0].shape[0], self.plan.config.clamp
                    kernels["reconstruct"].launch(slots, table, image, out, weights, kernel, clamp, self._tile("reconstruct"))

    def _tile(self, kernel: str) -> Any:
        from memnet_fast.kernels.tile_config import tile

        own = tile(kernel, self.precision, self.architecture, self.padded_channels)
        return own if self.tma else replace(own, tma=False)

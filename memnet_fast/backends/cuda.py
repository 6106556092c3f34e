"""The CUDA backend: one native call packs the weights and launches every kernel, on the caller's stream, and waits for nothing.

Numerics are those of the torch backend: operands rounded after BN-ReLU, sums, bias and skip in float32, one store for each
operation, the image path in float32. Weights are packed on the device in every call, from the parameters as they are then: a
few microseconds, so that no change can be missed and nothing has to be compared.

The module needs no torch and no driver to be built or loaded; `memnet_fast.native_cuda` says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memnet_fast import native_cuda
from memnet_fast.backends import cuda_tables
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError
from memnet_fast.layouts import CHANNELS
from memnet_fast.memory import short_memory
from memnet_fast.parameters import Parameters
from memnet_fast.plan import FusedPlan, Op, Recipe, State, outline
from memnet_fast.timing import Timing, of_timeline

PRECISIONS = ("fp16", "bf16", "fp8")
ALGORITHMS = ("direct",)
# `backends.choose` passes over a backend with this line unless it is asked for by name.
ON_REQUEST_ONLY = "its kernels were checked by the compiler and by emulation, but never on a GPU; ask for it by name"
# One pass holds this many pixels at most: 1.7 GB of workspace for M6R6, and 3 % of the time of a pass goes into what a pass
# costs whatever its size (packing, and each kernel's loading of its weights).
PIXELS_PER_PASS = 1 << 20

_SOURCE_TYPE = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def why_not(config: MemNetConfig, device: torch.device, precision: str, algorithm: str) -> str | None:
    if precision not in PRECISIONS:
        return f"it computes in {', '.join(PRECISIONS)}, not {precision}"
    if algorithm not in ALGORITHMS:
        return f"it has only the algorithm 'direct', not '{algorithm}'"
    if config.channels > CHANNELS:
        return f"its kernels hold {CHANNELS} channels, the network has {config.channels}"
    missing = native_cuda.why_missing()
    if missing is not None:
        return missing
    if device.type != "cuda":
        return f"it runs on CUDA devices, the network is on {device}"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs, and this is a ROCm build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    reason = native_cuda.why_not_running() or native_cuda.why_not_capability(capability)
    if reason is None and precision == "fp8" and not native_cuda.hopper(capability):
        major, minor = capability
        return f"fp8 needs the kernels for 9.0 (MEMNET_CUDA_ARCHS=90a) and such a GPU; this one has {major}.{minor}"
    return reason


@dataclass(frozen=True, eq=False)
class Bound:
    """A network with the parameters of one call."""

    native: Any
    device: torch.device
    parameters: Parameters
    types: np.ndarray  # [P] uint8, of the parameters

    @classmethod
    def of(cls, native: Any, device: torch.device, parameters: Parameters) -> Bound:
        """Raises InputError for a parameter on another device or of a dtype that the native module does not read."""
        if parameters.device != device:
            raise InputError(f"the parameters of the network lie on {parameters.device}, not on {device}; move it")
        try:
            types = np.array([_SOURCE_TYPE[dtype] for dtype in parameters.dtypes], np.uint8)
        except KeyError as error:
            raise InputError(f"the network has parameters of dtype {error.args[0]}; convert it with .float()") from None
        return cls(native, device, parameters, types)

    def workspace_bytes(self, n: int, h: int, w: int) -> int:
        return self.native.workspace_bytes(n, h, w)

    def run(self, image: Tensor, out: Tensor, workspace: Tensor) -> None:
        """Enqueues everything on the current stream of the device."""
        self._run(image, out, workspace, None)

    def run_timed(self, image: Tensor, out: Tensor, workspace: Tensor, names: Sequence[str]) -> Timing:
        """Each kernel as it ran on the device, those that pack the weights too. The event between two kernels keeps the next
        one from starting early."""
        timeline = native_cuda.module().Timeline(list(names))
        self._run(image, out, workspace, timeline)
        return of_timeline(timeline.rows())

    def _run(self, image: Tensor, out: Tensor, workspace: Tensor, timeline: Any) -> None:
        with torch.cuda.device(self.device), short_memory("kernels", self.device):
            stream = torch.cuda.current_stream(self.device).cuda_stream
            self.native.run(self.device.index or 0, stream, *self._arguments(image, out, workspace), timeline)

    def capture(self, image: Tensor, out: Tensor, workspace: Tensor) -> Any:
        """The same as a graph, with launch(stream). Whoever keeps it keeps the tensors, and the parameters where they are."""
        with torch.cuda.device(self.device), short_memory("a CUDA graph", self.device):
            return self.native.capture(self.device.index or 0, *self._arguments(image, out, workspace))

    def _arguments(self, image: Tensor, out: Tensor, workspace: Tensor) -> tuple[Any, ...]:
        n, _, h, w = image.shape
        memory = workspace.data_ptr(), workspace.numel(), image.data_ptr(), out.data_ptr()
        return self.parameters.addresses, self.types, *memory, n, h, w


class Live:
    """A network whose parameters come with each call."""

    def __init__(self, native: Any, device: torch.device) -> None:
        self.native, self.device = native, device
        self._last: Bound | None = None

    def bind(self, parameters: Parameters) -> Bound:
        """parameters: the tensors named by `names` of `live`, in that order. Raises InputError as `Bound.of`."""
        last = self._last
        if last is None or last.parameters is not parameters:
            last = Bound.of(self.native, self.device, parameters)
            # A copy made for one call is not kept.
            self._last = last if parameters.in_place else None
        return last


def live(
    config: MemNetConfig, eps: Mapping[str, float], names: Sequence[str], device: torch.device, precision: str, algorithm: str
) -> Live:
    """A network of this configuration, for a device on which `why_not` finds nothing."""
    device = _indexed(device)
    hopper = native_cuda.hopper(torch.cuda.get_device_capability(device))
    return Live(_live_plan(config, tuple(sorted(eps.items())), tuple(names), precision, hopper), device)


# Without a limit: a captured graph reads the tables of its plan for as long as it lives.
@cache
def _live_plan(
    config: MemNetConfig, eps: tuple[tuple[str, float], ...], names: tuple[str, ...], precision: str, hopper: bool
) -> Any:
    drawn = outline(config)
    return _native_plan(config, drawn.ops, drawn.recipes, names, dict(eps), drawn.num_slots, precision, hopper)


def _native_plan(
    config: MemNetConfig,
    ops: Sequence[Op],
    recipes: Mapping[str, Recipe],
    names: Sequence[str],
    eps: Mapping[str, float],
    num_slots: int,
    precision: str,
    hopper: bool,
) -> Any:
    tables = cuda_tables.build(ops, recipes, names, eps, precision, hopper, config.clamp)
    return native_cuda.module().Plan(
        bf16=precision == "bf16",
        fp8=precision == "fp8",
        hopper=hopper,
        cin=config.in_channels,
        cout=config.out_channels,
        num_slots=num_slots,
        num_parameters=len(names),
        **vars(tables),
    )


def pack(plan: FusedPlan, device: torch.device, precision: str, algorithm: str) -> CudaPacked:
    """A plan with its weights on the device, in float64; they too are packed in each call."""
    device = _indexed(device)
    capability = 90 if native_cuda.hopper(torch.cuda.get_device_capability(device)) else 80
    return CudaPacked(plan, precision, capability, device)


@dataclass(frozen=True)
class CudaPacked:
    """capability: 90 for the residual block of Hopper, 80 for the one that every GPU runs."""

    plan: FusedPlan
    precision: str
    capability: int
    device: torch.device

    @property
    def padded_channels(self) -> int:
        return CHANNELS

    @cached_property
    def _bound(self) -> Bound:
        plan = self.plan
        recipes = {name: Recipe(tuple(weight.shape), (State(name),)) for name, weight in plan.weights.items()}
        hopper = self.capability == 90
        native = _native_plan(plan.config, plan.ops, recipes, list(recipes), {}, plan.num_slots, self.precision, hopper)
        with short_memory("weights", self.device):
            weights = [weight.to(self.device) for weight in plan.weights.values()]
        return Bound.of(native, self.device, Parameters.of(weights))

    def workspace_bytes(self, n: int, h: int, w: int) -> int:
        """Every slot [N, H, W, 64] of two bytes, in order, and behind them the packed weights."""
        return self._bound.workspace_bytes(n, h, w)

    def run(self, image: Tensor, out: Tensor, workspace: Tensor) -> None:
        self._bound.run(image, out, workspace)

    def run_timed(self, image: Tensor, out: Tensor, workspace: Tensor, names: Sequence[str]) -> Timing:
        return self._bound.run_timed(image, out, workspace, names)


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device

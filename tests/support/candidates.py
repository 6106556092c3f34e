"""Everything that can run a plan, behind one face, between guard bands and on poisoned memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from memnet_fast import native
from memnet_fast.backends import cpu, cuda, triton
from memnet_fast.backends import torch as torch_backend
from memnet_fast.plan import FusedPlan, Reconstruct, lower
from memnet_fast.reference import MemNet
from support.checks import require

CPU = torch.device("cpu")
_GUARD = 4096  # bytes
_MARK = 0x7FC0BEEF  # a NaN with a payload of its own
_STORE = {"fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float16}


class Guarded:
    """`size` bytes at a multiple of 64, filled with `poison`, between two bands of marked NaN."""

    def __init__(self, size: int, poison: int = 0xFF, device: torch.device = CPU) -> None:
        padded = -(-size // 4) * 4  # the bands are written as 32-bit words
        raw = torch.empty(padded + 2 * _GUARD + 64, dtype=torch.uint8, device=device)
        start = -raw.data_ptr() % 64
        self._words = raw[start : start + padded + 2 * _GUARD].view(torch.int32)
        self._words.fill_(_MARK)
        self.bytes = self._words.view(torch.uint8)[_GUARD : _GUARD + size]
        self.bytes.fill_(poison)

    def check(self, name: str) -> None:
        words = _GUARD // 4
        intact = bool((self._words[:words] == _MARK).all()) and bool((self._words[-words:] == _MARK).all())
        require(intact, f"something wrote outside {name}")


class Runner(Protocol):
    def run(self, image: Tensor, slots: dict[int, Tensor] | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        """Runs the plan once. slots: [N, C, H, W] values to begin with. Returns the output, and every slot afterwards where
        slots were given.
        """


@dataclass
class BackendRunner:
    """A packed plan of one of the package's backends. Tensors come from the CPU and go back to it, wherever the plan runs."""

    plan: FusedPlan
    packed: object
    precision: str
    padded: int  # channels of a slot in memory
    one_by_one: bool  # the workspace holds one image at a time
    poison: int = 0xFF
    device: torch.device = CPU

    def run(self, image: Tensor, slots: dict[int, Tensor] | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        if self.one_by_one and image.shape[0] != 1 and (slots or not self._complete()):
            raise ValueError("single operations run on one image here")
        n, _, h, w = image.shape
        config = self.plan.config
        kind = torch.float64 if self.precision == "fp64" else torch.float32
        work = Guarded(self.packed.workspace_bytes(n, h, w), self.poison, self.device)
        source = Guarded(image.numel() * kind.itemsize, device=self.device)
        target = Guarded(n * config.out_channels * h * w * kind.itemsize, device=self.device)
        x, out = source.bytes.view(kind).view(image.shape), target.bytes.view(kind).view(n, config.out_channels, h, w)
        x.copy_(image)
        if not self._complete():
            out.zero_()  # nobody writes it, and a result that is not finite would be computed again
        memory = self._slots(work.bytes, n, h, w)
        for index, value in (slots or {}).items():
            memory[index].zero_()
            memory[index][:, : config.channels].copy_(value)
        self.packed.run(x, out, work.bytes)
        for name, buffer in (("the workspace", work), ("the image", source), ("the output", target)):
            buffer.check(name)
        require(torch.equal(x.cpu(), image.cpu().to(kind)) or bool(image.isnan().any()), "the image was changed")
        # Who gives no slots looks at the result of a whole network; its slots may be more than the host's memory holds.
        kept = range(self.plan.num_slots) if slots is not None else ()
        return out.cpu().clone(), {i: memory[i][:, : config.channels].cpu().clone() for i in kept}

    def _complete(self) -> bool:
        return any(isinstance(op, Reconstruct) for op in self.plan.ops)

    def _slots(self, memory: Tensor, n: int, h: int, w: int) -> Tensor:
        images = 1 if self.one_by_one else n
        kind = _STORE.get(self.precision, torch.float32)
        count = self.plan.num_slots * images * h * w * self.padded
        view = memory[: count * kind.itemsize].view(kind)
        return view.view(self.plan.num_slots, images, h, w, self.padded).permute(0, 1, 4, 2, 3)


@dataclass(frozen=True)
class Candidate:
    """make: packs a plan. lower: makes the plan of a network. exact: sums in a fixed order of its own, so that integers come
    out exactly and a result does not depend on where a tile begins. scattered: takes sources in any slots.
    """

    name: str
    precision: str
    make: Callable[[FusedPlan], Runner] = field(compare=False)
    lower: Callable[[MemNet], FusedPlan] = field(default=lower, compare=False)
    algorithm: str = "direct"
    scattered: bool = True

    def build(self, net: MemNet) -> Runner:
        return self.make(self.lower(net))


def triton_candidate(
    precision: str,
    device: torch.device = CPU,
    architecture: int | None = None,
    spoil: Callable[[tuple], tuple] | None = None,
    tma: bool = True,
) -> Candidate:
    """On a GPU, or with TRITON_INTERPRET=1 on the CPU. architecture: whose tiles (80 for 8.0); None: the device's own.
    spoil: changes the packed weights of each operation. tma: False: gates read by address everywhere.
    """

    def make(plan: FusedPlan) -> Runner:
        packed = dataclasses.replace(triton.pack(plan, device, precision, "direct"), tma=tma)
        if architecture is not None:
            packed = dataclasses.replace(packed, architecture=architecture)
        if spoil is not None:
            packed = dataclasses.replace(packed, weights=tuple(spoil(w) for w in packed.weights))
        return BackendRunner(plan, packed, precision, packed.padded_channels, one_by_one=False, device=device)

    tiles = ("" if architecture is None else f"-sm{architecture}") + ("" if tma else "-by-address")
    return Candidate(f"triton-{precision}{tiles}", precision, make)


def cuda_candidate(precision: str, device: torch.device, capability: int | None = None) -> Candidate:
    """capability: whose kernels, 80 or 90; None: the device's own."""

    def make(plan: FusedPlan) -> Runner:
        packed = cuda.pack(plan, device, precision, "direct")
        if capability is not None:
            packed = dataclasses.replace(packed, capability=capability)
        return BackendRunner(plan, packed, precision, packed.padded_channels, one_by_one=False, device=device)

    kernels = "" if capability is None else f"-sm{capability}"
    return Candidate(f"cuda-{precision}{kernels}", precision, make, scattered=False)


def torch_candidate(precision: str) -> Candidate:
    def make(plan: FusedPlan) -> Runner:
        packed = torch_backend.pack(plan, torch.device("cpu"), precision)
        return BackendRunner(plan, packed, precision, plan.config.channels, one_by_one=True)

    return Candidate(f"torch-{precision}", precision, make)


def cpu_candidate(isa: str, algorithm: str) -> Candidate:
    def make(plan: FusedPlan) -> Runner:
        packed = cpu.CpuPacked(plan, algorithm, isa)
        return BackendRunner(plan, packed, "fp32", packed.padded_channels, one_by_one=False)

    return Candidate(f"cpu-{algorithm}-{isa}", "fp32", make, algorithm=algorithm)


def isas() -> list[str]:
    """Instruction sets that run here; none where the native module is missing (its own tests say why)."""
    return [] if native.why_missing() else list(native.module().isas())


TORCH = [torch_candidate(p) for p in ("fp32", "tf32", "bf16", "fp16")]
DIRECT = [cpu_candidate(isa, "direct") for isa in isas()]
WINOGRAD = [cpu_candidate(isa, "winograd") for isa in isas()]
ALL = TORCH + DIRECT + WINOGRAD
PMR = TORCH[0]


def pmr(precision: str) -> Candidate:
    """The policy-matched reference of a precision."""
    return next(c for c in TORCH if c.precision == precision)

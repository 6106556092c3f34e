"""The native CPU backend: one call into C++ runs a whole plan, float32, AVX-512, AVX2 or portable code as the machine has it.

algorithm "winograd" computes the 3x3 convolutions of residual blocks as F(6x6, 3x3); "direct" sums nine taps in a fixed
order: slower, smaller error, exact on integers, and bit-equal between tiles and the whole image.

precision "bf16" needs AVX512-BF16. Its sums, bias, skip and slots are float32. With algorithm "direct" operands and weights are
rounded where the backend "torch" rounds them; the stores, which that specification rounds, too, are not: a smaller error. With
"winograd", F(3x3, 3x3), rounded is what the transforms make of operands and weights, and the tensor between the convolutions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memnet_fast import native, packing
from memnet_fast.backends.cpu_steps import Step, compact_steps, plain_steps
from memnet_fast.config import MemNetConfig
from memnet_fast.control_groups import granted_cpus
from memnet_fast.plan import FirstConv, FusedPlan, Gate, Reconstruct, ResidualBlock
from memnet_fast.timing import Timing, of_native

PRECISIONS = ("fp32", "bf16")
ALGORITHMS = ("winograd", "direct")

BF16_ISA = "avx512_bf16"
_KIND = {FirstConv: 0, ResidualBlock: 1, Gate: 2, Reconstruct: 3}
# How the weights of 3x3 convolutions and of gates are laid out: (in bf16, algorithm) -> functions.
_PACKERS = {
    (False, "winograd"): (packing.pack_winograd, packing.pack_gate),
    (False, "direct"): (packing.pack_direct, packing.pack_gate),
    (True, "winograd"): (packing.pack_bf16_winograd, packing.pack_bf16_gate),
    (True, "direct"): (packing.pack_bf16_direct, packing.pack_bf16_gate),
}
_log = logging.getLogger("memnet_fast")
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# An OpenMP pool does not survive fork: a parallel region in the child would wait for threads that are not there.
os.register_at_fork(after_in_child=_note_fork)


def why_not(config: MemNetConfig, device: torch.device, precision: str, algorithm: str) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, the network is on {device}"
    if precision not in PRECISIONS:
        return f"it computes in fp32 or bf16, not {precision}"
    if algorithm not in ALGORITHMS:
        return f"algorithm '{algorithm}' is not among {', '.join(ALGORITHMS)}"
    missing = native.why_missing()
    if missing:
        return f"the native module is missing ({missing})"
    if precision == "bf16":
        return why_no_bf16()
    return f"MEMNET_ISA asks for {BF16_ISA}, which computes in bf16" if os.environ.get("MEMNET_ISA") == BF16_ISA else None


def why_no_bf16() -> str | None:
    """Why precision "bf16" cannot run on this CPU, if it cannot; the native module must be there."""
    wanted = os.environ.get("MEMNET_ISA") or BF16_ISA
    if wanted != BF16_ISA:
        return f"MEMNET_ISA asks for {wanted}, which has no bf16 products"
    return native.module().why_no_bf16() or None


def forked() -> bool:
    """Whether this process came from a fork after this module was imported."""
    return _forked


def spare_lost_threads() -> None:
    """In a forked process torch computes with one thread from here on: its parallel loops would wait for ever for a thread pool
    that did not survive the fork."""
    if _forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def num_threads() -> int:
    """Threads for one call: torch.get_num_threads(), but no more than this process may use; 1 in a forked child."""
    if _forked:
        return 1
    return max(1, min(torch.get_num_threads(), usable_cpus()))


def usable_cpus() -> int:
    """CPUs that this process may use, by its affinity and its control groups."""
    return min(len(os.sched_getaffinity(0)), granted_cpus())


def pack(plan: FusedPlan, device: torch.device, precision: str, algorithm: str) -> CpuPacked:
    """isa: the best one that this CPU has for this precision, unless MEMNET_ISA names another."""
    isa = os.environ.get("MEMNET_ISA") or (BF16_ISA if precision == "bf16" else native.module().isas()[0])
    return CpuPacked(plan, algorithm, isa, compact=True)


@dataclass
class CpuPacked:
    """compact: gates in parts and slots renumbered (cpu_steps), so that the workspace is smaller. The results are the same: bit
    for bit in fp32; in bf16 but for the order in which a gate adds up its sums.
    """

    plan: FusedPlan
    algorithm: str
    isa: str
    compact: bool = False
    ops: np.ndarray = field(init=False, repr=False)
    _kept: list[np.ndarray] = field(init=False, repr=False, default_factory=list)
    _direct: CpuPacked | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self._steps, self._num_slots = plain_steps(self.plan.ops), self.plan.num_slots
        if self.compact:
            self._steps, self._num_slots = compact_steps(self.plan.ops)
        self.ops = np.zeros(len(self._steps), native.module().op_dtype)
        self._addresses: dict[tuple[str, str], int] = {}
        for record, step in zip(self.ops, self._steps, strict=True):
            self._fill(record, step)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What runs, in order."""
        return tuple(self._steps)

    @property
    def padded_channels(self) -> int:
        return packing.padded_channels(self.plan.config.channels)

    def _fill(self, record: Any, step: Step) -> None:
        op, cp = step.op, self.padded_channels
        record["kind"] = _KIND[type(op)]
        conv3x3, pack_gate = _PACKERS[self.isa == BF16_ISA, self.algorithm]
        match op:
            case FirstConv():
                record["dst"] = op.dst
                self._point(record, "scale", op.scale, np.float32)
                self._point(record, "shift", op.shift, np.float32)
                self._point(record, "weight_a", op.weight, lambda w: packing.pack_first(w, cp))
                self._point(record, "bias_a", op.bias, lambda v: packing.pad_channels(v, cp))
            case ResidualBlock():
                record["src"], record["dst"] = op.src, op.dst
                for key, name in (
                    ("scale", op.scale),
                    ("shift", op.shift),
                    ("bias_a", op.bias_a),
                    ("bias_b", op.bias_b),
                ):
                    self._point(record, key, name, lambda v: packing.pad_channels(v, cp))
                self._point(record, "weight_a", op.weight_a, lambda w: conv3x3(w, cp))
                self._point(record, "weight_b", op.weight_b, lambda w: conv3x3(w, cp))
            case Gate():
                self._sources(record, op.srcs)
                record["dst"] = op.dst
                self._point(record, "scale", op.scale, lambda v: packing.pad_channels(v, cp))
                self._point(record, "shift", op.shift, lambda v: packing.pad_channels(v, cp))
                sources = self.plan.weights[op.scale].shape[0]
                self._point(record, "weight_a", op.weight, lambda w: pack_gate(w, sources, cp))
                self._point(record, "bias_a", op.bias, lambda v: packing.pad_channels(v, cp))
                record["accumulate"] = step.first > 0
                weight_bytes = cp * cp * (2 if self.isa == BF16_ISA else 4)
                for key, size in (("scale", 4 * cp), ("shift", 4 * cp), ("weight_a", weight_bytes)):
                    record[key] += step.first * size
            case Reconstruct():
                self._sources(record, op.srcs)
                weights = self.plan.weights
                record["kernel"] = weights[op.weight].shape[-1]
                record["clamp"] = self.plan.config.clamp
                record["skip_weight"] = float(weights[op.skip])
                self._point(record, "scale", op.scale, lambda v: packing.pad_channels(v, cp))
                self._point(record, "shift", op.shift, lambda v: packing.pad_channels(v, cp))
                self._point(record, "weight_a", op.weight, lambda w: packing.pack_reconstruct(w, cp))
                self._point(record, "bias_a", op.bias, np.float32)
                self._point(record, "head_weights", op.head, np.float32)

    def _sources(self, record: Any, srcs: tuple[int, ...]) -> None:
        record["num_src"] = len(srcs)
        self._kept.append(np.array(srcs, np.int32))
        record["srcs"] = self._kept[-1].ctypes.data

    def _point(self, record: Any, key: str, name: str, pack_weight: Any) -> None:
        """Stores the address of a packed weight; operations that share a weight share its packed copy."""
        if (name, key) not in self._addresses:
            self._kept.append(pack_weight(self.plan.weights[name].numpy()))
            self._addresses[name, key] = self._kept[-1].ctypes.data
        record[key] = self._addresses[name, key]

    def _shape(self, n: int, h: int, w: int) -> tuple[int, ...]:
        config = self.plan.config
        return n, h, w, config.in_channels, config.out_channels, self.padded_channels, self._num_slots

    def workspace_bytes(self, n: int, h: int, w: int) -> int:
        module, threads = native.module(), num_threads()
        size = module.workspace_bytes(*self._shape(n, h, w), self.algorithm, self.isa, threads)
        if self.algorithm == "winograd":  # the same memory must do when a result has to be computed again
            size = max(size, module.workspace_bytes(*self._shape(1, h, w), "direct", self.isa, threads))
        return size

    def run(self, image: Tensor, out: Tensor, workspace: Tensor) -> None:
        self._call(image, out, workspace)
        if self.algorithm == "winograd":
            # Winograd spreads one NaN or infinity over its whole tile, and overflows earlier: such images are computed
            # directly, which gives the values of the definition.
            for i in range(image.shape[0]):
                if not torch.isfinite(out[i]).all():
                    _log.info("image %d of the batch is not finite; computed again by the direct algorithm", i)
                    if self._direct is None:
                        self._direct = CpuPacked(self.plan, "direct", self.isa, self.compact)
                    self._direct._call(image[i : i + 1], out[i : i + 1], workspace)

    def run_timed(self, image: Tensor, out: Tensor, workspace: Tensor, names: Sequence[str]) -> Timing:
        timing = of_native(self._call(image, out, workspace, timed=True), native.module().PHASES)
        index = [step.index for step in self._steps]
        return replace(
            timing,
            spans=tuple(s if s.op is None else replace(s, op=index[s.op]) for s in timing.spans),
            threads=tuple(replace(s, op=index[s.op]) for s in timing.threads),
        )

    def _call(self, image: Tensor, out: Tensor, workspace: Tensor, timed: bool = False) -> Any:
        n, _, h, w = image.shape
        shape, threads = self._shape(n, h, w), num_threads()
        # The machine may grant another number of threads than when the size was asked for: as many as there is memory for.
        while threads > 1 and workspace.numel() < native.module().workspace_bytes(*shape, self.algorithm, self.isa, threads):
            threads -= 1
        call = native.module().run_timed if timed else native.module().run
        return call(
            self.ops,
            *shape,
            workspace.data_ptr(),
            workspace.numel(),
            image.data_ptr(),
            out.data_ptr(),
            self.algorithm,
            self.isa,
            threads,
        )

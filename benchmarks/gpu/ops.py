"""Time of every operation alone, with the card's own ceilings beside it:  python -m benchmarks.gpu.ops OUT.json

A row says the operation, ms, and from flop and byte (every input read once, every output written once) TFLOP/s, TB/s, and the
floor: the larger of flop over the GEMM rate and byte over the copy rate that this same run measured. The time of the cuda
backend contains the packing of the operation's weights, a kernel of some microseconds, which a network does once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import ceilings, facts, store
from benchmarks.gpu.cases import SIZES, OpCase, op_cases, op_truth
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.timing import Variant, measure
from memnet_fast import backends, native
from memnet_fast.bench.clocks import Clock, CudaClock, HostClock
from memnet_fast.config import MemNetConfig
from memnet_fast.plan import Gate, Reconstruct, ResidualBlock

_STORE = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float16}
# Root mean square of the error over that of the result, in units of the last place of operands (fp32: of 2^-22, for its sums).
# The torch backend has 0.2 to 1.7 on a CPU; a lost tap is a third of the result, 80 units in bf16.
_UNITS = 4.0
# Winograd's sums have larger terms than their result.
_WINOGRAD = 4.0
_UNIT = {"fp32": 2.0**-22, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8": 2.0**-4}


def limit(precision: str, algorithm: str = "direct") -> float:
    """Of the relative error of one operation."""
    return _UNITS * _UNIT[precision] * (_WINOGRAD if algorithm == "winograd" else 1.0)


def _pack(case: OpCase, backend: str, precision: str, algorithm: str, device: torch.device) -> Any:
    if backend == "cpu" and precision == "fp32":
        # Its own pack() renumbers the slots of a whole network, and there is none around this operation.
        isa = os.environ.get("MEMNET_ISA") or native.module().isas()[0]
        return backends.cpu.CpuPacked(case.plan, algorithm, isa)
    return backends.LADDER[backend].pack(case.plan, device, precision, algorithm)


class PlacedOp:
    """An operation in one backend, on slots in a workspace that begin as normal numbers."""

    def __init__(
        self,
        case: OpCase,
        backend: str,
        precision: str,
        other: dict[str, Any] | None,
        h: int,
        w: int,
        device: torch.device,
        algorithm: str = "direct",
    ):
        """other: what differs in the packed plan from what the backend takes by itself."""
        packed = dataclasses.replace(_pack(case, backend, precision, algorithm, device), **(other or {}))
        self._case, self._packed = case, packed
        self._work = torch.empty(packed.workspace_bytes(1, h, w), dtype=torch.uint8, device=device)
        dtype, count, padded = _STORE[precision], case.plan.num_slots, getattr(packed, "padded_channels", 64)
        values = self._work[: count * h * w * padded * dtype.itemsize].view(dtype)
        self._slots = values.view(count, 1, h, w, padded).permute(0, 1, 4, 2, 3)
        self._image = torch.rand(1, 1, h, w, device=device)
        self._out = torch.empty_like(self._image)

    def __call__(self) -> None:
        self._packed.run(self._image, self._out, self._work)

    def refresh(self) -> Tensor:
        """Fresh numbers in every slot, and a result that is NaN until it is written. Returns the result."""
        op = self._case.op
        for slot in self._slots:
            slot.normal_()
        result = self._out if isinstance(op, Reconstruct) else self._slots[op.dst]
        return result.fill_(float("nan"))

    def check(self) -> dict[str, float]:
        result = self.refresh()
        truth = op_truth(self._case, self._slots.double(), self._image)
        self()
        error = (result.double() - truth).square().mean().sqrt()
        return {"relative": float(error / truth.square().mean().sqrt())}


def plain(case: OpCase, h: int, w: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object] | None:
    """The operation as plain PyTorch does it, channels_last, or None for one that nobody would write alone."""
    weights, op = {k: v.to(device, dtype) for k, v in case.plan.weights.items()}, case.op

    def noise(channels: int) -> Tensor:
        return torch.randn(1, channels, h, w, device=device).to(dtype=dtype, memory_format=torch.channels_last)

    def bn_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        return torch.relu(F.batch_norm(x, zero, one, scale, shift, False, 0.0, 0.0))

    if isinstance(op, ResidualBlock):
        x = noise(64)
        a, b = (weights[n].contiguous(memory_format=torch.channels_last) for n in (op.weight_a, op.weight_b))

        def block() -> Tensor:
            t = F.conv2d(bn_relu(x, weights["s"], weights["t"]), a, weights["ba"], padding=1)
            return x + F.conv2d(torch.relu(t), b, weights["bb"], padding=1)

        return block
    if isinstance(op, Gate):
        sources = [noise(64) for _ in op.srcs]
        weight = weights[op.weight].flatten(1)[:, :, None, None].contiguous(memory_format=torch.channels_last)
        scale, shift = weights["s"].flatten(), weights["t"].flatten()
        return lambda: F.conv2d(bn_relu(torch.cat(sources, 1), scale, shift), weight, weights["b"])
    return None


@dataclasses.dataclass(frozen=True)
class _Way:
    """A backend as it is, or with something else in its packed plan, which then is what the row is about."""

    backend: str
    precision: str
    other: dict[str, Any] | None = None
    says: str = ""
    begins: str = ""  # of the names of the operations for which it makes a difference

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}{self.says}"


def _ways(device: torch.device) -> list[_Way]:
    """What can run here. A newer GPU also runs the residual block of sm_80, and the gate of Triton without descriptors."""
    found = []
    newer = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    for name, module in backends.LADDER.items():
        if name in ("cpu", "torch"):
            continue
        for precision in module.PRECISIONS:
            if module.why_not(MemNetConfig(), device, precision, "direct") is None:
                found.append(_Way(name, precision))
                if newer and name == "cuda" and precision != "fp8":
                    found.append(_Way(name, precision, {"capability": 80}, " (sm_80 kernels)", "residual_block"))
                if newer and name == "triton":
                    found.append(_Way(name, precision, {"tma": False}, " (by address)", "gate"))
    return found or [_Way("torch", "fp32")]  # a dry run


def run_size(
    size: str,
    shape: tuple[int, int, int],
    clock: Clock,
    device: torch.device,
    seconds: float,
    journal: Journal | None = None,
) -> list[dict[str, Any]]:
    _, h, w = shape
    ceiling = ceilings.measured(clock, device)
    rows = list(ceiling["rows"])
    for index in range(len(op_cases())):
        variants = []
        for way in _ways(device):
            case = op_cases(_STORE[way.precision].itemsize)[index]
            if not case.name.startswith(way.begins):
                continue
            try:
                placed = PlacedOp(case, way.backend, way.precision, way.other, h, w, device)
            except Exception as error:  # as in a check: it must not cost the others
                reason = f"{type(error).__name__}: {error}"[:300]
                rows.append({"suite": "op", "op": case.name, "variant": way.name, "status": "failed", "reason": reason})
                continue
            limits = {"relative": limit(way.precision)}
            variants.append(Variant(way.name, placed, placed.check, limits, {"precision": way.precision, "op": case.name}))
        eager = plain(op_cases()[index], h, w, device, torch.float16 if device.type == "cuda" else torch.float32)
        if eager is not None:
            variants.append(Variant("eager fp16 channels_last", eager, dict, {}, {"precision": "fp16", "op": case.name}))
        subject = next((v.name for v in variants if v.name == "cuda fp16"), None)
        for row in measure(variants, clock, seconds, subject, journal, f"{size} {op_cases()[index].name}"):
            if "ms" in row:
                element = _STORE[row["precision"]].itemsize
                cost, pixels, seconds_each = op_cases(element)[index], h * w, row["ms"] * 1e-3
                row.update(
                    tflops=cost.flop * pixels / seconds_each * 1e-12,
                    tbps=cost.byte * pixels / seconds_each * 1e-12,
                    floor_ms=1e3 * max(cost.flop * pixels / ceiling["flops"], cost.byte * pixels / ceiling["bytes"]),
                )
            rows.append({**_about_size(size, shape), **row})
    return rows


def _about_size(size: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    return {"suite": "op", "size": size, "h": shape[1], "w": shape[2]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", default="1080p", help=", ".join(SIZES) + " or 1xHxW")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each operation")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, whose times mean nothing")
    parser.add_argument("--journal", type=Path, help="to go on after a variant that took the GPU (benchmarks/gpu/journal.py)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device, 0 if options.device == "cuda" else None)
    about = facts.about()
    torch.backends.cudnn.benchmark = True
    clock: Clock = CudaClock(device) if device.type == "cuda" else HostClock()
    for size in options.sizes.split(","):
        shape = SIZES.get(size) or tuple(int(s) for s in size.split("x"))
        fixed = _about_size(size, shape)
        journal = Journal(options.journal, lambda row, fixed=fixed: store.add(options.out, about, [{**fixed, **row}]))
        if journal.has("done", size):
            continue
        rows = run_size(size, shape, clock, device, options.seconds, journal)
        store.add(options.out, about, rows)
        journal.write("done", size)
        for row in rows:
            what = f"{row['ms']:9.4f} ms  floor {row.get('floor_ms', float('nan')):9.4f}" if "ms" in row else row["reason"]
            print(f"{size:10} {row.get('op', ''):16} {row['variant']:36} {what}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

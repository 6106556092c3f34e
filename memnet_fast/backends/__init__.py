"""Backends run plans. Each module here offers

    PRECISIONS, ALGORITHMS   the names it knows, best first: what "auto" means comes first
    why_not(config, device, precision, algorithm) -> str | None    the reason why it cannot run, if it cannot
    pack(plan, device, precision, algorithm) -> Packed             weights in its own layout
    ON_REQUEST_ONLY    optional: the reason why "auto" must not choose it, though it may be asked for by name
    PIXELS_PER_PASS    optional: how many pixels of a batch it computes at once
    live(config, eps, names, device, precision, algorithm) -> Live    optional: packs weights by itself, in every call

and `choose` is the one ladder that picks among them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol

# `import torch` would not do here: the submodule of that name takes the attribute.
from torch import Tensor
from torch import device as Device

from memnet_fast.backends import cpu, cuda, torch, triton
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import BackendUnavailable, InputError
from memnet_fast.parameters import Parameters
from memnet_fast.timing import Timing

LADDER: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "torch": torch}
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")
ALGORITHMS = ("winograd", "direct")


class Packed(Protocol):
    """A plan ready to run: immutable, so that one may serve many calls at once."""

    def workspace_bytes(self, n: int, h: int, w: int) -> int:
        """Bytes of scratch memory that `run` needs for a batch [n, C_in, h, w]."""

    def run(self, image: Tensor, out: Tensor, workspace: Tensor) -> None:
        """image [N, C_in, H, W] -> out [N, C_out, H, W], both contiguous float32; workspace: uint8, 64-byte aligned."""

    def run_timed(self, image: Tensor, out: Tensor, workspace: Tensor, names: Sequence[str]) -> Timing:
        """As `run`, but waits for the result, and says when each operation of the plan ran. names: of the operations, for
        tools that look on (`timing.names`)."""


class Live(Protocol):
    """A network whose weights are packed in each call, from the parameters that the call brings."""

    def bind(self, parameters: Parameters) -> Packed:
        """parameters: the tensors named by `names`, in that order, as they are now; nothing is copied or read yet."""


@dataclass(frozen=True)
class Choice:
    """What a request for "auto" came to."""

    backend: str
    precision: str
    algorithm: str
    not_taken: tuple[str, ...] = ()  # what stood before it on the ladder, with the reasons


def choose(config: MemNetConfig, device: Device, backend: str, precision: str, algorithm: str) -> Choice:
    """The first backend of the ladder that can run this network on this device as asked.

    backend, precision, algorithm: a name or "auto"; MEMNET_BACKEND stands in for backend "auto".
    Raises InputError for unknown names and BackendUnavailable, with the reason, for a request that cannot be met.
    """
    asked_by = ""
    if backend == "auto" and (own := os.environ.get("MEMNET_BACKEND")):
        backend, asked_by = own, " (by MEMNET_BACKEND)"
    for name, value, known in (
        ("backend", backend, tuple(LADDER)),
        ("precision", precision, PRECISIONS),
        ("algorithm", algorithm, ALGORITHMS),
    ):
        if value != "auto" and value not in known:
            whose = asked_by if name == "backend" else ""
            raise InputError(f"unknown {name} '{value}'{whose}; choose from auto, {', '.join(known)}")
    reasons: list[str] = []
    for name in LADDER if backend == "auto" else [backend]:
        module = LADDER[name]
        if backend == "auto" and (held_back := getattr(module, "ON_REQUEST_ONLY", None)):
            reasons.append(f"{name}: {held_back}")
            continue
        choice = Choice(
            name,
            module.PRECISIONS[0] if precision == "auto" else precision,
            module.ALGORITHMS[0] if algorithm == "auto" else algorithm,
        )
        reason = module.why_not(config, device, choice.precision, choice.algorithm)
        if reason is None:
            return replace(choice, not_taken=tuple(reasons))
        reasons.append(f"{name}: {reason}")
    reason = "; ".join(reasons) if backend == "auto" else reasons[0].partition(": ")[2]
    raise BackendUnavailable(backend, reason + (f"; MEMNET_BACKEND={backend} asks for it" if asked_by else ""))

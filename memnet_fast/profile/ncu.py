"""The command line for Nsight Compute that looks at the kernels of a plan. Needs no GPU: it is only put together here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from memnet_fast import backends, timing
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError
from memnet_fast.plan import outline

# The names of the functions on the device, as csrc/cuda and kernels/ have them. PyTorch's own have none to tell.
_KERNELS: dict[str, tuple[str, ...]] = {
    "cuda": ("first_conv_kernel", "residual_block_kernel", "gate_kernel", "reconstruct_kernel"),
    "triton": ("first_conv", "conv3x3", "gate", "reconstruct"),
    "torch": (),
}


def command(config: MemNetConfig, backend: str, precision: str, report: str, options: Sequence[str]) -> str:
    """The command, then as comments the ranges of this plan.

    backend: "auto" stands for "cuda". options: of `memnet profile`, without backend and precision, as words. report: the file
    that ncu writes. One timed run is looked at; what warms up before it lies outside the range.
    Raises InputError for a backend that runs on no GPU, or a precision that it does not know.
    """
    backend = "cuda" if backend == "auto" else backend
    if backend not in _KERNELS:
        raise InputError(f"--ncu is for backends that run on a GPU ({', '.join(_KERNELS)}), not '{backend}'")
    known = backends.LADDER[backend].PRECISIONS
    precision = known[0] if precision == "auto" else precision
    if precision not in known:
        raise InputError(f"backend {backend} knows the precisions {', '.join(known)}, not '{precision}'")
    words = ["ncu", "--nvtx", "--nvtx-include", f"{timing.RANGE}/", "--set", "full", "--clock-control", "none"]
    if kernels := _KERNELS[backend]:
        words += ["--kernel-name-base", "function", "--kernel-name", f"regex:^({'|'.join(kernels)})$"]
    words += ["-f", "-o", report, "memnet", "profile", *options]
    words += ["--device", "cuda", "--backend", backend, "--precision", precision, "--rounds", "1"]
    ranges = list(dict.fromkeys(timing.names(outline(config).ops)))
    lines = [shlex.join(words), f"# ranges of this plan, all within {timing.RANGE}/ ({len(ranges)}):"]
    lines += [f"#   {line}" for line in _wrapped(ranges)]
    one = next(name for name in reversed(ranges) if name.startswith("gate."))
    lines.append(f"# one of them alone: --nvtx-include {timing.RANGE}/{one}/ in place of {timing.RANGE}/")
    return "\n".join(lines)


def _wrapped(names: Sequence[str]) -> list[str]:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 110:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + name
    return lines

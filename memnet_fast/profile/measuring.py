"""Runs a network under the plan's own instrumentation, in turns with the ordinary call, and adds up what it says."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memnet_fast import backends, timing
from memnet_fast.engine import state_names
from memnet_fast.errors import InputError, NumericError
from memnet_fast.fused import FusedMemNet, fuse
from memnet_fast.memory import empty
from memnet_fast.parameters import Parameters
from memnet_fast.plan import FusedPlan, Op, batch_norm_eps, lower
from memnet_fast.profile import ceilings
from memnet_fast.profile.ceilings import Ceilings
from memnet_fast.profile.cost import Cost, Way, cost
from memnet_fast.profile.memory import Step, steps
from memnet_fast.reference import MemNet
from memnet_fast.timing import Timing

_WARM_UP = 2


@dataclass(frozen=True)
class HostEvent:
    """Of torch.profiler: nanoseconds from the first event. track: a thread, or "device"."""

    name: str
    track: str
    begin: int
    end: int


@dataclass(frozen=True)
class Operation:
    """One operation of the plan. ms: of each round. phases: milliseconds summed over the threads, median of the rounds; empty
    for a backend without phases. counted: whether cost.executed comes from the kernel itself instead of the formula."""

    index: int
    name: str
    kind: str
    cost: Cost
    ms: tuple[float, ...]
    phases: dict[str, float] = field(default_factory=dict)
    counted: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


@dataclass(frozen=True)
class Profile:
    """plain_ms: of the ordinary call of `fuse(net)`, in turns with the timed ones; timed_ms: of the operations of each round,
    with the packing of weights where the device does it; packing_ms: that part. host: one ordinary call under torch.profiler.
    ceilings: with one thread, and with those of the run (a GPU: one entry), the last one counts. steps: what ran."""

    plan: FusedPlan
    choice: backends.Choice
    device: torch.device
    shape: tuple[int, int, int, int]
    operations: tuple[Operation, ...]
    rounds: tuple[Timing, ...]
    plain_ms: tuple[float, ...]
    host: tuple[HostEvent, ...]
    ceilings: tuple[Ceilings, ...]
    way: Way
    steps: tuple[Step, ...]
    workspace_bytes: int

    @property
    def timed_ms(self) -> tuple[float, ...]:
        return tuple(1e-6 * t.nanoseconds for t in self.rounds)

    @property
    def packing_ms(self) -> float:
        return statistics.median(1e-6 * sum(s.end - s.begin for s in t.spans if s.op is None) for t in self.rounds)

    @property
    def threads(self) -> int | None:
        return self.ceilings[-1].threads


def way_of(packed: Any, plan: FusedPlan, choice: backends.Choice) -> Way:
    """How a backend computes, for the formulas."""
    channels = getattr(packed, "padded_channels", None)
    if channels is None:
        channels = 64 if choice.backend == "cuda" else plan.config.channels
    return Way(
        channels,
        4 if choice.precision in ("fp32", "tf32") else 2,
        choice.algorithm == "winograd",
        choice.backend in ("cpu", "cuda"),
    )


def prepared(net: MemNet, backend: str, precision: str, algorithm: str) -> tuple[FusedPlan, backends.Choice, Any]:
    """The plan of a network as it is now, what runs it on the network's device, and its weights packed as for any call."""
    device, plan = net.first.conv.weight.device, lower(net)
    choice = backends.choose(net.config, device, backend, precision, algorithm)
    module = backends.LADDER[choice.backend]
    if not hasattr(module, "live"):
        return plan, choice, module.pack(plan, device, choice.precision, choice.algorithm)
    names, state = state_names(net.config), net.state_dict(keep_vars=True)
    live = module.live(net.config, batch_norm_eps(net), names, device, choice.precision, choice.algorithm)
    return plan, choice, live.bind(Parameters.of([state[name].detach() for name in names]))


def measure(
    net: nn.Module,
    image: Tensor,
    backend: str = "auto",
    precision: str = "auto",
    algorithm: str = "auto",
    rounds: int = 5,
    host: bool = True,
) -> Profile:
    """image: [N, C_in, H, W] float32 in [0, 1] on the device of `net`; computed at once, whatever N is. rounds: at least 1.
    host: also one ordinary call under torch.profiler.

    Raises as `fuse` and its call do; DeviceOOM where the workspace does not fit.
    """
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}")
    fast = fuse(net, backend, precision, algorithm)
    n, _, h, w = image.shape
    plan, choice, packed = prepared(fast.reference, backend, precision, algorithm)
    names = timing.names(plan.ops)
    with torch.inference_mode():
        plain = _plain(fast, image)
        for _ in range(_WARM_UP):
            expected = fast(image)
        size = packed.workspace_bytes(n, h, w)
        workspace = empty((size,), torch.uint8, image.device, "workspace")
        out = torch.full_like(expected, float("nan"))
        found, plain_ms = [], []
        packed.run(image, out, workspace)
        for _ in range(rounds):
            plain_ms.append(plain())
            found.append(packed.run_timed(image, out, workspace, names))
        if not torch.equal(out, expected) and bool(torch.isfinite(expected).all()):
            raise NumericError("the timed run gave another result than the ordinary call; nothing it says can be trusted")
        events = _host_events(fast, image) if host else ()
    way = way_of(packed, plan, choice)
    return Profile(
        plan,
        choice,
        image.device,
        (n, image.shape[1], h, w),
        tuple(_operation(i, op, names[i], plan, way, found, (n, h, w)) for i, op in enumerate(plan.ops)),
        tuple(found),
        tuple(plain_ms),
        events,
        _ceilings(choice, packed, image.device),
        way,
        steps(plan, packed),
        size,
    )


def _operation(
    index: int, op: Op, name: str, plan: FusedPlan, way: Way, rounds: list[Timing], shape: tuple[int, int, int]
) -> Operation:
    ms = tuple(1e-6 * sum(s.end - s.begin for s in timing.spans if s.op == index) for timing in rounds)
    sums: dict[str, list[float]] = {}
    for timed in rounds:
        parts = [t for t in timed.threads if t.op == index]
        for phase in parts[0].phases if parts else ():
            sums.setdefault(phase, []).append(1e-6 * sum(t.phases[phase] for t in parts))
    by_formula = cost(op, plan.config, way, *shape)
    counted = sum(t.flop for t in rounds[0].threads if t.op == index)
    known = by_formula if not counted else Cost(by_formula.flop, counted, by_formula.bytes)
    phases = {phase: statistics.median(values) for phase, values in sums.items()}
    return Operation(index, name, timing.KINDS[type(op)], known, ms, phases, counted > 0)


def _plain(fast: FusedMemNet, image: Tensor) -> Callable[[], float]:
    """Milliseconds of an ordinary call, until its result is there."""

    def once() -> float:
        start = time.perf_counter()
        fast(image)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        return 1e3 * (time.perf_counter() - start)

    return once


def _host_events(fast: FusedMemNet, image: Tensor) -> tuple[HostEvent, ...]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if image.is_cuda else [])]
    with profile(activities=activities) as profiler:
        fast(image)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
    events = [e for e in profiler.events() or () if e.time_range is not None]
    origin = min((e.time_range.start for e in events), default=0.0)
    found = []
    for e in events:
        track = "device" if e.device_type == DeviceType.CUDA else f"thread {e.thread}"
        begin, end = (round(1e3 * (t - origin)) for t in (e.time_range.start, e.time_range.end))
        found.append(HostEvent(e.name, track, begin, max(begin, end)))
    return tuple(sorted(found, key=lambda e: (e.track, e.begin, -e.end)))


def _ceilings(choice: backends.Choice, packed: Any, device: torch.device) -> tuple[Ceilings, ...]:
    if device.type == "cuda":
        return (ceilings.of_gpu(device, choice.precision),)
    threads = backends.cpu.num_threads() if choice.backend == "cpu" else torch.get_num_threads()
    isa = getattr(packed, "isa", "auto")
    return tuple(ceilings.of_cpu(t, isa, choice.precision) for t in dict.fromkeys((1, threads)))

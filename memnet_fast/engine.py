"""What runs behind a FusedMemNet: packed weights that follow the parameters, workspaces, and the passes over a batch."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from memnet_fast import backends
from memnet_fast.backends.cuda_graphs import Replays, capturing
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import DeviceOOM, InputError
from memnet_fast.fp8_gate import require_fp8
from memnet_fast.memory import empty, empty_to_keep, short_memory
from memnet_fast.parameters import Followed, Parameters, Values
from memnet_fast.plan import FusedPlan, lower_state
from memnet_fast.reference import MemNet

_log = logging.getLogger("memnet_fast")

# Batches are computed in passes of about this many pixels: more would cost memory and win nothing.
PIXELS_PER_PASS = 1 << 17


@lru_cache(maxsize=64)
def state_names(config: MemNetConfig) -> tuple[str, ...]:
    """Names of the tensors that determine a network in eval mode, in the order in which they are handed around."""
    with torch.device("meta"):
        return tuple(k for k in MemNet(config).state_dict() if not k.endswith("num_batches_tracked"))


def images_per_pass(n: int, h: int, w: int, backend: str = "cpu") -> int:
    """Images of a batch that a backend computes at once."""
    pixels = getattr(backends.LADDER[backend], "PIXELS_PER_PASS", PIXELS_PER_PASS)
    return max(1, min(n, pixels // (h * w)))


def workspace_bytes(packed: backends.Packed, n: int, h: int, w: int, backend: str) -> int:
    """Bytes that every pass over a batch fits in: the last one may hold fewer images, and their schedule may need more."""
    step = images_per_pass(n, h, w, backend)
    return max(packed.workspace_bytes(images, h, w) for images in {step, n % step or step})


def _fingerprint(state: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Where the tensors lie and how often autograd saw them change; needs no look at their values."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in state]


class Engine:
    """Runs one network, described by `spec`, on the tensors that each call brings.

    spec: JSON of config, eps (one for each batch normalisation), backend, precision, algorithm.
    Calls may come from several threads at once: packed weights are immutable, and each call has a workspace of its own.

    On a GPU everything is enqueued on the current stream of the device of x, and nothing waits for it, with two exceptions:
    the first call, and backends that pack on the host, which compare the weights with those they packed. So a call can be
    captured with torch.cuda.graph: its workspace then comes from the memory of that graph, and lives as long. The CUDA backend
    packs in every call, so also in every replay, from the parameters where they lay at the capture; the others can be captured
    once they have run, and replay the weights of that time.

    replays: the graphs that the CUDA backend keeps of small images by itself.
    """

    def __init__(self, spec: str) -> None:
        values = json.loads(spec)
        self.config = MemNetConfig.from_dict(values["config"])
        self.eps: dict[str, float] = values["eps"]
        self.request = (values["backend"], values["precision"], values["algorithm"])
        self.lock = threading.RLock()
        self.replays = Replays()
        self._device: torch.device | None = None
        self._parameters = Followed()
        self._seen: Values | None = None
        self._seen_at: list[tuple[int, int]] = []
        self._fp8_at: list[tuple[int, int]] = []
        self._packed: tuple[backends.Choice, backends.Packed] | None = None
        self._live: dict[torch.device, tuple[backends.Choice, backends.Live | None]] = {}
        self._told: backends.Choice | None = None
        self._free: dict[tuple[torch.device, int], Tensor] = {}

    def packed(self, state: Sequence[Tensor]) -> tuple[backends.Choice, backends.Packed]:
        """The backend, and the weights as it wants them; packed now, or packed before from the very same values.

        Values are compared, not version counters: `parameter.data.mul_(2)` changes no counter.
        Raises InputError where that would have to wait for a GPU whose stream is being captured, and BackendUnavailable for
        precision "fp8" where the weights are new and do not fit it.
        """
        backends.cpu.spare_lost_threads()
        with self.lock:
            parameters = self._parameters.of(state)
            device = parameters.device
            choice, live = self._of_device(device)
            if live is not None:
                if choice.precision == "fp8":
                    self._look_at_fp8(choice, parameters, _fingerprint(state))
                return choice, live.bind(parameters)
            if capturing(device):
                if self._packed is None or self._seen_at != _fingerprint(state):
                    raise InputError(
                        f"backend '{choice.backend}' packs its weights on the host, which a stream under capture forbids; "
                        "call the network once before the capture"
                    )
                return self._packed
            if self._packed is None or self._seen is None or not self._seen.are_in(parameters):
                # A copy, and packed is the copy: another thread may change the parameters meanwhile, and change them back.
                seen = Values(parameters)
                plan = self._plan(seen.tensors())
                if choice.precision == "fp8":
                    require_fp8(plan, choice.backend)
                module = backends.LADDER[choice.backend]
                self._packed = choice, module.pack(plan, device, choice.precision, choice.algorithm)
                self._seen = seen
            self._seen_at = _fingerprint(state) if device.type == "cuda" else []
            return self._packed

    def _plan(self, tensors: Sequence[Tensor]) -> FusedPlan:
        return lower_state(self.config, dict(zip(state_names(self.config), tensors, strict=True)), self.eps)

    def _look_at_fp8(self, choice: backends.Choice, parameters: Parameters, at: list[tuple[int, int]]) -> None:
        """Whether weights that the host does not read fit fp8; read only where their fingerprint is a new one."""
        if at == self._fp8_at:
            return
        if capturing(parameters.device):
            raise InputError(
                "fp8 looks at new weights on the host, which a stream under capture forbids; "
                "call the network once before the capture"
            )
        require_fp8(self._plan([t.cpu() for t in parameters.tensors]), choice.backend)
        self._fp8_at = at

    def settle(self, device: torch.device) -> None:
        """The network lies on this device: lets go of packed weights, workspaces and graphs of one that it has left."""
        with self.lock:
            if self._device == device:
                return
            self._device = device
            self._parameters, self._packed, self._seen = Followed(), None, None
            self._seen_at, self._fp8_at = [], []
            self._live.clear()
            for key in [key for key in self._free if key[0] != device]:
                del self._free[key]
            self.replays.clear()

    def _of_device(self, device: torch.device) -> tuple[backends.Choice, backends.Live | None]:
        """The backend for a device, and if it packs weights by itself in each call, what it made of the network."""
        with self.lock:
            self.settle(device)
            if device not in self._live:
                choice = backends.choose(self.config, device, *self.request)
                self._tell(choice, device)
                module = backends.LADDER[choice.backend]
                live = None
                if hasattr(module, "live"):
                    names = state_names(self.config)
                    live = module.live(self.config, self.eps, names, device, choice.precision, choice.algorithm)
                self._live[device] = choice, live
            return self._live[device]

    def _tell(self, choice: backends.Choice, device: torch.device) -> None:
        """Logs a new choice, once."""
        if self._told != choice:
            self._told = choice
            _log.info(
                "backend %s, precision %s, algorithm %s on %s", choice.backend, choice.precision, choice.algorithm, device
            )
            for reason in choice.not_taken:
                _log.info("not taken: %s", reason)

    def run(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        """x [N, C_in, H, W] -> [N, C_out, H, W], contiguous, dtype and device of x."""
        try:
            with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
                if self._of_device(state[0].device)[1] is None:
                    return self._run(x, state)
                # Only the enqueueing is under the lock: load_state_dict in another thread comes before or after all of it.
                with self.lock:
                    return self._run(x, state)
        except DeviceOOM:
            self.release()
            raise

    def _run(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        choice, packed = self.packed(state)
        if isinstance(packed, backends.cuda.Bound):
            replayed = self.replays.run(packed, x, self.config.out_channels)
            if replayed is not None:
                return replayed
        n, _, h, w = x.shape
        with short_memory("a copy of the input", x.device):
            # A view with the negative bit set looks contiguous; its memory holds other numbers.
            image = x.detach().resolve_neg().to(torch.float32).contiguous()
        out = empty((n, self.config.out_channels, h, w), torch.float32, x.device, "output")
        step = images_per_pass(n, h, w, choice.backend)
        with self._workspace(x.device, workspace_bytes(packed, n, h, w, choice.backend)) as workspace:
            for i in range(0, n, step):
                packed.run(image[i : i + step], out[i : i + step], workspace)
        with short_memory("a copy of the output", x.device):
            return out.to(x.dtype)

    @contextmanager
    def _workspace(self, device: torch.device, size: int) -> Iterator[Tensor]:
        """A workspace that nobody else holds; the largest one of each (device, stream) is kept for the next call."""
        stream = 0
        if device.type == "cuda":
            if capturing(device):
                # Of the memory pool of the graph, which keeps it for its replays. No other call may get it.
                yield empty_to_keep((size,), torch.uint8, device, "workspace")
                return
            stream = torch.cuda.current_stream(device).cuda_stream
        with self.lock:
            workspace = self._free.pop((device, stream), None)
        if workspace is None or workspace.numel() < size:
            workspace = None  # frees the old one before the new one is asked for
            workspace = empty_to_keep((size,), torch.uint8, device, "workspace")
        try:
            yield workspace
        finally:
            with self.lock:
                kept = self._free.get((device, stream))
                # Not where the network has left the device meanwhile.
                if self._device == device and (kept is None or kept.numel() < workspace.numel()):
                    self._free[device, stream] = workspace

    def release(self) -> None:
        """Gives the kept workspaces back, and those of the kept graphs with them."""
        with self.lock:
            self._free.clear()
            self.replays.clear()


_engines: dict[str, Engine] = {}
# By one thread more than once: while an engine is made, garbage may be collected, and with it a network that forgets its own.
_engines_lock = threading.RLock()


def engine(spec: str) -> Engine:
    """The engine of a spec; made on first use (an exported program names one that this process has not seen)."""
    with _engines_lock:
        if spec not in _engines:
            _engines[spec] = Engine(spec)
        return _engines[spec]


def forget(spec: str) -> None:
    """Drops an engine with its packed weights and workspaces."""
    with _engines_lock:
        _engines.pop(spec, None)


def make_spec(config: MemNetConfig, eps: dict[str, float], backend: str, precision: str, algorithm: str, owner: str) -> str:
    """owner: a name that keeps the engines of two networks of equal configuration apart."""
    values: dict[str, Any] = {"config": config.to_dict(), "eps": eps, "backend": backend}
    return json.dumps({**values, "precision": precision, "algorithm": algorithm, "owner": owner}, sort_keys=True)

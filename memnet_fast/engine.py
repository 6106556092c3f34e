"""What runs behind a FusedMemNet: packed weights that follow the parameters, workspaces, and the passes over a batch."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from memnet_fast import backends
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import DeviceOOM, InputError
from memnet_fast.plan import lower_state
from memnet_fast.reference import MemNet

_log = logging.getLogger("memnet_fast")

# Batches are computed in passes of about this many pixels: more would cost memory and win nothing.
PIXELS_PER_PASS = 1 << 17


@lru_cache(maxsize=64)
def state_names(config: MemNetConfig) -> tuple[str, ...]:
    """Names of the tensors that determine a network in eval mode, in the order in which they are handed around."""
    with torch.device("meta"):
        return tuple(k for k in MemNet(config).state_dict() if not k.endswith("num_batches_tracked"))


def images_per_pass(n: int, h: int, w: int) -> int:
    return max(1, min(n, PIXELS_PER_PASS // (h * w)))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str) -> Tensor:
    """torch.empty that raises DeviceOOM where memory is short."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        size = math.prod(shape) * dtype.itemsize / 2**20
        raise DeviceOOM(f"{size:.0f} MiB of {what} on {device}: {str(error).splitlines()[0]}") from error


class Engine:
    """Runs one network, described by `spec`, on the tensors that each call brings.

    spec: JSON of config, eps (one for each batch normalisation), backend, precision, algorithm.
    Calls may come from several threads at once: packed weights are immutable, and each call has a workspace of its own.
    """

    def __init__(self, spec: str) -> None:
        values = json.loads(spec)
        self.config = MemNetConfig.from_dict(values["config"])
        self.eps: dict[str, float] = values["eps"]
        self.request = (values["backend"], values["precision"], values["algorithm"])
        self.lock = threading.RLock()
        self._seen: Tensor | None = None
        self._packed: tuple[backends.Choice, backends.Packed] | None = None
        self._free: dict[tuple[torch.device, int], Tensor] = {}

    def packed(self, state: Sequence[Tensor]) -> tuple[backends.Choice, backends.Packed]:
        """Weights as the backend wants them, packed again if any value of `state` differs from the last call.

        Values are compared, not version counters: `parameter.data.mul_(2)` changes no counter.
        """
        if backends.cpu.forked() and torch.get_num_threads() > 1:
            # torch's own parallel loops would wait for ever, too, for a thread pool that did not survive the fork.
            torch.set_num_threads(1)
        with self.lock:
            device = state[0].device
            if any(t.device != device for t in state):
                raise InputError("the parameters of the network lie on several devices; move it to one")
            flat = torch.cat([t.detach().reshape(-1) for t in state])
            bits = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[flat.element_size()])
            seen = self._seen
            same = seen is not None and seen.dtype == bits.dtype and seen.device == device and torch.equal(seen, bits)
            if not same or self._packed is None:
                choice = backends.choose(self.config, device, *self.request)
                self._tell(choice, device)
                plan = lower_state(self.config, dict(zip(state_names(self.config), state, strict=True)), self.eps)
                module = backends.LADDER[choice.backend]
                self._packed = choice, module.pack(plan, device, choice.precision, choice.algorithm)
                self._seen = bits
            return self._packed

    def _tell(self, choice: backends.Choice, device: torch.device) -> None:
        """Logs a new choice, once."""
        if self._packed is None or self._packed[0] != choice:
            _log.info(
                "backend %s, precision %s, algorithm %s on %s", choice.backend, choice.precision, choice.algorithm, device
            )
            for reason in choice.not_taken:
                _log.info("not taken: %s", reason)

    def run(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        """x [N, C_in, H, W] -> [N, C_out, H, W], contiguous, dtype and device of x."""
        _, packed = self.packed(state)
        n, _, h, w = x.shape
        # A view with the negative bit set looks contiguous; its memory holds other numbers.
        image = x.detach().resolve_neg().to(torch.float32).contiguous()
        out = _empty((n, self.config.out_channels, h, w), torch.float32, x.device, "output")
        step = images_per_pass(n, h, w)
        with self._workspace(x.device, packed.workspace_bytes(step, h, w)) as workspace:
            for i in range(0, n, step):
                packed.run(image[i : i + step], out[i : i + step], workspace)
        return out.to(x.dtype)

    @contextmanager
    def _workspace(self, device: torch.device, size: int) -> Iterator[Tensor]:
        """A workspace that nobody else holds; the largest one of each (device, stream) is kept for the next call."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        with self.lock:
            workspace = self._free.pop((device, stream), None)
        if workspace is None or workspace.numel() < size:
            workspace = None  # frees the old one before the new one is asked for
            workspace = _empty((size,), torch.uint8, device, "workspace")
        try:
            yield workspace
        finally:
            with self.lock:
                kept = self._free.get((device, stream))
                if kept is None or kept.numel() < workspace.numel():
                    self._free[device, stream] = workspace

    def release(self) -> None:
        """Gives the kept workspaces back."""
        with self.lock:
            self._free.clear()


_engines: dict[str, Engine] = {}
_engines_lock = threading.Lock()


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

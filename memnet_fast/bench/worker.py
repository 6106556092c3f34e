"""One variant in a process of its own, so that its memory, its threads and its environment are its own.

Started with one argument, JSON: {"folder", "threads", "device", "shape": [n, h, w] and either "peer": name or "own": [backend,
precision, algorithm]}; folder holds weights.safetensors and what prepare.py made. Answers each line of JSON on standard
input with one on standard output: {"do": "load", "file": NPY}, {"do": "run", "file": NPY} (writes the result),
{"do": "time"}, {"do": "memory"}.

Only the public face of the package is used for its own backends, and nothing of memnet_fast.bench unless another peer asks for
it: benchmarks/compare.py runs this file with an older package.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Runner(Protocol):
    """A network for images of one shape. in_flight: images that one run restores, each of the shape."""

    in_flight: int
    device: str

    def load(self, image: np.ndarray) -> None:
        """Puts [N, C, H, W] float32 where `run` reads it; always the same place."""

    def run(self) -> None:
        """Restores what was loaded. On a GPU it may be only queued, on the current stream."""

    def result(self) -> np.ndarray:
        """[N, C, H, W] float32 of the last run."""

    def device_peak_mib(self) -> float | None:
        """What it held at most of a device's own memory; None on a CPU."""


class TorchRunner:
    """function: Tensor [N, C, H, W] float32 on the device -> Tensor."""

    in_flight = 1

    def __init__(self, function: Any, shape: tuple[int, int, int], channels: int, device: str) -> None:
        import torch

        n, h, w = shape
        self._function, self.device = function, device
        self._image = torch.zeros((n, channels, h, w), device=device)
        self._result: Any = None

    def load(self, image: np.ndarray) -> None:
        import torch

        self._image.copy_(torch.from_numpy(image))

    def run(self) -> None:
        import torch

        with torch.inference_mode():
            self._result = self._function(self._image)

    def result(self) -> np.ndarray:
        return self._result.float().cpu().contiguous().numpy()

    def device_peak_mib(self) -> float | None:
        import torch

        return torch.cuda.max_memory_reserved() / 2**20 if self.device.startswith("cuda") else None


def own(settings: dict[str, Any]) -> TorchRunner:
    """A backend of this package."""
    import memnet_fast as mf

    net = mf.load_weights(Path(settings["folder"]) / "weights.safetensors").to(settings["device"])
    backend, precision, algorithm = settings["own"]
    fast = mf.fuse(net, backend=backend, precision=precision, algorithm=algorithm)
    return TorchRunner(fast, tuple(settings["shape"]), net.config.in_channels, settings["device"])


def _peak_mib() -> float | None:
    """Of this program alone: getrusage's figure would begin with what the parent held when it forked. None off Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


class _Server:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        if "torch" in sys.modules or "own" in settings:
            import torch

            torch.set_num_threads(settings["threads"])
        self._before = _peak_mib()
        if "own" in settings:
            self._runner: Runner = own(settings)
        else:
            from memnet_fast.bench import peers

            self._runner = peers.make(settings)
        self._clock = self._make_clock()

    def _make_clock(self) -> Any:
        if self._runner.device.startswith("cuda"):
            import torch

            from memnet_fast.bench.clocks import CudaClock

            return CudaClock(torch.device(self._runner.device)).sample
        return _host_milliseconds

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "load":
                self._runner.load(np.load(request["file"]))
                return {}
            case "run":
                self._runner.run()
                np.save(request["file"], self._runner.result())
                return {}
            case "time":
                cpu = time.process_time()
                ms = self._clock(self._runner.run) / self._runner.in_flight
                return {"ms": ms, "cpu_s": time.process_time() - cpu, "in_flight": self._runner.in_flight}
            case "memory":
                device = self._runner.device_peak_mib()
                found = {"peak_mib": _peak_mib(), "before_mib": self._before}
                return found if device is None else {**found, "device_peak_mib": device}
        raise ValueError(f"unknown request {request['do']!r}")


def _host_milliseconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    server: _Server | None = None
    for line in sys.stdin:
        try:
            if server is None:
                server = _Server(settings)
            answer = server.answer(json.loads(line))
        except Exception as error:  # the parent decides what a variant that cannot run costs
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

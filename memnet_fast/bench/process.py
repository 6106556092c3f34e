"""A variant in its own process, as its parent sees it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from memnet_fast.bench import worker

# Threads of a pool spin for a moment when their work is done. The next run must not have to share with them.
_SETTLE = 0.05


class VariantFailed(RuntimeError):
    """The process ended, raised, or took too long; one line."""


def import_path() -> str:
    """PYTHONPATH of a process that is to find what this one finds, in the same order, and nothing else: another package in the
    current folder would be taken in the place of this one.
    """
    return os.pathsep.join(part or os.getcwd() for part in sys.path)


class Process:
    """settings: as worker.py takes them. environment: added to this process's; OMP_NUM_THREADS is set to the threads.

    package: a folder to import memnet_fast from in place of the one that runs here.
    """

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str], package: Path | None = None) -> None:
        env = {**os.environ, **environment, "OMP_NUM_THREADS": str(settings["threads"])}
        env["PYTHONPATH"] = import_path() if package is None else str(package)
        # The folder of the script must not become part of the path: its neighbours are not top-level modules.
        command = [sys.executable, "-P", worker.__file__]
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by close()
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [*command, json.dumps(dict(settings))], stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=env
        )

    def ask(self, do: str, seconds: float = 600.0, **more: Any) -> dict[str, Any]:
        """The answer to a request. Raises VariantFailed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], max(0.0, seconds))[0]:
            self._process.kill()  # what it says later must not be taken for the answer to another request
            raise VariantFailed(f"no answer to '{do}' within {seconds:.0f} seconds")
        line = self._process.stdout.readline()
        if not line:
            raise VariantFailed(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise VariantFailed(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"its process ended with {code}" + (f": {lines[-1][:300]}" if lines else "")

    def time(self, seconds: float = 600.0) -> dict[str, Any]:
        """One timed run: ms, cpu_s, in_flight, and others: the part of all CPUs that other processes used meanwhile (None
        where the system does not tell).
        """
        time.sleep(_SETTLE)
        before, start = _busy_seconds(), time.perf_counter()
        answer = self.ask("time", seconds)
        after, passed = _busy_seconds(), time.perf_counter() - start
        answer["others"] = None
        if before is not None and after is not None:
            share = (after - before - answer["cpu_s"]) / (passed * len(os.sched_getaffinity(0)))
            answer["others"] = min(1.0, max(0.0, share))
        return answer

    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """Ends the process, by force where it does not listen."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not isinstance(error, Exception):  # this process is asked to end
            self._process.kill()
        self.close()


def _busy_seconds() -> float | None:
    """CPU seconds that anybody has used on the CPUs of this process, time stolen by the host included."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    used, total = os.sched_getaffinity(0), 0
    for line in lines:
        name, _, values = line.partition(" ")
        if name[:3] == "cpu" and name[3:].isdecimal() and int(name[3:]) in used:
            user, nice, system, _, _, irq, softirq, steal = (int(v) for v in values.split()[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK")

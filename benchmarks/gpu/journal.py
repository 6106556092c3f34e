"""What a program must know that is started again after it lost the GPU.

A kernel that faults or never ends takes the GPU from its whole process, and every later variant with it. The variant is then
noted in the results and in the journal, and the process ends with STATUS: whoever started it starts it again with the same
journal (benchmarks/gpu_window.sh), and it goes on with the others.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

STATUS = 7


def gpu_is_lost() -> bool:
    """Whether a fault has taken the GPU from this process: every call fails from then on."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Journal:
    """file: None where nobody would start the program again; then it goes on as well as it can. note: keeps a row of the
    results."""

    def __init__(self, file: Path | None, note: Callable[[dict[str, Any]], None]) -> None:
        self._file, self._note = file, note
        self._known = set(file.read_text().splitlines()) if file is not None and file.exists() else set()

    def has(self, *words: str) -> bool:
        return " ".join(words) in self._known

    def write(self, *words: str) -> None:
        """One line: "done SIZE" or "lost SIZE VARIANT"."""
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(" ".join(words) + "\n")

    @contextlib.contextmanager
    def watching(self, line: str, row: dict[str, Any], seconds: float | None) -> Iterator[None]:
        """What runs inside may take so many seconds (None: any time). Where it takes more, or loses the GPU, row and line are
        noted and the process ends. Without a GPU nothing can be lost, and nothing is watched.
        """
        if self._file is None or not torch.cuda.is_initialized():
            yield
            return
        late = f"no result after {seconds} s"
        timer = threading.Timer(seconds, self._end, (line, row, late)) if seconds else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        except Exception as error:
            if gpu_is_lost():
                self._end(line, row, f"{type(error).__name__}: {error}"[:300])
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _end(self, line: str, row: dict[str, Any], reason: str) -> None:
        print(f"{line}: {reason}", flush=True)
        self.write(line)
        self._note({**row, "status": "failed", "reason": reason})
        os._exit(STATUS)

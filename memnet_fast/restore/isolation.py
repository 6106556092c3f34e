"""Decoding in this process, or in child processes that a bad file may crash."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

from memnet_fast.errors import ImageCorrupt
from memnet_fast.restore import images


@dataclass(frozen=True)
class Reading:
    """Which images are accepted, as for `read_image`."""

    max_pixels: int = images.MAX_PIXELS
    pages: str = "single"
    gray: bool = False


class Decoders:
    """A context; ends its processes with it. May be called from several threads: each has a process of its own."""

    def __init__(self, isolate: bool) -> None:
        self._isolate = isolate
        self._of_thread = threading.local()
        self._children: list[_Child] = []

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *args: object) -> None:
        for child in self._children:
            child.end()

    def decode(self, path: Path, file: BinaryIO, reading: Reading) -> images.Source:
        """The image in a file that is open at its start. Raises what `read_image` raises; ImageCorrupt for a crash."""
        if not self._isolate:
            return images.decode_image(path, file, **asdict(reading))
        child = getattr(self._of_thread, "child", None)
        if child is None or not child.alive():
            child = self._of_thread.child = _Child()
            self._children.append(child)
        return child.decode(path, reading)


class _Child:
    def __init__(self) -> None:
        # Not forked: a child of a process with threads may hang on a lock that one of them held.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True, name="memnet-decode")
        self._process.start()
        theirs.close()

    def alive(self) -> bool:
        return self._process.is_alive()

    def decode(self, path: Path, reading: Reading) -> images.Source:
        try:
            self._pipe.send((path, reading))
            good, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise ImageCorrupt(f"{path}: the decoder {_how_it_ended(self._process.exitcode)}") from error
        if not good:
            raise answer
        return answer

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def serve(pipe: Connection) -> None:
    """Decodes until the other end is closed, also by the death of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the parent decides
    with contextlib.suppress(EOFError, OSError):
        while True:
            path, reading = pipe.recv()
            answer: tuple[bool, Any]
            try:
                with images.open_image(path) as file:
                    answer = (True, images.decode_image(path, file, **asdict(reading)))
            except Exception as error:
                answer = (False, error)
            pipe.send(answer)

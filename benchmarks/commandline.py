"""What the programs of this folder have in common: one line for an error, and a clean end where a signal asks for it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from memnet_fast.errors import MemNetError


class Ended(BaseException):
    """A signal asked this process to end. Not an Exception, so that nobody takes it for a failure of a variant."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser(program: str, description: str | None) -> Parser:
    return Parser(prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(program: str, work: Callable[[], int]) -> int:
    """The exit code of work: what it returns, that of its MemNetError, said in a line, 130 after SIGINT, 143 after SIGTERM."""
    try:
        with _signals_unwind():
            return work()
    except MemNetError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    except Ended as end:
        print(f"{program}: ended by {end}", file=sys.stderr)
        return 128 + end.number


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Within: SIGINT and SIGTERM raise Ended, once; what comes while everything is being put away is too late."""
    if threading.current_thread() is not threading.main_thread():  # the host decides about signals
        yield
        return
    asked: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(number)
            raise Ended(number)

    # A shell's background jobs ignore ctrl-C, and that is to stay so.
    interrupted = [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, *interrupted)}
    try:
        yield
        if asked:  # an extension module whose import the signal met reports a failed import instead, and somebody believed it
            raise Ended(asked[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def complete(command: Sequence[str], cwd: Path, env: Mapping[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run for a program that starts others (a build, a test suite): whatever ends this ends them all."""
    with subprocess.Popen(command, cwd=cwd, env=dict(env), text=True, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)

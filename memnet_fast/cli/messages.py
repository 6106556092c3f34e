"""What the command line says, in one place: one line, on stderr, free of control characters."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import click


@dataclass
class State:
    """Shared by the commands of one run. verbose: None while no command has said it, as those without the option never do.
    ended_by: the signal that asked this process to end, if one did."""

    verbose: bool | None = None
    ended_by: int | None = None

    def end_if_asked(self) -> None:
        """For long work, now and then: the exception of a signal may have been swallowed on its way up (an extension module
        whose import it met reports a failed import instead)."""
        if self.ended_by == signal.SIGINT:
            raise KeyboardInterrupt
        if self.ended_by is not None:
            sys.exit(128 + self.ended_by)


def shown(text: object) -> str:
    """Text that is safe to print: names of files may hold newlines, escape sequences and bytes that are no characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))


def say(text: object) -> None:
    click.echo(f"memnet: {shown(text)}", err=True)


def say_error(text: object) -> None:
    click.echo(f"memnet: error: {shown(' '.join(str(text).split()))}", err=True)


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines of aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def is_terminal(stream: TextIO | None) -> bool:
    """stream: sys.stdout or sys.stderr, which is None where a program was started with it closed."""
    return stream is not None and stream.isatty()


class _Line(logging.Formatter):
    """What is said about a file repeats its name."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))


@contextlib.contextmanager
def log_on_stderr(level: int) -> Iterator[None]:
    """The package's log as lines on stderr, until the command ends: a program that calls a command keeps its own handlers."""
    log = logging.getLogger("memnet_fast")
    before = log.handlers, log.level
    handler = logging.StreamHandler()
    handler.setFormatter(_Line("memnet: %(message)s"))
    log.handlers = [handler]
    log.setLevel(level)
    try:
        yield
    finally:
        log.handlers = before[0]
        log.setLevel(before[1])

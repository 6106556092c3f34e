"""How far a job is: a bar for people, JSON lines for programs, both on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click

from memnet_fast.cli.messages import is_terminal, shown


class Reporter(Protocol):
    def windows(self, name: str, index: int, files: int, done: int, total: int, fraction: float) -> None:
        """Windows done of file number `index`; fraction: share of all files."""

    def event(self, event: str, **values: Any) -> None:
        """A file is finished, or the whole job."""


class _Silent:
    def windows(self, name: str, index: int, files: int, done: int, total: int, fraction: float) -> None:
        pass

    def event(self, event: str, **values: Any) -> None:
        pass


class _Json:
    def windows(self, name: str, index: int, files: int, done: int, total: int, fraction: float) -> None:
        self.event("progress", input=name, index=index, files=files, done=done, total=total, fraction=round(fraction, 6))

    def event(self, event: str, **values: Any) -> None:
        click.echo(json.dumps({"event": event, **values}), err=True)


class _Bar(_Silent):
    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=1.0)

    def windows(self, name: str, index: int, files: int, done: int, total: int, fraction: float) -> None:
        from rich.markup import escape

        label = escape(shown(name)) if files == 1 else escape(f"{index + 1}/{files} {shown(name)}")
        self._bar.update(self._task, description=label, completed=fraction)


@contextmanager
def reporter(kind: str) -> Iterator[Reporter]:
    """kind: "auto" (a bar on a terminal, else nothing), "bar", "json" or "none"."""
    if kind == "auto":
        kind = "bar" if is_terminal(sys.stderr) else "none"
    if kind == "json":
        yield _Json()
    elif kind == "bar":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        fields = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*fields, console=Console(stderr=True)) as bar:
            yield _Bar(bar)
    else:
        yield _Silent()

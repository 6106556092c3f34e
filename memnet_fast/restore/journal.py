"""What earlier runs wrote into a folder, so that an interrupted job goes on where it stopped.

The folder of outputs holds a folder `.memnet`:
  journal.jsonl   one line for each output: its path, the SHA-256 of its input and of itself, and the key of the run. A line
                  that does not parse (the machine stopped in the middle of it) is passed over.
  success.json    written last, when every file of the latest job is there; removed when a job begins.

A line is on disk before its output gets its final name, and an output counts as done only if its bytes have the digest of a
line whose key and input are those of now. So no order of crashes lets a file be skipped wrongly: without the rename the bytes
do not match the line, and with it the line is already there.

The key is the digest of weights, options, backend and the version of this package. What the machine decides (its vector
instructions; with winograd the tile that its memory allows; the versions of the codecs) may change last bits and does not
count. Moving the folder, or the inputs, does not matter.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from memnet_fast.errors import InputError, OutputError
from memnet_fast.files import make_folder, write_whole

FOLDER = ".memnet"
# Key of the run, SHA-256 of the input, SHA-256 of the output.
Line = tuple[str, str, str]
_log = logging.getLogger("memnet_fast")


def key_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none that can be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


class Journal:
    """Made by `open_journal`; without a file it can only be asked. Safe to use from several threads."""

    def __init__(self, folder: Path, key: str, file: int = -1) -> None:
        self.folder, self.key = folder, key
        self._file = file
        self._lock = threading.Lock()
        self._lines = read_lines(folder)

    def may_skip(self, target: Path, source_digest: str) -> bool:
        """As the function `may_skip`, for a file that may be there."""
        if not os.path.lexists(target):
            return False
        lines = self._lines.get(self._name(target), set())
        return may_skip(lines, self.key, source_digest, digest_of(target) or "unreadable", target)

    def verdict(self, source: Path, target: Path) -> str:
        """What a run with "skip" would do about a file, in words."""
        digest = digest_of(source)
        if digest is None:
            return "cannot be read"
        try:
            return "skip" if self.may_skip(target, digest) else "restore"
        except OutputError:
            return "refuse: the output is of unknown origin"

    def announce(self, target: Path, source_digest: str, target_digest: str) -> None:
        """To be called before the output appears under its name. Raises OutputError."""
        line = (self.key, source_digest, target_digest)
        name = self._name(target)
        self._append(
            {"output": name, "input_sha256": source_digest, "output_sha256": target_digest, "key": self.key},
        )
        with self._lock:
            self._lines.setdefault(name, set()).add(line)

    def describe_run(self, settings: Mapping[str, Any]) -> None:
        """Says what the key stands for."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._append({"run": self.key, "started": now, "settings": dict(settings)})

    def begin(self) -> None:
        """The folder is no longer complete."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._success)

    def succeed(self, counts: Mapping[str, Any]) -> None:
        """Every file of the job is there. Raises OutputError."""
        write_whole(self._success, (json.dumps({"key": self.key, **counts}) + "\n").encode())

    @property
    def _success(self) -> Path:
        return self.folder / FOLDER / "success.json"

    def _name(self, target: Path) -> str:
        return os.path.relpath(target, self.folder)

    def _append(self, record: Mapping[str, Any]) -> None:
        # In one write, so that lines of several processes do not mix; the first newline ends what a crash may have left.
        data = b"\n" + json.dumps(record).encode() + b"\n"
        try:
            written = os.write(self._file, data)
            os.fsync(self._file)
        except OSError as error:
            raise OutputError(f"cannot write the journal in {self.folder}: {error.strerror or error}") from error
        if written < len(data):
            raise OutputError(f"cannot write the journal in {self.folder}: the disk is full")


@contextlib.contextmanager
def open_journal(folder: Path, key: str, *, alone: bool = True) -> Iterator[Journal]:
    """The journal of a folder, which is made if it is not there.

    alone: no other process may work on the folder meanwhile; otherwise only those that want to be alone are kept out.
    Raises InputError if another process works on it, OutputError if it cannot be written.
    """
    make_folder(folder / FOLDER)
    path = folder / FOLDER / "journal.jsonl"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    journal = None
    try:
        _lock_file(file, folder, alone)
        for place in (path.parent, folder):  # a line is worth nothing if the name of its file is lost with the power
            _sync(place)
        journal = Journal(folder, key, file)
        yield journal
    finally:
        if journal is not None:
            journal._file = -1  # its number may soon be another file's
        os.close(file)


def _sync(folder: Path) -> None:
    try:
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise OutputError(f"cannot write the journal in {folder}: {error.strerror or error}") from error


def _lock_file(file: int, folder: Path, alone: bool) -> None:
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another run is writing into {folder}; wait until it ends, or choose another folder") from error
    except OSError as error:
        _log.warning("%s cannot be locked (%s): see to it yourself that only one run writes into it", folder, error.strerror)


def may_skip(lines: Set[Line], key: str, source_digest: str, present: str | None, target: object) -> bool:
    """Whether the output in place is what the run with this key would write for an input of that digest.

    lines: about that output. present: digest of what is in its place, None if that is nothing.
    Raises OutputError for a file that no run wrote, or that was changed since: it is not for this run to replace.
    """
    if present is None:
        return False
    if (key, source_digest, present) in lines:
        return True
    if not any(line[2] == present for line in lines):
        raise OutputError(unknown_origin(target))
    return False


def unknown_origin(target: object) -> str:
    """What is said about a file that is not for a run to replace."""
    return f"{target} exists already, and no run recorded that it wrote this; --existing overwrite replaces it"


def read_lines(folder: Path) -> dict[str, set[Line]]:
    """Output, as a path in the folder -> every line about it. A file that cannot be read is passed over with a warning."""

    def contents() -> Iterator[bytes]:
        for path in sorted((folder / FOLDER).glob("*.jsonl")):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                _log.warning("%s cannot be read (%s): what it records does not count", path, error.strerror or error)
                continue
            yield content

    return parse_lines(contents())


def parse_lines(contents: Iterable[bytes]) -> dict[str, set[Line]]:
    """As read_lines, from the contents of the files."""
    lines: dict[str, set[Line]] = {}
    for content in contents:
        for line in content.splitlines():
            record = _parsed(line)
            if record is not None:
                lines.setdefault(record[0], set()).add(record[1])
    return lines


def _parsed(line: bytes) -> tuple[str, Line] | None:
    try:
        record = json.loads(line)
        values = [record[name] for name in ("output", "key", "input_sha256", "output_sha256")]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(isinstance(value, str) for value in values):
        return None
    return values[0], (values[1], values[2], values[3])

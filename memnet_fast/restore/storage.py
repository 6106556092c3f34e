"""Where a job on a cluster reads and writes: the file system of the machines, or an object store, through PyArrow."""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from memnet_fast.errors import InputError, MissingExtra, OutputError
from memnet_fast.files import make_folder, write_whole
from memnet_fast.restore.images import EXTENSIONS
from memnet_fast.restore.job import Item, Job, named
from memnet_fast.restore.journal import FOLDER, parse_lines
from memnet_fast.restore.uris import is_uri, masked

# Here an object appears when it is complete, so that nothing has to be renamed.
_WHOLE_OBJECTS = ("s3", "gcs", "abfs")


@dataclass(frozen=True)
class Storage:
    """filesystem: of pyarrow.fs. Paths are those of that file system, without a scheme. Can be pickled."""

    filesystem: Any
    local: bool

    def read(self, path: str, max_bytes: int | None = None) -> bytes | None:
        """The whole file; None if it is larger than allowed. Raises OSError."""
        with self.filesystem.open_input_file(path) as file:
            return None if max_bytes is not None and file.size() > max_bytes else file.read()

    def digest(self, path: str) -> str | None:
        """SHA-256; None where there is no file, "unreadable" for what cannot be read. The bytes are not kept."""
        total = hashlib.sha256()
        try:
            with self.filesystem.open_input_stream(path) as file:
                while block := file.read(1 << 22):
                    total.update(block)
        except FileNotFoundError:
            return None
        except OSError:
            return "unreadable"
        return total.hexdigest()

    def exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(path).type.name != "NotFound"

    def write(self, path: str, data: bytes) -> None:
        """Whole or not at all. Raises OutputError."""
        if self.local:
            make_folder(Path(path).parent)
            write_whole(Path(path), data)
            return
        try:
            with self.filesystem.open_output_stream(path) as file:
                file.write(data)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error}") from error

    def delete(self, path: str) -> None:
        """A file, if it is there. Raises OutputError."""
        try:
            if self.exists(path):
                self.filesystem.delete_file(path)
        except OSError as error:
            raise OutputError(f"cannot remove {path}: {error}") from error

    def find(self, folder: str, recursive: bool) -> list[str]:
        """Paths of the files in a folder, sorted; none if there is no such folder. Raises OSError."""
        from pyarrow import fs

        chosen = fs.FileSelector(folder, allow_not_found=True, recursive=recursive)
        return sorted(info.path for info in self.filesystem.get_file_info(chosen) if info.is_file)

    def read_all(self, folder: str, suffix: str) -> list[bytes]:
        """The contents of all files in a folder whose names end so. Raises OSError."""
        return [self.read(path) or b"" for path in self.find(folder, recursive=False) if path.endswith(suffix)]


def storage_of(text: str) -> Storage:
    """The storage of a URI; local for a path.

    Raises InputError for what cannot be opened, where files appear in parts, and for a URI that carries a password.
    """
    return _open(text)[0]


def _open(text: str) -> tuple[Storage, str]:
    """A storage, and the path of a URI in it."""
    try:
        from pyarrow import ArrowException, fs
    except ImportError as error:
        raise MissingExtra(f"this needs PyArrow ({error}); pip install 'memnet-fast[distributed]'") from error
    if not is_uri(text):
        return Storage(fs.LocalFileSystem(), True), str(Path(text).absolute())
    shown = masked(text)
    if _has_password(text):
        raise InputError("a URI with a password would stand in logs and messages; give credentials by the environment")
    try:
        filesystem, path = fs.FileSystem.from_uri(text)
    except (ArrowException, OSError, ImportError, ValueError) as error:
        # PyArrow repeats the URI, so its error must not stand in a traceback, either.
        reason = str(error).replace(text, shown).splitlines()[0]
        raise InputError(f"cannot open {shown}: {reason}") from None
    kind = filesystem.type_name
    if kind != "local" and kind not in _WHOLE_OBJECTS:
        raise InputError(f"{shown}: files on '{kind}' would not appear whole; use file, s3, gs or abfs")
    if not path:
        raise InputError(f"{shown} names no bucket")
    return Storage(filesystem, kind == "local"), path.rstrip("/")


def _has_password(text: str) -> bool:
    try:
        return urlsplit(text).password is not None
    except ValueError:  # not a URI; whoever opens it says so
        return False


@contextlib.contextmanager
def reaching(what: str) -> Iterator[None]:
    """An error of the storage while it is asked what there is -> InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot look at {what}: {' '.join(str(error).split())}") from error


def plan_uris(
    inputs: Sequence[str], output: str, *, recursive: bool = False, format: str = "same", existing: str = "error"
) -> Job:
    """As `plan_job`, for URIs: each input is a file or a folder, all in one storage; the output is a folder.

    Hidden files, files without an image's extension, and what `plan_job` knows as outputs of earlier runs are ignored.
    """
    if not all(map(is_uri, (*inputs, output))):
        raise InputError("inputs and output are either all paths or all URIs (file:// is one)")
    target, folder = _open(output)
    items: list[Item] = []
    ignored: list[tuple[Path, str]] = []
    source: Storage | None = None
    for text in inputs:
        storage, path = _open(text)
        source = source or storage
        if not storage.filesystem.equals(source.filesystem):
            raise InputError(f"{masked(text)} is in another storage than {masked(inputs[0])}; use one job for each")
        with reaching(masked(text)):
            info = storage.filesystem.get_file_info(path)
            found = [path] if info.is_file else storage.find(path, recursive)
            outputs = set() if info.is_file else _recorded(storage, found, path)
        if info.type.name == "NotFound":
            raise InputError(f"there is no file or folder {masked(text)}")
        same = storage.filesystem.equals(target.filesystem)
        inside = f"{folder}/" if same and folder.startswith(f"{path}/") else None
        for file in found:
            name = posixpath.basename(file) if info.is_file else posixpath.relpath(file, path)
            if inside is not None and file.startswith(inside):
                continue
            if any(part.startswith(".") for part in PurePosixPath(name).parts):
                ignored.append((Path(file), "a hidden file"))
            elif posixpath.splitext(name)[1].lower() not in EXTENSIONS:
                ignored.append((Path(file), "not an image by its name"))
            elif file in outputs:
                ignored.append((Path(file), "an output of an earlier run"))
            else:
                items.append(named(Path(file), Path(folder, name), format))
    with reaching(masked(output)):
        _check(items, source, target, folder, existing)
    return Job(items, ignored, None, existing, Path(folder), True, source, target)


def _recorded(storage: Storage, found: Sequence[str], root: str) -> set[str]:
    """The outputs in the journals of the folders below the root, all of whose files were found."""
    outputs = set()
    for journals in {posixpath.dirname(file) for file in found if file.endswith(".jsonl")}:
        folder = posixpath.dirname(journals)
        if posixpath.basename(journals) == FOLDER and folder != root:
            outputs |= {posixpath.join(folder, name) for name in parse_lines(storage.read_all(journals, ".jsonl"))}
    return outputs


def _check(items: Sequence[Item], source: Storage | None, target: Storage, folder: str, existing: str) -> None:
    seen: dict[Path, Item] = {}
    for item in items:
        if item.target in seen:
            raise InputError(f"{seen[item.target].source} and {item.source} would both be written to {item.target}")
        seen[item.target] = item
    if source is not None and source.filesystem.equals(target.filesystem):
        for item in items:
            writer = seen.get(item.source, item)
            if writer is not item:
                raise InputError(f"the output of {writer.source} would replace another input, {item.source}")
            if item.source in seen and existing != "overwrite":
                raise InputError(f"the output {item.source} is an input; --existing overwrite replaces it")
    if existing == "error":
        there = [path for path in map(Path, target.find(folder, recursive=True)) if path in seen]
        if there:
            more = f" (and {len(there) - 1} more outputs)" if len(there) > 1 else ""
            raise InputError(f"{there[0]}{more} exists already; --existing overwrite replaces it")

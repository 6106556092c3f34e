"""The one writer: a file appears under its name whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from memnet_fast.errors import OutputError


def write_whole(path: Path, data: bytes) -> None:
    """Temporary file in the same folder, write, fsync, rename, fsync the folder. An older file stays intact until the rename.

    Raises OutputError; the temporary file is removed.
    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".memnet-", suffix=".part", dir=path.parent)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            # mkstemp makes private files; a result has the permissions that any new file would have.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Read once, at import: the only way to read it sets it for an instant, which other threads would see.
_UMASK = _read_umask()


def _umask() -> int:
    return _UMASK

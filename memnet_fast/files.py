"""The one writer: a file appears under its name whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path

from memnet_fast.errors import OutputError

_PREFIX, _SUFFIX = ".memnet-", ".part"


def write_whole(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Temporary file in the same folder, write, fsync, rename, fsync the folder. An older file stays intact until the rename.

    Raises OutputError, also for a device, a pipe or a stream (/dev/null, /dev/stdout), to which the rename would put an end;
    the temporary file is removed. Where the process is killed before that, `sweep` finds it.
    """
    temporary = None
    try:
        if _is_special(path):
            raise OutputError(f"cannot write {path}: it is no regular file")
        descriptor, temporary = _locked_temporary(path.parent)
        # Open, and so locked, until it has its final name: a sweep must not take it before.
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            # mkstemp makes private files; a result has the permissions that any new file would have.
            os.fchmod(file.fileno(), 0o666 & ~_UMASK)
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


def require_writable(path: Path, *, makes_folders: bool = False) -> None:
    """Before long work, not after it: raises OutputError where no file can appear under this name.

    makes_folders: who writes it will make the folders that are missing.
    """
    try:
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder")
        if _is_special(path):
            raise OutputError(f"cannot write {path}: it is no regular file")
        folder = path.parent
        while makes_folders and not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            reason = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
            raise OutputError(f"cannot write {path}: {reason}")
    except OSError as error:  # a folder on the way that may not be entered, a name that is too long
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: the folder {folder} is not writable")


def _is_special(path: Path) -> bool:
    """Whether something stands there that is neither a file nor a folder."""
    with contextlib.suppress(OSError):  # no link
        # /dev/stdout is one. There may be a file behind it, but the rename would replace the link, for the whole machine.
        if os.readlink(path).startswith("/proc/"):
            return True
    with contextlib.suppress(OSError):  # nothing there
        mode = os.stat(path).st_mode
        return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
    return False


def make_folder(folder: Path) -> None:
    """The folder and its parents. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from error


def sweep(folder: Path) -> list[Path]:
    """Removes the temporary files that killed processes left in a folder (not below it), and returns them.

    Those of living writers stay, also of writers on other machines as far as the file system has locks that reach there; where
    it has none, nothing is removed.
    """
    swept = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.startswith(_PREFIX) and e.name.endswith(_SUFFIX)]
        for path in (Path(folder, name) for name in names):
            if _is_left_behind(path):
                swept.append(path)
    return swept


def _locked_temporary(folder: Path) -> tuple[int, str]:
    """The kernel gives the lock back when the writer ends, however it ends."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=folder)
        with contextlib.suppress(OSError):  # no locks here; then nothing is swept either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor, name
        os.close(descriptor)  # swept in the moment before it was locked


def _is_left_behind(path: Path) -> bool:
    """Removes the file if nobody holds its lock."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The name may belong to another file by now.
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                os.unlink(path)
                return True
        finally:
            os.close(descriptor)
    return False


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Read once, at import: the only way to read it sets it for an instant, which other threads would see.
_UMASK = _read_umask()

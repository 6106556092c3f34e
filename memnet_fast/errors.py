"""Every error this package raises on purpose, and the exit code that the command line gives it.

All derive from `MemNetError`; a message is one line: what is wrong, with what, and what to do.
"""

from __future__ import annotations


class MemNetError(Exception):
    """Base of all errors of this package."""

    exit_code = 3


class InputError(MemNetError, ValueError):
    """An argument that cannot be used: shape, dtype, device, range or option."""

    exit_code = 2


class CheckpointError(MemNetError):
    """Base of the errors of weight files."""

    exit_code = 2


class CheckpointCorrupt(CheckpointError):
    """The file is truncated, damaged or not what its header says."""


class CheckpointMismatch(CheckpointError):
    """The file is sound but does not fit the model; lists every problem."""


class CheckpointUnsafe(CheckpointError):
    """The file asks for code to be run."""


class CheckpointTooLarge(CheckpointError):
    """The file declares more than the stated limits."""


class ImageError(MemNetError):
    """Base of the errors of one image file."""


class ImageCorrupt(ImageError):
    """The image cannot be decoded to its last pixel."""


class ImageUnsupported(ImageError):
    """A format, mode or bit depth that is not restored."""


class ImageTooLarge(ImageError):
    """More pixels than the limit allows; refused before decoding."""


class OutputError(MemNetError):
    """A result could not be written; an older file under that name is intact."""


class NumericError(MemNetError, ArithmeticError):
    """A result that is not finite although its input was."""


class ProcessLost(MemNetError):
    """Another process of a training on several devices ended; what it saved before is intact."""


class DeviceOOM(MemNetError, MemoryError):
    """Out of memory, also with the smallest tile."""


class MissingExtra(MemNetError, ImportError):
    """A package that only some functions need is not installed; says how to install it."""

    exit_code = 2


class BackendUnavailable(MemNetError, RuntimeError):
    """The backend or device asked for cannot run here; `reason` says why."""

    exit_code = 5

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"backend '{backend}' cannot run: {reason}")
        self.backend = backend
        self.reason = reason

    def __reduce__(self) -> tuple[type[BackendUnavailable], tuple[str, str]]:
        return type(self), (self.backend, self.reason)

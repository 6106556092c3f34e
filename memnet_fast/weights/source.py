"""Opening a checkpoint: the whole file is read once, and its format is told by its first bytes, never by its name."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from memnet_fast.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointTooLarge, InputError

# First bytes of a NetParameter: the tags of its fields name, layers, input, input_dim, force_backward, state, debug_info,
# input_shape and layer. A .caffemodel has no magic number.
_CAFFE_TAGS = (b"\x0a", b"\x12", b"\x1a", b"\x20", b"\x22", b"\x28", b"\x32", b"\x38", b"\x42", b"\xa2\x06")
_MXNET = b"\x12\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
_LEGACY_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


def read_file(path: Path, limit: int) -> bytearray:
    """The bytes of a regular file. They are read, not mapped: the file may change or shrink under a map.

    Raises InputError (no such file, a folder, a pipe, a device), CheckpointTooLarge, CheckpointCorrupt (it changed meanwhile).
    """
    try:
        # Non-blocking, so that a FIFO without a writer does not hang.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path} is not a file")
            if status.st_size > limit:
                raise CheckpointTooLarge(f"{path} has {status.st_size} bytes, more than {limit}")
            data = bytearray(status.st_size)
            filled = 0
            with memoryview(data) as view:
                while filled < len(data):
                    count = file.readinto(view[filled:])
                    if not count:
                        break
                    filled += count
            if filled < len(data) or file.read(1):
                raise CheckpointCorrupt(f"{path} changed while it was read")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read weights {path}: {getattr(error, 'strerror', None) or error}") from error
    return data


def sniff(data: bytearray) -> str:
    """ "safetensors", "zip", "legacy", "tar", "mxnet" or "caffe".

    Raises CheckpointCorrupt for an empty file and for one of no known format, CheckpointMismatch for a format that is
    known but not read.
    """
    if not data:
        raise CheckpointCorrupt("the file is empty")
    if data[8:9] == b"{":
        return "safetensors"
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if data.startswith(_LEGACY_PICKLE):
        return "legacy"
    if data.startswith(_MXNET):
        return "mxnet"
    if data[257:262] == b"ustar":
        return "tar"
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        raise CheckpointMismatch("an HDF5 file is not read; convert it to a binary .caffemodel first")
    if data.startswith(_CAFFE_TAGS):
        return "caffe"
    raise CheckpointCorrupt(
        "neither safetensors, nor a PyTorch file (.pth), nor a .caffemodel, nor MXNet's .params; or its start is damaged"
    )

"""Protocol buffers as far as a .caffemodel needs them: one message at a time, every length checked, nothing recursive.

A message is only entered where its schema is known, so the depth is bounded by the caller; everything else is stepped over.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memnet_fast.errors import CheckpointCorrupt, CheckpointTooLarge

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# The official models have some ten thousand fields; each costs about a microsecond.
_MAX_FIELDS = 300_000


class Budget:
    """How many fields may still be read in this file."""

    def __init__(self) -> None:
        self.fields = _MAX_FIELDS

    def spend(self) -> None:
        self.fields -= 1
        if self.fields < 0:
            raise CheckpointTooLarge(f"more than {_MAX_FIELDS} fields")


class Message:
    """The fields of the message in data[start:end], in their order.

    for number, wire in message: then one of varint(), piece(), floats() or skip() must be called.
    """

    def __init__(self, data: bytearray, start: int, end: int, budget: Budget) -> None:
        self.data, self.at, self.end, self.budget = data, start, end, budget
        self._wire = self._tag_at = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while self.at < self.end:
            self.budget.spend()
            self._tag_at = self.at
            tag = self.varint()
            number, self._wire = tag >> 3, tag & 7
            if number == 0 or number >= 1 << 29:
                raise CheckpointCorrupt(f"field number {number} at byte {self._tag_at}")
            if self._wire not in (VARINT, FIXED64, BYTES, FIXED32):
                raise CheckpointCorrupt(f"wire type {self._wire} at byte {self._tag_at}")
            yield number, self._wire

    def varint(self) -> int:
        """An unsigned number of at most 64 bits."""
        value = shift = 0
        while self.at < self.end and shift < 70:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 64:
                    break
                return value
            shift += 7
        raise CheckpointCorrupt(f"a number at byte {self.at} does not end")

    def piece(self) -> tuple[int, int]:
        """Where the bytes, the text or the message of this field lie."""
        length = self.varint()
        if length > self.end - self.at:
            raise CheckpointCorrupt(f"{length} bytes at byte {self.at}, where {self.end - self.at} are left")
        start = self.at
        self.at += length
        return start, self.at

    def text(self) -> str:
        start, end = self.piece()
        return self.data[start : min(end, start + 1000)].decode("utf-8", "replace")

    def inner(self) -> Message:
        return Message(self.data, *self.piece(), self.budget)

    def skip(self) -> None:
        if self._wire == VARINT:
            self.varint()
        elif self._wire == BYTES:
            self.piece()
        else:
            self._fixed(8 if self._wire == FIXED64 else 4)

    def floats(self, dtype: str) -> np.ndarray:
        """Values of a repeated "<f4" or "<f8" field, packed (all in one piece) or not (as many as follow each other)."""
        size = int(dtype[2:])
        if self._wire == BYTES:
            start, end = self.piece()
            if (end - start) % size:
                raise CheckpointCorrupt(f"{end - start} bytes of numbers of {size} bytes at byte {start}")
            return np.frombuffer(self.data, dtype, (end - start) // size, start) if end > start else np.empty(0, dtype)
        if self._wire != (FIXED32 if size == 4 else FIXED64):
            raise CheckpointCorrupt(f"numbers of wire type {self._wire} at byte {self._tag_at}")
        if self.at - self._tag_at > 1:  # a tag in more bytes than it needs: legal, and never seen
            return np.frombuffer(self.data, dtype, 1, self._fixed(size))
        return self._run(size).view(dtype).reshape(-1)

    def _fixed(self, size: int) -> int:
        start = self.at
        if size > self.end - start:
            raise CheckpointCorrupt(f"a number at byte {start} does not end")
        self.at += size
        return start

    def _run(self, size: int) -> np.ndarray:
        """Bytes [count, size] of equal fields in a row. Looks ahead in doubling steps, so that short runs stay cheap."""
        self._fixed(size)
        start, stride = self._tag_at, size + 1
        available = np.frombuffer(self.data, np.uint8, self.end - start, start)
        rows = len(available) // stride
        count, step = 1, 16
        while count < rows:
            tags = available[count * stride : (count + min(step, rows - count)) * stride : stride]
            other = np.flatnonzero(tags != available[0])
            if other.size:
                count += int(other[0])
                break
            count += len(tags)
            step *= 2
        self.at = start + count * stride
        return np.ascontiguousarray(available[: count * stride].reshape(count, stride)[:, 1:])

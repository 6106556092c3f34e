"""What a job is told and what it tells: its threads, what became of each file, and how busy each stage was."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from memnet_fast.errors import InputError, MemNetError
from memnet_fast.restore.job import Item
from memnet_fast.restore.tiling import Tiled

STAGES = ("decode", "network", "encode")


@dataclass(frozen=True)
class Threads:
    """How many threads decode, feed the network and encode. proc: one number for every device, or a number for each."""

    load: int
    proc: int | tuple[int, ...]
    save: int

    def __post_init__(self) -> None:
        procs = self.proc if isinstance(self.proc, tuple) else (self.proc,)
        for value in (self.load, *procs, self.save):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
                raise InputError(f"threads must be three whole numbers from 1 to 1024, got {self}")

    def __str__(self) -> str:
        procs = self.proc if isinstance(self.proc, tuple) else (self.proc,)
        return f"{self.load}:{','.join(map(str, procs))}:{self.save}"

    @classmethod
    def parse(cls, text: str) -> Threads:
        """From "load:proc:save", where proc may be one number for each device: "1:2,2:2". Raises InputError."""
        parts = text.split(":")
        procs = parts[1].split(",") if len(parts) == 3 else []
        if len(parts) != 3 or not all(part.isdecimal() and len(part) < 20 for part in (parts[0], *procs, parts[2])):
            raise InputError(f"expected load:proc:save, three whole numbers such as 1:2:2, got {text!r}")
        proc = tuple(map(int, procs))
        return cls(int(parts[0]), proc if len(proc) > 1 else proc[0], int(parts[2]))

    def of_devices(self, count: int) -> tuple[int, ...]:
        """Threads that feed each of `count` devices. Raises InputError if there are numbers for another count."""
        if not isinstance(self.proc, tuple):
            return (self.proc,) * count
        if len(self.proc) != count:
            raise InputError(f"the threads {self} are for {len(self.proc)} devices, but the job has {count}")
        return self.proc

    @classmethod
    def default(cls) -> Threads:
        """Compressing PNG is the slowest work beside the network, so half of the CPUs may do it."""
        return cls(2, 1, max(2, (os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count() or 1) // 2))


@dataclass(frozen=True)
class FileResult:
    """What became of one file.

    status: "restored", "skipped" (what an earlier run wrote is still there) or "failed", with the error.
    seconds: for each of STAGES that it went through; of a group of images in the network, its share.
    The rest is about what was restored. size: width, height of the result; jpeg_quality: estimate of that of a JPEG input.
    """

    index: int
    item: Item
    status: str
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None
    dtype: str | None = None
    frames: int = 1
    jpeg_quality: int | None = None
    tiled: Tiled | None = None


@dataclass
class Stage:
    """Work of one stage so far. seconds: over all of its threads; pixels: that went in ("encode": that came out)."""

    threads: int
    seconds: float = 0.0
    images: int = 0
    pixels: int = 0

    def rate(self) -> float | None:
        """Megapixels per second that it can do with all of its threads."""
        return self.pixels / self.seconds * self.threads / 1e6 if self.seconds > 0 else None

    def busy(self, wall: float) -> float:
        """The share of the time that its threads had work."""
        return self.seconds / (self.threads * wall) if wall > 0 else 0.0


@dataclass
class JobReport:
    """results: in the order in which files were finished."""

    results: list[FileResult] = field(default_factory=list)
    stages: dict[str, Stage] = field(default_factory=dict)
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    def count(self, status: str) -> int:
        return sum(r.status == status for r in self.results)

    def limit(self) -> str | None:
        """The stage whose threads were busiest: the one to make faster. None before anything was done."""
        busy = {name: stage.busy(self.seconds) for name, stage in self.stages.items()}
        return max(busy, key=busy.__getitem__) if any(busy.values()) else None


def describe(error: Exception) -> str:
    """One line for people. Errors of this package say everything themselves."""
    text = " ".join(str(error).split())
    return text if isinstance(error, MemNetError) else f"unexpected {type(error).__name__}: {text}"

"""The control groups (version 2 or 1) that limit this process: its own and all around it, since the narrowest limit counts."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

# Version 1 has no word for "no limit" and shows the largest number of whole pages.
_UNLIMITED = 1 << 60


@cache
def folders(controller: str) -> tuple[Path, ...]:
    """Of the groups that can be seen, outermost first; those of version 1 with this controller behind those of version 2.

    Looked up once: what is read in them may change, but a process hardly ever moves.
    """
    try:
        # Names of groups are bytes.
        lines = Path("/proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    own: dict[str, str] = {}
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        own.update(dict.fromkeys(names.split(","), path))
    found = []
    for name, root in (("", "/sys/fs/cgroup"), (controller, f"/sys/fs/cgroup/{controller}")):
        found.append(Path(root))
        parts = [part for part in own.get(name, "").split("/") if part]
        # In a container the path may be that of the machine, of which only the root is here, or lie outside of the root.
        for part in parts if ".." not in parts else ():
            found.append(found[-1] / part)
    return tuple(folder for folder in found if folder.is_dir())


@cache
def _quotas() -> tuple[tuple[Path, ...], ...]:
    """Files that hold a quota and its period, together or apart. They are read in every call, so only those that are there."""
    kinds = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    groups = (tuple(folder / name for name in names) for folder in folders("cpu") for names in kinds)
    return tuple(files for files in groups if files[0].exists())


def granted_cpus() -> int:
    """CPUs that the groups grant, rounded up; a large number where there is no limit."""
    granted = 1 << 20
    for files in _quotas():
        try:
            quota, period = (int(word) for file in files for word in file.read_text().split())
        except (OSError, ValueError):  # gone, or "max"
            continue
        if quota > 0 and period > 0:
            granted = min(granted, math.ceil(quota / period))
    return granted


def free_memory() -> int | None:
    """Bytes that the groups leave; None where there is no limit. Page cache counts as free, for it is given back on demand."""
    free = None
    # Version 2, then version 1, whose plain counts are those of a group without the groups in it.
    for limit_name, used_name, whole in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        for folder in folders("memory"):
            try:
                limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
                if limit >= _UNLIMITED:
                    continue
                cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left = limit - used + sum(int(cache.get(whole + name, 0)) for name in ("active_file", "inactive_file"))
            except (OSError, ValueError):  # absent, or "max"
                continue
            free = left if free is None else min(free, left)
    return free

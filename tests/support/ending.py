"""Programs that a signal ends while they work."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Rounds that go on until the time is spent: what settles early may have ended before a signal comes.
ENDLESS = "from memnet_fast.bench import pairs; pairs.Contest.open = lambda self: self.failure is None\n"
_PATIENCE = 300.0  # seconds: a busy machine is slow, and says nothing about what is tested


def children(pid: int) -> list[int]:
    """Processes that it started, and theirs."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        own = [int(word) for word in path.read_text().split()]
        found += own + [below for child in own for below in children(child)]
    return found


def ended_in_the_middle(
    command: Sequence[str], number: signal.Signals, when: str, temporary: Path, env: Mapping[str, str] | None = None
) -> tuple[int, str, list[int]]:
    """Starts a program, sends it a signal when it has said `when` on stderr, and waits for its end. Its temporary files go to
    a folder. Returns its exit code, what it said, and the processes that it had by then, each of which is gone now.
    """
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", **(env or {})}
    # Where this process ignores SIGINT, its children would.
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        try:
            said = ""
            while when not in said:
                line = process.stderr.readline()
                assert line, f"it ended before it said {when!r}: {said}"
                said += line
            had = children(process.pid)
            process.send_signal(number)
            said += process.communicate(timeout=_PATIENCE)[1]
        finally:
            process.kill()
    end = time.monotonic() + 10.0  # of those that are killed, the last moments
    while left := [pid for pid in had if lives(pid)]:
        assert time.monotonic() < end, f"processes that outlive it: {left}"
        time.sleep(0.05)
    return process.returncode, said, had


def lives(pid: int) -> bool:
    """Whether it does anything still."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False

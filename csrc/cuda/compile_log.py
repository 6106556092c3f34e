"""What ptxas says of the kernels. As a program, compile_log.py COMPILER ARGUMENT... runs a compiler and keeps its words beside
the object, since a file that did not change is not compiled again and says nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(text: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The kernels of a log of `nvcc -Xptxas -v`, and its warnings and performance notes (C75xx: wgmma not overlapped).

    A kernel: function (mangled), arch, registers, stack, spill (bytes stored and loaded), shared (bytes, static).
    """
    kernels: list[dict[str, Any]] = []
    notes = []
    for line in text.splitlines():
        if "warning" in line.lower() or re.search(r"\bC7\d\d\d\b", line):
            notes.append(line.strip())
        if entry := _ENTRY.search(line):
            function, arch = entry.groups()
            kernels.append({"function": function, "arch": arch, "registers": 0, "stack": 0, "spill": 0, "shared": 0})
        if kernels and (memory := _MEMORY.search(line)):
            # Functions that were not inlined follow their kernel, and count for it.
            stack, stores, loads = map(int, memory.groups())
            kernels[-1]["stack"] += stack
            kernels[-1]["spill"] += stores + loads
        if kernels and (used := _USED.search(line)):
            kernels[-1]["registers"] = max(kernels[-1]["registers"], int(used[1]))
            if shared := _SHARED.search(line):
                kernels[-1]["shared"] = int(shared[1])
    return kernels, notes


def collect(folder: Path) -> dict[str, Any]:
    """kernels and notes of every log below a build folder; each kernel with its source file."""
    kernels, notes = [], []
    for log in sorted(folder.rglob("*.cu.o.log")):
        found, said = parse(log.read_text(encoding="utf-8"))
        source = log.name.removesuffix(".o.log")
        kernels += [{"file": source, **kernel} for kernel in found]
        notes += [f"{source}: {line}" for line in said]
    return {"kernels": kernels, "notes": notes}


def _main(command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    sys.stdout.write(done.stdout)
    if "-o" in command[:-1]:
        Path(command[command.index("-o") + 1] + ".log").write_text(done.stdout, encoding="utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))

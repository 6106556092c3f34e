"""Ends folder jobs at random moments and looks at what is left:  python -m benchmarks.kills [COUNT] [--seed N]

Every run is a process of its own that restores a folder of small images in several formats, with `--existing skip`, and gets
SIGKILL (or, one time in four, SIGINT or SIGTERM) at a random moment. After each of them, every file under a final name must
be, byte for byte, what an undisturbed run writes. Then either the next run begins on top of it, or one is left to finish: it
must skip exactly the files that are there, make exactly the others, and leave no temporary file. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # noqa: F401  the first call of an operator imports it
from PIL import Image

from memnet_fast.cli import main as memnet
from memnet_fast.config import MemNetConfig
from memnet_fast.reference import MemNet
from memnet_fast.restore import pipeline  # noqa: F401  what a run imports is there before it is forked
from memnet_fast.weights import save_weights

_SUFFIXES = (".png", ".jpg", ".webp", ".tiff")
_POLITE = (signal.SIGINT, signal.SIGTERM)


def interrupt(folder: Path, count: int, files: int = 24, seed: int = 0) -> dict[str, Any]:
    """Runs jobs in an empty folder until SIGKILL has ended `count` of them. Returns counts; the first four must be 0."""
    choose = random.Random(seed)
    _prepare(folder, files)
    start = time.perf_counter()
    code = _finish(_start(folder, "expected"))
    duration = time.perf_counter() - start
    expected = _outputs(folder / "expected")
    if code or len(expected) != files:
        raise RuntimeError((folder / "messages.txt").read_text())
    told: Counter[str] = Counter(incomplete=0, wrong_reruns=0, wrong_codes=0, temporary_files_left=0)
    histogram: Counter[int] = Counter()
    problems: list[str] = []
    while told["ended_by_SIGKILL"] < count:
        number = choose.choice(_POLITE) if choose.random() < 0.25 else signal.SIGKILL
        child = _start(folder, "out")
        time.sleep(choose.uniform(0, duration))
        os.kill(child, number)
        code = _finish(child)
        told["finished_before" if code == 0 else "ended_by_" + signal.Signals(number).name] += 1
        # Before the command has its handlers, every signal simply ends the process.
        if code not in (0, -number, 128 + number):
            told["wrong_codes"] += 1
            problems.append(f"{signal.Signals(number).name} gave code {code}: {_messages(folder)}")
        found = _outputs(folder / "out")
        histogram[len(found)] += 1
        different = [name for name, data in found.items() if expected.get(name) != data]
        told["incomplete"] += len(different)
        if different:
            problems.append(f"backends in the journal: {', '.join(_backends(folder / 'out')) or 'none'}")
        problems += [f"{signal.Signals(number).name} left {name} of {len(found[name])} bytes" for name in different]
        left = len(list((folder / "out").glob(".memnet-*.part")))
        told["temporary_files_met"] += left
        told["temporary_files_left"] += left if number in _POLITE and left > told["temporary_before"] else 0
        told["temporary_before"] = left
        if choose.random() < 0.5 or len(found) == files:
            told["reruns"] += 1
            if wrong := _wrong(folder, expected, found):
                told["wrong_reruns"] += 1
                problems.append(wrong)
            _remove(folder / "out")
            told["temporary_before"] = 0
    del told["temporary_before"]
    middle = sum(n for done, n in histogram.items() if 0 < done < files)
    return {**told, "ended_in_the_middle": middle, "seconds_of_a_run": round(duration, 3), "problems": problems}


def _prepare(folder: Path, files: int) -> None:
    torch.manual_seed(0)
    save_weights(MemNet(MemNetConfig(channels=16, num_memory_blocks=1, num_recursions=1)).eval(), folder / "net")
    (folder / "in").mkdir()
    random_pixels = np.random.default_rng(0)
    for i in range(files):
        pixels = random_pixels.integers(0, 256, (60 + i, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"{i}{_SUFFIXES[i % len(_SUFFIXES)]}")


def _start(folder: Path, output: str, *more: str) -> int:
    """A forked process: importing torch anew each time would take longer than the job. Nothing was computed here before."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        with open("messages.txt", "w") as messages:
            os.dup2(messages.fileno(), 2)
            sys.stderr = messages
            memnet(["denoise", "-i", "in", "-o", output, "-n", "net", "--existing", "skip", "-b", "1", *more])
    except SystemExit as end:
        code = int(end.code or 0)
    except KeyboardInterrupt:  # before the command has begun
        code = 128 + signal.SIGINT
    except BaseException:
        os.write(2, traceback.format_exc().encode())  # `messages` is closed, its descriptor is not
    finally:
        os._exit(code)


def _finish(child: int) -> int:
    """Exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix in _SUFFIXES}


def _backends(folder: Path) -> list[str]:
    """What the runs over a folder chose: another backend gives other bits."""
    found = set()
    for path in (folder / ".memnet").glob("*.jsonl"):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut, or one about an output
                found.add(str(json.loads(line)["settings"]["backend"]))
    return sorted(found)


def _wrong(folder: Path, expected: dict[str, bytes], before: dict[str, bytes]) -> str:
    """Lets a run finish over what is there; what was wrong about it, or nothing."""
    code = _finish(_start(folder, "out", "--log", "log.json"))
    if code:
        return f"a rerun over {len(before)} files gave code {code}: {_messages(folder)}"
    log = json.loads((folder / "log.json").read_text())
    counts = (log["restored"], log["skipped"])
    if counts != (len(expected) - len(before), len(before)):
        return f"a rerun over {len(before)} files restored {counts[0]} and skipped {counts[1]}"
    if _outputs(folder / "out") != expected:
        return "a rerun left other files than an undisturbed run"
    if left := list((folder / "out").rglob("*.part")):
        return f"a rerun left {left}"
    return "" if (folder / "out" / ".memnet" / "success.json").exists() else "a rerun left no mark of success"


def _messages(folder: Path) -> str:
    return (folder / "messages.txt").read_text(errors="replace")[-2000:]


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = interrupt(Path(name), options.count, seed=options.seed)
    print(json.dumps(result))
    return int(any(result[name] for name in ("incomplete", "wrong_reruns", "wrong_codes", "temporary_files_left")))


if __name__ == "__main__":
    sys.exit(main())

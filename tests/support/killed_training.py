"""Trainings that are killed, in forked processes (importing Lightning anew each time would take longer than a training):

    python killed_training.py saves FOLDER COUNT   a process that does nothing but save is killed COUNT times
    python killed_training.py runs FOLDER COUNT    a training that saves after each step is killed COUNT times and goes on
    python killed_training.py ranks FOLDER         trainings of two processes of which one fails

Prints what was found as one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401  the first call of an operator imports it
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from memnet_fast import cli, files
from memnet_fast.errors import InputError
from memnet_fast.training import module, run
from memnet_fast.training.results import load_result, read_state, write_state
from support.recipes import recipe_file

_HANG = 100.0


def _fork(work: Callable[[], None], messages: Path) -> int:
    """A child that does the work, with its stderr in a file. Nothing was computed here before, so there are no threads."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with messages.open("w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def saves(folder: Path, count: int) -> dict[str, Any]:
    """Each life goes on counting from what it finds; a file that is there must load, and never count backwards."""
    choose, last = random.Random(0), folder / "last.ckpt"
    told = {"kills": 0, "unreadable": 0, "backwards": 0, "temporary_met": 0, "temporary_left": 0, "saves": 0}
    seen = 0

    reading, writing = os.pipe()

    def save() -> None:
        number = seen
        while True:
            number += 1
            os.write(writing, b".")
            write_state(last, {"number": number, "weights": torch.full((300_000,), number)})

    while told["kills"] < count:
        child = _fork(save, folder / "messages")
        # In the middle of the second save, or a little later: as long as the first took decides when that is.
        os.read(reading, 1)
        begin = time.monotonic()
        os.read(reading, 1)
        time.sleep(choose.uniform(0, 1.2 * (time.monotonic() - begin)))
        os.kill(child, signal.SIGKILL)
        _code(child)
        os.write(writing, b".")
        while os.read(reading, 4096) == b"." * 4096:  # what the dead had written
            pass
        told["kills"] += 1
        if last.exists():
            try:
                state = read_state(last, ("number", "weights"))
                whole = bool((state["weights"] == state["number"]).all())
            except Exception:
                whole = False
            told["unreadable"] += not whole
            told["backwards"] += whole and state["number"] < seen
            seen = state["number"] if whole else seen
        told["temporary_met"] += len(list(folder.glob(".memnet-*")))
        files.sweep(folder)
        told["temporary_left"] += len(list(folder.glob(".memnet-*")))
    return {**told, "saves": seen}


def _train(file: Path, *more: str) -> None:
    cli.main(["train", str(file), "--accelerator", "cpu", "--resume", "auto", "save_minutes=0", "--progress", "none", *more])


def runs(folder: Path, count: int) -> dict[str, Any]:
    file, choose = recipe_file(folder), random.Random(0)
    told = {"kills": 0, "unreadable": 0, "other_bits": 0, "wrong_codes": 0, "temporary_left": 0, "finished": 0, "in_between": 0}
    start = time.monotonic()
    if _code(_fork(lambda: _train(file), folder / "messages")):
        raise RuntimeError((folder / "messages").read_text())
    duration = time.monotonic() - start
    expected = _weights(folder)
    shutil.rmtree(folder / "run")
    while told["kills"] < count:
        child = _fork(lambda: _train(file), folder / "messages")
        time.sleep(choose.uniform(0.3, 1) * duration)  # it takes a third to begin
        os.kill(child, signal.SIGKILL)
        _code(child)
        told["kills"] += 1
        if (folder / "run" / "last.ckpt").exists():
            told["in_between"] += 1
            try:
                read_state(folder / "run" / "last.ckpt", ("stage", "state"))
            except Exception:
                told["unreadable"] += 1
        if told["kills"] % 4 == 0:  # after some deaths in a row, to the end
            told["wrong_codes"] += _code(_fork(lambda: _train(file), folder / "messages")) != 0
            told["finished"] += 1
            found = _weights(folder)
            told["other_bits"] += not all(torch.equal(found[name], value) for name, value in expected.items())
            told["temporary_left"] += len(list((folder / "run").rglob(".memnet-*")))
            shutil.rmtree(folder / "run")
    return told


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_result(folder / "run" / "result")[0].state_dict()


# Two processes of one training


def _killed(step: int) -> None:
    original, calls = module.multi_supervised, 0

    def dying(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    module.multi_supervised = dying


def _raising(step: int) -> None:
    original, calls = module.multi_supervised, 0

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            raise InputError("this process has had enough")
        return original(*arguments)

    module.multi_supervised = failing


def _killed_while_saving(number: int) -> None:
    """After the file is written and before it has its name."""
    original, calls = os.replace, 0

    def dying(source: Any, target: Any) -> None:
        nonlocal calls
        calls += Path(target).name == "last.ckpt"
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    os.replace = dying  # type: ignore[assignment]


def _pair(folder: Path, fault: Callable[[int], None] | None = None, faulty: int = 0) -> dict[str, Any]:
    """A training of two processes, of which one may have a fault (from its third step or save on)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    file = folder / "tiny.toml"

    def rank(number: int) -> None:
        os.environ |= {"LOCAL_RANK": str(number), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank_zero_only.rank = number
        if fault is not None and number == faulty:
            fault(3)
        _train(file, "--devices", "2")

    messages = [folder / f"messages{number}" for number in range(2)]
    children = [_fork(lambda n=number: rank(n), messages[number]) for number in range(2)]  # type: ignore[misc]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + _HANG
    while len(codes) < 2:
        for number, child in enumerate(children):
            if number in codes:
                continue
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[number] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                codes[number] = _code(child)
        time.sleep(0.05)
    told = {"codes": [codes[0], codes[1]], "hung": time.monotonic() > deadline, "said": [m.read_text() for m in messages]}
    last = folder / "run" / "last.ckpt"
    return {**told, "step": read_state(last, ("state",))["state"].get("step") if last.exists() else None}


def ranks(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {}
    cases = {
        "killed": (_killed, 1),
        "raising": (_raising, 1),
        "first_killed": (_killed, 0),
        "saving": (_killed_while_saving, 0),
    }
    for name in ("whole", *cases):
        (folder / name).mkdir()
        recipe_file(folder / name)
        told[name] = _pair(folder / name, *cases.get(name, (None, 0)))
    told["saving"]["temporary"] = len(list((folder / "saving" / "run").glob(".memnet-*")))
    told["resumed"] = _pair(folder / "saving")
    told["resumed"]["temporary"] = len(list((folder / "saving" / "run").glob(".memnet-*")))
    expected = _weights(folder / "whole")
    found = _weights(folder / "saving")
    told["resumed"]["same"] = all(torch.equal(found[name], value) for name, value in expected.items())
    return told


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    told = ranks(folder) if what == "ranks" else {"saves": saves, "runs": runs}[what](folder, int(sys.argv[3]))
    print(json.dumps(told))


if __name__ == "__main__":
    assert run.rank_zero_only is rank_zero_only
    main()

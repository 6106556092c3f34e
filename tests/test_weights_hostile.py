"""Files made to attack a reader: C03, C04, C06 to C08, C13 to C16, C21, C22, C28, C29.

All are loaded in one other process, in which an audit hook sees what Python does, and in which time and memory are measured.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import checkpoints as make
from support import networks
from support.hostile import CANARY, SCALAR, SOUND_SYMBOL, SYMBOLS, TABLES, Calls, mxnet_list, own_file

from memnet_fast import weights
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch

SECONDS = 1.0
EXTRA_BYTES = 64 << 20

_CHILD = """
import json, sys, time
import memnet_fast.weights as weights
folder, first, *names = sys.argv[1:]
weights.load_weights(f"{folder}/{first}")
events, watching = [], False
def hook(event, args):
    # Not what does nothing: id(), and open() of a descriptor, which was opened before by its name.
    if watching and event != "builtins.id" and not (event == "open" and isinstance(args[0], int)):
        events.append([event, str(args[0])[:200] if args else ""])
sys.addaudithook(hook)
def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024
for name in names:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak
    before, result = memory("VmRSS"), "loaded"
    del events[:]
    start = time.process_time()
    watching = True
    try:
        weights.load_weights(f"{folder}/{name}")
    except weights.CheckpointError as error:
        result, text = type(error).__name__, str(error)
        assert name in text and text.isprintable(), text
    watching = False
    seconds = time.process_time() - start
    print(json.dumps([name, result, seconds, memory("VmHWM") - before, list(events)]), flush=True)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, dict[str, list]]:
    folder = tmp_path_factory.mktemp("hostile")
    contents = {f"{kind}/{name}": made() for kind, table in TABLES.items() for name, (made, _) in table.items()}
    names = [name for name in _write(folder, contents)]
    (folder / "sound.safetensors").write_bytes(own_file(lambda tensors, metadata: None))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), "sound.safetensors", *names], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, {row[0]: row[1:] for row in map(json.loads, done.stdout.splitlines())}


def _write(folder: Path, contents: dict[str, bytes]) -> list[str]:
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        if name.startswith("mxnet/"):
            _symbol(folder / name).write_bytes(SYMBOLS.get(name.removeprefix("mxnet/symbol, "), SOUND_SYMBOL))
    return list(contents)


def _symbol(path: Path) -> Path:
    return path.with_name(f"{path.name}-symbol.json")


CASES = [(f"{kind}/{name}", error) for kind, table in TABLES.items() for name, (_, error) in table.items()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "error"), CASES, ids=[name for name, _ in CASES])
def test_hostile_files(results, name, error):
    folder, rows = results
    result, seconds, extra, events = rows[name]
    assert result == error
    files = [folder / name] + [_symbol(folder / name)] * name.startswith("mxnet/")
    opened = [["open", str(file)] for file in files]
    assert [e for e in events if e not in opened] == [], "only the file itself was opened, nothing imported"
    assert extra <= 2 * sum(file.stat().st_size for file in files) + EXTRA_BYTES
    assert seconds <= SECONDS
    assert not os.path.exists(CANARY)


def test_the_watch_sees_what_it_must(tmp_path):
    """The harness itself: torch.load of an attack runs it, and a hook like the one above notices."""
    seen = []
    watching = True
    sys.addaudithook(lambda event, args: seen.append(event) if watching and event in ("import", "pickle.find_class") else None)
    pickle.loads(pickle.dumps(Calls(os.getenv, "HOME"), 2))
    watching = False
    assert "pickle.find_class" in seen


def test_no_reader_uses_pickle_or_torch_load():
    """C08: there is nothing to fall back to."""
    for path in Path(weights.__file__).parent.glob("*.py"):
        source = path.read_text()
        for word in (
            r"\bpickle\b import",
            r"import (pickle|importlib)\b",
            r"torch\.load\(",
            r"(?<![.\w])(eval|exec|__import__)\(",
        ):
            assert not re.search(word, source), (path.name, word)


def test_random_damage_never_escapes(tmp_path):
    """Damaged pickles, archives and headers end in an error of the package, or in a network."""
    port = _port()
    own = own_file(lambda tensors, metadata: None)
    files = [make.torch_bytes(port), make.torch_bytes(port, True), make.tar_file(port, list(port.values())), own]
    g = np.random.default_rng(0)
    path, refused = tmp_path / "x", 0
    for data in files:
        text = bytes(data)
        # Mostly where structure is: the pickles, headers and lists of entries, not the numbers.
        spots = [i for i, b in enumerate(text) if b != 0]
        for _ in range(300):
            changed = bytearray(data)
            for _ in range(1 + int(g.integers(3))):
                changed[spots[int(g.integers(len(spots)))]] = int(g.integers(256))
            path.write_bytes(bytes(changed))
            try:
                weights.load_weights(path)
            except CheckpointError:
                refused += 1
    assert refused > 400


def _port() -> dict[str, torch.Tensor]:
    from test_reference import PORTS

    net = networks.build(MemNetConfig(channels=2, num_memory_blocks=1, num_recursions=1, **PORTS["A"][1]))
    own = net.state_dict()
    return {
        f"{theirs}.{leaf}": own[f"{ours}.{leaf}"]
        for theirs, ours in PORTS["A"][0].keys(1, 1).items()
        for leaf in ("weight", "bias", "running_mean", "running_var")
        if f"{ours}.{leaf}" in own
    }


def test_ten_thousand_flipped_bits_of_our_files_are_noticed(tmp_path):
    """Anywhere: in the tensors, in the header, in the configuration and the description, which have a digest of their own."""
    path = tmp_path / "net.safetensors"
    net = networks.build(MemNetConfig(channels=2, num_memory_blocks=1, num_recursions=1))
    weights.save_weights(net, path, {"psnr": {"30": 28.1}, "author": 'Zoë "x"'})
    data = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for i in map(int, np.random.default_rng(0).choice(8 * len(data), 10_000, replace=False)):
            os.pwrite(file.fileno(), bytes([data[i // 8] ^ 1 << i % 8]), i // 8)
            with pytest.raises(CheckpointError):
                weights.load_weights(path)
            os.pwrite(file.fileno(), data[i // 8 : i // 8 + 1], i // 8)
    assert weights.load_info(path)["psnr"] == {"30": 28.1}


def test_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """C28: it shrinks or grows between the look at its size and the last byte."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(own_file(lambda tensors, metadata: None))
    real = os.fstat
    for size in (-5, 5):

        def look(descriptor, size=size):
            status = real(descriptor)
            return os.stat_result((*status[:6], status.st_size + size, *status[7:10]))

        monkeypatch.setattr(os, "fstat", look)
        with pytest.raises(CheckpointCorrupt, match="changed while it was read"):
            weights.load_weights(path)
        monkeypatch.undo()


def test_nothing_falls_back_to_torch_load(tmp_path, monkeypatch):
    """C08: neither for a sound file nor for a refused one."""

    def forbidden(*arguments, **keywords):
        raise AssertionError("an unsafe reader was called")

    for module, name in ((torch, "load"), (torch.jit, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    port, path = _port(), tmp_path / "net.pth"
    for data in (make.torch_bytes(port), make.torch_bytes(port, True), make.tar_file(port, list(port.values()))):
        path.write_bytes(data)
        weights.load_weights(path)
        path.write_bytes(data.replace(b"Storage", b"Stopage"))
        with pytest.raises(CheckpointError):
            weights.load_weights(path)


def test_symbols_that_are_no_files(tmp_path):
    """C27, for the file that is opened beside another one."""
    path, symbol = tmp_path / "net-0000.params", tmp_path / "net-symbol.json"
    path.write_bytes(mxnet_list(SCALAR, 1, struct.pack("<QQ1s", 1, 1, b"a")))
    for make_it in (
        symbol.mkdir,
        lambda: os.mkfifo(symbol),
        lambda: symbol.symlink_to(symbol),
        lambda: symbol.symlink_to("no"),
    ):
        make_it()
        with pytest.raises(CheckpointMismatch, match="net-symbol.json, which must lie in the same folder"):
            weights.load_weights(path)
        symbol.rmdir() if make_it == symbol.mkdir else symbol.unlink()


def test_concurrent_loads(tmp_path):
    """C29."""
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "net.pth"
    path.write_bytes(make.torch_bytes(_port()))
    with ThreadPoolExecutor(8) as pool:
        nets = list(pool.map(weights.load_weights, [path] * 100))
    first = nets[0].state_dict()
    assert all(torch.equal(first[k], v) for net in nets for k, v in net.state_dict().items())

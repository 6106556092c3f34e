"""Time and memory of reading weight files, beside torch and safetensors:  python -m benchmarks.loaders [FILE ...] [--rounds N]

Reads files of every PyTorch kind of a M6R6 (a port's, about 11 MB) and our own, or the files named. Every reading is a process
of its own: seconds from the call to tensors in memory (for us: to a checked network), and the peak of the process's memory
above what it had before. Rounds alternate between readers. Writes benchmarks/results/<device>/loaders.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import results_folder
from memnet_fast.errors import MemNetError
from memnet_fast.models import create_model
from memnet_fast.weights import load_weights, save_weights

_READ = {
    "memnet_fast": "memnet_fast.load_weights(path)",
    "torch, weights_only": "torch.load(path, weights_only=True)",
    "safetensors": "safetensors.torch.load_file(path)",
}
_CHILD = """
import ctypes, json, sys, time
import torch, safetensors.torch, memnet_fast, memnet_fast.weights
path = sys.argv[1]
def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024
memnet_fast.load_weights(sys.argv[2])  # code that is loaded with the first file
ctypes.CDLL(None).malloc_trim(0)  # what the first file left behind
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forgets the peak
before, start = memory("VmRSS"), time.perf_counter()
result = {read}
print(json.dumps([time.perf_counter() - start, max(0.0, memory("VmHWM") - before)]))
"""
# Names of this package, and what the port of Vandermode calls them.
_PORT_NAMES = (
    (r"^first\.", "feature_extractor."),
    (r"^blocks\.(\d+)\.(bn|conv)_a\.(\d+)\.", r"dense_memory.\1.recursive_unit.\3.relu_conv1.\2."),
    (r"^blocks\.(\d+)\.(bn|conv)_b\.(\d+)\.", r"dense_memory.\1.recursive_unit.\3.relu_conv2.\2."),
    (r"^blocks\.(\d+)\.gate\.", r"dense_memory.\1.gate_unit."),
    (r"^recon_bn\.0\.", "reconstructor.bn."),
    (r"^recon\.", "reconstructor.conv."),
)


def write_files(folder: Path, preset: str = "memnet_m6r6_vandermode", **changes: Any) -> list[Path]:
    """Our file, and a port's as torch writes it now and as it did before 1.6, of one network with random weights."""
    net = create_model(preset, pretrained=False, **changes)
    state = {}
    for name, tensor in net.state_dict().items():
        for ours, theirs in _PORT_NAMES:
            name = re.sub(ours, theirs, name)
        state[name] = tensor
    files = [folder / name for name in ("own.safetensors", "port.pth", "port_legacy.pth")]
    save_weights(net, files[0])
    torch.save({"state_dict": state}, files[1])
    torch.save({"state_dict": state}, files[2], _use_new_zipfile_serialization=False)
    return files


def measure(files: list[Path], first: Path, rounds: int) -> list[dict[str, Any]]:
    """One row for each file and reader that can open it. first: a sound file, read before the clock starts."""
    rows = []
    for path in files:
        size = path.stat().st_size / 2**20
        seen: dict[str, list[list[float]]] = {reader: [] for reader in _READ}
        for i in range(rounds):
            for reader in sorted(_READ, reverse=bool(i % 2)):
                if seen[reader] or not i:
                    done = _run(_CHILD.replace("{read}", _READ[reader]), path, first)
                    seen[reader] += [done] if done else []
        for reader, values in seen.items():
            if values:
                seconds, peaks = zip(*values, strict=True)
                row = {"file": path.name, "size_mib": round(size, 2), "reader": reader, "rounds": len(values)}
                row |= {"median_ms": 1e3 * statistics.median(seconds), "peak_mib": statistics.median(peaks)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def _run(code: str, path: Path, first: Path) -> list[float] | None:
    """None where the reader does not know the kind of file."""
    done = subprocess.run([sys.executable, "-c", code, str(path), str(first)], capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.loaders")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("--rounds: at least 1")
    with tempfile.TemporaryDirectory() as name:
        made = write_files(Path(name))
        files = given.files or made
        try:
            for path in files:
                load_weights(path)
        except MemNetError as error:
            parser.error(str(error))
        rows = measure(files, made[0], given.rounds)
    about = {"torch": torch.__version__, "python": sys.version.split()[0], "rounds": given.rounds}
    (results_folder() / "loaders.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

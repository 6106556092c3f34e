"""Turns what other programs print into files of results, for benchmarks/gpu_window.sh:

python -m benchmarks.gpu.collect parity JUNIT.xml... OUT.json      tests by name and outcome, failures with their message
python -m benchmarks.gpu.collect sanitizer OUT.json LOG...         errors that each log of compute-sanitizer sums up
python -m benchmarks.gpu.collect ncu PAGE.csv OUT.json             metrics of each kernel from ncu --page raw --csv
python -m benchmarks.gpu.collect log OUT.txt LOG...                logs joined, of long ones the beginning and the end
python -m benchmarks.gpu.collect merge BENCH.json... OUT.json      rows of several calls on one machine and one commit
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.store import write
from memnet_fast.files import write_whole

_MESSAGE = 600  # characters of a failure
_KEPT = 400_000  # bytes of one log at its beginning, and at its end


def parity(files: list[Path]) -> dict[str, Any]:
    """From pytest's JUnit files. A file that a killed run left half written counts as unreadable, not as passed."""
    rows, unreadable = [], []
    for path in files:
        try:
            cases = list(ElementTree.parse(path).getroot().iter("testcase"))
        except (OSError, ElementTree.ParseError) as error:
            unreadable.append(f"{path.name}: {error}")
            continue
        for case in cases:
            outcome, message = "passed", None
            for child in case:
                if child.tag in ("failure", "error", "skipped"):
                    outcome = "failed" if child.tag in ("failure", "error") else "skipped"
                    message = (child.get("message") or child.text or "")[:_MESSAGE]
            name = f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}"
            rows.append({"test": name, "outcome": outcome, "seconds": float(case.get("time") or 0)})
            if message is not None:
                rows[-1]["message"] = message
    counts = Counter(row["outcome"] for row in rows)
    return {
        "counts": dict(counts),
        "unreadable": unreadable,
        "rows": [r for r in rows if r["outcome"] != "passed"] + _slowest(rows),
    }


def _slowest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Passed tests, the slowest first; their number is in the counts."""
    return sorted((r for r in rows if r["outcome"] == "passed"), key=lambda r: -r["seconds"])[:50]


_SUMMARY = re.compile(r"========= (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def sanitizer(files: list[Path]) -> dict[str, Any]:
    """errors: from the tool's last summary; None where it never came to one (killed, crashed, refused the device)."""
    rows = []
    for path in files:
        text = path.read_text(errors="replace") if path.exists() else ""
        found = _SUMMARY.findall(text)
        errors = int(found[-1][0] or found[-1][1]) if found else None
        first = [line for line in text.splitlines() if line.startswith("=========")][:40]
        rows.append({"tool": path.stem, "errors": errors, "first": [] if errors == 0 else first})
    return {"rows": rows}


# name in the results: start of the metric's name in the raw page
_METRICS = {
    "us": "gpu__time_duration.sum",
    "sm_mhz": "smsp__cycles_elapsed.avg.per_second",
    "tensor_pct": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "tensor_cycles_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "shared_pct": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed",
    "shared_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "occupancy_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "cycles_max": "sm__cycles_active.max",
    "cycles_avg": "sm__cycles_active.avg",
}


def ncu(text: str) -> dict[str, Any]:
    """Rows by kernel launch. The second line of the page holds the units, which are kept beside the values."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(io.StringIO("\n".join(lines))))
    if len(table) < 3:
        return {"rows": [], "units": {}, "metrics": []}
    head, units, body = table[0], table[1], table[2:]
    columns = {key: head.index(name) for key, name in _METRICS.items() if name in head}
    rows = []
    for line in body:
        row: dict[str, Any] = {"kernel": line[head.index("Kernel Name")][:200]}
        for key, index in columns.items():
            try:
                row[key] = float(line[index].replace(",", ""))
            except ValueError:
                row[key] = None
        rows.append(row)
    return {"rows": rows, "units": {key: units[i] for key, i in columns.items()}, "metrics": sorted(_METRICS.keys() & columns)}


def log(files: list[Path]) -> bytes:
    joined = []
    for path in files:
        data = path.read_bytes()
        if len(data) > 2 * _KEPT:
            data = data[:_KEPT] + f"\n[{len(data) - 2 * _KEPT} bytes left out]\n".encode() + data[-_KEPT:]
        joined.append(f"######## {path.name}\n".encode() + data + b"\n")
    return b"".join(joined)


def merge(files: list[Path]) -> dict[str, Any]:
    """bench.json of several calls as one. Raises ValueError where another GPU, driver, commit or torch was measured."""
    parts = [json.loads(path.read_text()) for path in files]
    for path, part in zip(files, parts, strict=True):
        for key in ("commit", "torch", "triton", "cuda", "nvcc"):
            if part["about"].get(key) != parts[0]["about"].get(key):
                raise ValueError(f"{path} and {files[0]} differ in {key}")
        names = [((p["about"].get("gpu") or {}).get("name"), _driver(p)) for p in (part, parts[0])]
        if names[0] != names[1]:
            raise ValueError(f"{path} and {files[0]} are of {names[0]} and {names[1]}")
    return {"about": parts[0]["about"], "rows": [row for part in parts for row in part["rows"]]}


def _driver(part: dict[str, Any]) -> Any:
    return ((part["about"].get("gpu") or {}).get("nvidia_smi") or {}).get("driver_version")


def main(arguments: list[str]) -> int:
    kind, *rest = arguments
    paths = [Path(a) for a in rest]
    match kind:
        case "parity":
            write(paths[-1], parity(paths[:-1]))
        case "sanitizer":
            write(paths[0], sanitizer(paths[1:]))
        case "ncu":
            write(paths[1], ncu(paths[0].read_text(errors="replace")))
        case "log":
            write_whole(paths[0], log(paths[1:]))
        case "merge" if len(paths) > 1:
            try:
                write(paths[-1], merge(paths[:-1]))
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

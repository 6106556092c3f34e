"""Writes the README's tables and the plots from the stored results:  python -m benchmarks.report [--check]

Each table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; nothing in there is typed by hand. --check changes
nothing and fails where the README and the data differ.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from memnet_fast import weights

_ROOT = Path(__file__).parents[1]
README = _ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"
# Drawn by plots.py, in the order in which the README shows them.
PLOTS = ("speedup", "times", "memory", "roofline")


_PLACE = ("model", "subject", "isa", "threads", "size", "op", "base", "variant")


class Results:
    """All files of one device. Of rows that say the same thing, the newest counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[Path, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.json")):
            data = json.loads(path.read_text())
            if isinstance(data, dict) and "suite" in (data.get("rows") or [{}])[0] and "command" in data.get("about", {}):
                self.files[path] = data
        self._numbers = {path: i + 1 for i, path in enumerate(self.files)}

    def rows(self, suite: str) -> list[dict[str, Any]]:
        """Rows of a suite with their file (`path`), `model` and `subject` (the first of the file), each thing once."""
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for path, data in sorted(self.files.items(), key=lambda item: item[1]["about"]["date"]):
            own = [row for row in data["rows"] if row["suite"] == suite]
            for row in own:
                # Ratios to different subjects do not belong in one table.
                run = {"path": path, "model": data["about"].get("model", ""), "subject": own[0]["variant"]}
                place = tuple({**row, **run}.get(key) for key in _PLACE)
                found.pop(place, None)  # the newest also comes last
                found[place] = {**row, **run}
        return list(found.values())

    def source(self, row: dict[str, Any]) -> str:
        """A link to the file of a row."""
        return f"[{self._numbers[row['path']]}]({row['path'].relative_to(_ROOT)})"

    def sources(self, rows: list[dict[str, Any]]) -> list[str]:
        """A line for each file of these rows: what, when, and the command that makes it again."""
        lines = []
        for path in sorted({row["path"] for row in rows}):
            about = self.files[path]["about"]
            engines = [f"{name} {version}" for name, version in about.get("engines", {}).items() if version]
            what = ", ".join([f"commit {(about['commit'] or 'unknown')[:10]}", f"torch {about['torch']}", *engines])
            number = self._numbers[path]
            lines.append(f"[{number}]({path.relative_to(_ROOT)}): {about['date'][:10]}, {what}; again: `{about['command']}`  ")
        return lines

    def device(self) -> str:
        about = list(self.files.values())[-1]["about"]
        gpu = about.get("gpu") if about.get("device", "cpu") != "cpu" else None
        if gpu:
            return f"{gpu['name']}, driver {gpu.get('nvidia_smi', {}).get('driver_version', 'unknown')}, CUDA {about['cuda']}"
        return f"{about['cpu']['model']}, {about['cpu']['cpus']} CPUs"


def forward_tables(results: Results) -> str:
    """Whole networks: time, ratio, memory and error by size, then threads, pixels and single operations."""
    lines = [f"**{results.device()}**", ""]
    rows = results.rows("forward")
    memory = {(r["model"], r["isa"], r["size"], r["variant"]): r for r in results.rows("memory") if r["status"] == "ok"}
    shown: list[dict[str, Any]] = []
    for group in _groups(rows, "model", "subject", "isa", "threads", "size"):
        first = group[0]
        isa = ", AVX-512 left alone" if first["isa"] == "avx2" else ""
        lines += [
            f"{first['model']}, {first['size']}, {first['threads']} threads{isa}; subject: {first['subject']}",
            "",
            "| | ms | time / subject (20 % to 80 %) | peak memory, MiB | error / residual | |",
            "|---|---|---|---|---|---|",
        ]
        for r in sorted(group, key=lambda r: (r["precision"] != "fp32", r["status"] != "ok")):
            peak = memory.get((r["model"], r["isa"], r["size"], r["variant"]), {})
            lines.append(_forward_row(r, peak.get("peak_mib", r.get("device_peak_mib")), results.source(r)))
            shown += [r, peak] if peak else [r]
        lines.append("")
    for r in results.rows("threads"):
        if r["status"] == "ok":
            text = f"{r['variant']}, {r['size']}: {r['threads']} threads are {r['ratio']:.2f} times as fast as one"
            lines.append(f"- {text} ({r['ratio_q20']:.2f} to {r['ratio_q80']:.2f}) {results.source(r)}")
            shown.append(r)
    for r in results.rows("pixels"):
        if r["status"] == "ok":
            text = f"{r['variant']}: a pixel of {r['size']} costs {r['ratio']:.3f} times one of {r['base']}"
            lines.append(f"- {text} ({r['ratio_q20']:.3f} to {r['ratio_q80']:.3f}) {results.source(r)}")
            shown.append(r)
    lines += ["", *_ops_table(results, shown)]
    for name in PLOTS:
        path = results.folder / f"{name}.png"
        if path.exists():
            lines += [f"![{name}]({path.relative_to(_ROOT)})", ""]
    return "\n".join([*lines, *results.sources(shown)]) + "\n"


def _forward_row(r: dict[str, Any], peak: float | None, source: str) -> str:
    name = r["variant"] + (f" ({r['note']})" if r.get("note") else "")
    if r["status"] != "ok":
        return f"| {name} | {r['status']}: {r['reason'][:100]} | | | | {source} |"
    ratio = f"{r['ratio']:.2f} ({r['ratio_q20']:.2f} to {r['ratio_q80']:.2f})"
    mib = "" if peak is None else f"{peak:.0f}"
    return f"| {name} | {r['ms']:.0f} | {ratio} | {mib} | {r['errors']['nsr']:.1e} | {source} |"


def _ops_table(results: Results, shown: list[dict[str, Any]]) -> list[str]:
    rows = [r for r in results.rows("op") if r["status"] == "ok"]
    if not rows:
        return []
    shown += rows
    lines = ["| operation | size | | ms | GFLOP/s | GB/s | plain PyTorch / this | |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        ratio = f"{r['plain_ratio']:.2f}" if "plain_ratio" in r else ""
        numbers = f"{r['ms']:.2f} | {1e3 * r['tflops']:.0f} | {1e3 * r['tbps']:.1f} | {ratio} | {results.source(r)}"
        lines.append(f"| {r['op']} | {r['size']} | {r['variant']} | {numbers} |")
    return [*lines, ""]


def _groups(rows: list[dict[str, Any]], *keys: str) -> list[list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys), []).append(row)

    def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
        row = found[key][0]
        return row["model"], row["subject"], row["isa"] != "native", row["n"] * row["h"] * row["w"], key

    return [found[key] for key in sorted(found, key=place)]


def gpu_table(path: Path) -> str:
    """Ceilings, whole networks by size, and single operations from one file of benchmarks/gpu/. A refused or failed row shows
    its reason in place of a time.
    """
    data = json.loads(path.read_text())
    about, rows = data["about"], data["rows"]
    gpu, commit = about["gpu"], (about["commit"] or "unknown")[:10]
    driver = gpu.get("nvidia_smi", {}).get("driver_version", "unknown")
    name = path.relative_to(_ROOT)
    lines = [
        f"{gpu['name']}, driver {driver}, CUDA {about['cuda']}, torch {about['torch']}, triton {about['triton']}. "
        f"Source: [{name}]({name}), commit {commit}, {about['date'][:10]}.",
        "",
    ]
    ceilings = {r["variant"]: r for r in rows if r["suite"] == "ceiling"}
    for r in ceilings.values():
        rate = f"{r['tflops']:.0f} TFLOP/s" if r["tflops"] else f"{r['tbps']:.2f} TB/s"
        lines.append(f"- {r['variant']}: {rate}")
    networks = [r for r in rows if r["suite"] == "network"]
    for size in dict.fromkeys(r["size"] for r in networks):
        lines += [
            "",
            f"**{size}**",
            "",
            "| | ms (20 % to 80 %) | time / subject | peak memory, MiB | error / residual |",
            "|---|---|---|---|---|",
        ]
        for r in (r for r in networks if r["size"] == size):
            if "ms" not in r:
                lines.append(f"| {r['variant']} | {r['status']}: {r['reason'][:80]} | | | |")
                continue
            ratio = f"{r['ratio']:.2f}" if "ratio" in r else ""
            time = f"{r['ms']:.2f} ({r['ms_q20']:.2f} to {r['ms_q80']:.2f})"
            lines.append(f"| {r['variant']} | {time} | {ratio} | {r.get('peak_mib', 0):.0f} | {r['errors']['nsr']:.1e} |")
    ops = [r for r in rows if r["suite"] == "op"]
    if ops:
        lines += ["", "| operation | | ms | TFLOP/s | TB/s | floor, ms | of the floor |", "|---|---|---|---|---|---|---|"]
    for r in ops:
        if "ms" in r:
            numbers = (
                f"{r['ms']:.3f} | {r['tflops']:.0f} | {r['tbps']:.2f} | {r['floor_ms']:.3f} | {r['floor_ms'] / r['ms']:.0%}"
            )
            lines.append(f"| {r['op']} | {r['variant']} | {numbers.replace('%', ' %')} |")
        else:
            lines.append(f"| {r['op']} | {r['variant']} | {r['status']}: {r['reason'][:80]} | | | | |")
    return "\n".join(lines) + "\n"


def weights_table() -> str:
    """What the bundled weights reach, from their own metadata."""
    lines = ["| weights | data | level | PSNR degraded, dB | PSNR restored, dB |", "|---|---|---|---|---|"]
    for name, path in weights.bundled().items():
        info = weights.load_info(path)
        before = info.get("psnr_degraded") or info["psnr_noisy"]  # the older name
        for data, levels in info["psnr"].items():
            for level, restored in levels.items():
                lines.append(f"| `{name}` | {data} | {level} | {before[data][level]:.2f} | {restored:.2f} |")
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    made: dict[str, Any] = {"weights": weights_table()}
    devices = [r for r in (Results(folder) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()) if r.files]
    made["forward"] = "\n".join(forward_tables(r) for r in devices if r.rows("forward"))
    if found := sorted(RESULTS.glob("*/gpu.json")):
        made["gpu"] = "\n".join(gpu_table(f) for f in found)
    return made


def render(text: str) -> str:
    """The README with every table made anew. Raises ValueError where a pair of markers is missing."""
    for name, table in tables().items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, t=table: m[1] + t + m[2], text)
        if count != 1:
            raise ValueError(f"README.md must have one pair of markers for {name}, it has {count}")
    return text


def main() -> int:
    old = README.read_text()
    new = render(old)
    if "--check" in sys.argv:
        if new != old:
            print("README.md differs from the stored results; run python -m benchmarks.report", file=sys.stderr)
            return 1
        return 0
    from benchmarks import plots  # matplotlib is needed to draw, not to check

    for folder in sorted(f for f in RESULTS.iterdir() if f.is_dir()):
        plots.draw(Results(folder))
    README.write_text(render(old))  # with the plots that are there now
    return 0


if __name__ == "__main__":
    sys.exit(main())

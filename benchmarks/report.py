"""Writes the README's tables from the stored results:  python -m benchmarks.report [--check]

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


def forward_table(path: Path) -> str:
    """Time, ratio, memory and error of every peer in one pytest-benchmark file."""
    data = json.loads(path.read_text())
    info = data["machine_info"]["memnet"]
    rows = [b["extra_info"] for b in data["benchmarks"]]
    memory = {(r["peer"], r["size"]): r["peak_mib"] for r in json.loads(path.with_name("memory.json").read_text())["rows"]}
    lines = [
        f"{info['cpu']}, {info['cpus']} CPUs, {rows[0]['threads']} threads, {info['isa']}, torch {info['torch']}, float32. "
        f"Source: [{path.relative_to(_ROOT)}]({path.relative_to(_ROOT)}), commit {data['commit_info']['id'][:10]};"
        f" memory.json beside it.",
        "",
    ]
    for size in dict.fromkeys(r["size"] for r in rows):
        lines += [
            f"**{size}**",
            "",
            "| | ms (median) | time / cpu backend (20 % to 80 %) | peak memory of the process, MiB | error / residual |",
            "|---|---|---|---|---|",
        ]
        for r in (r for r in rows if r["size"] == size):
            low, high = r["ratio_q20_q80"]
            lines.append(
                f"| {r['peer']} | {r['ms']:.0f} | {r['ratio_to_subject']:.2f} ({low:.2f} to {high:.2f}) | "
                f"{memory[r['peer'], r['size']]:.0f} | {r['nsr']:.1e} |"
            )
        lines.append("")
    return "\n".join(lines)


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
    files = sorted(RESULTS.glob("*/forward.json"))
    made["forward"] = "\n".join(forward_table(f) for f in files)
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
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

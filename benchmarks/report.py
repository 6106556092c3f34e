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

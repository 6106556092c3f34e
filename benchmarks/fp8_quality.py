"""What precision "fp8" costs in quality:  python -m benchmarks.fp8_quality FOLDER [--tasks NAME] [--backend torch] [--crop N]

Restores every image of a folder (Set12 for the gate: at most 0.05 dB lost in the mean) in float32 and in fp8 with the bundled
weights, and compares both with the clean image by the paper's protocol, but without rounding to 8 bits, which would hide
small differences. Writes benchmarks/results/<device>/fp8_quality.json after each image; an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.device import results_folder
from memnet_fast import fuse
from memnet_fast.errors import MemNetError
from memnet_fast.evaluation import compare, degraded_pair, image_files, planes, read_image
from memnet_fast.files import write_whole
from memnet_fast.metrics import psnr
from memnet_fast.tasks import TASKS, Task
from memnet_fast.weights import bundled, load_info, load_weights

LEVELS: dict[str, tuple[float, ...]] = {"denoise": (30, 50), "deblock": (10, 20), "sr": (2, 3, 4)}
LIMIT_DB = 0.05


def clean_image(path: Path, task: Task, crop: int | None) -> torch.Tensor:
    """[1, H, W] in [0, 1]: one gray plane, of which a centred square of `crop` pixels at most."""
    plane = planes(read_image(path), task, "paper")
    if crop is not None:
        h, w = (min(side, crop) for side in plane.shape[-2:])
        top, left = (plane.shape[-2] - h) // 2, (plane.shape[-1] - w) // 2
        plane = plane[..., top : top + h, left : left + w]
    return plane


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each task and level: how many images, mean PSNR in both precisions, mean and largest loss; whether the gate holds."""
    result = []
    for task, level in sorted({(row["task"], row["level"]) for row in rows}):
        own = [row for row in rows if (row["task"], row["level"]) == (task, level)]
        losses = [row["psnr_fp32"] - row["psnr_fp8"] for row in own]
        result.append(
            {
                "task": task,
                "level": level,
                "images": len(own),
                "psnr_fp32": fmean(row["psnr_fp32"] for row in own),
                "psnr_fp8": fmean(row["psnr_fp8"] for row in own),
                "mean_loss_db": fmean(losses),
                "largest_loss_db": max(losses),
                "within_gate": fmean(losses) <= LIMIT_DB,
            }
        )
    return result


def measure(folder: Path, tasks: list[str], backend: str, crop: int | None, target: Path) -> list[dict[str, Any]]:
    """The summary; `target` holds it together with a row for each image, task and level."""
    weights = {task: bundled()[f"memnet_m6r6.{task}"] for task in tasks}
    nets = {task: load_weights(path) for task, path in weights.items()}
    pairs = {t: (fuse(n, precision="fp32"), fuse(n, backend=backend, precision="fp8")) for t, n in nets.items()}
    exact, small = next(iter(pairs.values()))
    about = {
        "weights": {task: load_info(path)["sha256"] for task, path in weights.items()},
        "folder": folder.resolve().name,
        "crop": crop,
        "fp32": exact.backend,
        "fp8": small.backend,
        "torch": torch.__version__,
        "limit_db": LIMIT_DB,
    }
    stored = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    rows = stored["rows"] if stored.get("about") == about else []
    done = {(row["image"], row["sha256"], row["task"], row["level"]) for row in rows}
    for path, name in itertools.product(image_files(folder), tasks):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for level in LEVELS[name]:
            if (path.name, digest, name, level) in done:
                continue
            task, (exact, small) = TASKS[name], pairs[name]
            degraded, clean = degraded_pair(clean_image(path, task, crop), task, level, seed=0)
            how = dataclasses.replace(compare(task, level), rounded=False)
            images = (degraded, *(net(degraded[None])[0] for net in (exact, small)))
            given, full, eighth = (psnr(image, clean, how) for image in images)
            rows.append(
                {
                    "image": path.name,
                    "sha256": digest,
                    "size": list(clean.shape[:-3:-1]),
                    "task": name,
                    "level": level,
                    "psnr_degraded": given,
                    "psnr_fp32": full,
                    "psnr_fp8": eighth,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            record = {"about": about, "summary": summary(rows), "rows": rows}
            write_whole(target, (json.dumps(record, indent=1) + "\n").encode())
    return summary(rows)


def main(arguments: list[str] | None = None) -> int:
    """0: the gate holds for every level; 1: it does not; 2: there is nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=list(LEVELS), default=list(LEVELS), help="whose bundled weights")
    parser.add_argument("--backend", default="torch", help="that runs fp8: torch, or cuda on Hopper")
    parser.add_argument("--crop", type=int, help="at most this many pixels of each side, from the middle")
    options = parser.parse_args(arguments)
    try:
        target = results_folder() / "fp8_quality.json"
        results = measure(options.folder, options.tasks, options.backend, options.crop, target)
    except MemNetError as error:
        print(error, file=sys.stderr)
        return 2
    if not results:
        print(f"no image in {options.folder}", file=sys.stderr)
        return 2
    for row in results:
        print(json.dumps(row))
    return 0 if all(row["within_gate"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())

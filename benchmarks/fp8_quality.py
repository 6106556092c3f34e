"""What precision "fp8" costs in quality:  python -m benchmarks.fp8_quality FOLDER [--sigmas 30 50] [--backend torch] [--crop N]

Restores every image of a folder (Set12 for the gate: at most 0.05 dB lost in the mean) in float32 and in fp8 with the bundled
denoising weights, and compares both with the clean image by the paper's protocol: the noise neither clipped nor rounded, nor
the result. Writes benchmarks/results/<device>/fp8_quality.json after each image; a run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.device import results_folder
from memnet_fast import create_model, degrade, fuse
from memnet_fast.errors import MemNetError
from memnet_fast.evaluation import image_files, planes, read_image
from memnet_fast.files import write_whole
from memnet_fast.metrics import psnr
from memnet_fast.tasks import TASKS

MODEL = "memnet_m6r6.denoise"
LIMIT_DB = 0.05


def clean_image(path: Path, crop: int | None) -> torch.Tensor:
    """[1, 1, H, W] in [0, 1]: one gray plane, of which a centred square of `crop` pixels at most."""
    plane = planes(read_image(path), TASKS["denoise"], "paper")[None]
    if crop is not None:
        h, w = (min(side, crop) for side in plane.shape[-2:])
        top, left = (plane.shape[-2] - h) // 2, (plane.shape[-1] - w) // 2
        plane = plane[..., top : top + h, left : left + w]
    return plane


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each sigma: how many images, mean PSNR in both precisions, mean and largest loss, and whether the gate holds."""
    result = []
    for sigma in sorted({row["sigma"] for row in rows}):
        own = [row for row in rows if row["sigma"] == sigma]
        losses = [row["psnr_fp32"] - row["psnr_fp8"] for row in own]
        result.append(
            {
                "sigma": sigma,
                "images": len(own),
                "psnr_fp32": fmean(row["psnr_fp32"] for row in own),
                "psnr_fp8": fmean(row["psnr_fp8"] for row in own),
                "mean_loss_db": fmean(losses),
                "largest_loss_db": max(losses),
                "within_gate": fmean(losses) <= LIMIT_DB,
            }
        )
    return result


def measure(folder: Path, sigmas: list[float], backend: str, crop: int | None, target: Path) -> list[dict[str, Any]]:
    """The summary; `target` holds it together with a row for each image and sigma."""
    net = create_model(MODEL)
    exact, small = fuse(net, precision="fp32"), fuse(net, backend=backend, precision="fp8")
    about = {
        "model": MODEL,
        "folder": folder.resolve().name,
        "crop": crop,
        "fp32": exact.backend,
        "fp8": small.backend,
        "torch": torch.__version__,
        "limit_db": LIMIT_DB,
    }
    stored = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    rows = stored["rows"] if stored.get("about") == about else []
    done = {(row["image"], row["sha256"], row["sigma"]) for row in rows}
    for path in image_files(folder):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for sigma in sigmas:
            if (path.name, digest, sigma) in done:
                continue
            clean = clean_image(path, crop)
            noisy = degrade.gaussian(clean, sigma, torch.Generator().manual_seed(0))
            rows.append(
                {
                    "image": path.name,
                    "sha256": digest,
                    "size": list(clean.shape[:-3:-1]),
                    "sigma": sigma,
                    "psnr_noisy": psnr(noisy, clean),
                    "psnr_fp32": psnr(exact(noisy), clean),
                    "psnr_fp8": psnr(small(noisy), clean),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            record = {"about": about, "summary": summary(rows), "rows": rows}
            write_whole(target, (json.dumps(record, indent=1) + "\n").encode())
    return summary(rows)


def main(arguments: list[str] | None = None) -> int:
    """0: the gate holds for every sigma; 1: it does not; 2: there is nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[30.0, 50.0])
    parser.add_argument("--backend", default="torch", help="that runs fp8: torch, or cuda on Hopper")
    parser.add_argument("--crop", type=int, help="at most this many pixels of each side, from the middle")
    options = parser.parse_args(arguments)
    try:
        target = results_folder() / "fp8_quality.json"
        results = measure(options.folder, options.sigmas, options.backend, options.crop, target)
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

"""A folder of mixed images beside its network alone:  python -m benchmarks.pipeline [--images 200] [--scale 1.0] [--model NAME]

Draws photographs of scikit-image in several sizes, kinds and formats, restores the folder as `memnet denoise` does, and runs
the network alone over planes of the same sizes. Goal: the folder takes at most 1.1 times as long. Both are timed in turns, so
that a machine whose speed drifts still gives a true ratio. Writes benchmarks/results/<device>/pipeline.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.device import results_folder
from memnet_fast.backends import cpu
from memnet_fast.health import cpu_model
from memnet_fast.metrics import scikit_image
from memnet_fast.restore import Restorer, images
from memnet_fast.restore.job import plan_job
from memnet_fast.restore.pipeline import run_job

# width, height, suffix, whether it has colour: sizes and kinds as they come, in a fixed mixture.
_KINDS = (
    (160, 120, ".png", True),
    (128, 128, ".png", False),
    (240, 160, ".jpg", True),
    (96, 144, ".webp", True),
    (200, 200, ".tiff", False),
    (160, 120, ".jpg", True),
    (320, 180, ".png", True),
    (64, 64, ".png", False),
)
_ROUNDS = 5


def draw(folder: Path, count: int, scale: float) -> list[Path]:
    """`count` crops of photographs with noise, in the kinds above; scale: of their sides."""
    data = scikit_image("data")
    photos = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee")]
    chance = np.random.default_rng(0)
    paths = []
    for i in range(count):
        width, height, suffix, colour = _KINDS[i % len(_KINDS)]
        photo = Image.fromarray(photos[i % len(photos)]).convert("RGB" if colour else "L")
        x, y = (int(chance.integers(0, max(1, limit - 150))) for limit in photo.size)
        view = photo.crop((x, y, x + 150, y + 150)).resize((max(1, round(width * scale)), max(1, round(height * scale))))
        pixels = np.asarray(view).astype(float)
        noisy = np.clip(pixels + chance.normal(0, 25, pixels.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{i:04}{suffix}")
        Image.fromarray(noisy).save(paths[-1])
    return paths


def network_seconds(restorer: Restorer, shapes: list[tuple[int, int]], times: list[float]) -> None:
    """Seconds of the network alone over one plane of each shape, one after the other; nothing else is done in between."""
    planes = [torch.rand(1, 1, *shape) for shape in shapes]
    start = time.perf_counter()
    for plane in planes:
        restorer.net(plane)
    times.append(time.perf_counter() - start)


def measure(folder: Path, count: int, scale: float, model: str | None) -> dict[str, Any]:
    (folder / "in").mkdir()
    paths = draw(folder / "in", count, scale)
    shapes = [images.read_image(path).pixels.shape[:2] for path in paths]
    restorer = Restorer("denoise", model=model)
    restorer.net(torch.rand(1, 1, 64, 64))  # packs the weights and starts the threads
    alone: list[float] = []
    walls, reports = [], []
    for i in range(_ROUNDS):
        network_seconds(restorer, shapes, alone)
        start = time.perf_counter()
        reports.append(run_job(plan_job([str(folder / "in")], str(folder / f"out{i}")), restorer))
        walls.append(time.perf_counter() - start)
    if any(report.count("restored") != count for report in reports):
        raise RuntimeError("a file was not restored; there is nothing to time")
    ratios = [wall / pure for wall, pure in zip(walls, alone, strict=True)]
    best = reports[ratios.index(min(ratios))]
    return {
        "cpu": cpu_model(),
        "threads": cpu.num_threads() if restorer.backend == "cpu" else torch.get_num_threads(),
        "torch": torch.__version__,
        "model": restorer.model_name,
        "backend": f"{restorer.backend}, {restorer.precision}, {restorer.algorithm}, {restorer.device}",
        "images": count,
        "megapixels": sum(h * w for h, w in shapes) / 1e6,
        "seconds_folder": walls,
        "seconds_network_alone": alone,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "stages": {
            name: {"seconds": stage.seconds, "threads": stage.threads, "megapixels_per_second": stage.rate()}
            for name, stage in best.stages.items()
        },
        "limited_by": best.limit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--scale", type=float, default=1.0, help="of the sides of all images")
    parser.add_argument("--model", help="as for memnet denoise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), options.images, options.scale, options.model)
    (results_folder() / "pipeline.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

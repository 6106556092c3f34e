"""A folder of mixed images beside its network alone:  python -m benchmarks.pipeline [--images 200] [--rounds 1] [--model NAME]

Draws photographs of scikit-image in several sizes (0.02 to 0.3 megapixels), kinds and formats, restores the folder as
`memnet denoise` does, and runs the network alone over the planes that it sees there. Goal: the folder takes at most 1.1 times
as long. The network alone has one half of the planes before the folder and the other half after it, so that a machine whose
speed drifts still gives a true ratio; `drift` says how much slower it was after. `cpu_ratio` is the same ratio of CPU time,
which other programs disturb less. Writes results/<device>/pipeline.json.
"""

from __future__ import annotations

import argparse
import json
import os
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
from memnet_fast.restore import color as colors
from memnet_fast.restore.job import plan_job
from memnet_fast.restore.pipeline import run_job

# width, height, suffix, whether it has colour: sizes and kinds as they come, in a fixed mixture, 0.07 megapixels on average.
_KINDS = (
    (160, 128, ".png", True),
    (200, 150, ".jpg", True),
    (640, 480, ".jpg", True),
    (144, 144, ".png", False),
    (256, 192, ".webp", True),
    (128, 160, ".tiff", False),
    (320, 240, ".png", True),
    (150, 200, ".png", True),
    (400, 300, ".png", True),
    (176, 120, ".jpg", False),
)


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


def network_seconds(restorer: Restorer, planes: list[np.ndarray]) -> np.ndarray:
    """Seconds by the clock and of the CPU, of the network alone over planes [1, H, W], one after the other."""
    start = _clocks()
    for plane in planes:
        restorer.net(torch.from_numpy(plane)[None])
    return _clocks() - start


def _clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def measure(folder: Path, count: int, scale: float, model: str | None, rounds: int) -> dict[str, Any]:
    """folder: an empty one."""
    (folder / "in").mkdir()
    paths = draw(folder / "in", count, scale)
    planes = [colors.planes(colors.to_unit(images.read_image(path).pixels), "y") for path in paths]
    kinds = len(_KINDS)
    halves = [[plane for i, plane in enumerate(planes) if i // kinds % 2 == half] for half in (0, 1)]  # of the same kinds
    sizes = [sum(plane.size for plane in half) / 1e6 for half in halves]
    restorer = Restorer("denoise", model=model)
    restorer.net(torch.rand(1, 1, 64, 64))  # packs the weights and starts the threads
    alone, whole, reports, drifts = [], [], [], []
    for i in range(rounds):
        before = network_seconds(restorer, halves[0])
        start = _clocks()
        reports.append(run_job(plan_job([str(folder / "in")], str(folder / f"out{i}")), restorer))
        whole.append(_clocks() - start)
        after = network_seconds(restorer, halves[1])
        alone.append(before + after)
        drifts.append(after[0] / sizes[1] / (before[0] / sizes[0]))
    if any(report.count("restored") != count for report in reports):
        raise RuntimeError("a file was not restored; there is nothing to time")
    (walls, cpu_times), (pure, pure_cpu) = np.array(whole).T, np.array(alone).T
    ratios = (walls / pure).tolist()
    middle = reports[ratios.index(statistics.median_low(ratios))]
    return {
        "cpu": cpu_model(),
        "threads": cpu.num_threads() if restorer.backend == "cpu" else torch.get_num_threads(),
        "torch": torch.__version__,
        "model": restorer.model_name,
        "backend": f"{restorer.backend}, {restorer.precision}, {restorer.algorithm}, {restorer.device}",
        "images": count,
        "megapixels": sum(sizes),
        "seconds_folder": walls.tolist(),
        "seconds_network_alone": pure.tolist(),
        "cpu_seconds_folder": cpu_times.tolist(),
        "cpu_seconds_network_alone": pure_cpu.tolist(),
        "drift": drifts,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": float(np.median(cpu_times / pure_cpu)),
        "load_average": os.getloadavg()[0],
        "stages": {
            name: {"seconds": stage.seconds, "threads": stage.threads, "megapixels_per_second": stage.rate()}
            for name, stage in middle.stages.items()
        },
        "limited_by": middle.limit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1, help="each folder between two halves of the network alone")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sides of all images")
    parser.add_argument("--model", help="as for memnet denoise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), options.images, options.scale, options.model, options.rounds)
    (results_folder() / "pipeline.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

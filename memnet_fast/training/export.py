"""Makes a weight file of a training result, with all that is known about it in the metadata:

python -m memnet_fast.training.export RESULT FILE --validation DIR --validation-name NAME --data TEXT ...
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from memnet_fast.errors import InputError
from memnet_fast.evaluation import Score, evaluate, image_files, mean
from memnet_fast.fused import FusedMemNet, fuse
from memnet_fast.tasks import TASKS, Task
from memnet_fast.training.results import load_result
from memnet_fast.weights import load_weights, save_weights


@click.command()
@click.argument("result", type=click.Path(exists=True, path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--validation", type=click.Path(exists=True, path_type=Path), required=True, help="folder of images")
@click.option("--validation-name", required=True, help="what the folder is called in tables")
@click.option("--data", required=True, help="what the network was trained on, in words")
@click.option("--hardware", required=True, help="what it was trained with, in words")
@click.option("--commit", required=True, help="of the code that trained it")
@click.option("--half", is_flag=True, help="keep convolutions in float16: half the size")
def main(
    result: Path, file: Path, validation: Path, validation_name: str, data: str, hardware: str, commit: str, half: bool
) -> None:
    """Writes FILE (safetensors). What is measured is the network as FILE holds it."""
    net, history = load_result(result)
    task = TASKS[history[-1].get("task", "denoise")]  # the first networks were made before there were other tasks
    with tempfile.TemporaryDirectory() as folder:
        stored = os.path.join(folder, "weights.safetensors")
        save_weights(net, stored, None, half)
        net = load_weights(stored)
    info = {
        "task": task.name,
        "recipe": history,
        "data": data,
        "hardware": hardware,
        "hours": round(sum(stage.get("hours", 0) for stage in history), 2),
        "seed": [stage.get("seed") for stage in history],
        "commit": commit,
        "head_weights": None if net.head_weights is None else [round(w, 4) for w in net.head_weights.tolist()],
        "protocol": "paper",
    }
    for name, table in _tables(fuse(net), validation, task).items():
        info[name] = {validation_name: table}
    save_weights(net, file, info, half)
    click.echo(json.dumps(info, indent=2))


def _tables(net: FusedMemNet, folder: Path, task: Task) -> dict[str, dict[str, float]]:
    """psnr, ssim, psnr_degraded, ssim_degraded: {level: mean over the images}."""
    tables: dict[str, dict[str, float]] = {k: {} for k in ("psnr", "ssim", "psnr_degraded", "ssim_degraded")}
    files = image_files(folder)
    if not files:
        raise InputError(f"no image in {folder}")
    for level in task.levels:
        scores = []
        for found in evaluate(files, lambda planes: net(planes[:, None])[:, 0], task, level):
            if not isinstance(found, Score):
                raise found[1]
            scores.append(found)
        average: Any = mean(scores)
        for name, table in tables.items():
            if getattr(average, name) is not None:
                table[task.label(level)] = round(getattr(average, name), 4 if "ssim" in name else 3)
    return tables


if __name__ == "__main__":
    main()

"""Makes a weight file of a training result, with all that is known about it in the metadata:

python -m memnet_fast.training.export RESULT FILE --validation DIR --validation-name NAME --data TEXT ...
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from memnet_fast.fused import fuse
from memnet_fast.tasks import TASKS
from memnet_fast.training.loop import load_gray_images, load_history, load_result, validate
from memnet_fast.weights import save_weights


@click.command()
@click.argument("result", type=click.Path(exists=True, path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--validation", type=click.Path(exists=True, path_type=Path), required=True, help="folder of PNG files")
@click.option("--validation-name", required=True, help="what the folder is called in tables")
@click.option("--data", required=True, help="what the network was trained on, in words")
@click.option("--hardware", required=True, help="what it was trained with, in words")
@click.option("--commit", required=True, help="of the code that trained it")
def main(result: Path, file: Path, validation: Path, validation_name: str, data: str, hardware: str, commit: str) -> None:
    net = load_result(result)
    history = load_history(result)
    task = TASKS[history[-1].get("task", "denoise")]  # the first networks were made before there were other tasks
    restored, degraded = validate(fuse(net), load_gray_images(validation), task)
    info = {
        "task": task.name,
        "recipe": history,
        "data": data,
        "hardware": hardware,
        "hours": round(sum(stage["hours"] for stage in history), 2),
        "commit": commit,
        "psnr": {validation_name: {label: round(value, 3) for label, value in restored.items()}},
        "psnr_degraded": {validation_name: {label: round(value, 3) for label, value in degraded.items()}},
        "head_weights": [round(w, 4) for w in net.head_weights.tolist()] if net.head_weights is not None else None,
    }
    save_weights(net, file, info)
    click.echo(json.dumps(info, indent=2))


if __name__ == "__main__":
    main()

"""Trains one stage of a blind network:  python -m memnet_fast.training --data DIR --work DIR --name NAME [...]"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import click

from memnet_fast.config import MemNetConfig
from memnet_fast.fused import fuse
from memnet_fast.reference import MemNet
from memnet_fast.tasks import TASKS
from memnet_fast.training.loop import (
    Stage,
    grow,
    load_gray_images,
    load_history,
    load_result,
    save_result,
    train_stage,
    validate,
)
from memnet_fast.training.samples import ImageSet

_D = Stage()
_LEVELS: dict[str, dict[str, object]] = {
    "denoise": {"low": 5.0, "high": 70.0},
    "deblock": {"low": 5.0, "high": 60.0},
    "sr": {"low": 0.0, "high": 0.0, "only": (2, 3, 4)},
}


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="folder of PNG files to train on")
@click.option("--validation", type=click.Path(exists=True, path_type=Path), help="folder of PNG files to measure PSNR on")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for checkpoints, logs and results")
@click.option("--name", required=True, help="of this stage")
@click.option("--init", type=click.Path(exists=True, path_type=Path), help="result of an earlier stage to start from")
@click.option("--task", "task_name", type=click.Choice(list(TASKS)), default="denoise")
@click.option("--device", default="cpu")
@click.option("--recursions", default=_D.recursions)
@click.option("--steps", default=_D.steps)
@click.option("--batch", default=_D.batch)
@click.option("--patch", default=_D.patch)
@click.option("--lr", default=_D.lr)
@click.option("--warmup", default=_D.warmup)
@click.option("--seed", default=_D.seed)
def main(
    data: Path, validation: Path | None, work: Path, name: str, init: Path | None, task_name: str, device: str, **numbers: float
) -> None:
    stage = Stage(task=task_name, **_LEVELS[task_name], **numbers)  # type: ignore[arg-type]
    work.mkdir(parents=True, exist_ok=True)
    images = ImageSet(load_gray_images(data), stage.levels, stage.patch, device)
    net, history = MemNet(MemNetConfig(num_recursions=stage.recursions)), []
    if init is not None:
        net, history = grow(load_result(init), stage.recursions), load_history(init)
    start = time.time()
    net = train_stage(net, images, stage, checkpoint=work / f"{name}.checkpoint", log=work / f"{name}.jsonl", device=device)
    record = {"name": name, **dataclasses.asdict(stage), "device": device, "images": len(images)}
    record["hours"] = round((time.time() - start) / 3600, 3)
    if validation is not None:
        # The fused network is the faster one, and it is the one that users run.
        record["psnr"], record["psnr_degraded"] = validate(fuse(net), load_gray_images(validation), TASKS[task_name])
    save_result(net, [*history, record], work / f"{name}.result")
    click.echo(json.dumps(record))


if __name__ == "__main__":
    main()

"""One step of a training with frozen batch statistics, in as many processes as torchrun says.

python two_processes.py same|different FOLDER OUTPUT: writes the step of every parameter; "different" gives each process its
own images.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import lightning
import torch

from memnet_fast.reference import MemNet
from memnet_fast.training import run
from memnet_fast.training.module import StageModule
from support.recipes import images, recipe


class _Frozen(StageModule):
    def on_train_start(self) -> None:
        super().on_train_start()
        self.net.eval()


def main(kind: str, folder: Path, output: Path) -> None:
    loaded = recipe(folder, training__batch=4)
    still = {"clip": 0.0, "steps": 1, "warmup": 0, "lr": 1.0, "weight_decay": 0.0, "ema": 0.0}
    stage = dataclasses.replace(loaded.stages[0], optimizer="sgd", **still)
    loaded = dataclasses.replace(loaded, stages=(stage,))
    torch.manual_seed(0)
    module = _Frozen(MemNet(dataclasses.replace(loaded.network, num_recursions=1)), loaded, 0, images(), lambda m: None)
    world = int(os.environ.get("WORLD_SIZE", 1))
    mine = images() if kind == "same" else images()[: 1 + int(os.environ.get("RANK", 0))]
    started = run._Run(loaded, folder / "run", mine, [], run.Hardware("cpu", world), run._Stopping(None))
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[run._Watch(started)],
    )
    trainer.fit(module)
    if trainer.global_rank == 0:
        step = {name: before[name] - p.detach() for name, p in module.net.named_parameters()}
        torch.save({"world": trainer.world_size, "step": step}, output)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

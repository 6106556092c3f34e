"""One step of a training with fixed statistics, shared by two processes: python two_processes.py FOLDER, with
LOCAL_RANK and MASTER_PORT in the environment. Writes `step` (of every parameter) and, of trainings in which each process has
its own images, recipe or step, `refused` (what they were told, in lines).
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from pathlib import Path

import lightning
import torch
from torch import Tensor

from memnet_fast.errors import InputError
from memnet_fast.reference import MemNet
from memnet_fast.training import run
from memnet_fast.training.module import StageModule
from support.recipes import images, recipe


def one_step(folder: Path, world: int, count: int = 2, seed: int = 0, begin: int = 0) -> dict[str, Tensor]:
    """What one step of SGD with a rate of 1 subtracts from each parameter. count: of the images. begin: steps before it."""
    loaded = recipe(folder, training__batch=4, seed=seed)
    still = {"clip": 0.0, "steps": 1, "warmup": 0, "lr": 1.0, "weight_decay": 0.0, "ema": 0.0}
    stage = dataclasses.replace(loaded.stages[0], optimizer="sgd", statistics="fixed", **still)
    loaded = dataclasses.replace(loaded, stages=(stage,), init="the network below")
    mine = images()[:count]
    torch.manual_seed(0)
    module = StageModule(MemNet(dataclasses.replace(loaded.network, num_recursions=1)), loaded, 0, mine, lambda m: None)
    started = run._Run(loaded, folder / "run", mine, [], run.Hardware("cpu", world), run._Stopping(None), threading.Event())
    module.step = begin
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[run._Watch(started)],
    )
    trainer.fit(module)
    assert trainer.world_size == world and module.step == begin + 1
    return {name: before[name] - p.detach() for name, p in module.net.named_parameters()}


def main(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    step = one_step(folder, 2)
    if rank == 0:
        torch.save(step, folder / "step")
    refused = []
    for own in ({"count": 1 + rank}, {"seed": rank}, {"begin": rank}):
        try:
            one_step(folder, 2, **own)
        except InputError as error:
            refused.append(str(error))
    if rank == 0:
        (folder / "refused").write_text("\n".join(refused))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

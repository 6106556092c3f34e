"""The three restoration tasks, as training and evaluation see them: levels, how an image is degraded, how it is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from memnet_fast import degrade
from memnet_fast.errors import InputError
from memnet_fast.metrics import Protocol

TaskName = Literal["denoise", "deblock", "sr"]


@dataclass(frozen=True)
class Task:
    """levels: those that are measured. unit: what a level is called, with its number."""

    name: TaskName
    levels: tuple[float, ...]
    unit: str

    def label(self, level: float) -> str:
        """'sigma 30', 'Q 10', 'x2'"""
        return self.unit.format(level)

    def check(self, level: float) -> None:
        """Raises InputError for a level that does not exist."""
        if self.name == "denoise":
            if not 0 <= level <= 255:
                raise InputError(f"the level of denoise is a standard deviation of 0..255 grey levels, got {level:g}")
        elif self.name == "deblock":
            if not 1 <= level <= 100 or level != int(level):
                raise InputError(f"the level of deblock is a whole number of 1..100 (JPEG quality), got {level:g}")
        elif level not in (2, 3, 4):
            raise InputError(f"the level of sr is a scale of 2, 3 or 4, got {level:g}")

    def clean(self, image: Tensor, level: float) -> Tensor:
        """The part of an image [..., H, W] that takes part: all of it, but for sr the sides are cropped to multiples."""
        return degrade.modcrop(image, int(level)) if self.name == "sr" else image

    def degrade(self, clean: Tensor, level: float, generator: torch.Generator | None = None) -> Tensor:
        """clean: [..., H, W] float in [0, 1] -> what the network is given, same shape. generator: of noise."""
        if self.name == "denoise":
            return degrade.gaussian(clean, level, generator)
        if self.name == "deblock":
            return degrade.jpeg(clean, int(level))
        return degrade.bicubic(clean, int(level))

    def protocol(self, level: float) -> Protocol:
        """The paper's."""
        return Protocol.paper(self.name, int(level) if self.name == "sr" else None)


TASKS: dict[str, Task] = {
    "denoise": Task("denoise", (15, 25, 30, 50, 70), "sigma {:g}"),
    "deblock": Task("deblock", (10, 20, 30, 40), "Q {:g}"),
    "sr": Task("sr", (2, 3, 4), "x{:g}"),
}
assert set(TASKS) == set(get_args(TaskName))


def task(name: str) -> Task:
    """Raises InputError for an unknown name."""
    if name not in TASKS:
        raise InputError(f"unknown task '{name}'; choose from {', '.join(TASKS)}")
    return TASKS[name]

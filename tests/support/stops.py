"""Trainings that end after a number of steps, and ones that have not begun."""

from __future__ import annotations

import threading
from pathlib import Path

from memnet_fast.training import run
from memnet_fast.training.recipe import Recipe
from support.recipes import images


class StopAt(run._Stopping):
    """Due after a number of steps, as the deadline is after a number of minutes."""

    left = 0

    @property
    def due(self) -> bool:
        type(self).left -= 1
        return self.left <= 0


def new_run(recipe: Recipe, output: Path) -> run._Run:
    """A run on the small images, without validation, on the CPU."""
    return run._Run(recipe, output, images(), [], run.Hardware("cpu"), run._Stopping(None), threading.Event())

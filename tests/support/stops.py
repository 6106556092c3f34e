"""Ends trainings after a number of steps."""

from __future__ import annotations

from memnet_fast.training import run


class StopAt(run._Stopping):
    """Due after a number of steps, as the deadline is after a number of minutes."""

    left = 0

    @property
    def due(self) -> bool:
        type(self).left -= 1
        return self.left <= 0

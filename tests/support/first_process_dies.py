"""`memnet train` on two devices whose first process is killed when it has started the other: python first_process_dies.py
RECIPE, which Lightning calls again for the other."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from memnet_fast import cli

_setup = DDPStrategy.setup_environment


def _dying(self: DDPStrategy, *arguments: Any) -> None:
    if os.environ["LOCAL_RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    _setup(self, *arguments)


DDPStrategy.setup_environment = _dying  # type: ignore[method-assign]
cli.main(["train", sys.argv[1], "--accelerator", "cpu", "--devices", "2"])

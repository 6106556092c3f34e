"""Restoring real images: colour, files, tiling, and jobs over many files.

Names are loaded at first use: a process that only decodes images must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["Restored", "Restorer", "jpeg_quality"]
_MODULES = {"Restored": "restorer", "Restorer": "restorer", "jpeg_quality": "images"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"memnet_fast.restore.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if TYPE_CHECKING:
    from memnet_fast.restore.images import jpeg_quality
    from memnet_fast.restore.restorer import Restored, Restorer

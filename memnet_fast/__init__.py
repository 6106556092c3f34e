"""memnet_fast: MemNet (ICCV 2017) for image restoration, fused, and tested against a plain PyTorch reference.

    import memnet_fast as mf
    net  = mf.create_model("memnet_m6r6.denoise")     # the reference, a plain nn.Module
    fast = mf.fuse(net)                               # the same function, fused
    out  = mf.Restorer("denoise")(image)              # PIL image, array or tensor -> the same kind

Names are loaded at first use, so that `memnet --help` does not wait for torch. A program that loads an exported network
without touching any of them imports `memnet_fast.ops` first, which registers the operator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "config": ("MemNetConfig",),
    "health": ("doctor",),
    "errors": (
        "MemNetError",
        "InputError",
        "CheckpointError",
        "CheckpointCorrupt",
        "CheckpointMismatch",
        "CheckpointUnsafe",
        "CheckpointTooLarge",
        "ImageError",
        "ImageCorrupt",
        "ImageUnsupported",
        "ImageTooLarge",
        "OutputError",
        "ProcessLost",
        "NumericError",
        "DeviceOOM",
        "BackendUnavailable",
        "MissingExtra",
    ),
    "fused": ("FusedMemNet", "fuse"),
    "models": ("create_model", "list_models"),
    "reference": ("MemNet",),
    "restore": ("Restorer",),
    "weights": ("load_weights", "save_weights"),
}
_MODULES = ("degrade", "metrics")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME_OF, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from memnet_fast import degrade, metrics
    from memnet_fast.config import MemNetConfig
    from memnet_fast.errors import (
        BackendUnavailable,
        CheckpointCorrupt,
        CheckpointError,
        CheckpointMismatch,
        CheckpointTooLarge,
        CheckpointUnsafe,
        DeviceOOM,
        ImageCorrupt,
        ImageError,
        ImageTooLarge,
        ImageUnsupported,
        InputError,
        MemNetError,
        MissingExtra,
        NumericError,
        OutputError,
        ProcessLost,
    )
    from memnet_fast.fused import FusedMemNet, fuse
    from memnet_fast.health import doctor
    from memnet_fast.models import create_model, list_models
    from memnet_fast.reference import MemNet
    from memnet_fast.restore import Restorer
    from memnet_fast.weights import load_weights, save_weights

"""`create_model` and `list_models`: presets by name, and the bundled weights behind the dot."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from memnet_fast import weights
from memnet_fast.config import PRESETS, MemNetConfig
from memnet_fast.errors import InputError
from memnet_fast.reference import MemNet


def list_models(pretrained: bool = False) -> list[str]:
    """Names that create_model takes; pretrained: only those with bundled weights."""
    names = list(weights.bundled())
    return sorted(names if pretrained else [*PRESETS, *names])


def create_model(name: str, pretrained: bool | None = None, **config: Any) -> MemNet:
    """A reference MemNet (a plain nn.Module), float32, on the CPU, in eval mode.

    name: a preset ("memnet_m6r6"), or a preset and a task ("memnet_m6r6.denoise"), which loads the bundled weights.
    pretrained: False leaves the weights random; True insists on weights. None: as the name says.
    config: any field of MemNetConfig, to differ from the preset (then there are no weights to load).
    Raises InputError for unknown names and fields, and for weights that do not exist.
    """
    preset, _, task = name.partition(".")
    files = weights.bundled()
    if preset not in PRESETS or (task and name not in files):
        near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.3)
        raise InputError(f"unknown model '{name}'; " + (f"did you mean {', '.join(near)}?" if near else "see list_models()"))
    if pretrained is None:
        pretrained = bool(task)
    if not pretrained:
        values = {**dataclasses.asdict(PRESETS[preset]), **config}
        return MemNet(MemNetConfig.from_dict(values)).eval()
    if not task:
        tasks = [n for n in files if n.startswith(f"{preset}.")]
        raise InputError(
            f"'{name}' has no weights of its own; " + (f"choose {', '.join(tasks)}" if tasks else "none exist yet")
        )
    if config:
        raise InputError(f"the weights of '{name}' fix its configuration; {', '.join(config)} cannot be changed")
    return weights.load_weights(files[name])

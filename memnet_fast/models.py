"""`create_model` and `list_models`: presets by name, and the bundled weights behind the dot."""

from __future__ import annotations

import dataclasses
import difflib
import os
from typing import Any

from memnet_fast import weights
from memnet_fast.config import PRESETS, MemNetConfig
from memnet_fast.errors import CheckpointMismatch, InputError
from memnet_fast.reference import MemNet

# Fields that names and shapes of tensors do not tell: a file may differ in them from the port it looks like.
_NOT_IN_TENSORS = ("gate_order", "clamp")


def list_models(pretrained: bool = False) -> list[str]:
    """Names that create_model takes; pretrained: only those with bundled weights."""
    names = list(weights.bundled())
    return sorted(names if pretrained else [*PRESETS, *names])


def create_model(
    name: str | None = None,
    pretrained: bool | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    **config: Any,
) -> MemNet:
    """A reference MemNet (a plain nn.Module), float32, on the CPU, in eval mode.

    name: a preset ("memnet_m6r6"), or a preset and a task ("memnet_m6r6.denoise"), which loads the bundled weights.
    pretrained: False leaves the weights random; True insists on weights. None: as the name says.
    checkpoint: a weight file of any format that load_weights opens; it says the configuration, and a name is not needed.
        With a name, the file must hold that preset.
    config: any field of MemNetConfig, to differ from the preset (then there are no weights to load). With a checkpoint: what
        its tensors do not tell (gate_order, clamp), where the file is known to differ from the port it looks like.
    Raises InputError for unknown names and fields, and for weights that do not exist; with a checkpoint CheckpointMismatch,
    which lists the fields that differ, and the errors of load_weights.
    """
    if checkpoint is not None:
        return _from_checkpoint(name, pretrained, checkpoint, config)
    if name is None:
        raise InputError("create_model needs the name of a model or a checkpoint; see list_models()")
    preset, _, task = name.partition(".")
    files = weights.bundled()
    if preset not in PRESETS or (task and name not in files):
        near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.3)
        raise InputError(f"unknown model '{name}'; " + (f"did you mean {', '.join(near)}?" if near else "see list_models()"))
    if pretrained is None:
        pretrained = bool(task)
    if not pretrained:
        values = {**dataclasses.asdict(PRESETS[preset]), **config}
        return MemNet.on_cpu(MemNetConfig.from_dict(values)).eval()
    if not task:
        tasks = [n for n in files if n.startswith(f"{preset}.")]
        raise InputError(
            f"'{name}' has no weights of its own; " + (f"choose {', '.join(tasks)}" if tasks else "none exist yet")
        )
    if config:
        raise InputError(f"the weights of '{name}' fix its configuration; {', '.join(config)} cannot be changed")
    return weights.load_weights(files[name])


def _from_checkpoint(
    name: str | None, pretrained: bool | None, checkpoint: str | os.PathLike[str], config: dict[str, Any]
) -> MemNet:
    if pretrained is False:
        raise InputError("pretrained=False and a checkpoint exclude each other")
    if name is not None and name not in PRESETS:
        raise InputError(f"with a checkpoint the name must be a preset ({', '.join(PRESETS)}) or absent, not '{name}'")
    net = weights.load_weights(checkpoint)
    found = net.config
    wanted = MemNetConfig.from_dict({**dataclasses.asdict(found if name is None else PRESETS[name]), **config})
    free = [f for f in _NOT_IN_TENSORS if f in config]
    differences = [
        f"{field}={value!r}, not {getattr(wanted, field)!r}"
        for field, value in found.to_dict().items()
        if field not in free and getattr(wanted, field) != value
    ]
    if differences:
        raise CheckpointMismatch(f"{os.fspath(checkpoint)} holds a network with {'; '.join(differences)}")
    if wanted == found:
        return net
    changed = MemNet.on_cpu(wanted)
    changed.load_state_dict(net.state_dict())
    return changed.eval()

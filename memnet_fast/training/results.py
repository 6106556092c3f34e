"""What a training leaves behind: the network and the story of how it came about; and how a network grows."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointCorrupt, CheckpointError, InputError
from memnet_fast.files import write_whole
from memnet_fast.reference import MemNet
from memnet_fast.weights import load_any
from memnet_fast.weights.source import read_file

_MAX_BYTES = 1 << 34


def read_state(path: str | os.PathLike[str], keys: tuple[str, ...]) -> dict[str, Any]:
    """A file of `write_state`, on the CPU; nothing in it is run.

    Raises InputError (no such file, or not a regular one), CheckpointTooLarge, and CheckpointCorrupt, also for one wrong bit.
    """
    if not os.path.exists(path):
        raise InputError(f"there is no file {path}")
    file = io.BytesIO(read_file(Path(path), _MAX_BYTES))
    try:
        # torch.save writes a checksum of every tensor, which torch.load does not look at.
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise CheckpointCorrupt(f"{path} is damaged: {damaged} has another checksum")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # both raise whatever their parts raise
        raise CheckpointCorrupt(f"{path} cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from error
    missing = [key for key in keys if not isinstance(state, dict) or key not in state]
    if missing:
        raise CheckpointCorrupt(f"{path} is no file of a training: it lacks {', '.join(missing)}")
    return state


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, texts and containers of them; the file appears whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def save_result(net: MemNet, history: list[dict[str, Any]], path: Path) -> None:
    """history: one record for each stage, oldest first, of JSON values."""
    write_state(path, {"config": net.config.to_dict(), "net": net.state_dict(), "history": json.dumps(history)})


def load_result(path: str | os.PathLike[str]) -> tuple[MemNet, list[dict[str, Any]]]:
    """The network of a result, in eval mode, and its history; or those of any weight file (then from its metadata).

    Raises CheckpointCorrupt and the other errors of `load_weights`.
    """
    if os.fspath(path).endswith((".safetensors", ".caffemodel", ".params", ".pth", ".pt", ".tar")):
        loaded = load_any(path, False)
        history = loaded.info.get("recipe") or [{"name": Path(path).name, "sha256": loaded.sha256}]
        return loaded.net, history if isinstance(history, list) else [history]
    state = read_state(path, ("config", "net", "history"))
    net = MemNet(MemNetConfig.from_dict(state["config"]))
    net.load_state_dict(state["net"])
    return net.eval(), json.loads(state["history"])


@torch.no_grad()
def grow(net: MemNet, recursions: int) -> MemNet:
    """A MemNet with more recursions that computes, until it is trained, what `net` computes.

    The convolutions are shared over the recursions; the new batch normalisations start as copies of the last, and the gates
    read the new short-term memories with zero weights. Raises InputError for other networks, and for fewer recursions.
    """
    old = net.config
    if recursions == old.num_recursions:
        return net
    if old.sharing != "conv" or recursions < old.num_recursions:
        raise InputError("only a network with shared convolutions grows, and only to more recursions")
    new = MemNet(dataclasses.replace(old, num_recursions=recursions))
    source, target = net.state_dict(), new.state_dict()
    short, more, c = old.num_recursions * old.channels, recursions * old.channels, old.channels
    for name, value in target.items():
        parts = name.split(".")
        if ".gate." in name and value.ndim > 0 and name != f"blocks.{parts[1]}.gate.conv.bias":
            # The gate of block m reads m + 1 long-term and R short-term memories, in the configured order.
            long = (int(parts[1]) + 1) * c
            if old.gate_order == "long_short":
                kept = torch.arange(long + short)
            else:
                kept = torch.cat([torch.arange(short), more + torch.arange(long)])
            if name.endswith("conv.weight"):
                value.zero_()
                value[:, kept] = source[name]
            else:
                value[kept] = source[name]
        elif ".bn_" in name:
            parts[3] = str(min(int(parts[3]), old.num_recursions - 1))
            value.copy_(source[".".join(parts)])
        else:
            value.copy_(source[name])
    return new

"""What takes long to make and is always the same for one network, kept in a folder from run to run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from memnet_fast import __version__, reference
from memnet_fast.files import make_folder, write_whole
from memnet_fast.reference import MemNet
from memnet_fast.weights import digest


class Kept:
    """folder: None keeps nothing. What another network, other versions or other sources would make is another thing."""

    def __init__(self, folder: Path | None, net: MemNet) -> None:
        self._folder = folder
        tensors = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
        self._about = [digest(tensors), net.config.to_dict(), torch.__version__, __version__]

    def get(self, name: str, sources: Sequence[ModuleType], make: Callable[[], bytes]) -> bytes:
        """What make() gives, or gave before. sources: modules that decide about it, beside the reference."""
        if self._folder is None:
            return make()
        seen = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode())
        for module in (reference, *sources):
            assert module.__file__ is not None
            seen.update(Path(module.__file__).read_bytes())
        path = self._folder / f"{name}-{seen.hexdigest()[:32]}"
        if path.exists():
            return path.read_bytes()
        data = make()
        make_folder(self._folder)
        write_whole(path, data)
        return data

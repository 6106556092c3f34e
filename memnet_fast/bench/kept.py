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

    def find(self, name: str, sources: Sequence[ModuleType]) -> bytes | None:
        """What was kept, if it was. sources: modules that decide about it, beside the reference."""
        path = self._path(name, sources)
        return path.read_bytes() if path is not None and path.exists() else None

    def keep(self, name: str, sources: Sequence[ModuleType], data: bytes) -> None:
        path = self._path(name, sources)
        if path is not None:
            make_folder(path.parent)
            write_whole(path, data)

    def get(self, name: str, sources: Sequence[ModuleType], make: Callable[[], bytes]) -> bytes:
        """What make() gives, or gave before."""
        data = self.find(name, sources)
        if data is None:
            data = make()
            self.keep(name, sources, data)
        return data

    def _path(self, name: str, sources: Sequence[ModuleType]) -> Path | None:
        if self._folder is None:
            return None
        seen = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode())
        for module in (reference, *sources):
            assert module.__file__ is not None
            seen.update(Path(module.__file__).read_bytes())
        return self._folder / f"{name}-{seen.hexdigest()[:32]}"

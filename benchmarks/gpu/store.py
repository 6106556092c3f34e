"""Files of results: one JSON object {"about": ..., "rows": [...]}, rewritten whole whenever rows are added."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memnet_fast.files import write_whole


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())


def add(path: Path, about: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows. `about` is kept from the first time: one file is one machine and one build."""
    data = read(path) or {"about": about, "rows": []}
    data["rows"] += rows
    write(path, data)

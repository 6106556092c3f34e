"""Memory and speed of everything but the network, on large images:  python -m benchmarks.large_image [SIDE CHANNELS FORMAT]

Each image is made, decoded, restored, encoded and written in a process of its own. In the place of MemNet M6R6 stands a network
that asks for the same workspace, writes to all of it and gives its input back; so the peak is that of a real job, after seconds
instead of hours. Writes benchmarks/results/<device>/large_image.json, one row for each image: megapixels of the result per
CPU second (so that a busy machine does not matter much), bytes of the decoded image, and the peak of the process above them.
Without arguments: 20,000 x 20,000 in gray as PNG and TIFF, and a colour photograph of 144 megapixels as JPEG.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.device import results_folder
from memnet_fast.fused import FusedMemNet
from memnet_fast.models import create_model
from memnet_fast.restore import Restorer, images

_ROWS = ((20_000, 1, "png"), (20_000, 1, "tif"), (12_000, 3, "jpg"))


class _Idle(FusedMemNet):
    """Takes the memory of a network, and no time."""

    workspace: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.workspace_bytes(x.shape[0], *x.shape[2:])
        if self.workspace is None or self.workspace.numel() < size:
            self.workspace = None
            self.workspace = torch.empty(size, dtype=torch.uint8).fill_(1)
        return x.clone()

    def release_workspace(self) -> None:
        self.workspace = None
        super().release_workspace()


def _make(path: Path, side: int, channels: int) -> None:
    """Blocks with a little noise: neither flat nor incompressible."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 240, (-(-side // 8), -(-side // 8), channels), np.uint8)
    pixels = pixels.repeat(8, 0).repeat(8, 1)[:side, :side]
    pixels = pixels + random.integers(0, 8, (side, channels), np.uint8)
    images.write_image(path, pixels, images.EXTENSIONS[path.suffix], images.Encoding(png_level=1))


def _peak() -> int:
    """Bytes that this process has held at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(path: Path) -> dict[str, Any]:
    restorer = Restorer(model=_Idle(create_model("memnet_m6r6")))
    start = time.process_time()
    source = images.read_image(path)
    decoded = time.process_time()
    done = restorer.restore(source.pixels)
    restored = time.process_time()
    images.write_image(path.with_stem("result"), done.image, source.format, images.Encoding(png_level=1), source.metadata)
    end = time.process_time()
    h, w, channels = source.pixels.shape
    rates = {"decode": decoded - start, "tiles_and_colour": restored - decoded, "encode_and_write": end - restored}
    return {
        "size": [w, h],
        "channels": channels,
        "format": source.format,
        **{f"{name}_mp_per_cpu_s": round(h * w / 1e6 / seconds, 2) for name, seconds in rates.items()},
        "tile": list(done.tiled.tile[::-1]),
        "windows": done.tiled.windows,
        "decoded_bytes": source.pixels.nbytes,
        "peak_above_decoded_bytes": _peak() - source.pixels.nbytes,
    }


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--measure"]:
        print(json.dumps(measure(Path(arguments[1]))))
        return 0
    given = [(int(arguments[0]), int(arguments[1]), arguments[2])] if arguments else list(_ROWS)
    rows = []
    for side, channels, extension in given:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"image.{extension}"
            _make(path, side, channels)
            command = [sys.executable, "-m", "benchmarks.large_image", "--measure", str(path)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(json.dumps(rows[-1]), flush=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    (results_folder() / "large_image.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

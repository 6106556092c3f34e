"""The files that variants read: the weights, and for engines that cannot read those the network in their own format.

An ONNX file takes long, on one CPU: a process of its own makes it (this file, as a script: FOLDER) while the truth is computed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from memnet_fast.bench.kept import Kept
from memnet_fast.bench.peers import Variant
from memnet_fast.bench.process import import_path
from memnet_fast.reference import MemNet
from memnet_fast.weights import load_weights, save_weights

_WEIGHTS, _ONNX = "weights.safetensors", "model.onnx"


class Preparation:
    """Begins with everything that the variants read in a folder; finish() waits for it.

    cache: a folder that keeps the ONNX file from run to run.
    """

    def __init__(self, net: MemNet, folder: Path, variants: Sequence[Variant], cache: Path | None = None) -> None:
        self._folder, self._kept = folder, Kept(cache, net)
        self._failed: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        kinds = {kind for v in variants if not v.missing() for kind in v.files}
        save_weights(net, folder / _WEIGHTS)
        if "onnx" in kinds:
            self._begin_onnx()
        if "ncnn" in kinds:
            try:
                _write_ncnn(net, folder)
            except Exception as error:  # the other engines do not need it
                self._fail("ncnn", f"{type(error).__name__}: {error}")

    def _begin_onnx(self) -> None:
        from memnet_fast import export

        self._sources = [export]
        data = self._kept.find("onnx", self._sources)
        if data is not None:
            (self._folder / _ONNX).write_bytes(data)
            return
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by close()
        env = {**os.environ, "PYTHONPATH": import_path(), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", __file__, str(self._folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=env)

    def _fail(self, kind: str, reason: str) -> None:
        self._failed[kind] = f"the {kind} file could not be made: {' '.join(reason.split())}"[:300]

    def finish(self) -> dict[str, str]:
        """Waits for what is still being made. Returns why files could not be made, by kind."""
        if self._process is not None:
            code = self._process.wait()
            self._log.seek(0)
            said = self._log.read().strip().splitlines()
            if code:
                self._fail("onnx", said[-1] if said else f"its process ended with {code}")
            else:
                self._kept.keep("onnx", self._sources, (self._folder / _ONNX).read_bytes())
            self.close()
        return self._failed

    def close(self) -> None:
        """Ends what is still being made."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._log.close()
            self._process = None

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _write_ncnn(net: MemNet, folder: Path) -> None:
    from memnet_fast.bench.ncnn_model import write
    from memnet_fast.plan import lower

    text, data = write(lower(net))
    (folder / "model.param").write_text(text)
    (folder / "model.bin").write_bytes(data)


def main() -> None:
    from memnet_fast import export

    folder = Path(sys.argv[1])
    export.export_onnx(load_weights(folder / _WEIGHTS), folder / _ONNX)


if __name__ == "__main__":
    main()

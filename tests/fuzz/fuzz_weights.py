"""Coverage-guided fuzzing of the readers of weight files, with atheris:

python tests/fuzz/fuzz_weights.py READER [CORPUS ...] [-max_total_time=60 and other options of libFuzzer]

READER: one of READERS. An input may be refused with a CheckpointError or be a network; everything else is a crash. New inputs
go into the first CORPUS folder; tests/fuzz/corpus/READER holds the known ones.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

READERS = ("pickle", "zip", "legacy", "tar", "caffemodel", "mxnet", "symbol", "safetensors")


class _Right:
    """A checksum that equals every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """No random change would come past a CRC-32 or a digest, and what lies behind them would never be tried."""
    from memnet_fast import weights
    from memnet_fast.weights import archives

    with (
        mock.patch.object(archives.zlib, "crc32", lambda data: _Right()),
        mock.patch.object(weights, "digest", lambda tensors: _Right()),
        mock.patch.object(weights, "_metadata_digest", lambda metadata: _Right()),
    ):
        yield


def one_input(reader: str) -> Callable[[bytes], None]:
    """What a fuzzer, or a test, calls with an input."""
    from memnet_fast.errors import CheckpointError
    from memnet_fast.weights import _own_contents, caffe, mxnet, pickles, ports, torch_file
    from memnet_fast.weights.fitting import Contents, build

    # The symbol of the network of one block and one recursion, with which arrays are read.
    symbol = mxnet.read_symbol(bytearray((Path(__file__).parent / "M1R1-symbol.json").read_bytes()), "M1R1-symbol.json")

    def read(data: bytearray) -> Contents | None:
        if reader == "caffemodel":
            return caffe.read(data)
        if reader == "mxnet":
            return mxnet.read(data, symbol)
        if reader == "symbol":
            mxnet.read_symbol(data, "symbol.json")
            return None
        if reader == "safetensors":
            return _own_contents(data)[0]
        if reader == "pickle":
            torch_file._find(pickles.Machine(data, 0, lambda saved: saved, pickles.Budget()).run(), [], set())
            return None
        return ports.read(*torch_file.read(data, reader))

    def run(data: bytes) -> None:
        try:
            contents = read(bytearray(data))
            if contents is not None:
                build(contents, len(data), allow_nonfinite=False)
        except CheckpointError:
            pass

    return run


def main() -> None:
    import atheris
    import torch  # noqa: F401  (before the instrumentation, which would take minutes for all of it)

    with atheris.instrument_imports(include=["memnet_fast.weights"]):
        import memnet_fast.weights  # noqa: F401
    run = one_input(sys.argv[1])
    with without_checksums():
        atheris.Setup([sys.argv[0], *sys.argv[2:]], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

"""The readers against the inputs that fuzzing has kept, and a short run of the fuzzer itself where atheris is installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.fuzz_weights import READERS, one_input, without_checksums

FOLDER = Path(__file__).parent / "fuzz"
# A minute for all of them.
SECONDS = 60 / len(READERS)


@pytest.mark.parametrize("reader", READERS)
def test_corpus(reader):
    files = sorted((FOLDER / "corpus" / reader).iterdir())
    assert len(files) >= 5
    run = one_input(reader)
    for path in files:
        run(path.read_bytes())
        with without_checksums():
            run(path.read_bytes())


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
@pytest.mark.parametrize("reader", READERS)
def test_fuzzing(reader, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(FOLDER / "corpus" / reader, corpus)
    command = [sys.executable, str(FOLDER / "fuzz_weights.py"), reader, str(corpus)]
    options = [f"-max_total_time={SECONDS:.0f}", "-timeout=25", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]

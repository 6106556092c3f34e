"""Decoding in child processes: the same images and errors, and a crash that costs one file (row I36)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.crashing import crashing
from support.restoring import picture, small_net

from memnet_fast.errors import ImageCorrupt, ImageTooLarge
from memnet_fast.restore import Restorer, images, isolation, pipeline
from memnet_fast.restore.isolation import Decoders, Reading
from memnet_fast.restore.job import plan_job


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for i in range(5):
        Image.fromarray(picture((12, 13, 3), seed=i)).save(f"in/{i}.png", dpi=(72, 72))
    return tmp_path


def test_images_and_errors_are_those_of_this_process(here):
    with Decoders(True) as there, Decoders(False) as this:
        for name in ("0.png", "1.png"):
            path = Path("in", name)
            with open(path, "rb") as file:
                one, two = there.decode(path, file, Reading()), this.decode(path, file, Reading())
            assert np.array_equal(one.pixels, two.pixels) and one.metadata == two.metadata and one.format == two.format
        Path("in/0.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
        for decoders in (there, this):
            with open("in/0.png", "rb") as file, pytest.raises(ImageCorrupt, match="in/0.png"):
                decoders.decode(Path("in/0.png"), file, Reading())
            with open("in/1.png", "rb") as file, pytest.raises(ImageTooLarge):
                decoders.decode(Path("in/1.png"), file, Reading(max_pixels=10))
        (child,) = there._children
        assert child.alive()
    assert not child.alive(), "no process stays"


def test_a_decoder_does_not_wait_for_torch():
    code = "import sys, memnet_fast.restore.isolation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_crash_of_the_decoder_costs_one_file(here, monkeypatch):
    monkeypatch.setattr(isolation, "serve", crashing)
    restorer = Restorer(model=small_net())
    report = pipeline.run_job(plan_job(["in"], "out"), restorer, isolate=True, threads=pipeline.Threads(1, 1, 1))
    by_name = {r.item.source.name: r for r in report.results}
    assert report.count("restored") == 3 and report.count("failed") == 2
    assert str(by_name["2.png"].error) == "in/2.png: the decoder was killed by SIGSEGV"
    assert str(by_name["3.png"].error) == "in/3.png: the decoder ended with code 7"
    for name in ("0.png", "1.png", "4.png"):
        expected = restorer(images.read_image(f"in/{name}").pixels)
        assert np.array_equal(images.read_image(f"out/{name}").pixels, expected)

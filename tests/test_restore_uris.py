"""URIs with secrets in them: neither messages nor logs repeat those."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import pytest
from PIL import Image
from support.restoring import picture

from memnet_fast.cli import main
from memnet_fast.errors import InputError
from memnet_fast.restore.job import plan_job
from memnet_fast.restore.uris import masked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/in/a.png", "s3://bucket/in/a.png"),
        ("s3://bucket/in/a@2x.png", "s3://bucket/in/a@2x.png"),
        ("s3://bucket/in?region=x&sig=a@b:c", "s3://bucket/in?***"),
        ("s3://bucket?", "s3://bucket?***"),
        ("s3://key@bucket/in", "s3://***@bucket/in"),
        ("s3://key:hidden@bucket/in?x=1", "s3://***@bucket/in?***"),
        ("s3://key:hid/den@bucket/in", "s3://***@bucket/in"),
        ("s3://key:hid?den@bucket/in", "s3://***@bucket/in"),
        ("s3://key:hid#den@bucket/in", "s3://***@bucket/in"),
        ("s3://key:hid@d/en@bucket/in", "s3://***@bucket/in"),
        ("s3://ke/y:hidden@bucket/in", "s3://***@bucket/in"),
        ("s3://key:hidden@[bucket/in", "s3://***@[bucket/in"),
        ("file:///in/a b.png", "file:///in/a b.png"),
        ("in/a@2x.png", "in/a@2x.png"),
        ("what?.png", "what?.png"),
        ("://", "://"),
        ("", ""),
    ],
)
def test_masked(text, expected):
    assert masked(text) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:XY/ZZY@bucket/in",
        "s3://key:XY?ZZY@bucket/in",
        "s3://key:XYZZY@[bucket/in",
        "s3://key:XY]ZZY@bucket",
        "s3://key:XY\nZZY@bucket",
        "https://host/in?X-Amz-Signature=XYZZY",
        "s3://bucket/in?secret=a%zXYZZY",
        "bogus://key:XY ZZY@host/in",
    ],
)
def test_a_storage_that_cannot_be_opened(uri):
    storage = pytest.importorskip("memnet_fast.restore.storage")
    pytest.importorskip("pyarrow")
    for inputs, output in (([uri], "file:///out"), (["file:///in"], uri)):
        with pytest.raises(InputError) as caught:
            storage.plan_uris(inputs, output)
        told = "".join(traceback.format_exception(caught.value, limit=0))
        assert str(caught.value) in told and "XY" not in told and "ZZY" not in told


def test_what_is_not_there():
    storage = pytest.importorskip("memnet_fast.restore.storage")
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match=r"there is no file or folder file:///nowhere/in\?\*\*\*$"):
        storage.plan_uris(["file:///nowhere/in?hidden"], "file:///nowhere/out")


def test_the_command_without_a_cluster(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture((9, 8))).save("a.png")
    for arguments in (
        ["-i", "s3://key:hid/den@bucket/a.png", "-o", "out"],
        ["-i", "a.png", "-o", "s3://key:hid/den@bucket/a.png"],
    ):
        with pytest.raises(SystemExit) as left:
            main(["denoise", *arguments])
        assert left.value.code == 2
        assert capsys.readouterr().err == "memnet: error: s3://***@bucket/a.png is a URI; those need --engine ray\n"
    assert [path.name for path in Path().iterdir()] == ["a.png"], "a URI is not the name of a folder"
    with pytest.raises(InputError, match="is a URI"):
        plan_job(["a.png"], "file:///out")


def test_the_log_of_a_job(tmp_path, monkeypatch, capsys):
    restore = pytest.importorskip("memnet_fast.cli.restore")
    pytest.importorskip("pyarrow")
    Image.fromarray(picture((9, 8))).save(tmp_path / "a.png")
    monkeypatch.setattr(restore, "_run_engine", lambda *given: None)
    log = tmp_path / "run.json"
    words = ["-i", f"{tmp_path.as_uri()}/a.png?sig=hidden", "-o", f"{tmp_path.as_uri()}/out?sig=hidden", "--log", str(log)]
    with pytest.raises(SystemExit):
        main(["denoise", *words, "--engine", "ray", "--model", "https://key:hidden@host/w.safetensors"])
    text = log.read_text()
    assert "hidden" not in text and "hidden" not in capsys.readouterr().err
    options = json.loads(text)["options"]
    assert options["input"] == [f"{tmp_path.as_uri()}/a.png?***"] and options["model"] == "https://***@host/w.safetensors"
    assert options["batch"] is None or isinstance(options["batch"], int | str)

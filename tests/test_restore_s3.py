"""Jobs on an object store that speaks S3, at an address of one's own: a server in this process stands for it."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import subprocess
import sys

import pytest
from support.restoring import picture, small_net

from memnet_fast.errors import InputError, OutputError
from memnet_fast.restore import Restorer, images
from memnet_fast.restore.isolation import Reading
from memnet_fast.restore.journal import parse_lines

pa = pytest.importorskip("pyarrow")
server = pytest.importorskip("moto.server", reason="no S3 server is installed (moto, flask)")
distributed = pytest.importorskip("memnet_fast.restore.distributed")
storage = pytest.importorskip("memnet_fast.restore.storage")

OPTIONS = {"task": "denoise", "device": "cpu", "model": small_net()}
NAMES = ("a.png", "b.png", "sub/c.jpg")


@pytest.fixture(scope="module")
def address():
    """host:port; credentials stand in the environment, as they do for users."""
    log = logging.getLogger("werkzeug")
    level, names = (
        log.level,
        {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"},
    )
    log.setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**names, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        yield "{}:{}".format(*running.get_host_and_port())
        running.stop()
    log.setLevel(level)


@pytest.fixture
def bucket(address, request):
    """A bucket with three images in it: the file system, and URIs of what is in the bucket."""
    name = f"b{hashlib.sha256(request.node.name.encode()).hexdigest()[:20]}"
    opened = storage.storage_of(f"s3://{name}/x?scheme=http&endpoint_override={address}&allow_bucket_creation=true")
    opened.filesystem.create_dir(name)
    for i, path in enumerate(NAMES):
        data = images.encode(picture((12, 13, 3), seed=i), images.EXTENSIONS[path[-4:]])
        put(opened, f"{name}/in/{path}", bytes(data))
    return opened, name, lambda path: f"s3://{name}/{path}?scheme=http&endpoint_override={address}"


def put(opened, path: str, data: bytes) -> None:
    with opened.filesystem.open_output_stream(path) as file:
        file.write(data)


def work(job, existing: str):
    """What one actor makes of a job: name of the input -> result. The file system travels to it as it does on a cluster."""
    folder = str(job.folder)
    told = distributed._Orders(
        OPTIONS, images.Encoding(), Reading(), job.source_storage, job.target_storage, folder, existing, threads=2
    )
    told = pickle.loads(pickle.dumps(told))
    lines = parse_lines(told.target.read_all(f"{folder}/.memnet", ".jsonl"))
    rows = [distributed._row(i, item, job, folder, lines) for i, item in enumerate(job.items)]
    rows = [distributed._read(row, told.source, 1 << 20) for row in rows]
    answers = distributed._Worker([told])(pa.Table.from_pylist(rows))["result"]
    return {result.item.source.name: result for _, result in map(pickle.loads, answers)}


def test_a_job_writes_what_a_local_one_writes_and_resumes(bucket):
    opened, name, uri = bucket
    plan = {"recursive": True, "existing": "skip"}
    job = storage.plan_uris([uri("in")], uri("out"), **plan)
    assert {result.status for result in work(job, "skip").values()} == {"restored"}
    for path in NAMES:
        source = opened.read(f"{name}/in/{path}")
        restored = Restorer(**OPTIONS)(images.decode_image(path, pa.BufferReader(source)).pixels)
        assert opened.read(f"{name}/out/{path}") == bytes(images.encode(restored, images.EXTENSIONS[path[-4:]]))
    assert {result.status for result in work(job, "skip").values()} == {"skipped"}
    opened.filesystem.delete_file(f"{name}/out/a.png")
    put(opened, f"{name}/out/b.png", b"mine")
    results = work(storage.plan_uris([uri("in")], uri("out"), **plan), "skip")
    assert {n: r.status for n, r in results.items()} == {"a.png": "restored", "b.png": "failed", "c.jpg": "skipped"}
    assert opened.read(f"{name}/out/b.png") == b"mine" and "no run recorded" in str(results["b.png"].error)
    # Above the outputs, what the journal lists is no input, and the journal is none either.
    planned = storage.plan_uris([uri("")], uri("other"), recursive=True)
    assert sorted(str(item.source) for item in planned.items) == [f"{name}/in/{n}" for n in NAMES]


def test_outputs_that_are_there_are_not_replaced_unasked(bucket):
    opened, name, uri = bucket
    put(opened, f"{name}/out/a.png", b"mine")
    with pytest.raises(InputError, match="out/a.png exists already"):
        storage.plan_uris([uri("in")], uri("out"))
    assert len(storage.plan_uris([uri("in")], uri("out"), existing="overwrite").items) == 2
    with pytest.raises(InputError, match="is an input"):
        storage.plan_uris([uri("in")], uri("in"), existing="skip")


def test_an_object_appears_whole_or_not_at_all(bucket, address):
    """The process ends after 12 MB of an upload: the store never shows a part, and an older object stays."""
    opened, name, uri = bucket
    put(opened, f"{name}/old.png", b"old")
    script = (
        "import os; from memnet_fast.restore import storage\n"
        f"opened = storage.storage_of({uri('x')!r})\n"
        "kept = []\n"
        "for path in ('new.png', 'old.png'):\n"
        f"    file = opened.filesystem.open_output_stream('{name}/' + path)\n"
        "    file.write(bytes(12 << 20))\n"
        "    kept.append(file)\n"
        "os._exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], env={**os.environ}, timeout=100).returncode == 7
    assert not opened.exists(f"{name}/new.png") and opened.read(f"{name}/old.png") == b"old"
    opened.write(f"{name}/new.png", bytes(12 << 20))
    assert opened.digest(f"{name}/new.png") == hashlib.sha256(bytes(12 << 20)).hexdigest()


def test_what_cannot_be_reached_is_said_in_one_line(bucket, address):
    opened, name, uri = bucket
    with pytest.raises(InputError, match="there is no file or folder s3://nobucket/in"):
        storage.plan_uris([f"s3://nobucket/in?scheme=http&endpoint_override={address}"], uri("out"))
    with pytest.raises(InputError, match="names no bucket"):
        storage.plan_uris([uri("in")], f"s3://?scheme=http&endpoint_override={address}")
    with pytest.raises(InputError, match="Unexpected query parameter"):
        storage.plan_uris([f"s3://{name}/in?endpoint={address}"], uri("out"))
    with pytest.raises(OutputError, match="cannot write nobucket/a.png"):
        opened.write("nobucket/a.png", b"data")
    with pytest.raises(InputError) as error:
        storage.plan_uris([f"s3://key:hidden@{name}/in"], uri("out"))
    assert "by the environment" in str(error.value) and "hidden" not in str(error.value)


def test_a_store_that_is_gone(monkeypatch, bucket):
    opened, name, uri = bucket

    class Gone:
        def get_file_info(self, what):
            raise OSError("AWS Error NETWORK_CONNECTION\nCould not connect")

        def equals(self, other):
            return True

    monkeypatch.setattr(storage, "_open", lambda text: (storage.Storage(Gone(), False), text.partition("//")[2]))
    with pytest.raises(InputError, match=r"cannot look at s3://b/in: AWS Error NETWORK_CONNECTION Could not connect$"):
        storage.plan_uris(["s3://b/in"], "s3://b/out")


def test_a_job_that_begins_removes_the_mark_of_success(bucket):
    opened, name, uri = bucket
    job = storage.plan_uris([uri("in")], uri("out"), recursive=True)
    put(opened, f"{name}/out/.memnet/success.json", b"{}")
    with distributed._journal(job, job.target_storage, str(job.folder)) as lines:
        assert not opened.exists(f"{name}/out/.memnet/success.json") and lines == {}

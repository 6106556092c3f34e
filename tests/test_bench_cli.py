"""`memnet bench`."""

from __future__ import annotations

import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from support import networks
from support.ending import ENDLESS, ended_in_the_middle

from memnet_fast import cli
from memnet_fast.bench import facts, measure
from memnet_fast.cli.bench import bench
from memnet_fast.cli.messages import State
from memnet_fast.config import MemNetConfig
from memnet_fast.weights import save_weights

TINY = MemNetConfig(channels=8, num_memory_blocks=1, num_recursions=1)


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_end_politely", lambda state: None)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["bench", *arguments])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture
def model(tmp_path):
    save_weights(networks.build(TINY), tmp_path / "net.safetensors")
    return str(tmp_path / "net.safetensors")


def test_a_real_run(run, model, tmp_path):
    out = tmp_path / "r.json"
    words = ["--sizes", "9x11", "--backends", "torch", "--peers", "none", "--threads", "1", "--seconds", "1"]
    code, table, said = run("-n", model, *words, "--json", str(out))
    assert code == 0, said
    assert "memnet_fast torch" in table and "9x11" in table and "ratio: time in comparison with memnet_fast torch" in table
    data = json.loads(out.read_text())
    (row,) = data["rows"]
    assert row["status"] == "ok" and row["threads"] == 1 and row["errors"]["nsr"] < 2e-5
    about = data["about"]
    assert about["torch"] == torch.__version__ and about["cpu"]["cpus"] >= 1 and about["model"] == model
    assert about["cpu"]["clocks"]["mhz"] or about["cpu"]["clocks"]["reason"]
    assert "rounds of memnet_fast torch" in said and f"wrote {out}" in said


def row(name, **more):
    base = {"suite": "forward", "size": "256x256", "variant": name, "precision": "fp32", "status": "ok"}
    times = {"ms": 600.0, "ratio": 1.0, "ratio_interval": [0.995, 1.005], "rounds": 20, "enough": True, "subject": "ours"}
    return {**base, "errors": {"nsr": 1.6e-6}, "peak_mib": 640.0, "others": 0.0, **times, **more}


def without_times(name, status, **more):
    return {"suite": "forward", "size": "256x256", "variant": name, "precision": "fp32", "status": status, **more}


@pytest.fixture
def told(monkeypatch):
    """Rows in the place of measurements; what was asked is kept."""
    asked: list = []

    def make(*rows):
        class Session:
            def __init__(self, net, variants, **options):
                asked.append((variants, options))

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

        monkeypatch.setattr(measure, "session", Session)
        monkeypatch.setattr(
            measure, "forward", lambda session, size, shape, seconds, until: [{**r, "size": size} for r in rows]
        )
        return asked

    return make


def test_what_is_wrong_or_missing_is_said(run, model, told):
    told(
        row("ours"),
        row("slow", ratio=3.25, ratio_interval=None, enough=False, others=0.31),
        without_times("wrong", "refused", reason="nsr 1.0e+00 above 2.0e-05", errors={"nsr": 1.0}),
        without_times("nan", "refused", reason="nsr nan above 2.0e-05", errors={"nsr": None}),
        without_times("absent", "missing", reason="engine not installed", install="pip install memnet_fast[bench]"),
    )
    code, table, _ = run("-n", model, "-q")
    assert code == 3
    lines = {line.split()[1]: line for line in table.splitlines() if line.startswith("│")}
    assert "3.25" in lines["slow"] and "1.6e-06" in lines["slow"]
    assert "refused" in lines["wrong"] and "3.25" not in lines["wrong"] and lines["absent"].count("-") >= 5
    assert "not settled" in lines["slow"] and "settled" not in lines["ours"]
    assert "before 1 of 2 ratios" in table and "31 %" in table
    assert "Missing: absent (engine not installed). pip install memnet_fast[bench]" in table
    assert "Refused: wrong: nsr 1.0e+00 above 2.0e-05" in table


def test_json_on_stdout_is_all_there_is(run, model, told):
    told(row("ours"))
    code, out, _ = run("-n", model, "--json", "-", "-q", "--sizes", "64,16x8x8")
    assert code == 0 and [r["size"] for r in json.loads(out)["rows"]] == ["64x64", "16x8x8"]


def test_what_runs_by_default(run, model, told):
    asked = told(row("ours"))
    assert run("-n", model, "-q")[0] == 0
    assert run("-n", model, "-q", "--backends", "all", "--peers", "all", "-p", "all")[0] == 0
    assert run("-n", model, "-q", "--peers", "eager, ncnn", "--backends", "torch")[0] == 0
    default, everything, named = ([v.name for v in variants] for variants, _ in asked)
    assert default[0].startswith("memnet_fast") and sum(n.startswith("memnet_fast") for n in default) == 1
    assert default[1:] == ["eager channels_last", "ONNX Runtime", "OpenVINO latency", "ncnn"]
    assert not any("torch.compile" in n or "bf16" in n for n in default)
    assert "torch.compile max-autotune" in everything and "memnet_fast torch" in everything and "ncnn bf16" in everything
    assert named[0] == "memnet_fast torch" and all("eager" in n or "ncnn" in n for n in named[1:]) and len(named) > 2


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--sizes", "256,huge"), 2, "huge"),
        (("--backends", "gpu"), 2, "unknown backend 'gpu'"),
        (("--precision", "fp64"), 2, "unknown precision 'fp64'"),
        (("--peers", "no-such-engine"), 2, "no-such-engine"),
        (("--model", "no-such-model"), 2, "no-such-model"),
        (("--json", "/no-such-folder/r.json"), 3, "no-such-folder"),
        (("--json", "/"), 3, "it is a folder"),
        (("--json", "/dev/null"), 3, "no regular file"),
        (("--device", "tpu"), 2, "tpu"),
        (("--device", "meta"), 2, "meta"),
        (("--device", "cuda:99"), 5, "CUDA"),
        (("--backends", "cuda", "--device", "cpu"), 5, "cuda"),
        (("--backends", "cpu", "--device", "cpu", "-p", "fp16"), 5, "not fp16"),
        (("--threads", "0"), 2, "--threads"),
        (("--threads", "-1"), 2, "--threads"),
        (("--threads", "100000"), 2, "this process may use"),
        (("--threads", "x"), 2, "--threads"),
        (("--seconds", "0"), 2, "--seconds"),
        (("more",), 2, "more"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(run, told, model, arguments, code, word):
    told(row("ours"))
    given = arguments if "--model" in arguments else ("-n", model, *arguments)
    left, out, said = run(*given)
    assert left == code and word in said and len(said.strip().splitlines()) == 1 and not out


def test_a_backend_that_cannot_run_here_is_not_blamed_on_a_precision_nobody_asked_for(run, told, model):
    told(row("ours"))
    left, _, said = run("-n", model, "--backends", "cuda", "--device", "cpu")
    assert left == 5 and "fp32" not in said
    left, _, said = run("-n", model, "--backends", "cuda", "--device", "cpu", "-p", "fp32")
    assert left == 5 and "not fp32" in said


def test_sizes_by_default(run, model, told, monkeypatch):
    told(row("ours"))
    for cpus, size in ((2, "128x128"), (64, "256x256")):
        monkeypatch.setattr(facts, "usable_cpus", lambda cpus=cpus: cpus)
        code, out, _ = run("-n", model, "-q", "--json", "-", "--device", "cpu")
        assert code == 0 and [r["size"] for r in json.loads(out)["rows"]] == [size]


def test_the_file_holds_what_is_done_or_is_not_there(run, model, told, tmp_path, monkeypatch):
    """Ended in the second of three sizes."""
    told(row("ours"))
    forward, out = measure.forward, tmp_path / "r.json"
    seen: list[str] = []

    def ended(session, size, shape, seconds, until):
        seen.append(f"{size} {out.exists()}")
        if size == "5x5":
            raise SystemExit(143)
        return forward(session, size, shape, seconds, until)

    monkeypatch.setattr(measure, "forward", ended)
    assert run("-n", model, "-q", "--json", str(out), "--sizes", "5,4")[0] == 143
    assert seen == ["5x5 False"] and not list(tmp_path.glob(".memnet*")) and not out.exists()
    assert run("-n", model, "-q", "--json", str(out), "--sizes", "4,5,6")[0] == 143
    assert [r["size"] for r in json.loads(out.read_text())["rows"]] == ["4x4"]


def test_the_device_that_is_used_is_named(monkeypatch):
    """A GPU that nothing runs on is no part of the results; of several, the one that is used is."""
    properties = {
        "capability": "9.0",
        "major": 9,
        "minor": 0,
        "multi_processor_count": 1,
        "L2_cache_size": 1,
        "total_memory": 1,
    }
    asked = []

    def output(*command):
        if command[0] == "nvidia-smi":
            asked.append(command[-1])
        return None

    monkeypatch.setattr(facts, "_output", output)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=f"GPU {i}", uuid=f"id-{i}", **properties)
    )
    assert facts.about("cpu")["gpu"] is None and not asked
    assert facts.about("cuda:1")["gpu"]["name"] == "GPU 1" and asked == ["GPU-id-1"]
    assert facts.about()["gpu"]["index"] == 0


def test_a_signal_leaves_nothing_behind(model, tmp_path):
    """In the middle of the rounds: no file, no temporary folder, no process."""
    (tmp_path / "tmp").mkdir()
    words = ["--sizes", "9x11", "--backends", "torch", "--peers", "eager channels_last", "--threads", "1", "--seconds", "600"]
    code = ENDLESS + "from memnet_fast.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "-n", model, *words, "--json", str(tmp_path / "r.json")]
    code, said, children = ended_in_the_middle(command, signal.SIGTERM, "rounds of", tmp_path / "tmp")
    assert code == 143 and children
    assert not (tmp_path / "r.json").exists() and not list((tmp_path / "tmp").iterdir())
    assert "Traceback" not in said


def test_an_interrupted_run_ends():
    state = State(ended_by=15)
    with pytest.raises(SystemExit) as left:
        bench.main(["--peers", "none", "--backends", "torch", "--sizes", "4"], standalone_mode=False, obj=state)
    assert left.value.code == 143

"""Suites, stored results, report and comparison of revisions: the README says what the data say."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support import ending, networks

import memnet_fast
from benchmarks import commandline, compare, pipeline, repeatability, report, run, scaling
from benchmarks.networks import network
from memnet_fast.backends import cpu
from memnet_fast.bench import facts, measure, peers
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError
from memnet_fast.restore import images
from memnet_fast.weights import save_weights

ROOT = Path(__file__).parents[1]
TINY = MemNetConfig(channels=8, num_memory_blocks=1, num_recursions=1)


# Suites --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(run, "network", lambda name: networks.build(TINY))
    monkeypatch.setattr(run, "_KEPT", tmp_path_factory.mktemp("kept"))


def stored(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_a_suite_stores_rows_and_the_command_that_makes_them(tiny, tmp_path, capsys):
    words = ["--sizes", "7x9", "--backends", "torch", "--peers", "none", "--threads", "1", "--seconds", "0.1"]
    arguments = [*words, "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    data = stored(tmp_path)
    assert data["rows"][0]["suite"] == "forward" and data["rows"][0]["ratio"] > 0
    assert "package" not in data["about"], "kept results do not say where the package lay"
    assert data["about"]["command"].startswith("python -m benchmarks.run --sizes 7x9")
    for key in ("date", "commit", "torch", "cuda", "triton", "engines", "compiler", "flags", "cpu", "threads", "gpu"):
        assert key in data["about"], key
    assert "again with: python -m benchmarks.run" in capsys.readouterr().out


def test_what_a_run_contains():
    net = networks.build(TINY)

    def names(*more):
        return [v.name for v in run.chosen(net, "cpu", *more)]

    subject = peers.own_variants(net, "cpu")[0].name
    forward = names("forward", "fp32", None, None)
    assert forward[0] == subject and "torch.compile freezing" in forward and "OpenVINO throughput" in forward
    assert "memnet_fast torch" not in forward and not any("bf16" in n for n in forward)
    assert names("threads", "fp32", None, None) == [subject]
    assert names("forward", "fp32", "none", "all")[-1] == "memnet_fast torch"
    assert set(names("forward", "fp32", "ncnn,ONNX", None)) >= {subject, "ncnn", "ONNX Runtime"}
    for arguments in (("forward", "fp32", "no-such", None), ("forward", "fp7", None, None)):
        with pytest.raises(Exception, match=r"no-such|fp7"):
            run.chosen(net, "cpu", *arguments)


def _left(main, arguments: list[str]) -> int:
    """The exit code, however it is told."""
    try:
        return main(arguments)
    except SystemExit as left:
        return int(left.code or 0)


THREADS = [["--threads", value] for value in ("0", "-1", "9999", "x")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sizes", "0"],
        ["--model", "no-such"],
        ["--peers", "no-such", "--sizes", "4"],
        ["--suite", "no-such"],
        ["--device", "tpu"],
        ["--device", "cuda:99"],
        *THREADS,
    ],
    ids=" ".join,
)
def test_bad_options_of_a_run_are_one_line(arguments, tmp_path, capsys):
    code = _left(run.main, [*arguments, "--out", str(tmp_path)])
    assert code == (5 if "cuda:99" in arguments else 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("benchmarks.run: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [*THREADS, ["--sizes", "0"], ["--json", "/no-such-folder/r.json"]], ids=" ".join)
def test_bad_options_of_a_comparison_are_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr(compare, "commit", lambda name: name)
    assert _left(compare.main, ["HEAD", *arguments]) == (3 if "--json" in arguments else 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("benchmarks.compare: ")


def test_what_is_done_is_stored_at_once(tiny, tmp_path, monkeypatch, capsys):
    """Ended after the second of three rows: both are there, in a whole file."""
    seen = []

    def forward(session, size, shape, seconds, show):
        for name in ("a", "b"):
            show(row(name, 1.0, 2.0, ratio_interval=None, enough=True))
            seen.append([r["variant"] for r in stored(tmp_path)["rows"]])
        raise commandline.Ended(15)

    monkeypatch.setattr(measure, "forward", forward)
    assert run.main(["--sizes", "4", "--peers", "none", "--backends", "torch", "--out", str(tmp_path)]) == 143
    assert seen == [["a"], ["a", "b"]] and [r["variant"] for r in stored(tmp_path)["rows"]] == ["a", "b"]
    assert "wrote " in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert run.main(["--sizes", "4", "--peers", "none", "--out", str(tmp_path / "file")]) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_signal_ends_a_run_and_its_processes(tmp_path):
    for name in ("tmp", "out"):
        (tmp_path / name).mkdir()
    save_weights(networks.build(TINY), tmp_path / "net.safetensors")
    code = ending.ENDLESS + (
        "import sys; from benchmarks import run; from memnet_fast.weights import load_weights; from pathlib import Path\n"
        f"run.network = lambda name: load_weights({str(tmp_path / 'net.safetensors')!r})\n"
        f"run._KEPT = Path({str(tmp_path)!r}) / 'kept'\n"
        "sys.exit(run.main(sys.argv[1:]))"
    )
    words = ["--sizes", "9x11", "--backends", "torch", "--peers", "eager", "--threads", "1", "--seconds", "600"]
    command = [sys.executable, "-c", code, *words, "--out", str(tmp_path / "out")]
    path = os.pathsep.join([str(ROOT), *sys.path])
    code, said, had = ending.ended_in_the_middle(command, signal.SIGINT, "rounds of", tmp_path / "tmp", {"PYTHONPATH": path})
    assert code == 130 and had and said.strip().splitlines()[-1] == "benchmarks.run: ended by SIGINT"
    assert not list((tmp_path / "tmp").iterdir()), "temporary folders are gone"
    assert all(path.suffix == ".json" and json.loads(path.read_text()) for path in (tmp_path / "out").iterdir())


def test_the_second_signal_does_not_disturb_the_end():
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals belong to the main thread")
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    told = []

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            told.append("put away")
        return 0

    assert commandline.run("a program", work) == 143 and told == ["put away"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    def swallowed() -> int:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return 0

    assert commandline.run("a program", swallowed) == 143


def test_whoever_is_ended_ends_all_of_a_build(tmp_path):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals belong to the main thread")
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    others, found = ending.children(os.getpid()), []

    def end(number, frame):
        raise commandline.Ended(number)

    def ask() -> None:
        deadline = time.monotonic() + 60
        while len(found) < 2 and time.monotonic() < deadline:
            found[:] = [pid for pid in ending.children(os.getpid()) if pid not in others]
            time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGUSR1)

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, end)
    asker = threading.Thread(target=ask)
    try:
        with pytest.raises(commandline.Ended):
            asker.start()
            commandline.complete([sys.executable, "-c", script], tmp_path, os.environ)
    finally:
        asker.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(found) == 2
    deadline = time.monotonic() + 10
    while any(ending.lives(pid) for pid in found):
        assert time.monotonic() < deadline, "a process of the build lives on"
        time.sleep(0.05)


class Grown:
    """Takes one millisecond for each pixel, twice that with one thread."""

    def __init__(self, shape, threads):
        n, h, w = shape
        self.ms = n * h * w * (2.0 if threads == 1 else 1.0)

    def ask(self, do):
        return {"peak_mib": 1.0, "before_mib": 1.0}

    def time(self):
        return {"ms": self.ms}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def grown(monkeypatch, tmp_path):
    net = networks.build(TINY)
    monkeypatch.setattr(measure.Session, "start", lambda self, variant, shape, threads=2: Grown(shape, threads))
    monkeypatch.setattr(measure.Case, "gated", lambda self, process, variant: {"status": "ok", "errors": {"nsr": 1e-6}})
    return measure.Session(net, tmp_path, peers.own_variants(net, "cpu")[:1], threads=2)


def test_threads_and_pixels(grown):
    (row,) = scaling.threads(grown, "4x6", (1, 4, 6), 0.0, lambda row: None)
    assert row["ratio"] == 2.0 and (row["ms"], row["ms_1"]) == (24.0, 48.0)
    sizes = {"4x6": (1, 4, 6), "8x6": (1, 8, 6), "2x8x6": (2, 8, 6)}
    rows = scaling.pixels(grown, sizes, 0.0, lambda row: None)
    assert [r["size"] for r in rows] == ["8x6", "2x8x6"] and all(r["ratio"] == 1.0 and r["base"] == "4x6" for r in rows)
    assert rows[1]["ms"] == 96.0 and rows[1]["ms_base"] == 24.0


def test_networks_without_weights_are_of_a_sane_size():
    net = network("memnet_m6r6")
    assert not net.training and all(m.momentum == 0.1 for m in net.modules() if hasattr(m, "momentum"))
    x = networks.image(1, 1, 16, 16)
    with torch.inference_mode():
        assert 1e-2 < float((net(x) - x).std()) < 1e2
    with pytest.raises(InputError):
        network("no-such")


def test_cpus_are_those_that_the_control_group_grants(monkeypatch):
    monkeypatch.setattr(cpu, "granted_cpus", lambda: 1)
    assert facts.cpu()["cpus"] == 1


def test_the_commit_is_not_that_of_a_repository_around_an_installed_package(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.delenv("MEMNET_COMMIT", raising=False)
    package = tmp_path / "venv" / "memnet_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()

    def git(*words):
        author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *author, *words], check=True, capture_output=True)

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "theirs")
    monkeypatch.setattr(memnet_fast, "__file__", str(package / "__init__.py"))
    about = facts.about()
    assert about["commit"] is None and about["changed"] is None
    git("add", "venv")
    git("commit", "--quiet", "-m", "a checkout")
    about = facts.about()
    assert len(about["commit"]) == 40 and about["changed"] == 0


def test_facts_name_the_flags_of_every_instruction_set():
    flags = facts.flags()
    assert flags is not None and all(word in flags for word in ("-O3", "baseline", "-mavx2", "-mavx512f"))


# The report ----------------------------------------------------------------------------------------------------------


def about(date, **more):
    cpu = {"model": "A CPU", "cpus": 2}
    base = {"date": date, "commit": "c" * 40, "torch": "2.13.0", "cpu": cpu, "gpu": None, "device": "cpu", "threads": 2}
    return {
        **base,
        "model": "memnet_m6r6.denoise",
        "engines": {"ncnn": "1.0"},
        "command": f"python -m benchmarks.run # {date}",
        **more,
    }


def row(variant, ms, ratio, **more):
    base = {
        "suite": "forward",
        "size": "256x256",
        "n": 1,
        "h": 256,
        "w": 256,
        "threads": 2,
        "isa": "native",
        "variant": variant,
    }
    times = {"ms": ms, "ratio": ratio, "ratio_q20": ratio - 0.01, "ratio_q80": ratio + 0.01, "peak_mib": 640.0, "rounds": 9}
    return {**base, "precision": "fp32", "status": "ok", "errors": {"nsr": 1.6e-6, "line": 4e-6}, **times, **more}


@pytest.fixture
def results(tmp_path, monkeypatch):
    folder = tmp_path / "a-cpu"
    folder.mkdir()
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def store(name, date, rows, **more):
        (folder / f"{name}.json").write_text(json.dumps({"about": about(date, **more), "rows": rows}))

    def load():
        return report.Results(folder)

    return store, load


REFUSED = {"status": "refused", "reason": "nsr 1 above 2e-05"}


def test_the_newest_row_counts_and_names_its_file(results):
    store, load = results
    store("b", "2026-11-22T10:00:00+00:00", [row("ours", 600.0, 1.0), row("peer", 1900.0, 3.17), row("other", 5.0, 0.5)])
    store("a", "2026-11-22T11:00:00+00:00", [row("ours", 500.0, 1.0), row("peer", 1800.0, 3.6)])
    text = report.forward_tables(load())
    assert "| peer | 1800 | 3.60 (3.59 to 3.61) |  | 1.6e-06 | [1](a-cpu/a.json) |" in text
    assert "| other | 5 | 0.50 (0.49 to 0.51) |  | 1.6e-06 | [2](a-cpu/b.json) |" in text
    assert "1900" not in text and "again: `python -m benchmarks.run # 2026-11-22T11:00:00+00:00`" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    assert len(rows) == 3 and all(re.search(r"\[\d+\]\(a-cpu/[ab]\.json\) \|$", line) for line in rows)


def test_a_refused_row_shows_its_reason_and_no_time(results):
    store, load = results
    bad = {k: v for k, v in row("wrong", 1.0, 1.0).items() if not k.startswith(("ms", "ratio"))}
    store("a", "2026-11-22T11:00:00+00:00", [row("ours", 500.0, 1.0), {**bad, **REFUSED}])
    (line,) = (line for line in report.forward_tables(load()).splitlines() if line.startswith("| wrong"))
    assert "refused: nsr 1 above 2e-05" in line and not re.search(r"\| \d", line)


def test_runs_with_other_subjects_are_other_tables(results):
    store, load = results
    store("a", "2026-11-22T11:00:00+00:00", [row("ours", 500.0, 1.0), row("peer", 1500.0, 3.0)])
    store("b", "2026-11-22T12:00:00+00:00", [row("ours bf16", 300.0, 1.0), row("peer", 1500.0, 5.0)])
    store("c", "2026-11-22T13:00:00+00:00", [row("ours", 700.0, 1.0, isa="avx2", note="keeps")], threads=2)
    text = report.forward_tables(load())
    assert text.count("subject: ours bf16") == 1 and text.count("subject: ours\n") == 2
    assert "AVX-512 left alone" in text and "| ours (keeps) | 700" in text
    assert "3.00 (" in text and "5.00 (" in text


def test_memory_threads_pixels_and_operations_are_shown(results):
    store, load = results
    store("a", "2026-11-22T11:00:00+00:00", [row("ours", 500.0, 1.0)])
    memory = {"suite": "memory", "peak_mib": 321.0}
    store("b", "2026-11-22T11:00:01+00:00", [{**row("ours", 0.0, 0.0), **memory}])
    store("c", "2026-11-22T11:00:02+00:00", [{**row("ours", 500.0, 1.93), "suite": "threads"}])
    store(
        "d", "2026-11-22T11:00:03+00:00", [{**row("ours", 9.0, 1.02), "suite": "pixels", "size": "512x512", "base": "256x256"}]
    )
    op = {"suite": "op", "op": "gate_7", "tflops": 0.18, "tbps": 0.01, "plain_ratio": 4.5}
    store("e", "2026-11-22T11:00:04+00:00", [{**row("ours", 2.5, 1.0), **op}], model=None)
    text = report.forward_tables(load())
    assert "| ours | 500 | 1.00 (0.99 to 1.01) | 321 |" in text
    assert "2 threads are 1.93 times as fast as one (1.92 to 1.94) [3](a-cpu/c.json)" in text
    assert "a pixel of 512x512 costs 1.020 times one of 256x256" in text
    assert "| gate_7 | 256x256 | ours | 2.50 | 180 | 10.0 | 4.50 | [5](a-cpu/e.json) |" in text
    assert all(f"[{i}](a-cpu/{name}.json): " in text for i, name in enumerate("abcde", 1))


def test_plots_of_everything(results):
    pytest.importorskip("matplotlib", reason="pip install memnet_fast[bench]")
    from benchmarks import plots

    store, load = results
    plots.draw(load())
    folder = load().folder
    assert not list(folder.glob("*.png")), "nothing to draw, nothing drawn"
    rows = [row("ours", 500.0, 1.0), row("peer", 1500.0, 3.0), row("ours", 2000.0, 1.0, size="512x512", h=512, w=512)]
    store("a", "2026-11-22T11:00:00+00:00", rows)
    store("b", "2026-11-22T11:00:01+00:00", [{**row("ours", 0.0, 0.0), "suite": "memory"}])
    profiled = {"name": "gate, 7 sources", "tflops": 0.185, "share": 0.3, "executed_gflop": 3.7, "gb": 0.13}
    values = {"backend": "cpu", "precision": "fp32", "algorithm": "winograd", "shape": [1, 1, 9, 9], "rows": [profiled]}
    values["ceilings"] = [{"flops": 2.3e11, "bytes": 4e10, "fma": None, "threads": 1}]
    (folder / "profile.json").write_text(json.dumps(values))
    (folder / "profile_overhead.json").write_text(json.dumps({"about": {}, "off_cpu": {"median": 1.0}}))
    plots.draw(load())
    made = {p.stem: p.read_bytes() for p in folder.glob("*.png")}
    assert set(made) == set(report.PLOTS) and all(data[:4] == b"\x89PNG" and len(data) < 200_000 for data in made.values())
    assert "![speedup](a-cpu/speedup.png)" in report.forward_tables(load())
    plots.draw(load())
    assert made == {p.stem: p.read_bytes() for p in folder.glob("*.png")}


def test_readme_shows_the_stored_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert report.render(text) == text


def test_changed_results_would_be_noticed() -> None:
    text = (ROOT / "README.md").read_text()
    wrong = re.sub(r"\| \d+ \|", "| 1 |", text, count=1)
    assert wrong != text and report.render(wrong) == text
    with pytest.raises(ValueError, match="markers"):
        report.render("no markers")


def test_readme_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", (ROOT / "README.md").read_text()):
        path = target[0] or target[1]
        if "://" not in path:
            assert (ROOT / path).exists(), path


# Two runs ------------------------------------------------------------------------------------------------------------


def test_repeatability(tmp_path, capsys):
    runs = [
        {"rows": [row("a", 1.0, 2.0), row("b", 1.0, 3.0), {"size": "256x256", "variant": "wrong", "status": "refused"}]},
        {"rows": [row("b", 2.0, 3.3), row("a", 2.0, 2.04)]},
    ]
    names = [str(tmp_path / f"{i}.json") for i in range(2)]
    for name, data in zip(names, runs, strict=True):
        Path(name).write_text(json.dumps(data))
    assert repeatability.main(names) == 1 and "10.0 %" in capsys.readouterr().out
    found = repeatability.differences(*runs)
    assert found["256x256", "a"][2] == pytest.approx(0.02) and len(found) == 2
    assert repeatability.main([names[0], names[0]]) == 0
    Path(names[1]).write_text("{}")
    assert repeatability.main(names) == 2 and repeatability.main([]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


# Two revisions -------------------------------------------------------------------------------------------------------


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout with a commit")
    return done.stdout


def test_a_revision_that_does_not_exist_is_one_line(capsys):
    _git("rev-parse", "HEAD")
    for revision in ("no-such-revision", "--all", ""):
        assert compare.main(["--", revision] if revision.startswith("-") else [revision]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and "no revision" in said[0]
    assert compare.commit("HEAD") == _git("rev-parse", "HEAD").strip()


def test_a_revision_is_built_and_vanishes():
    before = _git("worktree", "list")
    with compare.built(compare.commit("HEAD"), native=False) as library:
        assert (library / "memnet_fast" / "fused.py").is_file() and (library / "memnet_fast" / "kernels").is_dir()
        assert not list((library / "memnet_fast").glob("_native.*"))
        assert _git("worktree", "list") != before
    assert _git("worktree", "list") == before and not library.exists()


def test_packages_are_compared(tmp_path):
    """A package that is wrong gets no time; one beside itself has a ratio."""
    wrong = tmp_path / "memnet_fast"
    wrong.mkdir()
    (wrong / "__init__.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    config = type('C', (), {'in_channels': 1})\n"
        "    def forward(self, x):\n"
        "        return x\n"
        "load_weights = lambda path: Net()\n"
        "fuse = lambda net, **options: net\n"
    )
    net = networks.build(TINY)
    with measure.session(net, [], threads=1) as session:
        here, there = ("here", ROOT), ("there", tmp_path)
        own = ("torch", "fp32", "auto")
        (row,) = compare.compare(session, [here, here], {"9x8": (1, 9, 8)}, 0.5, own)
        assert row["status"] == "ok" and row["ratio"] > 0 and row["rounds"] >= 3 and row["peak_mib_2"] > 10
        (row,) = compare.compare(session, [there, here], {"9x8": (1, 9, 8)}, 0.5, own)
        assert row["status"] == "refused" and "there" in row["reason"] and "ratio" not in row


# The pipeline -------------------------------------------------------------------------------------------------------


def test_the_pipeline_is_timed_beside_the_network_on_its_own_planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(networks.build(networks.SMALL), tmp_path / "weights.safetensors")
    (tmp_path / "work").mkdir()
    seen = []
    original = pipeline.network_seconds
    monkeypatch.setattr(pipeline, "network_seconds", lambda net, planes: (seen.append(planes), original(net, planes))[1])
    result = pipeline.measure(tmp_path / "work", 11, 0.2, str(tmp_path / "weights.safetensors"), 2)
    assert len(result["ratios"]) == 2 and min(result["seconds_network_alone"]) > 0 and result["stages"]["encode"]["seconds"] > 0
    names = sorted(path.name for path in (tmp_path / "work" / "in").iterdir())
    assert len({name.partition(".")[2] for name in names}) == 4 and len(seen) == 5
    expected = [images.read_image(tmp_path / "work" / "in" / name).pixels.shape[:2] for name in names]
    shapes = sorted(plane.shape[1:] for planes in seen[1:3] for plane in planes)
    assert shapes == sorted(expected), "both halves together are the planes of the folder, once"
    assert result["megapixels"] == pytest.approx(sum(h * w for h, w in expected) / 1e6)
    drawn = [w * h / 1e6 for w, h, *_ in pipeline._KINDS]
    assert min(drawn) >= 0.02 and max(drawn) < 0.31

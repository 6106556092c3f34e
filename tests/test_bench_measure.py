"""Variants in processes, the gate before every time, and the rows that come out. Planted faults get no time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import faults, networks

from memnet_fast.bench import kept as kept_module
from memnet_fast.bench import measure, peers, prepare, truth
from memnet_fast.bench.peers import Variant
from memnet_fast.bench.process import Process, VariantFailed
from memnet_fast.bench.worker import TorchRunner
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError

CPU = torch.device("cpu")
TINY = MemNetConfig(channels=8, num_memory_blocks=1, num_recursions=1)
SHAPE = (2, 21, 26)


@pytest.fixture(scope="module")
def net():
    return networks.build(TINY)


class Here:
    """A variant in this process, behind the face of one in another. times: what its runs take, in turn."""

    def __init__(self, function, shape, milliseconds=1.0):
        self.runner = TorchRunner(function, shape, 1, "cpu")
        self.milliseconds, self.asked, self.dead = milliseconds, [], False

    def ask(self, do, seconds=0.0, file=None):
        self.asked.append(do)
        if do == "load":
            self.runner.load(np.load(file))
        elif do == "run":
            self.runner.run()
            np.save(file, self.runner.result())
        return {"peak_mib": 2.0, "before_mib": 1.0} if do == "memory" else {}

    def time(self, seconds=0.0):
        self.asked.append("time")
        return {"ms": self.milliseconds, "in_flight": 1, "others": 0.0}

    def ended(self):
        return self.dead

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def staged(net, tmp_path, monkeypatch):
    """A session whose variants run here: name -> function; the first is the subject."""

    def make(functions, shape=SHAPE, **variant):
        started: dict[str, list[Here]] = {}

        def start(self, v, shape, **more):
            started.setdefault(v.name, []).append(Here(functions[v.name], shape, 1.0 if v.name == "subject" else 3.0))
            return started[v.name][-1]

        monkeypatch.setattr(measure.Session, "start", start)
        monkeypatch.setattr(measure, "_seconds_of_rounds", lambda contest: 0.0)  # so short that every process stays
        variants = [Variant(name, variant.get("precision", "fp32")) for name in functions]
        return measure.Session(net, tmp_path, variants, threads=1), started

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", faults.faults())
def test_planted_faults_get_no_time(staged, net, fault, precision):
    wrong = faults.faults()[fault]
    session, started = staged({"subject": net, "faulty": lambda x: wrong(net, x)}, precision=precision)
    subject, faulty = measure.forward(session, "2x21x26", SHAPE, 0.0)
    assert subject["status"] == "ok" and subject["ratio"] == 1.0 and subject["errors"]["nsr"] < 2e-6
    assert faulty["status"] == "refused" and "above" in faulty["reason"]
    assert not any(key.startswith(("ms", "ratio")) for key in faulty)
    assert "time" not in started["faulty"][0].asked


@pytest.mark.parametrize("fault", faults.faults())
def test_faults_in_a_large_image_are_refused(fault, monkeypatch):
    """Where only windows are checked: the corners and the middle."""
    net = networks.build(MemNetConfig(channels=4, num_memory_blocks=1, num_recursions=1))
    monkeypatch.setattr(truth, "_WHOLE", 1000)
    shape = (2, 130, 121)
    assert len(truth.few_windows(*shape, net.config.receptive_radius)) == 5
    case = truth.NetworkCase(net, shape, CPU, thrifty=True)
    assert truth.verdict(case.errors(net), truth.limits("fp32")) is None
    wrong = faults.faults()[fault]
    assert truth.verdict(case.errors(lambda x: wrong(net, x)), truth.limits("bf16")) is not None


def test_a_wrong_subject_gives_nobody_a_ratio(staged, net):
    session, started = staged({"subject": lambda x: x, "peer": net})
    rows = measure.forward(session, "2x21x26", SHAPE, 0.0)
    assert [r["status"] for r in rows] == ["refused", "failed"] and "subject" in rows[1]["reason"]
    assert all("ratio" not in r and "ms" not in r for r in rows) and "peer" not in started


def test_a_variant_that_raises_costs_only_itself(staged, net):
    def broken(x):
        raise VariantFailed("no such kernel")

    shown = []
    session, _ = staged({"subject": net, "broken": broken, "peer": net})
    rows = measure.forward(session, "2x21x26", SHAPE, 0.0, show=shown.append)
    assert [r["status"] for r in rows] == ["ok", "failed", "ok"]
    assert [r["variant"] for r in shown] == ["broken", "subject", "peer"], "each as soon as it is done"
    assert all(r in rows for r in shown)
    assert rows[1]["reason"] == "no such kernel" and rows[2]["ratio"] == 3.0 and rows[2]["subject"] == "subject"


def test_a_subject_that_dies_is_named(staged, net, monkeypatch):
    """What was settled before stays."""
    session, started = staged({"subject": net, "peer": net, "late": net})
    time = Here.time

    def die(here, seconds=0.0):
        if here is started["late"][0]:
            here.milliseconds *= 1.3  # never settles
        if here is started["subject"][0] and started["late"][0].asked.count("time") > 12:
            raise VariantFailed("its process ended with -9")
        return time(here)

    monkeypatch.setattr(Here, "time", die)
    rows = measure.forward(session, "2x21x26", SHAPE, 60.0)
    assert [r["status"] for r in rows] == ["ok", "ok", "failed"] and rows[1]["enough"] and rows[1]["ratio"] == 3.0
    assert rows[2]["reason"] == "subject: its process ended with -9" and "ratio" not in rows[2]


def test_processes_are_renewed_where_that_is_quick(staged, net, monkeypatch):
    """After every fourth round, the subject too; not one that takes long to start. What a new one needs, it gets."""
    session, started = staged({"subject": net, "peer": net, "compiler": net})
    monkeypatch.setattr(measure, "_seconds_of_rounds", lambda contest: 1000.0)
    gated = measure.Case.gated

    def slow(self, process, variant, seconds=600.0):
        return gated(self, process, variant, seconds) | ({"start_s": 2001.0} if variant.name == "compiler" else {})

    monkeypatch.setattr(measure.Case, "gated", slow)
    rows = measure.forward(session, "2x21x26", SHAPE, 60.0)
    assert [(r["rounds"], r["processes"], r["enough"]) for r in rows] == [(12, 3, True), (12, 3, True), (12, 1, True)]
    assert [r["ratio"] for r in rows] == [1.0, 3.0, 3.0]
    assert len(started["subject"]) == 6 and len(started["peer"]) == 3 and len(started["compiler"]) == 1
    for here in started["peer"][1:]:
        assert here.asked == ["load", *["time"] * 5], "a run to warm up, and four rounds"


def test_a_process_that_cannot_be_renewed_costs_only_itself(staged, net, monkeypatch):
    session, started = staged({"subject": net, "peer": net, "other": net})
    monkeypatch.setattr(measure, "_seconds_of_rounds", lambda contest: 1000.0)
    time = Here.time

    def dies(here, seconds=0.0):
        if here in started["peer"][1:]:
            raise VariantFailed("its process ended with -9")
        return time(here)

    monkeypatch.setattr(Here, "time", dies)
    rows = measure.forward(session, "2x21x26", SHAPE, 60.0)
    assert [r["status"] for r in rows] == ["ok", "failed", "ok"] and rows[2]["rounds"] == 12
    assert rows[1]["reason"] == "its process ended with -9" and "ratio" not in rows[1]


def test_where_memory_is_short_variants_run_one_by_one(staged, net, monkeypatch):
    alive: list[str] = []
    seen: list[set[str]] = []
    functions = {"subject": net, "one": net, "two": net}
    session, _ = staged(functions)
    start = measure.Session.start

    def counted(self, v, shape, **more):
        made = start(self, v, shape, **more)
        made.close = lambda: alive.remove(v.name)
        made.__class__ = type("Counted", (Here,), {"__exit__": lambda here, *error: here.close()})
        alive.append(v.name)
        seen.append(set(alive))
        return made

    monkeypatch.setattr(measure.Session, "start", counted)
    for free, together in ((4.1, {"subject", "one", "two"}), (4.0, {"subject", "two"})):
        monkeypatch.setattr(measure, "available_bytes", lambda device, free=free: int(free * 2**20))
        rows = measure.forward(session, "2x21x26", SHAPE, 0.0)
        assert [r["ratio"] for r in rows] == [1.0, 3.0, 3.0] and not alive
        assert seen[-1] == together, free


def test_the_time_is_that_of_everything(staged, net, monkeypatch):
    """What cannot be started before its end is skipped, and what was started has at least three rounds."""
    now = [0.0]
    session, started = staged({"subject": net, "peer": net, "late": net})
    start = measure.Session.start

    def slow(self, v, shape, **more):
        now[0] += 10.0
        return start(self, v, shape, **more)

    monkeypatch.setattr(measure.Session, "start", slow)
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    rows = measure.forward(session, "2x21x26", SHAPE, 0.0, until=25.0)
    assert [r["status"] for r in rows] == ["ok", "skipped", "skipped"] and rows[0]["rounds"] >= 3
    assert "time was spent" in rows[1]["reason"] and "ratio" not in rows[1] and "late" not in started
    now[0] = 0.0
    rows = measure.forward(session, "2x21x26", SHAPE, 0.0, until=35.0)
    assert [r["status"] for r in rows] == ["ok", "ok", "skipped"]


def test_who_is_interrupted_keeps_what_was_timed(staged, net, monkeypatch):
    session, started = staged({"subject": net, "peer": net})
    time, shown = Here.time, []

    def interrupted(here, seconds=0.0):
        if here is started["peer"][0] and here.asked.count("time") == 5:
            raise KeyboardInterrupt
        here.milliseconds *= 1.1
        return time(here)

    monkeypatch.setattr(Here, "time", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure.forward(session, "2x21x26", SHAPE, 60.0, shown.append)
    assert [(r["variant"], r["rounds"], r["enough"]) for r in shown] == [("subject", 6, False), ("peer", 5, False)]


def test_results_that_are_no_numbers_are_valid_json(staged, net):
    session, _ = staged({"subject": net, "nan": lambda x: x * float("nan")})
    _, row = measure.forward(session, "2x21x26", SHAPE, 0.0)
    assert row["status"] == "refused" and row["errors"] == {"nsr": None, "line": None}
    json.dumps(row, allow_nan=False)


def test_of_the_second_content_only_a_corner_is_computed(net):
    case = truth.NetworkCase(net, (2, 50, 60), CPU, thrifty=True)
    first, second = ([tuple(t.shape) for t in truths] for truths in case._truths)
    assert first == [(1, 50, 60)] * 2 and second == [(1, 32, 32)]
    assert truth.verdict(case.errors(net), truth.limits("fp32")) is None


def test_missing_engines_are_named(net, tmp_path):
    absent = Variant("engine", "fp32", needs=("json", "no_such_engine"), install="pip install it")
    session = measure.Session(net, tmp_path, [absent], threads=1)
    (row,) = measure.forward(session, "5x5", (1, 5, 5), 0.0)
    assert (row["status"], row["reason"], row["install"]) == ("missing", "no_such_engine not installed", "pip install it")


def test_masking_says_who_does_not_listen(staged, net):
    session, _ = staged({"subject": net})
    session.isa = "avx2"
    session.variants = [Variant("subject", "fp32"), Variant("deaf", "fp32", needs=("no_such_engine",), masks=False)]
    rows = measure.forward(session, "2x21x26", SHAPE, 0.0)
    assert rows[0]["environment"]["ONEDNN_MAX_CPU_ISA"] == "AVX2" and "note" not in rows[0]
    assert "no switch" in rows[1]["note"] and rows[1]["isa"] == "avx2"


def test_right_networks_pass_the_gate_of_their_precision(net):
    case = truth.NetworkCase(net, (1, 40, 50), CPU, thrifty=True)
    for name in ("eager", "eager channels_last", "eager bf16 channels_last", "autocast bf16 channels_last"):
        precision = "bf16" if "bf16" in name else "fp32"
        run = peers.plain_on_cpu(networks.build(TINY), name)
        errors = case.errors(lambda x, run=run: run(x).float())
        assert truth.verdict(errors, truth.limits(precision)) is None, name
        if precision == "bf16":
            assert truth.verdict(errors, truth.limits("fp32")) is not None, f"{name} computes in float32"


def test_few_windows_cover_the_ends():
    for shape, halo in (((1, 600, 900), 74), ((3, 2160, 3840), 74), ((1, 20, 100_000), 10)):
        n, h, w = shape
        found = truth.few_windows(n, h, w, halo)
        assert {at.image for at in found} == {n - 1}
        assert max(at.top + at.height for at in found) == h and max(at.left + at.width for at in found) == w
        assert min(at.top for at in found) == min(at.left for at in found) == 0
    assert truth.few_windows(16, 64, 64, 74) == [truth.Window(i, 0, 0, 64, 64) for i in range(16)]


# In processes --------------------------------------------------------------------------------------------------------


def test_a_variant_in_its_own_process(net):
    eager = next(v for v in peers.peer_variants("cpu") if v.name == "eager")
    own = peers.own_variants(net, "cpu")[0]
    with measure.session(net, [own, eager], threads=1) as session:
        rows = measure.forward(session, "9x11", (1, 9, 11), 0.0)
    for row in rows:
        assert row["status"] == "ok" and row["ms"] > 0 and row["rounds"] >= 3 and row["ratio"] > 0, row
        assert row["peak_mib"] >= row["before_mib"] > 10 and row["start_s"] > 0 and 0 <= row["others"] <= 1
        assert row["errors"]["nsr"] < truth.NSR["fp32"]
    assert rows[1]["environment"] == peers.KEEP_PAGES and rows[0]["environment"] == {}
    assert json.loads(json.dumps(rows)) == rows


ENGINES = [v for v in peers.peer_variants("cpu") if v.needs and "jax" not in v.needs]


@pytest.fixture(scope="module")
def engines(net):
    with measure.session(net, ENGINES, threads=1) as made:
        yield made, made.case(SHAPE)


@pytest.mark.parametrize("variant", ENGINES, ids=lambda v: v.name)
def test_engines_compute_the_network(engines, variant):
    session, case = engines
    if absent := variant.missing():
        pytest.skip(f"needs {', '.join(absent)}: {variant.install}")
    assert session.why_not(variant) is None
    with session.start(variant, SHAPE) as process:
        row = case.gated(process, variant)
        assert row["status"] == "ok", row
        assert process.time()["ms"] > 0
        assert process.ask("memory")["peak_mib"] > 10


def test_jax_computes_the_network(net):
    variant = next(v for v in peers.peer_variants("cpu") if v.name == "JAX")
    if absent := variant.missing():
        pytest.skip(f"needs {', '.join(absent)}: {variant.install}")
    with measure.session(net, [variant], threads=1) as session, session.start(variant, SHAPE) as process:
        assert session.case(SHAPE).gated(process, variant)["status"] == "ok"


def test_processes_that_fail_say_why(tmp_path):
    settings = {"folder": str(tmp_path), "shape": [1, 4, 4], "device": "cpu", "threads": 1, "own": ["torch", "fp32", "auto"]}
    with Process(settings, {}) as process, pytest.raises(VariantFailed, match="weights.safetensors"):
        process.ask("time")
    with Process({"threads": 1}, {}) as process:
        process._process.kill()
        with pytest.raises(VariantFailed, match="ended with -9"):
            process.ask("time")


def test_an_onnx_file_is_made_meanwhile_and_its_failure_is_that_of_its_engines(net, tmp_path, monkeypatch):
    engine = Variant("engine", "fp32", files=("onnx",))
    made = tmp_path / "memnet_fast"
    made.mkdir()
    (made / "__init__.py").write_text("raise RuntimeError('no exporter here')\n")
    monkeypatch.setattr(prepare, "import_path", lambda: str(tmp_path))
    with measure.session(net, [engine], threads=1) as session:
        assert session.preparation is not None and session.preparation._process is not None
        why = session.why_not(engine)
        assert why == {"status": "failed", "reason": "the onnx file could not be made: RuntimeError: no exporter here"}
        assert session.why_not(engine) == why and session.why_not(Variant("other", "fp32")) is None
    (made / "__init__.py").write_text("import time\ntime.sleep(60)\n")
    with measure.session(net, [engine], threads=1) as session:
        assert session.preparation is not None
        process = session.preparation._process
    assert process is not None and process.poll() == -9, "it ends with the session"


def test_processes_that_hang_are_left(tmp_path):
    (tmp_path / "memnet_fast").mkdir()
    (tmp_path / "memnet_fast" / "__init__.py").write_text("import time\ntime.sleep(60)\n")
    settings = {"folder": str(tmp_path), "shape": [1, 4, 4], "device": "cpu", "threads": 1, "own": ["cpu", "fp32", "auto"]}
    with Process(settings, {}, package=tmp_path) as process:
        with pytest.raises(VariantFailed, match="no answer to 'time' within 1 seconds"):
            process.ask("time", seconds=1.0)
        with pytest.raises(VariantFailed, match="ended with -9"):  # and not a late answer
            process.ask("time")
        assert process.ended()


def test_the_current_folder_lends_no_package(tmp_path, monkeypatch):
    (tmp_path / "memnet_fast").mkdir()
    (tmp_path / "memnet_fast" / "__init__.py").write_text("raise ImportError('this is another package')\n")
    monkeypatch.chdir(tmp_path)
    settings = {"folder": str(tmp_path), "shape": [1, 4, 4], "device": "cpu", "threads": 1, "own": ["torch", "fp32", "auto"]}
    with Process(settings, {}) as process, pytest.raises(VariantFailed, match="weights.safetensors"):
        process.ask("time")


# What is kept --------------------------------------------------------------------------------------------------------


def test_the_truth_is_kept_for_its_network_only(net, tmp_path, monkeypatch):
    shape = (1, 12, 14)
    first = truth.NetworkCase(net, shape, CPU, thrifty=True, cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(truth.NetworkCase, "_truth", lambda *a: pytest.fail("it was there already"))
    again = truth.NetworkCase(net, shape, CPU, thrifty=True, cache=tmp_path)
    assert again.errors(net) == first.errors(net) and truth.verdict(again.errors(lambda x: x), truth.limits("bf16"))
    monkeypatch.undo()
    other = networks.build(TINY, seed=1)
    case = truth.NetworkCase(other, shape, CPU, thrifty=True, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and truth.verdict(case.errors(other), truth.limits("fp32")) is None
    assert truth.verdict(case.errors(net), truth.limits("fp32")) is not None
    monkeypatch.setattr(kept_module.Path, "read_bytes", lambda path: b"other sources")
    assert kept_module.Kept(tmp_path, net).get("truth", [truth], lambda: b"made") == b"made"


def test_selection_of_peers():
    variants = peers.peer_variants("cpu")

    def names(text):
        return [v.name for v in peers.select(variants, text)]

    assert names("all") == [v.name for v in variants] and names("none") == []
    assert names("eager channels_last") == ["eager channels_last"] and names("NCNN") == ["ncnn"]
    assert names("openvino latency,onnx") == ["ONNX Runtime", "OpenVINO latency"]
    assert len(names("openvino")) == 4 and not any("compile" in n for n in names("fast"))
    for text in ("", "ncnn,", "tensorflow"):
        with pytest.raises(InputError, match="no peer"):
            peers.select(variants, text)

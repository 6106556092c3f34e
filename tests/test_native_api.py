"""The native module's boundary: argument errors, threads, the loader, one OpenMP runtime."""

import json
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import native_harness as nh
import numpy as np
import pytest
import torch
from native_harness import Plan, single

from memnet_fast import native

ARGUMENTS = ["ops", "n", "h", "w", "cin", "cout", "cp", "num_slots", "workspace_ptr", "workspace_bytes"]
ARGUMENTS += ["image_ptr", "out_ptr", "algorithm", "isa", "threads"]


def small_plan(**options) -> Plan:
    """All four operations on 20 channels."""
    generator = torch.Generator().manual_seed(0)
    plan = Plan(options.pop("n", 2), 9, 11, 20, **options)
    plan.set_image(torch.rand(plan.n, 1, 9, 11, generator=generator).double())

    def conv() -> torch.Tensor:
        return single(20, 20, 3, 3, generator=generator, spread=0.1)

    def channel() -> torch.Tensor:
        return single(20, generator=generator, spread=0.1) + 0.5

    plan.first_conv(0, torch.ones(1), torch.zeros(1), single(20, 1, 3, 3, generator=generator), channel())
    plan.residual_block(0, 1, channel(), channel(), conv(), channel(), conv(), channel())
    pair = torch.stack([channel(), channel()])
    plan.gate([0, 1], 2, pair, pair, single(20, 40, 1, 1, generator=generator, spread=0.1), channel())
    weight = single(1, 20, 3, 3, generator=generator)
    plan.reconstruct([2], channel()[None], channel()[None], weight, torch.ones(1), torch.ones(1), 1.0)
    return plan


def test_module_describes_itself():
    module = native.module()
    assert native.why_missing() is None
    assert module.version() == version("memnet-fast")
    assert module.compiler()
    assert module.isas()[-1] == "baseline"
    assert set(module.isas()) <= {"avx512", "avx2", "baseline"}
    assert module.op_dtype.itemsize == 96


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "at least 1"),
        ({"h": -1}, "at least 1"),
        ({"cin": 0}, "cin"),
        ({"cout": 1 << 20}, "cout"),
        ({"cp": 20}, "cp"),
        ({"num_slots": 0}, "num_slots"),
        ({"num_slots": 2}, "slot 2 is not in 0..1"),
        ({"workspace_ptr": 0}, "workspace pointer is null"),
        ({"workspace_bytes": 64}, "are needed"),
        ({"image_ptr": 0}, "null"),
        ({"out_ptr": 0}, "null"),
        ({"algorithm": "fft"}, "algorithm"),
        ({"isa": "sse9"}, "isa"),
        ({"threads": 0}, "threads"),
        ({"threads": 5000}, "threads"),
        ({"h": 1 << 40, "w": 1 << 40}, "overflow"),
        ({"n": 1 << 33, "h": 1 << 14, "w": 1 << 14}, "overflow"),
    ],
)
def test_bad_arguments_raise_value_error(change, message):
    plan = small_plan()
    arguments = dict(zip(ARGUMENTS, plan.arguments(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        plan.module.run(**arguments)
    assert np.isnan(plan.out.data).all(), "something ran"


@pytest.mark.parametrize("name", ["workspace_ptr", "image_ptr", "out_ptr"])
def test_misaligned_pointers_raise(name):
    plan = small_plan()
    arguments = dict(zip(ARGUMENTS, plan.arguments(), strict=True))
    arguments[name] += 2
    with pytest.raises(ValueError, match="not aligned"):
        plan.module.run(**arguments)


@pytest.mark.parametrize(
    ("index", "field", "value", "message"),
    [
        (0, "kind", 7, "unknown kind"),
        (0, "dst", 4, "slot"),
        (0, "weight_a", 0, "null"),
        (0, "bias_a", 3, "aligned"),
        (1, "src", -1, "slot"),
        (1, "dst", 0, "differ"),
        (1, "weight_b", 0, "null"),
        (2, "dst", 1, "must not be a source"),
        (2, "num_src", 0, "num_src"),
        (2, "srcs", 0, "null"),
        (3, "kernel", 5, "kernel"),
        (3, "head_weights", 0, "null"),
    ],
)
def test_bad_operations_raise_value_error(index, field, value, message):
    plan = small_plan()
    plan.ops[index][field] = value
    with pytest.raises(ValueError, match=f"op {index}: .*{message}"):
        plan.module.run(*plan.arguments())
    assert np.isnan(plan.out.data).all(), "something ran"


def test_global_skip_needs_matching_channels():
    plan = small_plan(cout=1)
    arguments = dict(zip(ARGUMENTS, plan.arguments(), strict=True)) | {"cin": 3, "cout": 5, "workspace_bytes": 1 << 40}
    with pytest.raises(ValueError, match="cin == cout"):
        plan.module.run(**arguments)


def test_ops_of_another_dtype_are_refused():
    plan = small_plan()
    arguments = plan.arguments()
    with pytest.raises(TypeError):
        plan.module.run(np.zeros(3, np.float32), *arguments[1:])
    with pytest.raises(ValueError, match="one-dimensional"):
        plan.module.run(arguments[0][None], *arguments[1:])


def test_workspace_size_is_exact():
    """One byte less is refused; the guard bands of Plan.run say that one byte more is not used."""
    plan = small_plan()
    arguments = dict(zip(ARGUMENTS, plan.arguments(), strict=True))
    with pytest.raises(ValueError, match="are needed"):
        plan.module.run(**(arguments | {"workspace_bytes": plan.bytes - 1}))
    plan.run()


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_timed_run_is_the_same_run(algorithm):
    plain, timed = small_plan(algorithm=algorithm).run(), small_plan(algorithm=algorithm)
    times = timed.module.run_timed(*timed.arguments())
    assert times.shape == (4, 1 + timed.threads) and times.dtype == timed.module.times_dtype
    whole, threads = times[:, 0], times[:, 1:]
    assert (whole["begin"] < whole["end"]).all() and (whole["end"][:-1] <= whole["begin"][1:]).all()
    for one, each in zip(whole, threads, strict=True):
        took_part = each[each["begin"] > 0]
        assert len(took_part) >= 1
        assert (one["begin"] <= took_part["begin"]).all() and (took_part["end"] <= one["end"]).all()
        # A lap is all that was done since the one before, so the phases of a region add up to its time; an operation of two
        # regions (direct) lets go of the time between them.
        assert (took_part["phases"] >= 0).all()
        assert (took_part["phases"].sum(1) <= took_part["end"] - took_part["begin"]).all()
        assert each["flop"].sum() > 0
    assert torch.equal(plain.output(), timed.output())


def test_auto_is_the_best_isa():
    best = small_plan(isa=nh.isas()[0]).run().output()
    assert torch.equal(small_plan(isa="auto").run().output(), best)


def test_calls_in_many_threads_do_not_disturb_each_other():
    expected = small_plan(algorithm="winograd").run().output()
    plans = [small_plan(algorithm="winograd") for _ in range(4)]

    def work(plan: Plan) -> None:
        for _ in range(20):
            plan.run()

    threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for plan in plans:
        assert torch.equal(plan.output(), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_one_openmp_runtime_in_the_process():
    code = """
import json
from memnet_fast import native
import torch
assert native.why_missing() is None, native.why_missing()
torch.ones(300, 300) @ torch.ones(300, 300)
maps = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(json.dumps(sorted(path for path in maps if any(name in path for name in ("libgomp", "libomp", "libiomp")))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)) == 1, done.stdout


def _reason(tmp_path: Path, info: dict | None, broken: bool) -> dict:
    """Imports a copy of native.py in a package of its own whose native module is absent or cannot be loaded."""
    package = tmp_path / "memnet_copy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "native.py").write_text(Path(native.__file__).read_text())
    if info is not None:
        (package / "_build_info.json").write_text(json.dumps(info))
    if broken:
        (package / "_native.py").write_text("raise ImportError('libstrange.so.7: cannot open shared object file')")
    code = """
import json
from memnet_copy import native
try:
    native.module()
    raised = None
except ImportError as error:
    raised = str(error), str(error.__cause__)
print(json.dumps({"why": native.why_missing(), "raised": raised}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_missing_module_says_why(tmp_path):
    answer = _reason(tmp_path, {"native": False, "reason": "cmake was not found"}, broken=False)
    assert "cmake was not found" in answer["why"]
    assert answer["raised"][0] == answer["why"]


def test_broken_module_keeps_the_original_error(tmp_path):
    answer = _reason(tmp_path, {"native": True, "reason": None}, broken=True)
    assert "libstrange.so.7: cannot open shared object file" in answer["why"]
    assert "libstrange.so.7" in answer["raised"][1]


@pytest.mark.parametrize("name", ["native", "native_cuda"])
def test_a_signal_during_the_import_does_not_switch_the_module_off(tmp_path, name):
    package = tmp_path / "memnet_copy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / f"{name}.py").write_text(Path(native.__file__).with_name(f"{name}.py").read_text())
    (package / f"_{name}.py").write_text(
        "import sys\nif not hasattr(sys, 'met'):\n    sys.met = True\n    raise ImportError('failed') from SystemExit(143)\n"
    )
    code = f"""
from memnet_copy import {name} as loader
try:
    loader.why_missing()
except SystemExit as end:
    print(end.code, loader.why_missing())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "143 None\n"


def test_never_built_module_is_reported(tmp_path):
    assert "not built or installed" in _reason(tmp_path, None, broken=False)["why"]

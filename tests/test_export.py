"""ONNX and .pt2: the same function as the reference at any size, in other programs; whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import checkpoints as make
from support import networks
from test_cli_convert import run  # noqa: F401  (a fixture)

from memnet_fast import cli, weights
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import MissingExtra, OutputError
from memnet_fast.export import export_onnx, export_program

SIZES = ((1, 1, 1), (2, 3, 1), (1, 5, 19), (2, 17, 23))
# Between them: biases and none, one and three channels, every kind of sharing, one and many heads, clamped and not.
TINY = MemNetConfig(channels=4, num_memory_blocks=1, num_recursions=1)
CHOSEN = ("official", "colour", "shared_head_bn", "lornatang")


def _unclamped(config: MemNetConfig) -> torch.nn.Module:
    """A network whose results lie on both sides of 0 and 1."""
    net = networks.build(config)
    with torch.no_grad():
        net.recon.weight.mul_(8)
    return net


def _near(y: torch.Tensor, truth: torch.Tensor, own: torch.Tensor) -> None:
    """Twice the error of PyTorch's float32, and four rounding units for where that happens to be none."""
    limit = 2 * float((own.double() - truth).abs().max()) + 4 * 2**-23 * max(1.0, float(truth.abs().max()))
    assert y.shape == truth.shape and float((y.double() - truth).abs().max()) <= limit


@pytest.fixture
def ort():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", CHOSEN)
def test_onnx(ort, tmp_path, name):
    net = _unclamped(networks.VARIANTS[name])
    path = tmp_path / "net.onnx"
    export_onnx(net.train(), path)
    assert net.training
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (image,), (restored,) = session.get_inputs(), session.get_outputs()
    channels = net.config.in_channels, net.config.out_channels
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["N", channels[0], "H", "W"])
    assert (restored.name, restored.type, restored.shape) == ("restored", "tensor(float)", ["N", channels[1], "H", "W"])
    outside = False
    for n, h, w in SIZES:
        x = networks.image(n, channels[0], h, w, seed=h)
        truth, own = networks.oracle(net, x), net.eval()(x)
        outside |= bool(((truth < 0) | (truth > 1)).any())
        y = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
        _near(y, truth.clamp(0, 1), own.clamp(0, 1))
        assert float(y.min()) >= 0 and float(y.max()) <= 1
    assert outside or net.config.clamp


@pytest.mark.parametrize("name", CHOSEN)
def test_program(tmp_path, name):
    net = _unclamped(networks.VARIANTS[name])
    path = tmp_path / "net.pt2"
    export_program(net.bfloat16().float(), path)
    module = torch.export.load(path).module()
    for n, h, w in SIZES:
        x = networks.image(n, net.config.in_channels, h, w, seed=h)
        _near(module(x), networks.oracle(net, x), net(x))


def test_program_in_a_fresh_process_without_this_package(tmp_path):
    net = networks.build(networks.SMALL)
    export_program(net, tmp_path / "net.pt2", {"author": "a test"})
    x = networks.image(1, 1, 9, 7)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys; sys.modules['memnet_fast'] = None\n"
        "import numpy as np, torch\nextra = {'memnet_fast.json': ''}\n"
        "module = torch.export.load('net.pt2', extra_files=extra).module()\n"
        "np.save('y.npy', module(torch.from_numpy(np.load('x.npy'))).numpy())\nprint(extra['memnet_fast.json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    _near(torch.from_numpy(np.load(tmp_path / "y.npy")), networks.oracle(net, x), net(x))
    metadata = json.loads(done.stdout)
    assert json.loads(metadata["info"]) == {"author": "a test"}
    assert MemNetConfig.from_dict(json.loads(metadata["config"])) == networks.SMALL


def test_metadata_of_onnx(ort, tmp_path):
    import onnx

    net = networks.build(networks.SMALL)
    export_onnx(net, tmp_path / "net.onnx", {"psnr": 30.5})
    model = onnx.load(tmp_path / "net.onnx")
    metadata = {p.key: p.value for p in model.metadata_props}
    assert json.loads(metadata["info"]) == {"psnr": 30.5}
    assert MemNetConfig.from_dict(json.loads(metadata["config"])) == networks.SMALL
    tensors = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert metadata["sha256"] == weights.digest(tensors)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)] and model.ir_version == 8
    assert model.producer_name == "memnet_fast"
    assert not any(t.external_data for t in model.graph.initializer), "one file holds everything"


def test_other_eps_is_exported_as_it_is(ort, tmp_path):
    net = networks.build(TINY)
    net.first.bn.eps = 0.05
    export_onnx(net, tmp_path / "net.onnx")
    x = networks.image(1, 1, 8, 8)
    y = ort.InferenceSession(tmp_path / "net.onnx").run(None, {"image": x.numpy()})[0]
    _near(torch.from_numpy(y), networks.oracle(net, x).clamp(0, 1), net(x).clamp(0, 1))


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_command_line_gives_the_same_bytes_in_another_process(request, tmp_path, ending):
    """Also: nothing of the machine is inside."""
    if ending == "onnx":
        request.getfixturevalue("ort")
    source, out = tmp_path / "x.caffemodel", tmp_path / f"out.{ending}"
    source.write_bytes(make.caffemodel(make.official_blobs(1, 2, 4)))
    command = [sys.executable, "-c", "from memnet_fast import cli; cli.main()", "convert", str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    assert "official .caffemodel, M1R2" in told[0] and told[1].endswith(f"wrote {out}") and len(told) == 2 and done.stdout == ""
    loaded = weights.load_any(source)
    origin = {"converted_from": {"file": source.name, "sha256": loaded.sha256, "recognised": loaded.line}}
    (export_onnx if ending == "onnx" else export_program)(loaded.net, tmp_path / f"here.{ending}", origin)
    data = out.read_bytes()
    assert hashlib.sha256(data).digest() == hashlib.sha256((tmp_path / f"here.{ending}").read_bytes()).digest()
    for secret in (Path(cli.__file__).parents[2], Path(torch.__file__).parent, tmp_path):
        assert str(secret).encode() not in data


def test_wrong_results_are_not_written(ort, tmp_path, monkeypatch):
    real = ort.InferenceSession

    class Wrong(real):
        def run(self, *arguments):
            return [y + np.float32(1e-3) for y in super().run(*arguments)]

    path = tmp_path / "net.onnx"
    path.write_bytes(b"older")
    monkeypatch.setattr(ort, "InferenceSession", Wrong)
    with pytest.raises(OutputError, match=r"ONNX Runtime differs from the reference by 0.001 in an image \[1, 1, 1, 1\]"):
        export_onnx(networks.build(TINY), path)
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["net.onnx"]


def test_networks_that_are_not_finite_are_not_exported(tmp_path):
    net = networks.build(TINY)
    net.recon.bias[0] = float("nan")
    with pytest.raises(OutputError, match="not finite"):
        export_program(net, tmp_path / "net.pt2")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(run, tmp_path, monkeypatch, package):  # noqa: F811
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install memnet_fast\[onnx\]"):
        export_onnx(networks.build(TINY), tmp_path / "net.onnx")
    source = tmp_path / "x.safetensors"
    weights.save_weights(networks.build(TINY), source)
    code, out, err = run("convert", source, tmp_path / "net.onnx")
    assert code == 2 and out == "" and "memnet_fast[onnx]" in err and len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["x.safetensors"]

"""The other commands: help, version, models, doctor, demo; and what all commands have in common."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.restoring import small_net

import memnet_fast
from memnet_fast import cli, weights
from memnet_fast.cli.messages import columns, shown
from memnet_fast.cli.models import psnr_text
from memnet_fast.degrade import gaussian
from memnet_fast.restore import Restorer


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_end_politely", lambda state: None)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A small network in the place of the bundled denoiser."""
    folder = tmp_path / "weights"
    folder.mkdir()
    save = folder / "memnet_m6r6.denoise.safetensors"
    weights.save_weights(small_net(), save, {"psnr": {"15": 31.5, "30": 28.125}})
    monkeypatch.setattr(weights, "_FOLDER", folder)
    return save


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["denoise", "--help"], ["sr", "--help"], ["doctor", "--help"], ["denoise"]]
)
def test_help_and_version_do_not_wait_for_torch(arguments):
    code = (
        "import sys\nfrom memnet_fast.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'rich', 'skimage'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_names_every_command_and_version_the_version(run):
    code, out, _ = run("--help")
    assert code == 0 and all(f"  {name} " in out for name in ("denoise", "deblock", "sr", "models", "doctor", "demo"))
    assert run("--version") == (0, f"memnet, version {memnet_fast.__version__}\n", "")
    assert run("denoise", "--version")[1] == f"memnet, version {memnet_fast.__version__}\n"


def test_no_command_and_a_wrong_one_exit_2(run):
    code, out, err = run()
    assert (code, out) == (2, "") and "Usage: memnet" in err
    code, _, err = run("denoize")
    assert code == 2 and err.startswith("memnet: error: No such command 'denoize'") and err.count("\n") == 1


def test_an_unforeseen_error_is_one_line_unless_verbose(run, monkeypatch, bundled):
    def broken(*args, **kwargs):
        raise RuntimeError("a\nbug")

    monkeypatch.setattr("memnet_fast.metrics.scikit_image", broken)
    code, out, err = run("demo")
    assert (code, out, err) == (1, "", "memnet: error: unexpected RuntimeError: a bug (-v shows where)\n")
    assert "Traceback" in run("demo", "-v")[2]
    monkeypatch.setattr("memnet_fast.models.list_models", broken)
    assert run("models")[2] == "memnet: error: unexpected RuntimeError: a bug\n"  # it has no -v


def test_models_lists_parameters_tasks_and_psnr(run, bundled):
    code, out, _ = run("models")
    lines = [line.split(maxsplit=3) for line in out.splitlines()]
    rows = {line[0]: line[1:] for line in lines}
    assert code == 0
    assert rows["memnet_m6r6"] == ["695,497", "-", "no weights: a configuration only"]
    assert rows["memnet_m10r10"][0] == "1,422,029"
    count = sum(p.numel() for p in small_net().parameters())
    assert rows["memnet_m6r6.denoise"] == [f"{count:,}", "denoise", "15 31.50, 30 28.12"]


def test_psnr_tables_of_both_shapes_are_shown():
    assert psnr_text({"set12": {"30": 28.1}, "bsd68": {"30": 27.0}}) == "set12: 30 28.10; bsd68: 30 27.00"
    assert psnr_text(None) == psnr_text({}) == "not stated"


def test_models_says_that_bundled_weights_are_damaged(run, bundled):
    data = bytearray(bundled.read_bytes())
    data[-1] ^= 1
    bundled.write_bytes(bytes(data))
    code, _, err = run("models")
    assert code == 2 and "digest" in err


@pytest.mark.parametrize("photo", ["chelsea", "camera"])
def test_demo_prints_what_it_measured(run, bundled, tmp_path, photo):
    data = pytest.importorskip("skimage.data")
    metrics = pytest.importorskip("skimage.metrics")
    code, out, err = run("demo", "-o", str(tmp_path / "o"), "--photo", photo, "--sigma", "25")
    assert (code, err) == (0, "")
    clean = torch.from_numpy(getattr(data, photo)().copy())
    clean = (clean if clean.ndim == 3 else clean[..., None]).permute(2, 0, 1).float() / 255
    noisy = gaussian(clean, 25, torch.Generator().manual_seed(0))
    restored = Restorer("denoise", color="rgb")(noisy)
    before, after = (
        metrics.peak_signal_noise_ratio(clean.double().numpy(), x.double().numpy(), data_range=1) for x in (noisy, restored)
    )
    assert f"{before:.2f} dB noisy, {after:.2f} dB restored ({after - before:+.2f})" in out
    assert "megapixels/s" in out and "cpu, fp32, winograd" in out and "memnet_m6r6.denoise" in out
    h, w = clean.shape[1:]
    with Image.open(tmp_path / "o" / "restored.png") as image:
        expected = (restored.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(image), expected if expected.shape[2] == 3 else expected[..., 0])
    with Image.open(tmp_path / "o" / "before_after.png") as strip:
        original = (clean * 255).round().byte().permute(1, 2, 0).numpy()
        shown_last = np.asarray(strip)[-h:, -w:]
        assert np.array_equal(shown_last, original if original.shape[2] == 3 else original[..., 0])


def test_demo_without_scikit_image_says_how_to_install_it(run, bundled, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    code, _, err = run("demo", "-o", str(tmp_path / "o"))
    assert code == 2 and "pip install 'memnet-fast[demo]'" in err and not (tmp_path / "o").exists()


def test_the_page_without_gradio_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, out, err = run("demo", "--ui")
    assert (code, out) == (2, "") and "pip install 'memnet-fast[demo]'" in err and err.count("\n") == 1
    assert run("demo", "--port", "8000")[0] == 2


def test_doctor_as_text_and_json(run, bundled):
    code, out, _ = run("doctor")
    assert code == 0 and "weights memnet_m6r6.denoise  ok" in out and "restoring" in out
    code, out, _ = run("doctor", "--json")
    assert code == 0 and json.loads(out)["restore"]["ok"] is True


def test_doctor_exits_5_where_nothing_can_be_restored(run, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "_FOLDER", tmp_path)
    code, out, _ = run("doctor")
    assert code == 5 and "restoring" in out and "not bundled" in out


def test_a_recipe_that_cannot_be_copied_there_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "cp", "denoise")[0] == 0 and run("recipes", "cp", "denoise")[0] == 2
    for target, code, message in (("denoise.toml/x", 3, "Not a directory"), ("n" * 300, 3, "File name too long")):
        found, _, err = run("recipes", "cp", "denoise", target)
        assert found == code and message in err and err.startswith("memnet: error: cannot write") and err.count("\n") == 1


def test_a_reader_that_leaves_gets_no_complaint():
    script = "from memnet_fast.cli import main; main(['models'])"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        child.stdout.close()
        err = child.stderr.read()
    assert child.returncode == 1 and err == ""


def test_text_is_printed_without_control_characters():
    assert shown("a\x1b[1mb\nc\ud8ff é") == "a\\x1b[1mb\\nc\\ud8ff é"


def test_columns_are_aligned():
    assert columns([("a", "bb", "c"), ("ddd", "e", "")]) == ["a    bb  c", "ddd  e"]

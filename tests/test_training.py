"""The parts of training: losses, growing, images, recipes, optimisers, the weight file of a result."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import checkpoints
from support.recipes import image_folder, images, recipe, recipe_file

from memnet_fast import weights
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError
from memnet_fast.evaluation import mean_psnr
from memnet_fast.reference import MemNet
from memnet_fast.tasks import TASKS
from memnet_fast.training import export
from memnet_fast.training.images import digest, load_gray_images
from memnet_fast.training.losses import multi_supervised
from memnet_fast.training.recipe import Stage, bundled, differences, load_recipe
from memnet_fast.training.results import grow, load_result, save_result

TINY = MemNetConfig(channels=8, num_memory_blocks=2, num_recursions=1)


@pytest.mark.parametrize("order", ["long_short", "short_long"])
def test_growing_keeps_the_function(order: str) -> None:
    torch.manual_seed(0)
    net = MemNet(MemNetConfig(channels=8, num_memory_blocks=3, num_recursions=2, gate_order=order))  # type: ignore[arg-type]
    for _ in range(2):
        net(torch.rand(3, 1, 16, 16))
    net.eval()
    grown = grow(net, 4).eval()
    x = torch.rand(2, 1, 11, 13)
    assert grown.config.num_recursions == 4
    torch.testing.assert_close(grown(x), net(x), rtol=1e-5, atol=1e-6)
    grown.train()
    grown(x).sum().backward()
    # The new memories are read with zero weights, and must learn all the same.
    assert grown.blocks[0].gate.conv.weight.grad[:, 3 * 8 :].abs().sum() > 0
    with pytest.raises(InputError):
        grow(grown, 2)


def test_the_loss_is_equation_10() -> None:
    """alpha / 2N |y - gt|^2 + (1 - alpha) / 2MN sum |y_m - gt|^2, alpha = 1 / (M + 1), over N patches."""
    heads = [torch.rand(3, 1, 5, 7, dtype=torch.float64) for _ in range(4)]
    weights_, clean = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), torch.rand(3, 1, 5, 7, dtype=torch.float64)
    y = sum(w * h for w, h in zip(weights_, heads, strict=True))
    n = len(clean)
    for given, alpha in ((0, 1 / 5), (0.6, 0.6), (1, 1)):
        expected = alpha / 2 / n * ((y - clean) ** 2).sum() + (1 - alpha) / (2 * 4 * n) * sum(
            ((h - clean) ** 2).sum() for h in heads
        )
        loss = multi_supervised(heads, weights_, clean, "square", given)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    single = multi_supervised(heads[:1], None, clean, "square").double()
    torch.testing.assert_close(single, ((heads[0] - clean) ** 2).sum() / 2 / n, rtol=1e-6, atol=0)
    near = multi_supervised([clean + 0.1], None, clean, "charbonnier")
    assert float(near) == pytest.approx((0.01 + 1e-6) ** 0.5)
    with pytest.raises(InputError, match="charbonnier"):
        multi_supervised(heads, weights_, clean, "cubic")


def test_rates_follow_the_schedule() -> None:
    cosine = Stage(1, 110, lr=2.0, warmup=10)
    assert [cosine.rate(0), cosine.rate(9), cosine.rate(10)] == pytest.approx([0.2, 2.0, 2.0])
    assert cosine.rate(60) == pytest.approx(2 * 0.505) and cosine.rate(110) == pytest.approx(0.02)
    steps = Stage(1, 100, lr=1.0, warmup=0, schedule="step", decay_every=10)
    assert [steps.rate(k) for k in (0, 9, 10, 29)] == pytest.approx([1, 1, 0.1, 0.01])
    assert Stage(1, 100, lr=0.5, warmup=0, schedule="constant").rate(99) == 0.5


def test_folder_is_read_whole_and_bad_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = image_folder(tmp_path / "data")
    for k in range(20):
        Image.fromarray(np.full((30, 31, 3), (k, 2 * k, 0), np.uint8)).save(folder / f"colour{k:02}.png")
    (folder / "below").mkdir()
    Image.fromarray(np.zeros((20, 20), bool)).save(folder / "below" / "bits.tif")
    (folder / "notes.txt").write_text("not an image")
    for k in range(10):
        Image.fromarray(np.full((40, 40), k, np.uint8)).save(folder / f"gray{k}.png")
    Image.fromarray(np.full((40, 40), 50_000, np.uint16)).save(folder / "deep.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:100])
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(folder / "tiny.png")
    assert "JPEG" not in (load_gray_images(folder, 10) and caplog.text)
    Image.fromarray(np.full((30, 30, 3), 99, np.uint8)).save(folder / "photograph.JPG")
    found = load_gray_images(folder, 10)
    assert len(found) == 34 and all(i.dtype == torch.uint8 and i.ndim == 2 for i in found)
    assert "3 of 37 images" in caplog.text and "broken.png" in caplog.text
    assert "1 of 34 images" in caplog.text and "are JPEG files" in caplog.text
    with pytest.raises(InputError, match="25 of 37 images"):
        load_gray_images(folder, 31)
    assert digest(found) == digest(load_gray_images(folder, 10)) != digest(found[:-1]) != digest(found[1:])


@pytest.mark.parametrize("name", list(bundled()))
def test_bundled_recipes_are_sound_and_are_themselves_again(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.task == name.split("_")[0] and loaded.network.num_recursions == 6
    assert re.fullmatch(r"# .+\.", bundled()[name].read_text().splitlines()[0])  # what `memnet recipes` shows: a sentence
    assert not differences(loaded.to_dict(), load_recipe(name, ("data=x", "output=y", "save_minutes=1")).to_dict())
    if name.endswith("_paper"):
        (stage,) = loaded.stages
        assert (stage.patch, stage.batch, stage.lr, stage.optimizer, stage.loss) == (31, 64, 0.1, "sgd", "square")
        assert stage.clip / stage.rate(0) == pytest.approx(0.1) and loaded.head_start == 1


def test_overrides_hold_for_all_stages_or_for_one(tmp_path: Path) -> None:
    both = recipe(tmp_path, training__batch=6)
    assert [s.batch for s in both.stages] == [6, 6]
    one = recipe(tmp_path, stages__1__batch=6)
    assert [s.batch for s in one.stages] == [2, 6]
    assert load_recipe("sr", ("training.lr=0.5",)).stages[1].lr == 0.5
    assert load_recipe("denoise", ("data=some where/x",)).data == "some where/x"
    assert differences(both.to_dict(), one.to_dict()) == ["stages.0.batch: 6 -> 2"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=true", "seed must be a whole number"),
        ("seed=-1", "must not be negative"),
        ("sed=1", "unknown: sed"),
        ("training.momentum=1", "unknown: stages.0.momentum"),
        ("training.lr='fast'", "lr must be a number"),
        ("training.lr=nan", "lr must be a number"),
        ("training.lr=-1.0", "lr must not be negative"),
        ("training.batch=0", "batch must be at least 1"),
        ("training.ema=1.0", "ema"),
        ("training.alpha=1.5", "alpha must be between 0 and 1"),
        ("training.alpha=-0.1", "alpha must be between 0 and 1"),
        ("training.memory=thin", "memory must be one of"),
        ("training.jpeg=gpu", "jpeg must be one of auto, file, device"),
        ("training.minutes=-1", "minutes must not be negative"),
        ("training.minutes=inf", "minutes must be finite"),
        ("training.compile=1", "compile must be true or false"),
        ("training.sync_batchnorm=true", "sync_batchnorm needs"),
        ("training.statistics=none", "statistics must be one of batch, fixed"),
        ("training.statistics=fixed", "stage 1 has statistics = 'fixed'"),
        ("stages.1.statistics=fixed", "stage 2 has statistics = 'fixed'"),
        ("training={statistics='fixed', sync_batchnorm=true, memory='plain'}", "takes none"),
        ("training.schedule=step", "decay_every"),
        ("training={clip_by_lr=true, lr=0.0}", "clip_by_lr divides by lr"),
        ("levels.only=[30, 'x']", "only must be a list of numbers"),
        ("levels.only=[300]", "0..255"),
        ("levels.low=60", "above the highest"),
        ("network.preset=memnet_m9", "unknown preset"),
        ("network.num_recursions=2", "recursions of the network"),
        ("network.in_channels=3", "in_channels"),
        ("stages.5.steps=1", "names nothing"),
        ("stages=[]", "no stage"),
        ("task=colourise", "unknown task"),
        ("output", "KEY=VALUE"),
    ],
)
def test_wrong_recipes_are_named(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        load_recipe(recipe_file(tmp_path), (override,))
    assert len(str(raised.value).splitlines()) == 1


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    files = {b"a = ": "not a TOML", b"\xff\xfe": "not a TOML", b"": "names no task", b'task = "sr"': "no stage"}
    for content, said in files.items():
        (tmp_path / "r.toml").write_bytes(content)
        with pytest.raises(InputError, match=said):
            load_recipe(tmp_path / "r.toml")
    with pytest.raises(InputError, match="cannot read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(("task", "label"), [("denoise", "sigma 50"), ("deblock", "Q 10"), ("sr", "x3")])
def test_export_states_what_was_measured(tmp_path: Path, task: str, label: str) -> None:
    torch.manual_seed(0)
    net = MemNet(TINY).eval()
    history = [{"name": "a", "hours": 0.5}, {"name": "b", "hours": 0.25, "task": task, "images": 2}]
    save_result(net, history, tmp_path / "r")
    words = ["--validation-name", "V", "--data", "D", "--hardware", "H", "--commit", "0"]
    folder = image_folder(tmp_path / "data")
    export.main([str(tmp_path / "r"), str(tmp_path / "w"), "--validation", str(folder), *words], standalone_mode=False)
    info = weights.load_info(tmp_path / "w")
    assert info["task"] == task and info["hours"] == 0.75 and len(info["head_weights"]) == 2 and info["recipe"] == history
    level = TASKS[task].levels[[TASKS[task].label(v) for v in TASKS[task].levels].index(label)]
    restored, degraded = mean_psnr(net, images(), TASKS[task], level)
    assert info["psnr"]["V"][label] == pytest.approx(restored, abs=2e-3)
    assert info["psnr_degraded"]["V"][label] == pytest.approx(degraded, abs=1e-3)
    assert 0 < info["ssim"]["V"][label] < 1 and 0 < info["ssim_degraded"]["V"][label] < 1
    exact = weights.load_weights(tmp_path / "w").state_dict()
    export.main(
        [str(tmp_path / "r"), str(tmp_path / "h"), "--half", "--validation", str(folder), *words], standalone_mode=False
    )
    half = weights.load_weights(tmp_path / "h").state_dict()
    assert (tmp_path / "h").stat().st_size < 0.75 * (tmp_path / "w").stat().st_size
    for name, value in exact.items():
        assert torch.equal(half[name], value.half().float() if value.ndim == 4 else value), name


def test_a_training_starts_from_the_official_network_in_the_format_of_mxnet(tmp_path: Path) -> None:
    blobs = checkpoints.official_blobs(2, 1, 4)
    arrays, symbol = checkpoints.mxnet_official(blobs, 2, 1)
    path = tmp_path / "MemNet_M2R1-0000.params"
    path.write_bytes(checkpoints.mxnet_params(arrays, 2))
    (tmp_path / "MemNet_M2R1-symbol.json").write_bytes(symbol)
    net, history = load_result(path)
    assert net.config == dataclasses.replace(TINY, channels=4) and history[0]["name"] == path.name


def test_a_recipe_may_be_validated_more_often_when_it_goes_on(tmp_path: Path) -> None:
    assert not differences(recipe(tmp_path).to_dict(), recipe(tmp_path, validate_every=7).to_dict())


def test_the_average_is_the_moving_average_over_few_steps_first(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from memnet_fast.training.module import StageModule

    def average(averaged: object, current: object, count: torch.Tensor) -> None:
        get_ema_multi_avg_fn(min(0.4, (1 + int(count)) / (10 + int(count))))(averaged, current, count)

    loaded = recipe(tmp_path, training__ema=0.4, training__settle=0)
    net = MemNet(TINY)
    module = StageModule(net, loaded, 0, images(), lambda m: None)
    module.recipe = dataclasses.replace(loaded, network=TINY)
    expected = AveragedModel(net, multi_avg_fn=average)
    for _ in range(9):  # the fixed decay counts from the sixth on
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
            net(torch.rand(2, 1, 8, 8))
        module._update_average(module.average)
        expected.update_parameters(net)
    result = module.result()
    assert not result.training
    for name, value in expected.module.state_dict().items():
        assert torch.equal(result.state_dict()[name], value), name


def test_paper_optimiser_and_modern_optimiser_treat_parameters_as_stated(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    from memnet_fast.training.module import StageModule

    for name, decays, factors in (("denoise_paper", {1e-4}, {0.1, 1.0}), ("denoise", {0.0, 1e-4}, {1.0})):
        loaded = load_recipe(name, ("network.channels=4",))
        config = dataclasses.replace(loaded.network, num_recursions=loaded.stages[0].recursions)
        module = StageModule(MemNet(config), loaded, 0, images(), lambda m: None)
        groups = module.configure_optimizers().param_groups
        assert {g["weight_decay"] for g in groups} == decays and {g["factor"] for g in groups} == factors
        ids = [id(p) for g in groups for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in module.net.parameters())
        biases = {id(m.bias) for m in module.net.modules() if isinstance(m, torch.nn.Conv2d)}
        if name == "denoise_paper":
            assert {id(p) for g in groups if g["factor"] == 0.1 for p in g["params"]} == biases

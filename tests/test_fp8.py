"""The written numerics of precision "fp8": e4m3 convolutions between fp16 slots, in backends/torch.py."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from support.networks import build
from torch import Tensor

import memnet_fast as mf
from benchmarks import fp8_quality
from memnet_fast import degrade, fp8_gate
from memnet_fast.backends import torch as torch_backend
from memnet_fast.config import MemNetConfig
from memnet_fast.plan import ResidualBlock, lower
from memnet_fast.tasks import TASKS


def _e4m3_values() -> Tensor:
    """Every finite non-negative e4m3 value, by definition: 4 bits of exponent with bias 7, 3 of mantissa."""
    values = [m / 8 * 2.0**-6 for m in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(values, dtype=torch.float64)


def test_rounding_to_e4m3() -> None:
    values = _e4m3_values()
    assert values.max() == torch_backend.E4M3_MAX
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(4000, generator=generator) * 500, torch.rand(4000, generator=generator) * 0.05])
    x = torch.cat([x, -x])
    rounded = torch_backend.round_e4m3(x).double()
    nearest = (x.double().abs()[:, None] - values).abs().amin(1)
    assert torch.equal((rounded - x.double()).abs(), nearest)
    special = torch_backend.round_e4m3(torch.tensor([1e9, -1e9, float("inf"), float("nan"), 17.0, 19.0]))
    # 17 lies between 16 and 18, 19 between 18 and 20: ties go to the even mantissa.
    assert special[:3].tolist() == [448, -448, 448] and special[3].isnan() and special[4:].tolist() == [16, 20]


def test_block_equals_its_definition() -> None:
    """Against float64 products of the dequantised operands; what remains is the rounding of sums."""
    plan = lower(build(MemNetConfig(channels=24, num_memory_blocks=1, num_recursions=2), 3))
    op = next(o for o in plan.ops if isinstance(o, ResidualBlock))
    block = torch_backend.fp8_block(plan, op)
    x = torch.randn((1, 24, 9, 7), generator=torch.Generator().manual_seed(1), dtype=torch.float64).half().double()

    def column(t: Tensor) -> Tensor:
        return t.double().view(1, -1, 1, 1)

    w = plan.weights
    act = torch.relu(x * column(w[op.scale]) + column(w[op.shift]))
    mid = torch.relu(F.conv2d(act, w[op.weight_a], w[op.bias_a], padding=1))
    exact = x + F.conv2d(mid, w[op.weight_b], w[op.bias_b], padding=1)
    a = torch_backend.round_e4m3(torch.relu(x.float() * column(block.scale).float() + column(block.shift).float())).double()
    m = torch.relu(F.conv2d(a, block.weight_a.double(), padding=1) * column(block.gain_a) + column(block.bias_a))
    m = torch_backend.round_e4m3(m.float()).double()
    y = x + F.conv2d(m, block.weight_b.double(), padding=1) * column(block.gain_b) + column(block.bias_b)
    # e4m3 has an error of up to 1/16 on each of the four operands.
    assert (y - exact).square().mean().sqrt() < 0.12 * (exact - x).square().mean().sqrt()
    packed = torch_backend.pack(plan, torch.device("cpu"), "fp8")
    assert torch.equal(packed.fp8_blocks[op].gain_a, block.gain_a)
    slots = torch.zeros((plan.num_slots, 1, 9, 7, 24), dtype=torch.float16)
    slots[op.src] = x.permute(0, 2, 3, 1).half()
    single = torch_backend.TorchPacked(
        type(plan)(plan.config, (op,), plan.weights, plan.num_slots), "fp8", packed.weights, packed.fp8_blocks
    )
    image = torch.zeros((1, 1, 9, 7))
    single.run(image, image.clone(), slots.view(-1).view(torch.uint8))
    got = slots[op.dst].permute(0, 3, 1, 2).double()
    # One rounding to fp16, and a value of `mid` that falls to the other side of a boundary now and then.
    assert (got - y).square().mean().sqrt() < 2e-3 * y.square().mean().sqrt()


def test_weights_fill_the_format_and_keep_their_sums() -> None:
    plan = lower(mf.create_model("memnet_m6r6.denoise"))
    for op in plan.ops:
        if isinstance(op, ResidualBlock):
            block = torch_backend.fp8_block(plan, op)
            for rounded, name in ((block.weight_a, op.weight_a), (block.weight_b, op.weight_b)):
                weight = plan.weights[name]
                scaled = weight * (448 / weight.abs().amax((1, 2, 3), keepdim=True))
                assert torch.equal(torch_backend.round_e4m3(rounded), rounded)
                # The first tap that is rounded is the largest, and nothing is larger than 448.
                assert torch.equal(rounded.abs().amax((1, 2, 3)), torch.full((64,), 448.0))
                kept = (rounded.double() - scaled).sum((2, 3)).square().mean()
                plain = (torch_backend.round_e4m3(scaled.float()).double() - scaled).sum((2, 3)).square().mean()
                assert kept < 0.01 * plain


def test_a_dead_channel_has_a_scale() -> None:
    net = build(MemNetConfig(channels=8, num_memory_blocks=1, num_recursions=1), 4)
    with torch.no_grad():
        net.blocks[0].conv_b[0].weight[3] = 0
        net.blocks[0].bn_a[0].weight.zero_()
        net.blocks[0].bn_a[0].bias.fill_(-1)
    packed = torch_backend.pack(lower(net), torch.device("cpu"), "fp8")
    image = torch.rand((1, 1, 6, 5), generator=torch.Generator().manual_seed(0))
    out = torch.full_like(image, float("nan"))
    packed.run(image, out, torch.empty(packed.workspace_bytes(1, 6, 5), dtype=torch.uint8))
    assert bool(out.isfinite().all())


def _variance(factor: float) -> mf.MemNet:
    """The bundled denoiser, of whose first normalisation in one block the variance is another one."""
    net = mf.create_model("memnet_m6r6.denoise")
    with torch.no_grad():
        net.blocks[2].bn_a[3].running_var.mul_(factor)
    return net


def _never_trained() -> mf.MemNet:
    torch.manual_seed(0)
    return mf.MemNet(MemNetConfig(num_memory_blocks=3, num_recursions=3)).eval()


@pytest.mark.parametrize(
    "make",
    [_never_trained, lambda: _variance(1e-3), lambda: _variance(float("nan")), lambda: _variance(0)],
    ids=["never trained", "one variance a thousandth", "NaN", "zero"],
)
def test_statistics_that_do_not_describe_the_network_are_refused(make) -> None:
    """What the scales follow from is wrong there: with fp16 the same networks run."""
    net = make()
    with pytest.raises(mf.BackendUnavailable, match="running statistics"):
        mf.fuse(net, backend="torch", precision="fp8")
    assert mf.fuse(net, backend="torch", precision="fp16").precision == "fp16"


def test_the_check_does_not_depend_on_the_default_dtype() -> None:
    plan = lower(mf.create_model("memnet_m6r6.denoise"))
    expected = fp8_gate.fp8_loss(plan)
    for dtype in (torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert fp8_gate.fp8_loss(plan) == expected
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_network_that_changes_nothing_is_exact() -> None:
    net = build(MemNetConfig(channels=8, num_memory_blocks=1, num_recursions=1, multi_supervised=False))
    with torch.no_grad():
        net.recon.weight.zero_()
        net.recon.bias.zero_()
    assert fp8_gate.fp8_loss(lower(net)) == 0


def test_without_numbers_there_are_no_scales() -> None:
    with pytest.raises(mf.BackendUnavailable, match="on meta there are none"):
        mf.fuse(_never_trained().to("meta"), backend="torch", precision="fp8")


def test_weights_that_come_later_are_looked_at_too(monkeypatch) -> None:
    asked = []
    loss = fp8_gate.fp8_loss
    monkeypatch.setattr(fp8_gate, "fp8_loss", lambda plan: asked.append(1) or loss(plan))
    fast = mf.fuse(mf.create_model("memnet_m6r6.denoise"), backend="torch", precision="fp8")
    good = {name: value.clone() for name, value in fast.state_dict().items()}
    x = torch.rand((1, 1, 6, 5), generator=torch.Generator().manual_seed(0))
    expected = fast(x)
    assert torch.equal(fast(x), expected) and len(asked) == 1, "the first calls know the answer of fuse"

    def refused() -> None:
        for call in (lambda: fast(x), lambda: fast.workspace_bytes(1, 6, 5)):
            with pytest.raises(mf.BackendUnavailable, match="running statistics") as caught:
                call()
            assert "\n" not in str(caught.value)

    fast.load_state_dict({f"reference.{name}": value for name, value in _variance(1e-3).state_dict().items()})
    refused()
    fast.load_state_dict(good)
    assert torch.equal(fast(x), expected)
    fast.reference.blocks[2].bn_a[3].running_var.data.mul_(1e-3)
    refused()
    fast.load_state_dict(good)
    assert torch.equal(fast(x), expected)


def test_a_network_that_needs_more_digits_is_refused() -> None:
    """One of random weights, whose statistics are its own."""
    net = _never_trained().train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(4):
            net(torch.rand((4, 1, 32, 32), generator=generator))
    said = r"loses \S+ dB .* \(limit 0\.05 dB\).* or it needs more digits; .* or take fp16"
    with pytest.raises(mf.BackendUnavailable, match=said):
        mf.fuse(net.eval(), backend="torch", precision="fp8")


@pytest.mark.parametrize("task", TASKS)
def test_bundled_weights_are_not_refused(task: str) -> None:
    assert 0 < fp8_gate.fp8_loss(lower(mf.create_model(f"memnet_m6r6.{task}"))) < fp8_gate.LIMIT_DB / 2


def _loss(monkeypatch, exact: Tensor, wrong: Tensor) -> float:
    """Of a network that makes `exact` [4, H, W] of the test images and is wrong by `wrong` in fp8."""
    results = {"fp32": exact[:, None], "fp8": (exact + wrong)[:, None]}
    monkeypatch.setattr(fp8_gate, "_run", lambda plan, images, precision: results[precision])
    return fp8_gate.fp8_loss(lower(build(MemNetConfig(channels=8, num_memory_blocks=1, num_recursions=1))))


def test_a_network_is_judged_by_the_images_that_it_improves(monkeypatch) -> None:
    clean = fp8_gate._clean().expand(4, -1, -1)
    given = fp8_gate._degraded(clean[0]) - clean
    kept = torch.tensor([0.5, 1.5, 0.25, 1.5]).view(4, 1, 1)  # of what is wrong with an image, after restoration
    wrong = kept * given * torch.tensor([0.1, 0.9, 0.2, 0.9]).view(4, 1, 1)
    assert _loss(monkeypatch, clean + kept * given, wrong) == pytest.approx(10 * math.log10(1 + 0.2**2), rel=1e-3)
    wrong[2, 0, 0] = math.inf
    assert math.isnan(_loss(monkeypatch, clean + kept * given, wrong))


def test_a_network_that_improves_none_is_judged_by_what_it_changes(monkeypatch) -> None:
    clean = fp8_gate._clean().expand(4, -1, -1)
    given = fp8_gate._degraded(clean[0]) - clean
    wrong = given * torch.tensor([0.3, 0.1, 0.2, 0.4]).view(4, 1, 1)
    assert _loss(monkeypatch, clean + 2 * given, wrong) == pytest.approx(10 * math.log10(1 + 4 * 0.1**2), rel=1e-3)


def test_statistics_that_describe_the_network_are_not_refused() -> None:
    assert mf.fuse(_variance(4), backend="torch", precision="fp8").precision == "fp8"
    colour = lower(build(MemNetConfig(in_channels=3, out_channels=3, channels=5, num_memory_blocks=1, num_recursions=1)))
    assert 0 < fp8_gate.fp8_loss(colour) < 1, "several planes"


@pytest.mark.parametrize("sigma", [15, 50])
def test_quality_gate(sigma: int) -> None:
    """At most 0.05 dB below float32 with the bundled weights, in the mean over photographs."""
    net = mf.create_model("memnet_m6r6.denoise")
    fp32 = mf.fuse(net, precision="fp32")
    fp8 = mf.fuse(net, backend="torch", precision="fp8")
    generator = torch.Generator().manual_seed(sigma)

    def psnr(y: Tensor, clean: Tensor) -> float:
        return -10 * float(torch.log10((y - clean).double().square().mean()))

    losses = []
    for photo in (data.camera(), data.astronaut()[..., 1], data.chelsea()[..., 1], data.coins(), data.moon()):
        clean = torch.from_numpy(photo.copy())[None, None, 100:196, 100:180].float() / 255
        noisy = degrade.gaussian(clean, float(sigma), generator)
        restored = psnr(fp32(noisy), clean)
        assert restored > psnr(noisy, clean) + 3
        losses.append(restored - psnr(fp8(noisy), clean))
    assert max(losses) > 0
    assert sum(losses) / len(losses) <= 0.05, losses


def test_the_measurement_on_a_folder(tmp_path, monkeypatch, capsys) -> None:
    """benchmarks/fp8_quality.py: a row for each image and level, kept where it is interrupted; another image is another row."""
    monkeypatch.setattr(fp8_quality, "results_folder", lambda: tmp_path)
    monkeypatch.setattr(fp8_quality, "LEVELS", {"denoise": (30,), "deblock": (10,)})
    folder = tmp_path / "images"
    folder.mkdir()
    assert fp8_quality.main([str(folder)]) == 2 and "no image" in capsys.readouterr().err
    assert fp8_quality.main([str(tmp_path / "none")]) == 2 and "there is no folder" in capsys.readouterr().err
    for name, at in (("a.png", 0), ("b.png", 40)):
        Image.fromarray(data.camera()[100:118, at : at + 15]).save(folder / name)
    arguments = [str(folder), "--crop", "16"]
    assert fp8_quality.main(arguments) in (0, 1)
    target = tmp_path / "fp8_quality.json"
    first = json.loads(target.read_text())
    assert [(r["image"], r["size"], r["task"], r["level"]) for r in first["rows"]] == [
        (image, [15, 16], task, level) for image in ("a.png", "b.png") for task, level in (("denoise", 30), ("deblock", 10))
    ]
    assert set(first["about"]["weights"]) == {"denoise", "deblock"}
    for summary in first["summary"]:
        own = [r for r in first["rows"] if r["task"] == summary["task"]]
        losses = [r["psnr_fp32"] - r["psnr_fp8"] for r in own]
        assert summary["images"] == 2 and summary["mean_loss_db"] == pytest.approx(sum(losses) / 2)
        assert summary["within_gate"] == (sum(losses) / 2 <= 0.05) and all(abs(loss) < 1 for loss in losses)
        assert summary["task"] == "deblock" or all(r["psnr_fp32"] > r["psnr_degraded"] + 1 for r in own)

    def restored(*args) -> float:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(fp8_quality, "psnr", restored)
        assert fp8_quality.main(arguments) in (0, 1)
        assert json.loads(target.read_text()) == first
        for changed in ([*arguments[:-1], "12"], [*arguments, "--tasks", "deblock"]):
            with pytest.raises(AssertionError, match="measured again"):
                fp8_quality.main(changed)
    rows = [{"task": "sr", "level": 2, "psnr_fp32": 30.0, "psnr_fp8": 30.0 - loss} for loss in (0.02, 0.09)]
    assert not fp8_quality.summary(rows)[0]["within_gate"] and fp8_quality.summary(rows[:1])[0]["within_gate"]

"""The layers of the parity suite on a GPU: every kernel, precision and capability; and sizes that only a GPU can take.

Tests whose name on the CPU is cpu-direct run everywhere, so that the code of this file is never new to a GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support import checks, integer, layers, networks
from support.candidates import CPU, torch_candidate
from support.places import CUDA, EVERYWHERE, FP8, GPU, ON_CPU, SHALLOW, TRITON, TRITON_BY_ADDRESS

import memnet_fast as mf
from memnet_fast import degrade
from memnet_fast.config import PRESETS, MemNetConfig

GPU_ONLY = CUDA + TRITON
# Around the tiles of every kernel: 16 x 24 and 12 x 16 (sm_80), strips of 32, 64, 80 and 96 (sm_90), 32 and 128 (Triton).
EDGES = (1, 2, 3, 7, 11, 12, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33, 63, 64, 65, 79, 80, 81, 95, 96, 97, 127, 128, 129)
PRIMES = [(33, 29), (127, 257), (239, 241)]
OFFICIAL = PRESETS["memnet_m6r6"]


@pytest.mark.parametrize("channels", [64, 16, 20])
@pytest.mark.parametrize("candidate", GPU_ONLY)
def test_impulses(candidate, channels):
    """L0"""
    layers.l0_impulse(candidate, channels)


@pytest.mark.parametrize("candidate", GPU_ONLY)
@pytest.mark.parametrize("name", [n for n, c in networks.VARIANTS.items() if not c.clamp and n != "chain"])
def test_integer_networks(candidate, name):
    """L1"""
    layers.l1_integer(candidate, networks.VARIANTS[name], seed=1)


@pytest.mark.parametrize("candidate", GPU_ONLY)
@pytest.mark.parametrize("name", ["memnet_m6r6", "memnet_m10r10"])
def test_integer_networks_of_full_depth(candidate, name):
    """L1 on 80 and 212 layers; the last gates read 12 and 20 slots."""
    layers.l1_integer(candidate, PRESETS[name], size=(13, 17))


@pytest.mark.parametrize("candidate", EVERYWHERE)
@pytest.mark.parametrize("edge", EDGES)
def test_tile_borders(candidate, edge):
    """T01 to T04, as L1: heights and widths around every tile, each beside a width and a height of its own."""
    for size in ((edge, 19), (18, edge), (edge, edge)):
        layers.l1_integer(candidate, SHALLOW, seed=3, size=size)


@pytest.mark.parametrize("candidate", EVERYWHERE)
@pytest.mark.parametrize("size", [(1, 4096), (4096, 1), (1, 7), (7, 1)], ids=str)
def test_single_rows_and_columns(candidate, size):
    """T02, as L1"""
    layers.l1_integer(candidate, networks.SMALL, seed=4, size=size)


@pytest.mark.parametrize("candidate", GPU_ONLY)
@pytest.mark.parametrize("size", PRIMES, ids=str)
def test_primes(candidate, size):
    """T05, as L1"""
    layers.l1_integer(candidate, SHALLOW, seed=5, size=size)


@pytest.mark.parametrize("candidate", EVERYWHERE)
@pytest.mark.parametrize("size", [(2, 65536), (65536, 2)], ids=str)
def test_extreme_aspect(candidate, size):
    """T06, as L1: a grid may have 65,535 blocks in y and z. A CPU has no grid and takes a tenth."""
    if candidate.name.startswith(("cpu", "torch")):
        size = tuple(s // 10 if s > 2 else s for s in size)
    layers.l1_integer(candidate, MemNetConfig(channels=16, num_memory_blocks=1, num_recursions=1), seed=6, size=size)


@pytest.mark.parametrize("candidate", EVERYWHERE)
def test_many_tiny_images(candidate):
    """T07: 70,000 images of 3 x 3 (a grid may have 65,535 blocks in z): the same 500 over and over, which an oracle knows."""
    count = 700 if candidate.name.startswith(("cpu", "torch")) else 70_000
    net, x, truth = integer.case(SHALLOW, 500, 3, 3, seed=7)
    repeats = -(-count // 500)
    many = x.repeat(repeats, 1, 1, 1)[:count]
    y, _ = candidate.build(net).run(many)
    checks.equal(y, truth.repeat(repeats, 1, 1, 1)[:count])


@pytest.mark.parametrize("candidate", GPU_ONLY)
@pytest.mark.parametrize("size", [(17, 19), (40, 37), (70, 131)], ids=str)
@pytest.mark.parametrize("channels", [64, 16])
def test_errors_have_the_expected_spread(candidate, channels, size):
    """L2"""
    layers.l2_kernels(candidate, channels, size)


@pytest.mark.parametrize("candidate", TRITON_BY_ADDRESS)
def test_gates_by_address(candidate):
    """L1, L2"""
    layers.l1_integer(candidate, networks.SMALL, seed=1, size=(17, 33))
    layers.l2_kernels(candidate, 64, (17, 19))


@pytest.mark.parametrize("candidate", GPU_ONLY)
@pytest.mark.parametrize("seed", range(3))
def test_network_against_the_policy_matched_reference(candidate, seed):
    """L3"""
    layers.l3_network(candidate, seed=seed)


@pytest.mark.parametrize("candidate", GPU_ONLY)
@pytest.mark.parametrize("name", ["no_bias", "short_long", "colour", "gray_to_colour", "unshared", "last_output", "lornatang"])
def test_variants_against_the_policy_matched_reference(candidate, name):
    """L3"""
    layers.l3_network(candidate, networks.VARIANTS[name], seed=1)


@pytest.mark.parametrize("candidate", GPU_ONLY)
def test_official_network_against_the_policy_matched_reference(candidate):
    """L3 on 80 layers and 64 channels."""
    layers.l3_network(candidate, OFFICIAL, size=(61, 103), n=1)


@pytest.mark.parametrize("candidate", [pytest.param(torch_candidate("fp8"), id="torch-fp8"), *FP8])
@pytest.mark.parametrize("size", [(33, 29), (7, 95), (33, 97), (18, 129), (65, 31)], ids=str)
def test_fp8_against_the_policy_matched_reference(candidate, size):
    """L3 of fp8: both round the same operands at the same places, so their errors against float64 are nearly the same ones."""
    if candidate.name.startswith("cuda"):
        _require_fp8()
    for config in (SHALLOW, layers.NETWORK):
        net, x, truth = layers.network_case(config, 2, *size, 0)
        reference = torch_candidate("fp8").build(net).run(x)[0]
        y = candidate.build(net).run(x)[0]
        checks.require_ratios(y, reference, truth)
        checks.require(checks.nsr(y, truth, x) > 2 * checks.UNIT["fp16"], "this is too exact for fp8")


def _require_fp8():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 has kernels for compute capability 9.0 only")


@pytest.mark.parametrize("candidate", FP8)
def test_fp8_layers_that_need_no_unit(candidate):
    """L4 and L5"""
    _require_fp8()
    layers.l4_footprint(candidate, SHALLOW, (37, 130))
    layers.l5_invariance(candidate, SHALLOW, (41, 135))


@pytest.mark.parametrize("candidate", GPU_ONLY)
def test_footprint_of_nan(candidate):
    """L4, T33"""
    layers.l4_footprint(candidate)
    layers.l4_footprint(candidate, SHALLOW, (37, 130))


@pytest.mark.parametrize("candidate", GPU_ONLY)
def test_footprint_of_nan_in_the_official_network(candidate):
    """L4, T33: 149 x 149 pixels around the bad one, clipped at the border."""
    net = networks.preset("memnet_m6r6")
    x = networks.image(1, 1, 170, 180)
    bad = x.clone()
    bad[0, 0, 81, 20] = float("nan")
    runner = candidate.build(net)
    mask = checks.footprint(x.shape, 0, 81, 20, net.config.receptive_radius)
    checks.require_footprint(runner.run(bad)[0], runner.run(x)[0], mask)


@pytest.mark.parametrize("candidate", EVERYWHERE)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 3.0e4])
def test_infinity_stays_in_its_footprint(candidate, value):
    """T34 and T35: what becomes NaN or infinity lies inside; every other value keeps its bits."""
    net = networks.build(networks.SMALL)
    x = networks.image(3, 1, 37, 45)
    bad = x.clone()
    bad[1, 0, 20, 11] = value
    runner = candidate.build(net)
    clean, broken = runner.run(x)[0], runner.run(bad)[0]
    outside = ~checks.footprint(x.shape, 1, 20, 11, net.config.receptive_radius)
    checks.require(torch.equal(clean[outside], broken[outside]), "a value outside the receptive field changed")
    checks.require(not torch.equal(clean, broken), "the bad pixel has no effect")
    if value != 3.0e4:
        checks.require(not bool(torch.isfinite(broken[1, 0, 20, 11])), "the pixel itself came out finite")


@pytest.mark.parametrize("candidate", GPU_ONLY)
def test_batch_place_and_crop_do_not_matter(candidate):
    """L5, T57, T59"""
    layers.l5_invariance(candidate)
    layers.l5_invariance(candidate, SHALLOW, (41, 135))


@pytest.mark.parametrize("candidate", EVERYWHERE)
def test_batches_of_every_size(candidate):
    """T57: batch 1, 2, 3, 7, 16 and 64, the image at every place."""
    net = networks.build(SHALLOW)
    few = candidate.name.startswith(("cpu", "torch"))
    x = networks.image(7 if few else 64, 1, 13, 18)
    runner = candidate.build(net)
    whole = runner.run(x)[0]
    for size in (1, 2, 3, 7) if few else (1, 2, 3, 7, 16):
        for start in range(0, len(x) - size + 1, size):
            checks.equal(runner.run(x[start : start + size])[0], whole[start : start + size].double())


@pytest.mark.parametrize("candidate", EVERYWHERE)
def test_repeats_are_bit_equal(candidate):
    """L5, T58, T68: on memory that held something else each time."""
    net = networks.build(networks.SMALL)
    x = networks.image(2, 1, 40, 101)
    runner = candidate.build(net)
    first = runner.run(x)[0]
    for i in range(5 if candidate.name.startswith(("cpu", "torch")) else 200):
        runner.poison = (0xFF, 0x00, 0x7F, 0x42)[i % 4]
        assert torch.equal(runner.run(x)[0], first), i


def _windows_equal(candidate, config, h, w, side, workspace_values):
    """An image whose slots hold at least so many values, against windows of it at its corners and ends.

    The oracle of such an image would take hours; a window with its halo is small, and direct sums give the same bits.
    """
    net = networks.build(config)
    x = networks.image(1, 1, h, w)
    runner = candidate.build(net)
    if workspace_values:
        assert runner.plan.num_slots * h * w * runner.padded >= workspace_values, "the case is too small for its purpose"
    whole = runner.run(x)[0]
    halo = config.receptive_radius
    for top in (0, (h - side) // 2, h - side):
        for left in (0, (w - side) // 3, w - side):
            y0, y1, x0, x1 = max(0, top - halo), min(h, top + side + halo), max(0, left - halo), min(w, left + side + halo)
            part = runner.run(x[:, :, y0:y1, x0:x1])[0]
            core = part[:, :, top - y0 : top - y0 + side, left - x0 : left - x0 + side]
            checks.equal(core, whole[:, :, top : top + side, left : left + side].double())


@pytest.mark.parametrize("candidate", ON_CPU)
def test_windows_of_a_small_image(candidate):
    if candidate.name.startswith("torch"):
        pytest.skip("oneDNN sums a window in another order than the whole image")
    _windows_equal(candidate, SHALLOW, 70, 75, 20, 0)


@pytest.mark.parametrize("candidate", GPU_ONLY)
def test_gate_sources_of_more_than_31_bits(candidate):
    """T09: 13 slots of 1673 x 1673 and 64 channels; offsets among them pass 2^31 values."""
    _windows_equal(candidate, OFFICIAL, 1673, 1673, 128, 2**31)


@pytest.mark.slow
@pytest.mark.parametrize("candidate", CUDA + TRITON[2:])
def test_feature_map_of_more_than_31_bits(candidate):
    """T08: one map of 5793 x 5797 pixels and 64 channels holds more than 2^31 values."""
    assert 5793 * 5797 * 64 > 2**31
    _windows_equal(candidate, SHALLOW, 5793, 5797, 256, 2**31)


# What a restored image may lose or win, in dB. tf32 rounds operands as fp16 does; fp32 must lose nothing that can be printed.
# The torch backend changed a smooth image of 64 x 72 pixels by 0.0007 (tf32, fp16) and 0.007 (bf16), larger ones by less.
QUALITY = {"fp32": 1e-5, "tf32": 1e-3, "fp16": 1e-3, "bf16": 2e-2, "fp8": 5e-2}


@pytest.mark.parametrize("candidate", [pytest.param(torch_candidate("fp16"), id="torch-fp16"), *CUDA, *FP8, *TRITON])
def test_quality_with_the_bundled_weights(candidate):
    """L6: PSNR against the truth, beside that of the float64 result, for three levels of noise."""
    if candidate.precision == "fp8":
        _require_fp8()
    net = mf.create_model("memnet_m6r6.denoise")
    here = candidate.name.startswith("torch")
    h, w = (40, 48) if here else (256, 288)
    generator = networks.generator(0)
    coarse = torch.rand((1, 1, h // 8, w // 8), generator=generator)
    clean = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic").clamp(0, 1)
    runner = candidate.build(net)
    # A GPU's own float64 takes a second for what a CPU would take a minute.
    double = copy.deepcopy(net).double().to(CPU if here else GPU)
    for sigma in (15.0,) if here else (15.0, 30.0, 50.0):
        noisy = degrade.gaussian(clean, sigma, generator)
        with torch.no_grad():
            truth = double(noisy.double().to(double.recon.weight.device)).cpu()
        lost = _psnr(truth, clean) - _psnr(runner.run(noisy)[0], clean)
        checks.require(abs(lost) <= QUALITY[candidate.precision], f"{lost:.5f} dB at sigma {sigma:.0f}")
        checks.require(_psnr(truth, clean) > _psnr(noisy, clean) + 3, "the weights restore this image")


def _psnr(y, clean):
    return -20 * torch.log10(torch.tensor(checks.rms(y.double() - clean.double()))).item()

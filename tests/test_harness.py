"""The harness itself: right implementations pass every layer, each wrong one is caught, and no trap lets one through."""

from __future__ import annotations

import pytest
import torch
from support import checks, integer, layers, networks
from support.candidates import Candidate, Guarded
from support.checks import ParityError
from support.mutants import MUTANTS, Host, host

from memnet_fast.plan import lower

LAYERS = {
    "L0": layers.l0_impulse,
    "L1": layers.l1_integer,
    "L2": layers.l2_kernels,
    "L3": layers.l3_network,
    "L4": layers.l4_footprint,
    "L5": layers.l5_invariance,
}


def verdicts(candidate: Candidate, only: str = "") -> dict[str, str]:
    """What each layer has against a candidate, by layer."""
    found = {}
    for name, layer in LAYERS.items():
        if only in ("", name):
            try:
                layer(candidate)
            except ParityError as error:
                found[name] = str(error)
    return found


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_no_false_alarm(precision):
    found = verdicts(host(f"right {precision}", precision=precision))
    # L5 asks for bits that do not depend on the batch, which oneDNN, that computes here, does not promise.
    found.pop("L5", None)
    assert not found


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[f"{i}-{m.name}" for i, m in enumerate(MUTANTS)])
def test_every_mutant_is_caught(number):
    """By a layer other than L5, which might reject all of them for oneDNN's sake."""
    mutant = MUTANTS[number]
    assert any(verdicts(mutant, name) for name in ("L0", "L1", "L2", "L3", "L4")), f"mutant {number} ({mutant.name}) lives"


# Faults that each layer is there for; were they caught elsewhere alone, the layer would be decoration.
SPECIALITIES = {
    "L0": ("flip x", "taps transposed", "in and out swapped", "channel pair swapped", "replicate padding"),
    "L1": ("eps 0", "gate order swapped", "stale slot: H1 is H2", "weights of the wrong block", "one weight a tenth larger"),
    "L2": ("one weight a tenth larger", "fp16 accumulation", "truncating store bf16", "silent TF32", "one corner padded"),
    "L3": ("eps 1e-3", "BN index off by one", "ensemble weights rotated", "silent TF32", "truncating store fp16"),
    "L4": ("NaN swallowed by the ReLU", "wrap into the next row", "halo off by one", "batch index 0 reused"),
    "L5": ("batch index 0 reused", "returns the first result again", "depends on the batch"),
}


@pytest.mark.parametrize(("layer", "name"), [(k, n) for k, names in SPECIALITIES.items() for n in names])
def test_every_layer_catches_what_it_is_for(layer, name):
    mutant = next(m for m in MUTANTS if m.name == name)
    assert layer in verdicts(mutant, layer)


# Traps ---------------------------------------------------------------------------------------------------------------


def test_nan_is_no_small_error():
    truth = torch.rand(1, 1, 8, 9).double()
    broken = truth.clone()
    broken[0, 0, 3, 3] = float("nan")
    assert not (broken - truth).abs().max() > 1e-3, "the naive comparison lets it pass"
    for check in (
        lambda: checks.require_nsr(broken, truth, torch.zeros_like(truth), 1.0),
        lambda: checks.equal(broken, truth),
        lambda: checks.z_test(broken, truth, torch.ones_like(truth), checks.SUMS),
        lambda: checks.require_ratios(broken, truth + 1e-7, truth),
        lambda: checks.require_footprint(broken, truth, torch.zeros_like(truth, dtype=torch.bool)),
    ):
        with pytest.raises(ParityError):
            check()
    with pytest.raises(ParityError):  # NaN in a figure, not in the tensors
        checks.require(float("nan") <= 1.0, "not a number")


def test_returning_the_input_has_a_high_psnr_and_nsr_one():
    image = torch.rand(1, 1, 32, 32).double()
    truth = image + 1e-3 * torch.randn(1, 1, 32, 32).double()
    psnr = -20 * torch.log10(torch.tensor(checks.rms(image - truth)))
    assert psnr > 55
    assert abs(checks.nsr(image, truth, image) - 1) < 1e-6
    with pytest.raises(ParityError):
        checks.require_nsr(image, truth, image, 60 * checks.UNIT["fp32"])


def test_zero_output_and_last_row_are_seen_by_each_network_layer():
    for name in ("returns zeros", "last row of the result skipped"):
        mutant = next(m for m in MUTANTS if m.name == name)
        for layer in (layers.l1_integer, layers.l3_network):
            with pytest.raises(ParityError):
                layer(mutant)


def test_a_wrong_shape_is_seen():
    truth = torch.rand(1, 1, 4, 4).double()
    for check in (checks.equal, checks.ratios):
        with pytest.raises(ParityError):
            check(truth[..., :3], *([truth, truth] if check is checks.ratios else [truth]))


@pytest.mark.parametrize("offset", [-4, 0])
def test_guard_bands_see_one_stray_float(offset):
    buffer = Guarded(400)
    buffer.check("a quiet buffer")
    assert bool(torch.isnan(buffer.bytes.view(torch.float32)).all()), "the poison is NaN in float32"
    address = buffer.bytes.storage_offset() + (offset if offset < 0 else 400)
    whole = torch.empty(0, dtype=torch.uint8).set_(buffer.bytes.untyped_storage())
    whole[address : address + 4] = 0
    with pytest.raises(ParityError, match="outside"):
        buffer.check("the buffer")


def test_reading_unwritten_memory_shows_as_nan():
    """A plan whose gate reads a slot that nothing wrote."""
    net = networks.build(networks.SMALL)
    plan = lower(net)
    runner = Host(host("right").make(plan).interpreter)
    runner.interpreter.plan = type(plan)(plan.config, plan.ops[1:], plan.weights, plan.num_slots)
    out, _ = runner.run(networks.image(1, 1, 5, 5))
    assert torch.isnan(out).all()


def test_torch_empty_is_nan_here():
    assert torch.isnan(torch.empty(1000)).all()


def test_integer_networks_are_not_trivial():
    """Every feature map holds many different values, and each batch normalisation matters."""
    net, x, truth = integer.case(layers.NETWORK)
    assert 8 <= integer.largest_value(net, x) <= integer.LARGEST
    assert len(truth.unique()) > 30
    assert torch.equal(truth, truth.round())
    assert not torch.equal(truth, x.double())


def test_the_oracle_is_float64_and_leaves_the_network_alone():
    net = networks.build(networks.SMALL)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = networks.image(1, 1, 9, 9)
    y = networks.oracle(net, x)
    assert y.dtype == torch.float64
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert 0 < checks.nsr(net(x), y, x) < 60 * checks.UNIT["fp32"], "float32 differs from float64, by little"

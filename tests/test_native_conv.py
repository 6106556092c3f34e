"""The native first convolution and residual block against float64 torch: every size class, instruction set and algorithm."""

import itertools
import os
import subprocess
import sys

import native_harness as nh
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from native_harness import Plan, single

SIZES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (2, 2),
    (3, 3),
    (4, 5),
    (5, 4),
    (15, 16),
    (16, 17),
    (17, 15),
    (33, 29),
    (63, 65),
    (127, 9),
    (8, 331),
]
CHANNELS = [64, 16, 20, 5]
ALGORITHMS = ["direct", "winograd"]

# Largest error of any element, in units of the RMS of what the convolution adds: twice the largest measured over every case of
# this file (first 1.25e-6, direct 4.2e-6, Winograd 4.6e-5; worst RMS errors 4.6e-7 direct, 3.7e-6 Winograd).
LIMIT = {"first": 2.5e-6, "direct": 8e-6, "winograd": 9.2e-5}


def block_parameters(channels: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    spread = (2 / (9 * channels)) ** 0.5
    return {
        "scale": single(channels, generator=generator, spread=0.3) + 1,
        "shift": single(channels, generator=generator, spread=0.3),
        "weight_a": single(channels, channels, 3, 3, generator=generator, spread=spread),
        "bias_a": single(channels, generator=generator, spread=0.2),
        "weight_b": single(channels, channels, 3, 3, generator=generator, spread=spread),
        "bias_b": single(channels, generator=generator, spread=0.2),
    }


def run_block(x: torch.Tensor, parameters: dict, **options) -> torch.Tensor:
    n, channels, h, w = x.shape
    plan = Plan(n, h, w, channels, **options)
    plan.set_slot(2, x)
    plan.residual_block(2, 0, **parameters)
    result = plan.run().slot(0)
    assert torch.equal(plan.slot(2).double(), x), "the source slot was changed"
    return result


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_residual_block_equals_float64(size, channels):
    generator = torch.Generator().manual_seed(size[0] * 1000 + size[1] * 10 + channels)
    parameters = block_parameters(channels, generator)
    for n in (1, 3):
        x = single(n, channels, *size, generator=generator)
        reference = nh.residual_block(x, **parameters)
        for i, (isa, algorithm) in enumerate(itertools.product(nh.isas(), ALGORITHMS)):
            poison = ("nan", "ones")[i % 2]
            result = run_block(x, parameters, algorithm=algorithm, isa=isa, poison=poison, threads=1 + i % 3)
            error = nh.worst_error(result, reference, reference - x)
            assert error <= LIMIT[algorithm], (isa, algorithm, n, error)


@pytest.mark.parametrize("cin", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_first_conv_equals_float64(size, cin):
    generator = torch.Generator().manual_seed(size[0] * 100 + size[1] + cin)
    for n, channels in itertools.product((1, 3), CHANNELS):
        image = torch.rand(n, cin, *size, generator=generator).double()
        scale, shift = single(cin, generator=generator) + 2, single(cin, generator=generator, spread=0.3)
        weight = single(channels, cin, 3, 3, generator=generator, spread=0.3)
        bias = single(channels, generator=generator, spread=0.2)
        reference = F.conv2d(nh.activate(image, scale, shift), weight, bias, padding=1)
        for isa in nh.isas():
            plan = Plan(n, *size, channels, cin=cin, isa=isa)
            plan.set_image(image)
            plan.first_conv(1, scale, shift, weight, bias)
            error = nh.worst_error(plan.run().slot(1), reference, reference)
            assert error <= LIMIT["first"], (isa, n, channels, error)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_threads_bands_and_batch_do_not_change_a_bit(algorithm):
    generator = torch.Generator().manual_seed(5)
    parameters = block_parameters(64, generator)
    x = single(3, 64, 63, 65, generator=generator)
    for isa in nh.isas():
        alone = [run_block(x[i : i + 1], parameters, algorithm=algorithm, isa=isa, threads=1) for i in range(3)]
        for threads in (1, 2, 3, 8):
            together = run_block(x, parameters, algorithm=algorithm, isa=isa, threads=threads)
            assert torch.equal(together, torch.cat(alone)), (isa, threads)
            one = run_block(x[:1], parameters, algorithm=algorithm, isa=isa, threads=threads)
            assert torch.equal(one, alone[0]), (isa, threads)


def wide_block(isa: str, threads: int, width: int = 700) -> torch.Tensor:
    """Three panels at full width, and as many bands as threads up to three (test_the_wide_block_has_seams)."""
    generator = torch.Generator().manual_seed(8)
    parameters = block_parameters(16, generator)
    x = single(1, 16, 39, 700, generator=generator)
    return run_block(x[..., :width].contiguous(), parameters, algorithm="winograd", isa=isa, threads=threads)


@pytest.mark.parametrize("isa", nh.isas())
def test_panels_and_seams_do_not_change_a_bit(isa):
    whole = wide_block(isa, 1)
    for threads in (2, 3):
        assert torch.equal(wide_block(isa, threads), whole), threads
    for width in (288, 420):  # one panel and two: the same as far as they see the same
        part = wide_block(isa, 2, width)
        alike = width - 12  # the last column of tiles and the one before it read what was cut off
        assert torch.equal(part[..., :alike], whole[..., :alike]), width


def test_bands_end_where_openmp_grants_fewer_threads():
    """A band waits for the one above it; one thread that computes both must not wait for itself."""
    code = "import test_native_conv as t; print(t.wide_block('auto', 3).double().sum().item())"
    environment = os.environ | {"OMP_THREAD_LIMIT": "1", "PYTHONPATH": os.pathsep.join([*sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == wide_block("auto", 3).double().sum().item()


def test_the_wide_block_has_seams():
    """Its workspace holds one for each band, where there is more than one band."""
    one, two, three = (nh.native.module().workspace_bytes(1, 39, 700, 1, 1, 16, 4, "winograd", "auto", t) for t in (1, 2, 3))
    scratch = one - 4 * 39 * 700 * 16 * 4  # of a thread
    seam = three - two - scratch
    assert seam > 0 and two - one - scratch == 2 * seam


def test_both_winograd_schedules_are_exercised():
    """The banded schedule keeps no tensor between the convolutions; the other needs one more slot."""
    slot = 63 * 65 * 64 * 4
    banded, separate = (nh.native.module().workspace_bytes(1, 63, 65, 1, 1, 64, 4, "winograd", "auto", t) for t in (1, 8))
    assert banded < 5 * slot + 8 * 2**21
    plan = Plan(1, 63, 65, algorithm="winograd", threads=1)
    assert plan.bytes == banded
    per_thread = (separate - 5 * slot) / 8
    assert 0 < per_thread < banded - 4 * slot, "the separate schedule needs no ring but a slot of its own"


@pytest.mark.parametrize("isa", nh.isas())
def test_direct_is_exact_on_integers(isa):
    generator = torch.Generator().manual_seed(9)

    def integers(*shape, low=-2, high=3):
        return torch.randint(low, high, shape, generator=generator).double()

    parameters = {
        "scale": integers(64, low=-2, high=3),
        "shift": integers(64),
        "weight_a": integers(64, 64, 3, 3, low=-1, high=2),
        "bias_a": integers(64),
        "weight_b": integers(64, 64, 3, 3, low=-1, high=2),
        "bias_b": integers(64),
    }
    x = integers(2, 64, 19, 53, low=-4, high=5)
    assert torch.equal(run_block(x, parameters, isa=isa).double(), nh.residual_block(x, **parameters))


@pytest.mark.parametrize("isa", nh.isas())
def test_direct_impulse_weights_are_bit_exact(isa):
    """One pixel, one tap, one channel pair at a time through each of the two convolutions."""
    identity = torch.zeros(20, 20, 3, 3, dtype=torch.float64)
    identity[range(20), range(20), 1, 1] = 1
    nothing = torch.zeros(20, dtype=torch.float64)
    value = float(np.float32(0.1))
    for tap, (source, target) in itertools.product(range(9), [(0, 0), (3, 17)]):
        impulse = torch.zeros_like(identity)
        impulse[target, source, tap // 3, tap % 3] = float(np.float32(0.7))
        x = torch.zeros(2, 20, 9, 50, dtype=torch.float64)
        for y, column in ((0, 0), (8, 49), (4, 47), (7, 48)):
            x[1, source, y, column] = value
        for first, second in ((impulse, identity), (identity, impulse)):
            parameters = {
                "scale": nothing + 1,
                "shift": nothing,
                "weight_a": first,
                "bias_a": nothing,
                "weight_b": second,
                "bias_b": nothing,
            }
            expected = nh.residual_block(x.float(), **{k: v.float() for k, v in parameters.items()})
            assert torch.equal(run_block(x, parameters, isa=isa), expected), (tap, source, target)


@pytest.mark.parametrize("isa", nh.isas())
def test_direct_nan_marks_its_receptive_field_and_nothing_else(isa):
    generator = torch.Generator().manual_seed(3)
    parameters = block_parameters(20, generator)
    x = single(2, 20, 21, 55, generator=generator)
    clean = run_block(x, parameters, isa=isa)
    for y, column in ((0, 0), (20, 54), (8, 48), (10, 30)):
        marked = x.clone()
        marked[1, 7, y, column] = float("nan")
        plan = Plan(2, 21, 55, 20, isa=isa)
        plan.set_slot(2, marked)
        plan.residual_block(2, 0, **parameters)
        result = plan.run().slot(0)
        expected = torch.zeros(2, 20, 21, 55, dtype=torch.bool)
        expected[1, :, max(0, y - 2) : y + 3, max(0, column - 2) : column + 3] = True
        assert torch.equal(result.isnan(), expected)
        assert torch.equal(result[~expected], clean[~expected])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("isa", nh.isas())
def test_nan_and_infinity_come_through(isa, algorithm):
    generator = torch.Generator().manual_seed(4)
    parameters = block_parameters(16, generator)
    for hostile in (float("nan"), float("inf")):
        x = single(1, 16, 24, 24, generator=generator)
        x[0, 3, 12, 12] = hostile
        plan = Plan(1, 24, 24, 16, isa=isa, algorithm=algorithm)
        plan.set_slot(2, x)
        plan.residual_block(2, 0, **parameters)
        result = plan.run().slot(0)
        assert not torch.isfinite(result[0, 3, 12, 12])
        # Winograd may spread it over the tiles that read it, no further.
        assert torch.isfinite(result[..., :4, :]).all() and torch.isfinite(result[..., 20:]).all()


def _mutations(parameters):
    wrong_bias = parameters["bias_b"].clone()
    wrong_bias[5] *= 1.01
    dropped = parameters["weight_a"].clone()
    dropped[:, :, 2, 0] = 0
    tail = parameters["weight_b"].clone()
    tail[-8:, :, 0, 1] = 0
    tenth = parameters["weight_b"].clone()
    tenth[11, 13, 1, 1] *= 1.1
    return {
        "bias": {"bias_b": wrong_bias},
        "tap": {"weight_a": dropped},
        "tap of the last channels": {"weight_b": tail},
        "one weight by a tenth": {"weight_b": tenth},
        "swapped": {"weight_a": parameters["weight_a"].transpose(0, 1)},
        "transposed": {"weight_b": parameters["weight_b"].transpose(2, 3)},
        "shift": {"shift": parameters["shift"] * 1.001},
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_comparison_sees_wrong_operations(algorithm):
    generator = torch.Generator().manual_seed(6)
    parameters = block_parameters(64, generator)
    x = single(1, 64, 16, 17, generator=generator)
    reference = nh.residual_block(x, **parameters)
    for name, change in _mutations(parameters).items():
        wrong = run_block(x, {k: v.contiguous() for k, v in (parameters | change).items()}, algorithm=algorithm)
        assert nh.worst_error(wrong, reference, reference - x) > LIMIT[algorithm], f"{name} went unnoticed"
    broken = reference.clone()
    broken[0, 0, 0, 0] = float("nan")
    assert not nh.worst_error(broken, reference, reference) <= LIMIT[algorithm]

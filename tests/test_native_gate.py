"""The native gate and reconstruction against float64 torch."""

import native_harness as nh
import pytest
import torch
from native_harness import Plan, single

SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (3, 3), (4, 5), (5, 4), (16, 17), (33, 29), (63, 65), (9, 127)]

# Largest error of any element in units of the RMS of the output: twice the largest measured over this file (gate 3.1e-6: up
# to 320 products in one sum; reconstruction 1.3e-6: 576 products in 16, 8 or 4 partial sums).
LIMIT = {"gate": 6e-6, "reconstruct": 2.6e-6}


def gate_case(n, channels, size, count, generator):
    sources = [single(n, channels, *size, generator=generator) for _ in range(count)]
    parameters = {
        "scale": single(count, channels, generator=generator, spread=0.3) + 1,
        "shift": single(count, channels, generator=generator, spread=0.3),
        "weight": single(channels, count * channels, 1, 1, generator=generator, spread=(2 / (count * channels)) ** 0.5),
        "bias": single(channels, generator=generator, spread=0.2),
    }
    return sources, parameters


def run_gate(sources, parameters, slots, dst, **options):
    n, channels, h, w = sources[0].shape
    plan = Plan(n, h, w, channels, num_slots=7, **options)
    for slot, source in zip(slots, sources, strict=True):
        plan.set_slot(slot, source)
    plan.gate(slots, dst, **parameters)
    return plan.run().slot(dst)


@pytest.mark.parametrize("channels", [64, 16, 20, 5])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gate_equals_float64(size, channels):
    generator = torch.Generator().manual_seed(size[0] * 100 + size[1] + channels)
    for n, slots in ((1, [2]), (3, [5, 0, 3]), (1, [1, 2, 3, 4, 6])):
        sources, parameters = gate_case(n, channels, size, len(slots), generator)
        reference = nh.gate(sources, **parameters)
        for i, isa in enumerate(nh.isas()):
            dst = next(free for free in range(7) if free not in slots)
            result = run_gate(sources, parameters, slots, dst, isa=isa, threads=1 + i, poison=("nan", "ones")[i % 2])
            error = nh.worst_error(result, reference, reference)
            assert error <= LIMIT["gate"], (isa, n, slots, error)


def reconstruct_case(n, channels, size, cin, cout, kernel, heads, generator):
    image = torch.rand(n, cin, *size, generator=generator).double()
    sources = [single(n, channels, *size, generator=generator) for _ in range(heads)]
    parameters = {
        "scale": single(heads, channels, generator=generator, spread=0.3) + 1,
        "shift": single(heads, channels, generator=generator, spread=0.3),
        "weight": single(cout, channels, kernel, kernel, generator=generator, spread=0.3 / kernel),
        "bias": single(cout, generator=generator, spread=0.2),
        "heads": single(heads, generator=generator, spread=0.5),
        "skip_weight": 0.75,
    }
    return image, sources, parameters


def run_reconstruct(image, sources, parameters, **options):
    n, channels, h, w = sources[0].shape
    cout = parameters["weight"].shape[0]
    plan = Plan(n, h, w, channels, cin=image.shape[1], cout=cout, num_slots=7, **options)
    plan.set_image(image)
    slots = [5, 1, 3, 0, 2, 6][: len(sources)]
    for slot, source in zip(slots, sources, strict=True):
        plan.set_slot(slot, source)
    plan.reconstruct(slots, **parameters)
    return plan.run().output()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("size", "cin", "cout"),
    [
        *((size, *channels) for size in SIZES for channels in ((1, 1), (3, 3))),
        *((size, *channels) for size in ((1, 7), (16, 17), (9, 127)) for channels in ((1, 3), (31, 31))),
    ],
    ids=str,
)
def test_reconstruct_equals_float64(size, cin, cout, kernel):
    generator = torch.Generator().manual_seed(size[0] * 100 + size[1] + cin + kernel)
    for n, channels, heads in ((1, 64, 6), (3, 20, 1), (3, 64, 2)):
        image, sources, parameters = reconstruct_case(n, channels, size, cin, cout, kernel, heads, generator)
        reference = nh.reconstruct(image, sources, **parameters)
        for i, isa in enumerate(nh.isas()):
            poison = ("ones", "nan")[i % 2]
            result = run_reconstruct(image, sources, parameters, isa=isa, threads=1 + i, poison=poison)
            # In units of the whole sum's typical size: single outputs of a 1x1 image may cancel to almost nothing.
            error = nh.worst_error(result, reference, reference.abs() + 1)
            assert error <= LIMIT["reconstruct"], (isa, n, channels, error)


@pytest.mark.parametrize("isa", nh.isas())
def test_clamp_keeps_nan(isa):
    generator = torch.Generator().manual_seed(1)
    image, sources, parameters = reconstruct_case(1, 20, (9, 60), 1, 1, 3, 2, generator)
    sources[1][0, 4, 5, 50] = float("nan")
    result = run_reconstruct(image, sources, parameters | {"clamp": True}, isa=isa)
    reference = nh.reconstruct(image, sources, **parameters, clamp=True)
    expected = torch.zeros(1, 1, 9, 60, dtype=torch.bool)
    expected[..., 4:7, 49:52] = True
    assert torch.equal(result.isnan(), expected) and torch.equal(reference.isnan(), expected)
    kept = result[~expected]
    assert kept.min() == 0 and kept.max() == 1
    assert (kept - reference[~expected]).abs().max() <= 1e-5


@pytest.mark.parametrize("isa", nh.isas())
def test_threads_and_batch_do_not_change_a_bit(isa):
    generator = torch.Generator().manual_seed(2)
    sources, gate = gate_case(3, 20, (33, 29), 3, generator)
    image, heads, reconstruct = reconstruct_case(3, 20, (33, 59), 3, 3, 3, 4, generator)
    whole = run_gate(sources, gate, [0, 1, 2], 3, isa=isa, threads=1)
    restored = run_reconstruct(image, heads, reconstruct, isa=isa, threads=1)
    for threads in (2, 3):
        assert torch.equal(whole, run_gate(sources, gate, [0, 1, 2], 3, isa=isa, threads=threads))
        assert torch.equal(restored, run_reconstruct(image, heads, reconstruct, isa=isa, threads=threads))
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(whole[one], run_gate([s[one] for s in sources], gate, [0, 1, 2], 3, isa=isa))
        alone = run_reconstruct(image[one], [s[one] for s in heads], reconstruct, isa=isa)
        assert torch.equal(restored[one], alone)


@pytest.mark.parametrize("isa", nh.isas())
def test_integers_are_exact(isa):
    generator = torch.Generator().manual_seed(7)

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=generator).double()

    sources = [integers(2, 64, 11, 53) for _ in range(3)]
    scale, shift = integers(3, 64), integers(3, 64)
    gate = {"scale": scale, "shift": shift, "weight": integers(64, 192, 1, 1), "bias": integers(64)}
    assert torch.equal(run_gate(sources, gate, [4, 0, 2], 1, isa=isa).double(), nh.gate(sources, **gate))
    image = integers(2, 1, 11, 53)
    for kernel in (1, 3):
        heads = {"scale": scale, "shift": shift, "weight": integers(3, 64, kernel, kernel), "bias": integers(3)}
        heads |= {"heads": torch.tensor([0.5, -2.0, 1.0]).double(), "skip_weight": 2.0}
        result = run_reconstruct(image, sources, heads, isa=isa)
        assert torch.equal(result.double(), nh.reconstruct(image, sources, **heads))


def test_the_comparison_sees_wrong_operations():
    generator = torch.Generator().manual_seed(8)
    sources, gate = gate_case(1, 64, (16, 17), 3, generator)
    reference = nh.gate(sources, **gate)
    bias = gate["bias"].clone()
    bias[9] *= 1.01
    weight = gate["weight"].clone()
    weight[3, 70] *= 1.1
    for change in ({"bias": bias}, {"weight": weight}, {"scale": gate["scale"].roll(1, 0)}):
        wrong = run_gate(sources, gate | change, [0, 1, 2], 3)
        assert nh.worst_error(wrong, reference, reference) > LIMIT["gate"], list(change)
    image, heads, parameters = reconstruct_case(1, 64, (16, 17), 1, 1, 3, 3, generator)
    reference = nh.reconstruct(image, heads, **parameters)
    tap = parameters["weight"].clone()
    tap[:, :, 0, 2] = 0
    rotated = parameters["heads"].roll(1)
    for change in ({"weight": tap}, {"heads": rotated}, {"skip_weight": 0.0}, {"bias": parameters["bias"] * 1.01}):
        wrong = run_reconstruct(image, heads, parameters | change)
        assert nh.worst_error(wrong, reference, reference.abs() + 1) > LIMIT["reconstruct"], list(change)

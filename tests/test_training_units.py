"""The native units of a training step (training.units, csrc/cpu/training.h): values, bits, borders of memory, refusals."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.unit_cases import EPS, Case, Guarded, Raw, Values, by_units, error, exact, values

from memnet_fast import native
from memnet_fast.training import units

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
ISAS = [] if native.why_missing() else native.module().isas()

CASES = {
    "3x3, 1x2": Case(16, 3, 1, 2),
    "3x3, 5x7": Case(64, 2, 5, 7, skip=True),
    "3x3, 6x6": Case(48, 1, 6, 6, skip=True, bias=False),
    "3x3, 7x13": Case(80, 2, 7, 13, bias=False),
    "3x3, 31x31": Case(64, 1, 31, 31),
    "3x3, 48x48": Case(16, 1, 48, 48, skip=True),
    "3x3, 8x150": Case(64, 3, 8, 150),
    "3x3, 128 channels": Case(128, 1, 9, 8, skip=True),
    "1x1, 1x2": Case(64, 3, 1, 2, kernel=1),
    "1x1, 5x7": Case(16, 2, 5, 7, kernel=1, sources=3, bias=False),
    "1x1, 7x13": Case(48, 1, 7, 13, kernel=1, sources=7),
    "1x1, 31x31": Case(64, 3, 31, 31, kernel=1, sources=3),
    "1x1, 8x150": Case(80, 1, 8, 150, kernel=1, sources=7),
    "1x1, 128 channels": Case(128, 1, 9, 8, kernel=1, sources=2),
    "reconstruction, 1x2": Case(64, 3, 1, 2, outputs=1),
    "reconstruction, 5x7": Case(16, 2, 5, 7, outputs=3, bias=False),
    "reconstruction, 6x6": Case(48, 1, 6, 6, kernel=1, outputs=1),
    "reconstruction, 7x13": Case(80, 2, 7, 13, kernel=1, outputs=3),
    "reconstruction, 48x48": Case(64, 1, 48, 48, outputs=1),
    "reconstruction, 8x150": Case(64, 3, 8, 150, outputs=3),
}
# The largest error of each result in all of CASES, as `error` has it; measured (all three instruction sets of x86) -> limit.
LIMITS = {
    "3x3": {
        "out": 6e-6,  # 2.8e-6
        "x": 8e-6,  # 3.9e-6
        "gamma": 1.5e-5,  # 7.4e-6
        "beta": 1.2e-5,  # 5.8e-6
        "weight": 6e-6,  # 2.9e-6
        "bias": 5e-7,  # 2.3e-7
        "skip": 0.0,  # the gradient itself
    },
    "1x1": {
        "out": 8e-7,  # 3.7e-7
        "x": 8e-7,  # 4.1e-7
        "gamma": 1e-6,  # 4.9e-7
        "beta": 6e-7,  # 2.8e-7
        "weight": 8e-7,  # 3.8e-7
        "bias": 5e-7,  # 2.2e-7
    },
    "reconstruction": {
        "out": 6e-7,  # 3.1e-7
        "x": 1.7e-6,  # 8.4e-7
        "gamma": 9e-7,  # 4.2e-7
        "beta": 8e-7,  # 3.9e-7
        "weight": 2e-6,  # 1.0e-6
        "bias": 1e-7,  # 3.1e-8
    },
}
# More pixels than the sums have parts of full size for, and more than one chunk of tiles.
LARGE = [
    Case(16, 1, 260, 270, skip=True),
    Case(16, 1, 260, 270, kernel=1, sources=2),
    Case(16, 1, 260, 270, outputs=1),
]
SOME = [
    Case(64, 3, 31, 31, skip=True),
    Case(48, 2, 7, 13),
    Case(80, 2, 8, 150, bias=False),
    Case(64, 3, 31, 31, kernel=1, sources=3),
    Case(48, 2, 7, 13, kernel=1),
    Case(64, 3, 8, 150, outputs=3),
    Case(16, 3, 31, 31, kernel=1, outputs=1),
]


def _name(case: Case) -> str:
    return f"{case.kind}, {case.channels}, {case.n}x{case.h}x{case.w}"


def _check(case: Case, found: Values, expected: Values) -> None:
    for name, t in found.items():
        if name in expected:
            assert t.shape == expected[name].shape
            limit = LIMITS[case.kind][name]
            assert error(t, expected[name]) <= limit, (name, error(t, expected[name]))  # of a NaN not


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_units_are_those_of_float64(name: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result by itself, under each instruction set of this machine, which may not all choose the same code."""
    case = CASES[name]
    given = values(case)
    expected = exact(given, train)
    for isa in ISAS:
        monkeypatch.setattr(units, "_ISA", isa)
        found = by_units(case, given, train)
        assert found.keys() == expected.keys()
        _check(case, found, expected)


@pytest.mark.parametrize("case", LARGE, ids=_name)
def test_many_pixels(case: Case) -> None:
    given = values(case)
    _check(case, by_units(case, given, True), exact(given, True))


def test_kinds_are_told_apart() -> None:
    def known(out: int, channels: int, kernel: int, *maps: int) -> bool:
        conv = torch.nn.Conv2d(channels, out, kernel, padding=kernel // 2)
        return units.computes(conv, [torch.empty(1, c, 2, 2) for c in maps])

    assert known(16, 16, 3, 16) and known(16, 16, 1, 16) and known(16, 48, 1, 16, 16, 16)
    assert known(1, 16, 3, 16) and known(3, 16, 1, 16)
    assert not known(16, 1, 3, 1) and not known(8, 8, 3, 8) and not known(24, 24, 3, 24)
    assert not known(16, 32, 3, 16, 16) and not known(1, 32, 1, 16, 16) and not known(4, 16, 3, 16) and not known(32, 16, 3, 16)


# Bits ----------------------------------------------------------------------------------------------------------------


def _same(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert not t.isnan().any() and torch.equal(t, expected[name]), name


@pytest.mark.parametrize("case", [*SOME, *LARGE], ids=_name)
def test_threads_do_not_change_a_bit(case: Case) -> None:
    given = values(case)
    alone = Raw(case, given, True).run()
    for threads in (2, 3, 5):
        _same(Raw(case, given, True, threads).run(), alone)


@pytest.mark.parametrize("case", SOME, ids=_name)
def test_images_of_a_batch_do_not_change_a_bit_of_one_another(case: Case) -> None:
    given = values(case)
    together = Raw(case, given, False).run()
    for k in range(case.n):
        own = {name: t[k : k + 1] if name in ("x", "grad", "skip") else t for name, t in given.items()}
        alone = Raw(dataclasses.replace(case, n=1), own, False).run()
        for name in ("out", "x"):
            assert torch.equal(alone[name], together[name][k : k + 1]), (k, name)
        assert not torch.equal(alone["weight"], together["weight"])


@pytest.mark.parametrize("case", SOME, ids=_name)
def test_scratch_that_is_larger_and_holds_anything_does_not_change_a_bit(case: Case) -> None:
    """Raw's own scratch is full of NaN."""
    given = values(case)
    first = Raw(case, given, True, threads=2).run()
    _same(Raw(case, given, True, threads=2, spare=5000).run(), first)
    again = Raw(case, given, True, threads=2, spare=1)
    for backward in (False, True):
        scratch = again.scratch(backward)
        for content in (1e30, float("inf"), -1.0):
            scratch.data.fill_(content)
            again.call(backward, scratch)
            again.call(backward, scratch)  # what the last call left
    _same(again.found(), first)


@pytest.mark.parametrize("name", CASES)
def test_everything_is_written_and_nothing_else_is(name: str) -> None:
    """With arrays at addresses that are aligned to 4 bytes only. Raw.call looks at the bands around each array."""
    case = CASES[name]
    given = values(case)
    expected = exact(given, False)
    for isa in ISAS:
        raw = Raw(case, given, False, threads=3, isa=isa)
        raw.call(False)
        assert [k for k in raw.results if not raw.arrays[k].untouched] == ["out"]
        out = raw.arrays["out"].data.clone()
        raw.call(True)
        assert torch.equal(raw.arrays["out"].data, out)
        assert all(raw.arrays[k].written for k in raw.results)
        _check(case, raw.found(), expected)


@pytest.mark.parametrize("case", SOME, ids=_name)
def test_where_values_lie_does_not_change_a_bit(case: Case) -> None:
    """Maps, weights, gradients and parameters in any order of axes, and with gaps."""
    given = values(case)
    expected = by_units(case, given, True)
    for layout in (_channels_last, _with_gaps, _columns_first):
        _same(by_units(case, given, True, layout), expected)


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.clone()


def _columns_first(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT if t.ndim > 1 else t.clone()


def _with_gaps(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]


def test_a_scratch_grows_and_stays_aligned() -> None:
    scratch = units.Scratch()
    first = scratch.at_least(100)
    assert first % 64 == 0 and scratch.at_least(50) == first
    grown = scratch.at_least(100_000)
    memory = scratch._memory
    with ThreadPoolExecutor(1) as other:  # whose memory is its own
        elsewhere = other.submit(scratch.at_least, 100_000).result()
        assert other.submit(scratch.at_least, 100_000).result() == elsewhere != grown and scratch._memory is memory
    assert grown % 64 == 0 and memory.data_ptr() <= grown and grown + 400_000 <= memory.data_ptr() + 4 * memory.numel()


@pytest.mark.parametrize("case", [Case(16, 2, 5, 7), Case(16, 2, 5, 7, kernel=1), Case(16, 2, 5, 7, outputs=1)], ids=_name)
def test_a_relu_at_zero_lets_nothing_through(case: Case) -> None:
    """As in PyTorch: a batch normalisation that came to be 0 is dead."""
    given = values(case)
    given["gamma"][3], given["beta"][3] = 0.0, 0.0
    for isa in ISAS:
        found, expected = Raw(case, given, False, isa=isa).run(), exact(given, False)
        for name in ("gamma", "beta"):
            assert found[name][3] == expected[name][3] == 0.0
        assert not found["x"][:, 3].any() and not found["weight"][:, 3].any()


# Values that are no numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "grad"])
@pytest.mark.parametrize("case", SOME, ids=_name)
def test_what_is_no_number_stays_in_its_image_and_does_not_vanish(case: Case, where: str, value: float) -> None:
    given = values(case)
    clean = Raw(case, given, False).run()
    given[where] = given[where].clone()
    # Not at an edge: there autograd multiplies it with the zeros around the image, too.
    given[where][1, 0, case.h // 2, case.w // 2] = value
    found, expected = Raw(case, given, False).run(), exact(given, False)
    for name, t in found.items():
        if name in expected:
            lost = ~expected[name].isfinite() & t.isfinite()
            assert not lost.any(), (name, int(lost.sum()))
    others = [k for k in range(case.n) if k != 1]
    for name in ("out", "x"):
        assert torch.equal(found[name][others], clean[name][others]), name
    if where == "x":  # a ReLU of what is no number lets the gradient through
        assert error(found["beta"], expected["beta"]) <= LIMITS[case.kind]["beta"]
    reached = ["out", "weight", "gamma"] if where == "x" else ["x", "weight", "gamma", "beta", "bias"]
    for name in reached:
        assert not found[name].isfinite().all(), name


@pytest.mark.parametrize("where", ["x", "grad"])
@pytest.mark.parametrize("case", SOME, ids=_name)
def test_a_nan_reaches_the_gradients_of_its_batch(case: Case, where: str) -> None:
    given = values(case)
    given[where][0, 0, case.h // 2, case.w // 2] = float("nan")
    found, expected = by_units(case, given, True), exact(given, True)
    for name, t in found.items():
        assert not (expected[name].isnan() & ~t.isnan()).any(), name
    assert found["weight"].isnan().any() and found["x"].isnan().any()


# Statistics ----------------------------------------------------------------------------------------------------------


def _statistics(x: torch.Tensor, threads: int = 1, isa: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Of x [pixels, C], between guard bands."""
    module, (pixels, c) = native.module(), x.shape
    arrays = {"x": Guarded(x.numel()), "mean": Guarded(c), "var": Guarded(c)}
    scratch = Guarded(module.statistics_scratch(pixels, c, isa), aligned=True)
    arrays["x"].data.copy_(x.flatten())
    addresses = arrays["x"].address, pixels, c, arrays["mean"].address, arrays["var"].address
    module.channel_statistics(*addresses, scratch.address, scratch.data.numel(), threads, isa)
    for name, array in (*arrays.items(), ("scratch", scratch)):
        array.check_bands(name)
    assert torch.equal(arrays["x"].data.view(torch.int32), x.flatten().view(torch.int32))
    return arrays["mean"].data.clone(), arrays["var"].data.clone()


# Worst in 66001 pixels and fewer, 48 channels; measured -> limit. Of the mean in standard deviations (but for the rounding of
# the mean itself, where it is far from zero), of the variance in itself.
LIMIT_OF_MEAN = 8e-7  # 2.7e-7
LIMIT_OF_VARIANCE = 2.5e-6  # 8.8e-7


def _check_statistics(x: torch.Tensor, isa: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    found = _statistics(x, isa=isa)
    rounding = 2.0**-24 * mean.abs()
    assert bool(((found[0] - mean).abs() <= LIMIT_OF_MEAN * var.sqrt() + rounding).all())
    assert bool(((found[1] - var).abs() <= LIMIT_OF_VARIANCE * var).all()), float((found[1] / var - 1).abs().max())
    return found


@pytest.mark.parametrize("center", [0.0, 1e4])
@pytest.mark.parametrize("pixels", [2, 3, 31, 33, 95, 96, 97, 191, 193, 2047, 2048, 2049, 4095, 4097, 6145, 65537, 66001])
def test_statistics_are_those_of_float64(pixels: int, center: float) -> None:
    """A mean far from zero costs no digits of the variance: what there is of them is in the input."""
    x = torch.randn(pixels, 48 if pixels < 10000 else 16) + center
    for isa in ISAS:
        found = _check_statistics(x, isa)
        for threads in (2, 3, 5):
            assert all(torch.equal(a, b) for a, b in zip(_statistics(x, threads, isa), found, strict=True))


def test_pixels_far_from_the_others_cost_no_digits() -> None:
    """Corners of images lie in the padding of all convolutions so far."""
    x = torch.randn(64, 31 * 31, 16)
    x[:, 0] += 100.0
    _check_statistics(x.reshape(-1, 16))
    for pixel in (0, 5000, 9999):
        x = torch.randn(10000, 16)
        x[pixel] = 1e4
        _check_statistics(x)


def test_statistics_of_one_pixel_and_of_equal_pixels() -> None:
    one = torch.randn(1, 64) * 1e4
    mean, var = _statistics(one)
    assert torch.equal(mean, one[0]) and torch.equal(var, torch.zeros(64))
    for equal in (torch.zeros(48), torch.randn(48) * 1e4):
        mean, var = _statistics(equal.expand(2051, 48).contiguous())
        torch.testing.assert_close(mean, equal, rtol=2.0**-23, atol=0.0)
        assert bool((var >= 0.0).all()) and bool((var <= 1e-12 * equal.square()).all())


def test_statistics_keep_what_is_no_number() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        for pixel in (0, 2100):
            x = torch.randn(2500, 32)
            x[pixel, 17] = value
            clean = torch.arange(32) != 17
            mean, var = _statistics(x)
            assert not mean[17].isfinite() and not var[17].isfinite()
            assert mean[clean].isfinite().all() and var[clean].isfinite().all()


def test_statistics_of_any_layout_are_those_of_its_values() -> None:
    x = torch.randn(2, 16, 5, 9)
    expected = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    channels_last, strided = x.contiguous(memory_format=torch.channels_last), torch.empty(2, 32, 5, 9)
    strided[:, ::2] = x
    for layout in (x, channels_last, strided[:, ::2], x.flip(3).flip(3), x.transpose(2, 3).contiguous().transpose(2, 3)):
        mean, var = units.statistics(layout, units.Scratch())
        torch.testing.assert_close(mean, expected[1].float(), rtol=1e-6, atol=LIMIT_OF_MEAN)
        torch.testing.assert_close(var, expected[0].float(), rtol=LIMIT_OF_VARIANCE, atol=0)


# The transforms of weights -------------------------------------------------------------------------------------------


# Measured in five seeds and three instruction sets -> limit.
LIMIT_OF_TAPS = {
    "out": 8e-7,  # 3.9e-7
    "x": 1e-5,  # 5.1e-6
    "weight": 8e-7,  # 3.8e-7
}


@pytest.mark.parametrize("isa", ISAS)
def test_the_points_are_those_of_packing(isa: str) -> None:
    """The kernels transform weights themselves, for inference packing.winograd_weight_transform() does it; what is done to maps
    is the same code, and fits one transform of weights only. With the right one a weight of a single tap copies a channel,
    moved by a pixel, and each tap gets its own gradient: an error in a constant has no other values to hide among."""
    case = Case(16, 1, 6, 6, bias=False)
    given = values(case)
    given["gamma"], given["beta"] = torch.ones(16), torch.zeros(16)
    given["running_mean"], given["running_var"] = torch.full((16,), -9.0), torch.full((16,), 1 - EPS)  # all above zero
    for ky in range(3):
        for kx in range(3):
            given["weight"] = torch.zeros(16, 16, 3, 3)
            given["weight"][5, 3, ky, kx] = 1.0
            found, expected = Raw(case, given, False, isa=isa).run(), exact(given, False)
            moved = torch.nn.functional.pad(given["x"][0, 3] + 9.0, (1, 1, 1, 1))[ky : ky + 6, kx : kx + 6]
            assert error(found["out"][0, 5], moved) <= LIMIT_OF_TAPS["out"]
            assert not found["out"][0, [k for k in range(16) if k != 5]].any()
            for name, limit in LIMIT_OF_TAPS.items():
                assert error(found[name], expected[name]) <= limit, (name, error(found[name], expected[name]))


# Refusals ------------------------------------------------------------------------------------------------------------

WRONG_SHAPES = [
    ({"n": 0}, "n, h and w must be at least 1"),
    ({"h": 0}, "n, h and w must be at least 1"),
    ({"w": 2**63}, "n, h and w must be at least 1"),
    ({"n": 2**62}, "the map is too large"),
    ({"n": 2**32, "h": 2**32, "w": 2**32}, "the map is too large"),
    ({"h": 2**45}, "the map is too large"),
    ({"c": 0}, "c must be a multiple of 16 in 16..4096"),
    ({"c": 8}, "c must be a multiple of 16 in 16..4096"),
    ({"c": 24}, "c must be a multiple of 16 in 16..4096"),
    ({"c": 4112}, "c must be a multiple of 16 in 16..4096"),
    ({"threads": 0}, "threads must be in 1..1024"),
    ({"threads": 1025}, "threads must be in 1..1024"),
    ({"threads": 2**32 + 1}, "threads must be in 1..1024"),
    ({"threads": 2**64 - 2**32 + 1}, "threads must be in 1..1024"),
    ({"kernel": 0}, "kernel must be 1 or 3"),
    ({"kernel": 2}, "kernel must be 1 or 3"),
    ({"kernel": 5}, "kernel must be 1 or 3"),
    ({"outputs": 65}, "outputs must be in 0..64"),
    ({"outputs": 2**63}, "outputs must be in 0..64"),
    ({"x": []}, "sources must be in 1..4096"),
    ({"x": [64] * 4097, "kernel": 1}, "sources must be in 1..4096"),
    ({"x": [64, 64]}, "only a 1x1 convolution from maps to a map has several sources"),
    ({"x": [64, 64], "kernel": 1, "outputs": 1}, "only a 1x1 convolution from maps to a map has several sources"),
    ({"n": -1}, "n must be a whole number from 0 on"),
    ({"h": 1.5}, "h must be a whole number from 0 on"),
    ({"weight": None}, "weight must be a whole number from 0 on"),
]
WRONG_POINTERS = {
    False: [
        ("gamma", "a parameter is null or not aligned to 4 bytes"),
        ("beta", "a parameter is null or not aligned to 4 bytes"),
        ("mean", "a parameter is null or not aligned to 4 bytes"),
        ("invstd", "a parameter is null or not aligned to 4 bytes"),
        ("weight", "a parameter is null or not aligned to 4 bytes"),
        ("bias", "the bias or the output is null or not aligned to 4 bytes"),
        ("out", "the bias or the output is null or not aligned to 4 bytes"),
        ("x", "a source is null or not aligned to 4 bytes"),
    ],
    True: [
        *((name, "a parameter is null or not aligned to 4 bytes") for name in ("gamma", "beta", "mean", "invstd", "weight")),
        *(
            (name, "a gradient is null or not aligned to 4 bytes")
            for name in ("grad", "grad_gamma", "grad_beta", "grad_weight", "grad_bias")
        ),
        ("x", "a source is null or not aligned to 4 bytes"),
        ("grad_x", "the gradient of a source is null or not aligned to 4 bytes"),
    ],
}


def _refused(raw: Raw, backward: bool, said: str, scratch: Guarded, address: int | None = None, short: int = 0) -> None:
    function = raw.module.unit_backward if backward else raw.module.unit_forward
    address = scratch.address if address is None else address
    with pytest.raises(ValueError) as raised:
        function(raw.fields, address, scratch.data.numel() - short, raw.isa)
    assert str(raised.value) == said
    assert scratch.untouched and all(raw.arrays[name].untouched for name in raw.results)


@pytest.mark.parametrize("backward", [False, True])
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(backward: bool) -> None:
    case = Case(16, 1, 3, 4, skip=True)
    given = values(case)
    scratch = Raw(case, given, True).scratch(backward)
    for change, said in WRONG_SHAPES:
        raw = Raw(case, given, True)
        raw.fields |= change
        with pytest.raises(ValueError) as raised:
            raw.module.unit_scratch(raw.fields, backward, raw.isa)
        assert str(raised.value) == said
        _refused(raw, backward, said, scratch)
    for name, said in WRONG_POINTERS[backward]:
        for wrong in (0, 1, 2):  # null, or not aligned
            raw = Raw(case, given, True)
            address = raw.fields[name]
            if isinstance(address, list):
                raw.fields[name] = [a + wrong if wrong else 0 for a in address]
            else:
                raw.fields[name] = address + wrong if wrong else 0
            _refused(raw, backward, said, scratch)
            if not wrong:
                raw.fields[name] = [] if name == "grad_x" else raw.fields[name]  # as many as there are sources
                _refused(raw, backward, said, scratch)
    raw = Raw(case, given, True)
    for address in (0, scratch.address + 4, scratch.address + 32):
        _refused(raw, backward, "scratch is null or not aligned to 64 bytes", scratch, address)
    for short in (1, scratch.data.numel(), scratch.data.numel() + 1):
        _refused(raw, backward, "scratch is too small", scratch, short=short)
    raw.call(backward, scratch)  # and with nothing wrong it computes


@pytest.mark.parametrize("case", [Case(16, 1, 3, 4, kernel=1), Case(16, 1, 3, 4, outputs=1)], ids=_name)
def test_a_skip_belongs_to_one_kind_only(case: Case) -> None:
    raw = Raw(case, values(case), True)
    raw.fields["skip"] = raw.arrays["x0"].address
    said = "a skip belongs to a 3x3 convolution from map to map and is aligned to 4 bytes"
    _refused(raw, False, said, raw.scratch(False))
    other = Case(16, 1, 3, 4, skip=True)
    raw = Raw(other, values(other), True)
    raw.fields["skip"] += 2
    _refused(raw, False, said, raw.scratch(False))


def test_instruction_sets_that_cannot_train_are_refused() -> None:
    case = Case(16, 1, 3, 4)
    for backward in (False, True):
        for isa in ("avx512_bf16", "sse9", ""):
            raw = Raw(case, values(case), True)
            scratch = raw.scratch(backward)
            raw.isa = isa
            function = raw.module.unit_backward if backward else raw.module.unit_forward
            with pytest.raises(ValueError, match="^[^\n]+$"):
                raw.module.unit_scratch(raw.fields, backward, isa)
            with pytest.raises(ValueError, match="^[^\n]+$"):
                function(raw.fields, scratch.address, scratch.data.numel(), isa)
            with pytest.raises(ValueError, match="^[^\n]+$"):
                raw.module.statistics_scratch(12, 16, isa)
            assert scratch.untouched and all(raw.arrays[name].untouched for name in raw.results)


def test_statistics_refuse_in_one_line_and_write_nothing() -> None:
    module = native.module()
    x, mean, var = Guarded(160), Guarded(16), Guarded(16)
    scratch = Guarded(module.statistics_scratch(10, 16, "auto"), aligned=True)
    good = {"x": x.address, "pixels": 10, "c": 16, "mean": mean.address, "var": var.address}
    good |= {"scratch": scratch.address, "floats": scratch.data.numel(), "threads": 1, "isa": "auto"}
    refusals = [
        ({"pixels": 0}, "n, h and w must be at least 1"),
        ({"pixels": -1}, "n, h and w must be at least 1"),
        ({"pixels": 2**60}, "the map is too large"),
        ({"c": 17}, "c must be a multiple of 16 in 16..4096"),
        ({"c": 4112}, "c must be a multiple of 16 in 16..4096"),
        ({"threads": 0}, "threads must be in 1..1024"),
        ({"threads": 1025}, "threads must be in 1..1024"),
        ({"scratch": 0}, "scratch is null or not aligned to 64 bytes"),
        ({"scratch": scratch.address + 4}, "scratch is null or not aligned to 64 bytes"),
        ({"floats": scratch.data.numel() - 1}, "scratch is too small"),
    ]
    for name in ("x", "mean", "var"):
        for address in (0, good[name] + 1):
            refusals.append(({name: address}, "a map or its statistics are null or not aligned to 4 bytes"))
    for change, said in refusals:
        with pytest.raises(ValueError) as raised:
            module.channel_statistics(*(good | change).values())
        assert str(raised.value) == said
        assert scratch.untouched and mean.untouched and var.untouched


@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (1, 16, 1, 1), (3, 48, 1, 9)])
def test_new_maps_are_aligned_and_in_channels_last(shape: tuple[int, ...]) -> None:
    like = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    made = units._new_map(like)
    assert made.shape == like.shape and made.dtype == torch.float32
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert made.data_ptr() % 64 == 0 and made.untyped_storage().nbytes() >= made.nbytes


def test_new_maps_take_the_places_of_freed_ones() -> None:
    """In a process of its own, for it changes how the C library keeps memory."""
    program = """if True:
        import torch
        from memnet_fast.training import module, units
        module._keep_memory()
        like = torch.empty(1, 64, 64, 64).contiguous(memory_format=torch.channels_last)
        maps = [units._new_map(like) for _ in range(40)]
        places = {x.data_ptr() for x in maps[::2]}
        del maps[::2]
        print(len(places & {x.data_ptr() for x in [units._new_map(like) for _ in range(20)]}))
    """
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 18

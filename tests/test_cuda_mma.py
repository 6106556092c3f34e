"""The CUDA kernels for mma.sync and the image path: their own text on the CPU, against float64.

Every thread of a block is a fiber, shared memory is NaN until written, copies happen at once, late or at random
(tests/support/simt/simt.h says what is modelled). What a GPU does beyond that is for the tests marked gpu.
"""

import ctypes
import itertools
import mmap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import emulate_mma as emulate
from support import simt_build
from support.block_cases import (
    block_parameters,
    generator,
    integer_block,
    neighbours,
    normal,
    require_rounded_once,
    uncertainty,
)
from support.checks import UNIT, require, same_frame

from memnet_fast.layouts import mma

pytestmark = pytest.mark.skipif(simt_build.why_not() is not None, reason=str(simt_build.why_not()))

PRECISIONS = ("fp16", "bf16")
# Capabilities whose tables differ: small tiles and three stages; large tiles and two stages; resident weights of the gate.
CAPABILITIES = (80, 86, 90)
ORDERS = (0, 1, 7)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return simt_build.build(tmp_path_factory.mktemp("simt") / "all", emulate.SOURCES)


def gate_parameters(g, k):
    return {
        "scale": normal(g, k, 64, spread=0.3) + 1,
        "shift": normal(g, k, 64, spread=0.3),
        "weight": normal(g, 64, k, 64, spread=(2 / (64 * k)) ** 0.5),
        "bias": normal(g, 64, spread=0.2),
    }


def first_parameters(g, cin):
    return {
        "scale": normal(g, cin, spread=0.3) + 2,
        "shift": normal(g, cin, spread=0.3),
        "weight": normal(g, 64, cin, 3, 3, spread=0.3),
        "bias": normal(g, 64, spread=0.2),
    }


def recon_parameters(g, k, cout, kernel):
    return {
        "scale": normal(g, k, 64, spread=0.3) + 1,
        "shift": normal(g, k, 64, spread=0.3),
        "weight": normal(g, cout, 64, kernel, kernel, spread=0.05),
        "bias": normal(g, cout, spread=0.2),
        "head": normal(g, k, spread=0.4) + 0.3,
        "skip": normal(g, 1) + 1,
    }


def gate_uncertainty(slots, p, precision):
    """As block_cases.uncertainty, of a gate."""
    total = 0
    for j, slot in enumerate(slots):
        scaled = slot * p["scale"][j].view(-1, 1, 1)
        a = torch.relu(scaled + p["shift"][j].view(-1, 1, 1))
        a, moved = neighbours(a, 2 * UNIT["fp32"] * torch.maximum(scaled.abs(), a), precision)
        weight = emulate.rounded(p["weight"][:, j, :, None, None].abs(), precision)
        total = total + F.conv2d(moved + 16 * UNIT["fp32"] * a, weight)
    return total + 16 * UNIT["fp32"] * p["bias"].abs().view(-1, 1, 1)


def first_uncertainty(image, p):
    absolute = {"scale": p["scale"], "shift": p["shift"], "weight": p["weight"].abs(), "bias": p["bias"].abs()}
    return 16 * UNIT["fp32"] * emulate.first_conv(image, absolute)


def shorter(cases, precision):
    """bf16 differs from fp16 in its conversions alone: every third case."""
    return cases if precision == "fp16" else cases[::3]


SIZES = [
    (1, 1, 1),
    (1, 1, 7),
    (1, 7, 1),
    (2, 3, 5),
    (1, 11, 15),
    (1, 12, 16),
    (2, 13, 17),
    (1, 25, 9),
    (1, 15, 23),
    (1, 17, 25),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", (80, 86))
def test_residual_block_equals_float64(library, precision, capability):
    for i, (n, h, w) in enumerate(shorter(SIZES, precision)):
        g = generator(n, h, w)
        x, p = emulate.rounded(normal(g, n, 64, h, w), precision), block_parameters(g)
        y = emulate.Emulation(library, precision, capability, order=ORDERS[i % 3]).residual_block(x, p)
        require_rounded_once(y, emulate.residual_block(x, p, precision), precision, uncertainty(x, p, precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gate_equals_float64(library, precision, capability):
    # Pixels around a warp's 32 and a tile's 256, several tiles for each block, one source and many.
    cases = [(1, 1, 1, 1), (2, 1, 1, 7), (3, 2, 3, 5), (7, 1, 1, 31), (2, 1, 3, 11), (12, 1, 5, 51), (4, 1, 16, 16)]
    cases += [(1, 1, 257, 3), (5, 1, 2, 700), (16, 3, 9, 11), (20, 1, 1, 300)]
    for i, (k, n, h, w) in enumerate(shorter(cases, precision)):
        g = generator(k, n, h, w)
        slots, p = emulate.rounded(normal(g, k, n, 64, h, w), precision), gate_parameters(g, k)
        y = emulate.Emulation(library, precision, capability, order=ORDERS[i % 3]).gate(slots, p, gap=i % 3 * 8)
        require_rounded_once(y, emulate.gate(slots, p, precision), precision, gate_uncertainty(slots, p, precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cin", (1, 3, 10))
def test_first_conv_equals_float64(library, precision, cin):
    for i, (n, h, w) in enumerate([(1, 1, 1), (1, 1, 7), (1, 7, 1), (3, 2, 3), (1, 7, 31), (1, 8, 32), (2, 9, 33), (1, 8, 41)]):
        g = generator(cin, n, h, w)
        image, p = torch.rand(n, cin, h, w, generator=g).double(), first_parameters(g, cin)
        y = emulate.Emulation(library, precision, order=ORDERS[i % 3]).first_conv(image, p)
        require_rounded_once(y, emulate.first_conv(image, p), precision, first_uncertainty(image, p))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kernel", (1, 3))
def test_reconstruct_equals_float64(library, precision, kernel):
    # k, cout, image channels, n, h, w
    cases = [(1, 1, 1, 1, 1, 1), (6, 1, 1, 1, 1, 7), (2, 3, 3, 1, 7, 1), (3, 3, 1, 3, 2, 3), (1, 4, 4, 1, 15, 31)]
    cases += [(6, 1, 1, 2, 16, 32), (2, 5, 5, 1, 17, 33), (10, 31, 31, 1, 3, 35)]
    for i, (k, cout, planes, n, h, w) in enumerate(cases):
        g = generator(k, cout, n, h, w)
        slots, image = emulate.rounded(normal(g, k, n, 64, h, w), precision), torch.rand(n, planes, h, w, generator=g).double()
        p = recon_parameters(g, k, cout, kernel)
        runner = emulate.Emulation(library, precision, order=ORDERS[i % 3])
        for clamp in (False, True):
            y, reference = runner.reconstruct(slots, image, p, clamp), emulate.reconstruct(slots, image, p, clamp)
            same_frame(y, reference)
            # fp32 sums of up to 10 heads, 9 taps and 64 channels: measured at most 5e-6.
            error = float((y - reference).abs().max())
            require(error <= 1e-5, f"{(k, cout, planes, n, h, w)}: {error}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_integers_come_out_exactly(library, precision):
    """Bit equality: no index, tap, channel or sign can be wrong, and no rounding is lost."""
    g = generator("integers")

    def integers(*shape, low, high):
        return torch.randint(low, high + 1, shape, generator=g).double()

    x, p = integer_block(g, 1, 14, 19)
    reference = emulate.residual_block(x, p, precision)
    assert 20 < reference.abs().max() <= 256
    for capability, order in ((80, 0), (80, 3), (86, 1)):
        y = emulate.Emulation(library, precision, capability, order=order).residual_block(x, p)
        assert torch.equal(y, reference)

    slots = integers(3, 1, 64, 10, 30, low=-3, high=3)
    p = {"scale": integers(3, 64, low=1, high=2), "shift": integers(3, 64, low=-2, high=2)}
    weight = (integers(64, 3, 64, low=0, high=1) * 2 - 1) * (torch.rand(64, 3, 64, generator=g) < 0.1)
    p |= {"weight": weight, "bias": integers(64, low=-3, high=3)}
    reference = emulate.gate(slots, p, precision)
    assert 20 < reference.abs().max() <= 256
    for capability, order in zip(CAPABILITIES, (0, 1, 3), strict=True):
        y = emulate.Emulation(library, precision, capability, order=order).gate(slots, p)
        assert torch.equal(y, reference)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf"), 6e4))
def test_what_is_not_finite_stays_where_it_belongs(library, precision, value):
    g = generator("nan")
    runner = emulate.Emulation(library, precision, 86, order=1)

    x, p = emulate.rounded(normal(g, 2, 64, 9, 11), precision), block_parameters(g)
    clean = runner.residual_block(x, p)
    x[1, 5, 4, 3] = value
    y = runner.residual_block(x, p)
    same_frame(y, emulate.residual_block(x, p, precision).to(emulate.TYPES[precision][1]))
    reach = torch.zeros(2, 64, 9, 11, dtype=torch.bool)
    reach[1, :, 2:7, 1:6] = True
    assert torch.equal(y[~reach], clean[~reach])

    slots, p = emulate.rounded(normal(g, 3, 1, 64, 4, 70), precision), gate_parameters(g, 3)
    slots[1, 0, 9, 2, 33] = value
    y = runner.gate(slots, p)
    same_frame(y, emulate.gate(slots, p, precision).to(emulate.TYPES[precision][1]))

    image, p = torch.rand(1, 2, 4, 40, generator=g).double(), first_parameters(g, 2)
    image[0, 1, 2, 33] = value
    y = runner.first_conv(image, p)
    same_frame(y, emulate.first_conv(image, p).to(emulate.TYPES[precision][1]))

    for clamp in (False, True):
        slots, image = emulate.rounded(normal(g, 2, 1, 64, 4, 40), precision), torch.rand(1, 1, 4, 40, generator=g).double()
        slots[1, 0, 9, 2, 33] = value
        image[0, 0, 0, 5] = value
        p = recon_parameters(g, 2, 1, 3)
        same_frame(runner.reconstruct(slots, image, p, clamp), emulate.reconstruct(slots, image, p, clamp))


def test_tile_place_and_batch_do_not_change_a_bit(library):
    """An element is summed in the same order wherever its tile begins, in either tile and in any order of threads."""
    g = generator("place")
    x, p = emulate.rounded(normal(g, 1, 64, 14, 20), "fp16"), block_parameters(g)
    y = emulate.Emulation(library, "fp16", 80).residual_block(x, p)
    assert torch.equal(y, emulate.Emulation(library, "fp16", 86, order=1).residual_block(x, p))
    moved = emulate.Emulation(library, "fp16", 80, order=5).residual_block(x[..., 3:, 5:], p)
    assert torch.equal(moved[..., 2:, 2:], y[..., 5:, 7:])
    twice = emulate.Emulation(library, "fp16", 80, order=2).residual_block(torch.cat([x.flip(2), x]), p)
    assert torch.equal(twice[1:], y)

    slots, p = emulate.rounded(normal(g, 5, 1, 64, 1, 600), "fp16"), gate_parameters(g, 5)
    y = emulate.Emulation(library, "fp16", 80).gate(slots, p)
    for capability, sms in itertools.product(CAPABILITIES, (1, 3, 200)):
        assert torch.equal(y, emulate.Emulation(library, "fp16", capability, sms, order=sms).gate(slots, p))
    assert torch.equal(y[..., 37:], emulate.Emulation(library, "fp16", 90).gate(slots[..., 37:], p))

    slots, image = emulate.rounded(normal(g, 2, 1, 64, 20, 40), "fp16"), torch.rand(1, 1, 20, 40, generator=g).double()
    p = recon_parameters(g, 2, 1, 3)
    y = emulate.Emulation(library, "fp16").reconstruct(slots, image, p)
    moved = emulate.Emulation(library, "fp16", order=1).reconstruct(slots[..., 3:, 7:], image[..., 3:, 7:], p)
    assert torch.equal(moved[..., 1:, 1:], y[..., 4:, 8:])


def test_layouts_are_a_permutation_of_the_weight():
    for index, count in ((mma.conv3x3(), 64 * 64 * 9), (mma.gate(3), 64 * 3 * 64)):
        assert index.dtype == np.int32 and sorted(index.reshape(-1)) == list(range(count))
    assert mma.conv3x3()[0].nbytes // 2 == mma.gate(1)[0].nbytes // 2 == 8192  # in 16 bits: kStageBytes, kGateWeightBytes


def wavefronts(addresses, size):
    """Passes over the 32 banks that accesses of `size` bytes by these lanes take."""
    banks = {}
    for address in set(addresses):
        for word in range(address // 4, (address + size) // 4):
            banks.setdefault(word % 32, set()).add(word)
    return max(map(len, banks.values()))


def test_shared_memory_has_no_bank_conflicts(library):
    def chunk_offset(pixel, chunk):
        return library.index_chunk_offset(ctypes.c_int64(pixel), ctypes.c_int64(chunk))

    def sum_offset(pixel, chunk, half):
        return library.index_sum_offset(ctypes.c_int64(pixel), ctypes.c_int64(chunk), ctypes.c_int64(half))

    for first, chunk in itertools.product(range(40), range(8)):
        # ldmatrix: eight pixels of one chunk, at any shift. Copies and stores: whole pixels.
        assert wavefronts([chunk_offset(first + i, chunk) for i in range(8)], 16) == 1
        assert wavefronts([chunk_offset(first, i) for i in range(8)], 16) == 1
        # Fragments of 16-bit results: 8 rows of 4 lanes with 4 bytes.
        assert wavefronts([chunk_offset(first + i // 4, chunk) + 4 * (i % 4) for i in range(32)], 4) == 1
        # Fragments of fp32 sums, 8 bytes for each lane, half a warp at a time; 16 bytes for each lane when they are read.
        for rows in (0, 4):
            lanes = [(first + rows + i // 4, i % 4) for i in range(16)]
            assert wavefronts([sum_offset(pixel, chunk, t // 2) + 8 * (t % 2) for pixel, t in lanes], 8) == 1
        for half in (0, 1):
            assert wavefronts([sum_offset(first, i, half) for i in range(8)], 16) == 1


# Shared memory that a block may ask for, in KB (CUDA C++ Programming Guide, technical specifications by compute capability).
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


@pytest.mark.parametrize("capability", SHARED)
def test_shared_memory_fits(library, capability):
    limit = SHARED[capability] * 1024
    error, _, shared = launched(library, "residual_block_sm80", 0, capability, 100, *[0] * 8, 1, 100, 100)
    # Two blocks wherever there is room for them, each with the kilobyte that the system takes.
    assert error == 0 and shared <= limit and (2 * (shared + 1024) <= limit + 1024) == (limit > 100 * 1024)
    for num_src in (*range(1, 41), 1000, 10**6, 2**31 - 1):
        error, _, shared = launched(library, "gate", 0, capability, 100, 0, 0, num_src, *[0] * 5, 10**6)
        assert error == 0 and shared <= limit, num_src
    for cout, kernel in itertools.product((1, 2, 3, 4, 5, 31), (1, 3)):
        args = (0, capability, 100, 0, 0, 1, kernel, 0, *[0] * 8, 1, cout, 100, 100, 1)
        error, _, shared = launched(library, "reconstruct", *args)
        assert error == 0 and shared <= limit


# ---- Sizes that only a GPU could run whole


def launched(library, name, *args):
    """Error, number of blocks and bytes of shared memory of a launch that is not run."""
    library.simt_record_only(1)
    try:
        error = getattr(library, f"run_{name}")(*map(ctypes.c_int64, args))
    finally:
        library.simt_record_only(0)
    shape = (ctypes.c_uint * 3)()
    library.simt_last_launch(shape)
    return error, shape[0], shape[2]


@pytest.mark.parametrize(
    ("n", "h", "w", "tiles", "runs"),
    [
        (70_000, 3, 3, 70_000, 70_000),
        (1, 2, 65_536, 4096, 2048),
        (1, 65_536, 2, 5462, 8192),
        (1, 46_341, 46_341, 3862 * 2897, 5793 * 1449),  # 2^31 pixels
        (2**31 - 1, 1, 1, 2**31 - 1, 2**31 - 1),
        (2**31, 1, 1, None, None),  # more blocks than a launch has
        (1, 1, 2**31, None, None),  # columns are counted in 32 bits
    ],
)
def test_launches_cover_every_size(library, n, h, w, tiles, runs):
    for name, args, blocks in (
        ("residual_block_sm80", [0] * 8, tiles),
        ("first_conv", [0] * 6, runs),
    ):
        shape = (n, 1, h, w) if name == "first_conv" else (n, h, w)
        error, count, _ = launched(library, name, 0, 80, 108, *args, *shape)
        assert (error != 0) == (blocks is None)
        assert blocks is None or count == blocks
    error, count, _ = launched(library, "reconstruct", 0, 80, 108, 0, n * h * w * 64, 1, 3, 0, *[0] * 8, n, 1, h, w, 1)
    assert (error != 0) == (tiles is None)
    assert tiles is None or count == n * -(-h // 16) * -(-w // 32)
    pixels = n * h * w
    error, count, _ = launched(library, "gate", 0, 80, 108, 0, pixels * 64, 6, *[0] * 5, pixels)
    assert (error, count) == (0, min(108, -(-pixels // 256)))


class Sparse:
    """Memory of which only the touched pages exist, and numbers at some places of it."""

    def __init__(self, size):
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)

    @property
    def address(self):
        return self.bytes.data_ptr()

    def half(self, first, count):
        return self.bytes[2 * first : 2 * (first + count)].view(torch.float16)


def test_far_addresses(library):
    """Slots and images beyond 2^31 elements: the last block of a launch, on memory that exists only where it is touched."""
    g = generator("far")
    single = {name: value.float().contiguous() for name, value in block_parameters(g).items()}
    index = torch.from_numpy(mma.conv3x3()).long()
    packed = [single[name].view(-1)[index].half().contiguous() for name in ("weight_a", "weight_b")]
    n, h, w = 70_000, 23, 29  # 3.0e9 elements; the last tile has 11 rows and 13 columns
    elements = n * h * w * 64
    assert elements > 2**31
    source, target = Sparse(2 * elements), Sparse(2 * elements)
    x = normal(g, 1, 64, h, w).half()
    source.half(elements - h * w * 64, h * w * 64).copy_(x.permute(0, 2, 3, 1).reshape(-1))
    addresses = [single["scale"].data_ptr(), single["shift"].data_ptr(), packed[0].data_ptr(), single["bias_a"].data_ptr()]
    addresses += [packed[1].data_ptr(), single["bias_b"].data_ptr()]
    library.simt_clear_ranges()
    library.simt_last_block_only(1)
    try:
        args = (0, 80, 108, source.address, target.address, *addresses, n, h, w)
        assert library.run_residual_block_sm80(*map(ctypes.c_int64, args)) == 0
        p = {name: value.double() for name, value in single.items()}
        near, allowed = emulate.residual_block(x.double(), p, "fp16"), uncertainty(x.double(), p, "fp16")
        y = target.half(elements - h * w * 64, h * w * 64).view(1, h, w, 64).permute(0, 3, 1, 2).double()
        require_rounded_once(y[..., 12:, 16:], near[..., 12:, 16:], "fp16", allowed[..., 12:, 16:])
        assert not y[..., :12, :].any() and not y[..., :16].any()

        # First convolution, to the last image of the same batch.
        image = Sparse(4 * n * h * w)
        plane = image.bytes.view(torch.float32)[-h * w :]
        plane.copy_(torch.rand(h * w, generator=g))
        p = first_parameters(g, 1)
        held = [p["scale"].float(), p["shift"].float(), p["weight"].permute(2, 3, 1, 0).float().contiguous(), p["bias"].float()]
        args = (0, 80, 108, image.address, target.address, *(t.data_ptr() for t in held), n, 1, h, w)
        assert library.run_first_conv(*map(ctypes.c_int64, args)) == 0
        near = emulate.first_conv(plane.double().view(1, 1, h, w), p)
        y = target.half(elements - h * w * 64, h * w * 64).view(1, h, w, 64).permute(0, 3, 1, 2).double()
        allowed = first_uncertainty(plane.double().view(1, 1, h, w), p)
        require_rounded_once(y[..., 16:, :], near[..., 16:, :], "fp16", allowed[..., 16:, :])

        # Gate and reconstruction, from the last of two slots that are 3.0e9 elements apart, of few pixels.
        pixels, slots = 40, Sparse(2 * (elements + 40 * 64))
        p = gate_parameters(g, 2)
        values = normal(g, 2, 1, 64, 1, pixels).half()
        for j in range(2):
            slots.half(j * elements, pixels * 64).copy_(values[j].permute(0, 2, 3, 1).reshape(-1))
        held = [p["scale"].float(), p["shift"].float()]
        held += [p["weight"].float().reshape(-1)[torch.from_numpy(mma.gate(2)).long()].half(), p["bias"].float()]
        args = (0, 80, 108, slots.address, elements, 2, target.address, *(t.contiguous().data_ptr() for t in held), pixels)
        assert library.run_gate(*map(ctypes.c_int64, args)) == 0
        y = target.half(0, pixels * 64).view(1, 1, pixels, 64).permute(0, 3, 1, 2).double()
        near, allowed = emulate.gate(values.double(), p, "fp16"), gate_uncertainty(values.double(), p, "fp16")
        require_rounded_once(y, near, "fp16", allowed)

        p = recon_parameters(g, 2, 1, 3)
        image, out = torch.rand(pixels, generator=g), torch.empty(pixels)
        held = [p["scale"], p["shift"], p["weight"].permute(2, 3, 0, 1), p["bias"], p["head"], p["skip"]]
        held = [t.float().contiguous() for t in held]
        args = (0, 80, 108, slots.address, elements, 2, 3, 0, image.data_ptr(), out.data_ptr(), *(t.data_ptr() for t in held))
        library.simt_last_block_only(0)
        assert library.run_reconstruct(*map(ctypes.c_int64, (*args, 1, 1, 1, pixels, 1))) == 0
        near = emulate.reconstruct(values.double(), image.double().view(1, 1, 1, pixels), p)
        assert float((out.double() - near.view(-1)).abs().max()) <= 1e-5
    finally:
        library.simt_last_block_only(0)

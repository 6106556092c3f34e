"""Faults planted in the text of the CUDA kernels: the checks of test_cuda_mma.py must notice every one.

A textual mutant is compiled like the kernel and run on a few small cases. What the model cannot show (timing, bank conflicts,
what an instruction really does) is not here.
"""

import functools

import pytest
import torch
from support import emulate_mma as emulate
from support import simt_build
from support.block_cases import generator, integer_block

pytestmark = pytest.mark.skipif(simt_build.why_not() is not None, reason=str(simt_build.why_not()))

BLOCK, GATE, FIRST, RECON = emulate.SOURCES

# (source, file of the fault, text, text in its place)
MUTANTS = [
    # Residual block: halo, masks, rings, barriers.
    (BLOCK, BLOCK, "place.inside(place.top - 1 + pixel", "place.inside(place.top + pixel"),
    (BLOCK, BLOCK, "(x) < static_cast<unsigned>(width)", "(x) <= static_cast<unsigned>(width)"),
    (BLOCK, BLOCK, "inside ? both : 0u", "both"),
    (BLOCK, BLOCK, "step + Tile::kStages - 1)", "step + Tile::kStages)"),
    (BLOCK, BLOCK, "copy_async_wait<Tile::kStages - 2>", "copy_async_wait<Tile::kStages - 1>"),
    (BLOCK, BLOCK, "copy_async_wait<Tile::kStages - 1>", "copy_async_wait<Tile::kStages>"),
    (BLOCK, BLOCK, "__syncthreads();\n    load_tap", "load_tap"),
    (BLOCK, BLOCK, "__syncthreads(); // all have read the input, which now gives way", ""),
    (BLOCK, BLOCK, "__syncthreads(); // all have read the operands and the last weights", ""),
    (BLOCK, BLOCK, "__syncthreads(); // the sums are there", ""),
    (BLOCK, BLOCK, "left[m] ^ (k << 5)", "left[m] + (k << 5)"),
    (BLOCK, "tile_config.h", "kRingOffset = kInPixels * 128", "kRingOffset = (kInPixels - 1) * 128"),
    # Gate: waits, who owns the parameters, ends of warps and tiles.
    (GATE, GATE, "copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>"),
    (GATE, GATE, "if (memory.brings_parameters(here))", "if (false)"),
    (GATE, GATE, "!kResident || step.tile == blockIdx.x", "!kResident || step.tile == 0"),
    (GATE, GATE, "  __syncwarp();\n  const int chunk", "  const int chunk"),
    (GATE, GATE, "if (start + row < gate.pixels)", "if (start + row <= gate.pixels)"),
    (GATE, GATE, "scales + k * 64 + 288", "scales + k * 64 + 256"),
    (GATE, GATE, "      clear(sums);\n", ""),
    (GATE, GATE, "stage + 1 == kStages", "stage + 1 == kStages - 1"),
    # First convolution.
    (FIRST, FIRST, "__syncthreads(); // all have used the plane before", ""),
    (FIRST, FIRST, "if (x >= conv.w)", "if (x > conv.w)"),
    # Reconstruction.
    (RECON, RECON, "  __syncthreads();\n\n  float heads", "  float heads"),
    (RECON, RECON, "      if (offsets[p] < 0)\n        continue;\n", ""),
    (RECON, RECON, "value < kValues && ", ""),
    (RECON, RECON, "value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value", "fminf(fmaxf(value, 0.0f), 1.0f)"),
    (RECON, RECON, "recon.image_channels == 1 ? 0 : channel", "channel"),
    (RECON, RECON, "first_output + output, pixel", "output, pixel"),
]


def integers(g, *shape, low=-3, high=3):
    return torch.randint(low, high + 1, shape, generator=g).double()


@functools.cache
def block_case(h, w):
    x, p = integer_block(generator("mutant", h, w), 1, h, w)
    return x, p, emulate.residual_block(x, p, "fp16")


@functools.cache
def gate_case(k, pixels):
    g = generator("mutant", k, pixels)
    slots = integers(g, k, 1, 64, 1, pixels)
    weight = integers(g, 64, k, 64, low=-1, high=1) * (torch.rand(64, k, 64, generator=g) < 0.3)
    p = {"scale": integers(g, k, 64, low=1, high=2), "shift": integers(g, k, 64, low=-2, high=2)}
    p |= {"weight": weight, "bias": integers(g, 64)}
    return slots, p, emulate.gate(slots, p, "fp16")


@functools.cache
def first_case(cin, h, w):
    g = generator("mutant", cin, h, w)
    image, p = integers(g, 1, cin, h, w), {"scale": integers(g, cin, low=1, high=2), "shift": integers(g, cin)}
    p |= {"weight": integers(g, 64, cin, 3, 3, low=-1, high=1), "bias": integers(g, 64)}
    return image, p, emulate.first_conv(image, p)


@functools.cache
def recon_case(k, cout, planes, kernel, clamp):
    g = generator("mutant", k, cout, kernel)
    slots, image = integers(g, k, 1, 64, 3, 35), integers(g, 1, planes, 3, 35)
    p = {"scale": integers(g, k, 64, low=1, high=2), "shift": integers(g, k, 64), "skip": integers(g, 1, low=2)}
    p |= {"weight": integers(g, cout, 64, kernel, kernel, low=-1, high=1), "bias": integers(g, cout, low=1)}
    p |= {"head": integers(g, k, low=1, high=2)}
    if clamp:
        slots[0, 0, 5, 1, 20] = float("nan")
    return slots, image, p, emulate.reconstruct(slots, image, p, clamp)


def same(y, reference):
    return torch.equal(y.nan_to_num(nan=-12345.0), reference.nan_to_num(nan=-12345.0))


def right(source, library):
    """Whether the kernel of this source is right on every case: exact integers, so one wrong bit is seen."""
    for order in (1, 0, 3):
        if source == BLOCK:
            for capability, h, w in ((80, 3, 5), (80, 13, 17), (86, 17, 5)):
                x, p, reference = block_case(h, w)
                if not same(emulate.Emulation(library, "fp16", capability, order=order).residual_block(x, p), reference):
                    return False
        elif source == GATE:
            for capability, sms, k, pixels in ((90, 2, 3, 530), (86, 1, 4, 300), (80, 1, 9, 40)):
                slots, p, reference = gate_case(k, pixels)
                if not same(emulate.Emulation(library, "fp16", capability, sms, order=order).gate(slots, p), reference):
                    return False
        elif source == FIRST:
            for cin, h, w in ((1, 9, 33), (3, 7, 9)):
                image, p, reference = first_case(cin, h, w)
                if not same(emulate.Emulation(library, "fp16", order=order).first_conv(image, p), reference):
                    return False
        else:
            for k, cout, planes, kernel, clamp in ((2, 1, 1, 3, False), (2, 5, 1, 1, False), (1, 1, 1, 3, True)):
                slots, image, p, reference = recon_case(k, cout, planes, kernel, clamp)
                runner = emulate.Emulation(library, "fp16", order=order)
                if not same(runner.reconstruct(slots, image, p, clamp), reference):
                    return False
    return True


def noticed(source, library):
    try:
        return not right(source, library)
    except emulate.EmulationError:
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mutants")


@pytest.mark.parametrize("source", emulate.SOURCES)
def test_kernels_as_they_are_pass(folder, source):
    assert right(source, simt_build.build(folder / source, [source]))


@pytest.mark.parametrize("index", range(len(MUTANTS)), ids=lambda i: f"{MUTANTS[i][0].split('.')[0]}-{MUTANTS[i][2][:24]}")
def test_mutant_is_noticed(folder, index):
    source, name, old, new = MUTANTS[index]
    assert noticed(source, simt_build.build(folder / f"mutant{index}", [source], [(name, old, new)]))

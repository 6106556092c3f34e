"""The residual block for Hopper: its own text on the CPU, against float64, and what the compiler makes of it.

Every thread of a block is a fiber, shared memory is NaN until written, copies and products happen at once, late or at random,
and the tensor cores see a store only after its fence (tests/support/simt/simt.h says what is modelled). What a GPU does
beyond that is for the tests marked gpu.
"""

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support import emulate_mma as emulate
from support import simt_build
from support.block_cases import (
    block,
    block_parameters,
    fp8_parameters,
    generator,
    integer_block,
    normal,
    require_rounded_once,
    uncertainty,
)
from support.checks import ParityError, same_frame
from support.emulate_sm90 import WIDTHS, Hopper, sources

from memnet_fast.layouts import wgmma

needs_compiler = pytest.mark.skipif(simt_build.why_not() is not None, reason=str(simt_build.why_not()))
PRECISIONS = ("fp16", "bf16", "fp8")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float16}  # of slots
_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return simt_build.build(tmp_path_factory.mktemp("simt") / "all", [*sources(), "residual_block_sm90_fp8.cu"])


def case(precision, n, h, w):
    g = generator(n, h, w)
    parameters = fp8_parameters(g) if precision == "fp8" else block_parameters(g)
    return normal(g, n, 64, h, w).to(DTYPES[precision]).double(), parameters


def require_right(runner, x, p):
    reference = block(x, p, runner.precision)
    require_rounded_once(runner.residual_block(x, p), reference, runner.precision, uncertainty(x, p, runner.precision))


# n, h, w, multiprocessors, strip width. One pixel, one row and one column; widths 0, 1 and strip - 1 beyond whole strips;
# fewer rows than the pipeline holds; several images; segments that end inside a strip, and many for each block.
CASES = [
    (1, 1, 1, 132, 32),
    (1, 1, 7, 3, 32),
    (1, 7, 1, 2, 32),
    (3, 3, 3, 2, 32),
    (1, 9, 64, 5, 32),
    (1, 5, 33, 4, 32),
    (2, 4, 63, 7, 32),
    (1, 2, 63, 1, 64),
    (1, 3, 64, 1, 64),
    (2, 3, 65, 1, 80),
    (1, 4, 79, 1, 80),
    (1, 2, 80, 1, 80),
    (2, 9, 95, 2, 96),
    (1, 2, 96, 1, 96),
    (1, 11, 97, 2, 64),
    (1, 7, 193, 2, 32),
    (1, 5, 287, 2, 96),
]


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
def test_residual_block_equals_float64(library, precision):
    widths = set()
    for i, (n, h, w, sms, width) in enumerate(CASES):
        x, p = case(precision, n, h, w)
        runner = Hopper(library, precision, sms=sms, order=i % 4, early_weights=i % 2 == 1)
        assert runner.width(n, h, w) == width, (n, h, w)
        widths.add(width)
        require_right(runner, x, p)
    assert widths == set(WIDTHS)


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
def test_integers_come_out_exactly(library, precision):
    """Bit equality: no index, tap, channel or sign can be wrong, and no rounding is lost."""
    x, p = integer_block(generator("integers"), 1, 9, 70)
    if precision == "fp8":  # rounds between the convolutions, ties and all, as the reference does
        p |= {"gain_a": torch.full((64,), 0.5), "gain_b": torch.full((64,), 2.0)}
    reference = block(x, p, precision)
    assert 20 < reference.abs().max() <= 256
    for sms, order in ((1, 0), (3, 1), (8, 2)):
        y = Hopper(library, precision, sms=sms, order=order).residual_block(x, p)
        assert torch.equal(y, reference)


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf"), 6e4))
def test_what_is_not_finite_stays_where_it_belongs(library, precision, value):
    x, p = case(precision, 2, 9, 36)
    runner = Hopper(library, precision, sms=3, order=1)
    clean = runner.residual_block(x, p)
    x[1, 5, 4, 33] = value
    y = runner.residual_block(x, p)
    same_frame(y, block(x, p, precision).to(DTYPES[precision]))
    reach = torch.zeros(2, 64, 9, 36, dtype=torch.bool)
    reach[1, :, 2:7, 31:36] = True
    assert torch.equal(y[~reach], clean[~reach])


@needs_compiler
def test_strip_place_and_batch_do_not_change_a_bit(library):
    """An element is summed in the same order in strips of every width, in any place of them, however blocks share the rows."""
    x, p = case("fp16", 1, 6, 90)
    y = Hopper(library, "fp16", sms=1).residual_block(x, p)
    widths = {Hopper(library, "fp16", sms=1).width(1, 6, 90)}
    for sms in (2, 5, 40):
        runner = Hopper(library, "fp16", sms=sms, order=sms)
        widths.add(runner.width(1, 6, 90))
        assert torch.equal(runner.residual_block(x, p), y)
    assert len(widths) > 1
    moved = Hopper(library, "fp16", sms=2, order=1).residual_block(x[..., 2:, 5:], p)
    assert torch.equal(moved[..., 2:, 2:], y[..., 4:, 7:])
    twice = Hopper(library, "fp16", sms=3, order=2).residual_block(torch.cat([x.flip(2), x]), p)
    assert torch.equal(twice[1:], y)


@needs_compiler
def test_random_interleavings(library):
    """Warps fast and slow, copies and products early and late: the same bits, and no deadlock."""
    # Segments of one to twelve rows, blocks with one and with several of them.
    for i, (n, h, w, sms) in enumerate([(1, 12, 3, 1), (5, 1, 2, 2), (4, 2, 5, 2), (2, 5, 33, 3), (1, 7, 40, 3)]):
        precision = PRECISIONS[i % 3]
        x, p = case(precision, n, h, w)
        first = Hopper(library, precision, sms=sms).residual_block(x, p)
        for order in range(2 + i, 14 + i):
            assert torch.equal(Hopper(library, precision, sms=sms, order=order).residual_block(x, p), first), order


@needs_compiler
@pytest.mark.parametrize(
    ("n", "h", "w", "sms"),
    [(70000, 3, 3, 132), (1, 2, 65536, 132), (1, 65536, 2, 132), (1, 1, 1, 132), (3, 5, 200, 7), (2, 70000, 60000, 132)],
)
def test_blocks_share_all_rows(library, n, h, w, sms):
    """Every row of every strip once, in order, and no block has two rows more than another; the last case has 2^33 pixels."""
    strips = -(-w // 96)
    most = -(-n * strips * h // sms) + 1
    per_block = min(most, 2 + most // h + 1)
    out = np.zeros((sms, per_block, 4), np.int64)
    args = (n, h, w, sms, out.ctypes.data, per_block)
    library.simt_clear_ranges()
    library.simt_order(0)
    blocks = library.list_segments_sm90(*(ctypes.c_int64(v) for v in args))
    assert blocks == min(sms, n * strips * h)
    rows = out[:blocks, :, 3].clip(0).sum(1)
    assert rows.max() - rows.min() <= 1 and (out[:blocks, -1] == -1).all()
    image, x, y, length = out[:blocks].reshape(-1, 4)[out[:blocks].reshape(-1, 4)[:, 3] >= 0].T
    assert (length >= 1).all() and (y + length <= h).all() and (x % 96 == 0).all() and x.max() < w
    start = (image * strips + x // 96) * h + y
    assert start[0] == 0 and (start[1:] == (start + length)[:-1]).all() and (start + length)[-1] == n * strips * h


@needs_compiler
def test_the_width_of_least_cost(library):
    def width(n, h, w, sms=132):
        return Hopper(library, "fp16", sms=sms).width(n, h, w)

    assert [width(1, 1080, 1920), width(1, 2160, 3840), width(1, 720, 1280), width(1, 4096, 31)] == [96, 96, 80, 32]
    assert width(64, 512, 64) == 64 and width(16, 1000, 240) == 80
    # Few rows for many multiprocessors: narrow strips occupy more of them.
    assert width(1, 64, 64) == 32


@needs_compiler
def test_shared_memory_has_no_bank_conflicts(library):
    """16 bytes for each of 8 lanes are one wavefront: they must lie in different banks (16-byte columns of 128)."""
    offset = library.raw_offset_sm90

    def conflict_free(addresses):
        return len({address % 128 for address in addresses}) == 8

    for pixel in range(16):
        # Eight chunks of a pixel (loader, transform, drain), and eight pixels of a chunk (conv_b's skip and result).
        assert conflict_free(offset(pixel, chunk) for chunk in range(8))
        assert all(conflict_free(offset(pixel + i, chunk) for i in range(8)) for chunk in range(8))
    for width in WIDTHS:
        for planes in (8, 4):  # of 16-bit operands, of e4m3
            act, mid = (library.plane_bytes_sm90(width, int(planes == 4), which) for which in (0, 1))
            # The transform stores the planes of a pixel, or of two; tensor cores and conv_a take eight pixels of a plane.
            assert conflict_free(i % planes * act + i // planes * 16 for i in range(8))
            assert act % 16 == mid % 16 == 0 and act >= (width + 4) * 16 and mid >= (width + 2) * 16
    for pixel in range(8):  # and reads, of e4m3, two chunks of each plane of two pixels, one after the other
        for half in range(2):
            assert conflict_free(offset(pixel + i // 4, i % 4 * 2 + half) for i in range(8))


# ---- Faults ----------------------------------------------------------------------------------------------------------

_KERNEL, _SHARE = "residual_block_sm90.cuh", "residual_block_sm90.h"
FAULTS = {
    "halo short by a pixel": (_KERNEL, "segment.x + S::kWidth + 2, params.w)", "segment.x + S::kWidth + 1, params.w)"),
    "a column beyond the image": (_KERNEL, "row_inside && x >= 0 && x < params.w", "row_inside && x >= 0 && x <= params.w"),
    "padding before BN-ReLU": (_KERNEL, "if (row_inside && x >= 0 && x < params.w) {", "if (true) {"),
    "mid not padded at the right": (_KERNEL, "pixel < begin || pixel >= end", "pixel < begin || pixel > end"),
    "mid not padded below": (_KERNEL, "if (border || !row_inside) {", "if (border) {"),
    "tap off by a pixel": (_KERNEL, "tap % 3 * 16", "(tap % 3 + 1) * 16"),
    "leading offset": (_KERNEL, "(kPlane >> 4) << 16", "(kPlane >> 5) << 16"),
    "stride offset": (_KERNEL, "8 * 16 >> 4) << 32", "16 * 16 >> 4) << 32"),
    "skip of the next pixel": (_KERNEL, "(lane & 7) + 2, 2 * warp", "(lane & 7) + 3, 2 * warp"),
    "phase of a ring": (_KERNEL, "kActFree + act.slot), act.parity ^ 1)", "kActFree + act.slot), act.parity)"),
    "turn never changes": (_KERNEL, "ptx::barrier_wait(shared.barrier(S::kTurnA), turn);\n        turn ^= 1;", "turn ^= 0;"),
    "too many arrivals": (_KERNEL, "kActFull + i), kTransformWarps)", "kActFull + i), 1)"),
    "barriers that overlap": (_KERNEL, "kOutFull = kRawFree + kRawRows;", "kOutFull = kRawFree + kRawRows - 1;"),
    "no proxy fence": (
        _KERNEL,
        "ptx::fence_async();\n      __syncwarp();\n      if (lane == 0) {",
        "__syncwarp();\n      if (lane == 0) {",
    ),
    "no wait for the products": (
        _KERNEL,
        "ptx::wgmma_wait();\n      if (lane == 0) {\n        ptx::barrier_arrive(shared.barrier(S::kMidFree",
        "if (lane == 0) {\n        ptx::barrier_arrive(shared.barrier(S::kMidFree",
    ),
    "lane 0 does not wait for its warp": (
        _KERNEL,
        "ptx::fence_async();\n      __syncwarp();\n      if (lane == 0) {",
        "ptx::fence_async();\n      if (lane == 0) {",
    ),
    "a skip row freed early": (_KERNEL, "if (i < 2 || i >= segment.rows + 2)", "if (i < 3 || i >= segment.rows + 2)"),
    "mid slots kept": (_KERNEL, "if (k == segment.rows - 1) {", "if (k == segment.rows) {"),
    "arrival before the copies": (
        _KERNEL,
        "ptx::barrier_arrive_after_copies(shared",
        "ptx::barrier_arrive(shared",
    ),
    "mid row not awaited": (_KERNEL, "ptx::barrier_wait(shared.barrier(S::kMidFull + mid2.slot), mid2.parity);", ""),
    "no wait for the kernel in front": (_KERNEL, "ptx::wait_for_previous_kernel();", ""),
    "more registers than there are": (_KERNEL, "kConvRegisters = 224", "kConvRegisters = 232"),
    "a block too short": (_SHARE, "params.longer_blocks = rows % blocks;", "params.longer_blocks = 0;"),
    "too few rows of raw": ("tile_config.h", "kRawRows = 7", "kRawRows = 3"),
}


@pytest.fixture(scope="module")
def fault_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@needs_compiler
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(fault_folder, name):
    library = simt_build.build(fault_folder / re.sub(r"\W", "_", name), sources((32,)), [FAULTS[name]])
    with pytest.raises((ParityError, emulate.EmulationError)):
        # A border on each side, and blocks that pass from image to image; strips inside the image, for one fault.
        for n, h, w, sms in ((1, 4, 35, 3), (2, 6, 3, 1), (1, 1, 96, 3)):
            x, p = case("fp16", n, h, w)
            for order in (0, 1, *range(2, 8)):
                require_right(Hopper(library, "fp16", sms=sms, order=order, early_weights=True), x, p)


@pytest.mark.parametrize("name", ("ptx.cuh", "wgmma.cuh"))
def test_the_model_replaces_every_instruction(name):
    """A function of one file and not of the other would be one that no test runs, or a test of something else."""

    def functions(folder):
        text = re.sub(r"//.*", "", (folder / name).read_text(encoding="utf-8"))
        return set(re.findall(r"MEMNET_DEVICE [\w:<>]+ (\w+)\(", text)) - {"function"}  # that of a macro

    assert functions(_SOURCES) == functions(_SOURCES.parents[1] / "tests" / "support" / "simt") != set()


# ---- Layout and compiler ---------------------------------------------------------------------------------------------


def test_layout_is_the_fragment_of_the_instruction():
    """Every weight once; registers as the PTX ISA draws them for wgmma's A of 16-bit elements."""
    index = wgmma.conv3x3()
    assert index.shape == (36, 128, 8) and index.dtype == np.int32
    assert (np.sort(index, axis=None) == np.arange(64 * 64 * 9)).all()
    weight = np.arange(64 * 64 * 9).reshape(64, 64, 9)
    for step, thread, register, half in ((0, 0, 0, 0), (35, 127, 3, 1), (17, 70, 1, 0), (6, 33, 2, 1)):
        tap, quarter, warp, lane = step // 4, step % 4, thread // 32, thread % 32
        row, column = 16 * warp + lane // 4, lane % 4 * 2 + half
        row, column = row + 8 * (register in (1, 3)), column + 8 * (register in (2, 3))
        assert index[step, thread, 2 * register + half] == weight[row, 16 * quarter + column, tap]


def _cuobjdump():
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = pytest.importorskip("triton", reason="no cuobjdump: neither CUDA's nor Triton's")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.is_file() else None


# File, its kernels as (strip width, what they multiply).
COMPILED = {f"residual_block_sm90_{width}": [(width, 0), (width, 1)] for width in WIDTHS}
COMPILED["residual_block_sm90_fp8"] = [(width, 2) for width in WIDTHS]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{file: (log of ptxas, {(width, math): instructions})}"""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    if not _cuobjdump():
        pytest.skip("no cuobjdump: neither CUDA's nor Triton's")
    folder = tmp_path_factory.mktemp("sm90")

    def build(name):
        target = folder / f"{name}.cubin"
        command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-O3", "-Xptxas", "-v,-warn-spills"]
        done = subprocess.run([*command, "-cubin", "-o", target, _SOURCES / f"{name}.cu"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = subprocess.run([_cuobjdump(), "-sass", target], capture_output=True, text=True, check=True).stdout
        kernels = {}
        for part in text.split("Function : ")[1:]:
            math, width = map(int, re.search(r"MathE(\d)ELi(\d+)E", part.split()[0]).groups())
            code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Za-z0-9_.]*)[^;]*;", part)
            kernels[width, math] = code
        return done.stderr, kernels

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(COMPILED, pool.map(build, COMPILED), strict=True))


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(compiled, name):
    log, kernels = compiled[name]
    assert sorted(kernels) == sorted(COMPILED[name])
    # C75xx: ptxas makes products wait for one another.
    assert "warning" not in log and "C75" not in log, log
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(kernels), log
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    # 168 is what the launch bound leaves each of 384 threads; setmaxnreg then moves them to where the weights are.
    assert registers == [168, 168] if name != "residual_block_sm90_fp8" else max(registers) <= 168, log


@pytest.mark.parametrize("name", COMPILED)
def test_products_follow_each_other(compiled, name):
    """Two loops of products, only uniform instructions between them, and nothing in local memory."""
    for (width, math), code in compiled[name][1].items():
        assert not [op for op in code if op.startswith(("LDL", "STL"))]
        mid, steps = (width + 2 + 7) // 8 * 8, 18 if math == 2 else 36
        kind = ("HGMMA.64x{}x16.F32", "HGMMA.64x{}x16.F32.BF16", "QGMMA.64x{}x32.F32.E4M3.E4M3")[math]
        at = [i for i, op in enumerate(code) if op.startswith(("HGMMA", "QGMMA"))]
        assert [code[i] for i in at] in (
            [kind.format(a)] * steps + [kind.format(b)] * steps for a, b in ((mid, width), (width, mid))
        )
        for first in (0, steps):
            others = {op for op in code[at[first] : at[first + steps - 1]] if not op.startswith(("HGMMA", "QGMMA"))}
            # R2UR would bring a descriptor from the registers of the lanes.
            assert all(op.startswith(("U", "NOP")) for op in others), others
        assert sum(op.startswith("WARPGROUP.DEPBAR") for op in code) == 2
        # One load of the skip and one store of the result for two blocks of 8 pixels; of mid a store for two blocks, or in
        # e4m3 for four, and what is left.
        stores, loads = (sum(op.startswith(kind) for op in code) for kind in ("STSM", "LDSM"))
        blocks = mid // 8
        of_mid = blocks // 4 + blocks % 4 // 2 + blocks % 2 if math == 2 else -(-blocks // 2)
        assert (stores, loads) == (of_mid + width // 16, width // 16)

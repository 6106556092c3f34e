"""Every tile, warp and stage choice of the Triton kernels, each with its reason. Plain data: importing this needs no Triton.

Nothing is tuned at run time: a result must not depend on what a clock said. Where a line speaks of registers or shared memory,
the number is for 64 channels and was read from the compiled kernel; `tests/test_triton_compile.py` compiles every line again.
No line has been timed on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

KERNELS = ("first_conv", "conv_a", "conv_b", "gate", "reconstruct")
ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class Tile:
    """rows x cols pixels for one program (the gate, which knows no rows, takes their product as one run of pixels).

    swap: the product is W X^T (weights are the left operand), else X W^T.
    depth: the most input channels that one step of a sum takes.
    tma: pixels come through the tensor memory accelerator where a descriptor can stand for them (capability 9.0 and newer).
    """

    rows: int
    cols: int
    warps: int
    stages: int
    swap: bool = False
    depth: int = 64
    tma: bool = False


def channel_block(padded: int) -> int:
    """Channels that one program computes: the largest power of two that divides the padded
    number of channels (16, 32, 48, ...), at most 64. So no kernel masks channels."""
    return min(64, padded & -padded)


def out_block(channels: int) -> int:
    """Output channels of one reconstruction program: 1 is a sum over channels, more is a product of at least 16 columns."""
    return 1 if channels == 1 else 16 if channels <= 16 else 32


def tile(kernel: str, precision: str, architecture: int, padded: int = 64) -> Tile:
    """The line for a kernel ("conv_a" is the first convolution of a residual block), a precision and a compute capability
    (90 for 9.0). A capability without a line of its own takes that of the next lower one: 8.6 and 8.9 take 8.0, 10.0 takes 9.0.
    padded: the padded number of channels.
    """
    if architecture < min(ARCHITECTURES):
        raise ValueError(f"no tile for compute capability {architecture / 10}")
    own = max(a for a in ARCHITECTURES if a <= architecture)
    line = _TABLE[kernel, "half" if precision in ("fp16", "bf16") else precision, own]
    # Narrow networks. 8 warps would leave each thread less than four bytes of a 16 x 16 weight tile, and wgmma wants 64 rows on
    # the left, which only pixels give; with weights there, sm_80 spills at 48 channels.
    return replace(line, warps=4, swap=False) if channel_block(padded) < 64 else line


# (kernel, precision, capability): rows, cols, warps, stages.
_TABLE = {
    # BN-ReLU makes the pixels pass through registers. As the left operand they stay there (wgmma takes its left operand from
    # registers); on the right they would be written to shared memory once more for every tap. 193 registers, so two programs
    # share a multiprocessor; a third stage takes 255 in bfloat16.
    ("conv_a", "half", 90): Tile(8, 16, 4, 2, swap=False),
    # mma.sync takes both operands from registers, and swapping costs nothing; 4 warps would need 254 registers, 8 take 146.
    ("conv_a", "half", 80): Tile(8, 16, 8, 3, swap=True),
    # Operands are twice as large and rounding takes registers: 157 with 8 warps; a third stage would be 144 KiB.
    ("conv_a", "tf32", 90): Tile(8, 16, 8, 2, swap=False),
    # Half the channels in a step: 250 registers become 192, and three stages fit the 99 KiB of capability 8.6 and 8.9.
    ("conv_a", "tf32", 80): Tile(8, 16, 8, 3, swap=False, depth=32),
    # Without tensor cores a step of 64 channels unrolls into 2,000 multiplications and spills; 16 channels take 168 registers.
    ("conv_a", "fp32", 90): Tile(8, 8, 4, 2, swap=False, depth=16),
    ("conv_a", "fp32", 80): Tile(8, 8, 4, 2, swap=False, depth=16),  # the same
    # Nothing happens to the pixels on their way, so both operands come from shared memory, and 64 x 128 products read 96 bytes
    # of it per cycle where two of 64 x 64 read 128, its limit. 120 registers, 72 KiB.
    ("conv_b", "half", 90): Tile(8, 16, 4, 3, swap=True),
    # 4 warps spill here (255 registers and local memory); 8 take 128 registers and 48 KiB, two programs on each multiprocessor.
    ("conv_b", "half", 80): Tile(8, 16, 8, 3, swap=True),
    # 96 KiB, two programs on each multiprocessor; 126 registers.
    ("conv_b", "tf32", 90): Tile(8, 16, 8, 2, swap=True),
    # Pixels on the left take 148 registers, on the right 192.
    ("conv_b", "tf32", 80): Tile(8, 16, 8, 2, swap=False),
    ("conv_b", "fp32", 90): Tile(8, 8, 4, 2, swap=False, depth=16),  # as conv_a
    ("conv_b", "fp32", 80): Tile(8, 8, 4, 2, swap=False, depth=16),  # as conv_a
    # Bound by memory. 256 pixels: the weights come from L2 once for each tile, 32 bytes for each pixel and source beside the
    # 128 of the source; two stages of 32 KiB in flight are more than the latency of memory times its bandwidth asks for.
    # Fetched by descriptor a gate takes 159 registers, by address 177, and executes 24 copies of 16 bytes less for each step.
    ("gate", "half", 90): Tile(8, 32, 8, 3, swap=False, tma=True),
    # 110 registers and 49 KiB: two programs on each multiprocessor, also on capability 8.6.
    ("gate", "half", 80): Tile(8, 16, 8, 3, swap=False),
    # Sources are twice as large; pixels on the left take 65 KiB, on the right 97 KiB. 132 registers, by address 174.
    ("gate", "tf32", 90): Tile(8, 16, 8, 2, swap=False, tma=True),
    ("gate", "tf32", 80): Tile(8, 16, 8, 2, swap=False),  # 141 registers against 182
    # 128 registers; 64 pixels with 4 warps spill on sm_90.
    ("gate", "fp32", 90): Tile(8, 16, 8, 2, swap=False, depth=16, tma=True),
    ("gate", "fp32", 80): Tile(8, 16, 8, 2, swap=False, depth=16),
    # Writes 64 numbers for each one it reads: rows of 32 pixels make whole lines of the image, and nothing is worth staging.
    ("first_conv", "half", 90): Tile(4, 32, 4, 1),
    ("first_conv", "half", 80): Tile(4, 32, 4, 1),
    ("first_conv", "tf32", 90): Tile(4, 32, 4, 1),
    ("first_conv", "tf32", 80): Tile(4, 32, 4, 1),
    ("first_conv", "fp32", 90): Tile(4, 32, 4, 1),
    ("first_conv", "fp32", 80): Tile(4, 32, 4, 1),
    # A sum over channels in float32, bound by arithmetic: small tiles, 62 to 72 registers, many programs at once. Larger ones
    # spill on sm_80 with 31 planes.
    ("reconstruct", "half", 90): Tile(4, 8, 4, 1),
    ("reconstruct", "half", 80): Tile(4, 8, 4, 1),
    ("reconstruct", "tf32", 90): Tile(4, 8, 4, 1),
    ("reconstruct", "tf32", 80): Tile(4, 8, 4, 1),
    ("reconstruct", "fp32", 90): Tile(4, 8, 4, 1),
    ("reconstruct", "fp32", 80): Tile(4, 8, 4, 1),
}

"""The gate of a memory block: a 1x1 convolution over several slots, without their concatenation.

y = bias + sum_j weight[j] @ relu(slot[srcs[j]] * scale[j] + shift[j])
"""

import triton
import triton.language as tl
from memnet_fast.kernels.activation import bn_relu, narrow, product, round_tf32
from memnet_fast.kernels.tile_config import Tile, channel_block
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit(do_not_specialize=["pixels", "first_slot"])
def gate(
    slots,  # [slot, pixels, CP], pixels = N * H * W: a pointer, or with TMA a descriptor of blocks [1, BLOCK_P, BLOCK_IN]
    table_ptr,  # [NUM_SRC] int64, slot of each source, read if TABLE
    weight_ptr,  # [NUM_SRC, CP out, CP in]
    scale_ptr,  # [NUM_SRC, CP] float32
    shift_ptr,  # [NUM_SRC, CP] float32
    bias_ptr,  # [CP] float32
    y_ptr,  # [pixels, CP]
    pixels,
    first_slot,
    NUM_SRC: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TABLE: tl.constexpr,
    TF32: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
):
    """y = bias + sum_j weight[j] @ relu(slot_j * scale[j] + shift[j]), slot_j = first_slot + j or table[j]

    The sum over sources stays in float32 registers; each source is read once and nothing but y is written. Without TABLE the
    address of a source is arithmetic, so that its loads can be issued ahead. With TMA one instruction of the tensor memory
    accelerator fetches a block, and no thread computes an address.
    """
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < pixels)[:, None]
    out_channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    stride = pixels.to(tl.int64) * CP

    total = tl.zeros((BLOCK_C, BLOCK_P) if SWAP else (BLOCK_P, BLOCK_C), tl.float32)
    for step in range(NUM_SRC * (CP // BLOCK_IN)):
        j = step // (CP // BLOCK_IN)
        in_channel = step % (CP // BLOCK_IN) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        slot = tl.load(table_ptr + j) if TABLE else (first_slot + j).to(tl.int64)
        if TMA:
            # What lies beyond the last pixel comes as zeros.
            at = [slot.to(tl.int32), tl.program_id(0) * BLOCK_P, step % (CP // BLOCK_IN) * BLOCK_IN]
            x = slots.load(at).reshape(BLOCK_P, BLOCK_IN)
        else:
            x = tl.load(slots + slot * stride + pixel[:, None] * CP + in_channel[None, :], mask=inside, other=0.0)
        scale = tl.load(scale_ptr + j * CP + in_channel)
        shift = tl.load(shift_ptr + j * CP + in_channel)
        a = bn_relu(x, scale, shift)
        if TF32:
            a = round_tf32(a)
        a = narrow(a, y_ptr.dtype.element_ty)
        weight = tl.load(weight_ptr + (j * CP + out_channel[:, None]) * CP + in_channel[None, :])
        total = product(weight, tl.trans(a), total, TF32) if SWAP else product(a, tl.trans(weight), total, TF32)

    y = (tl.trans(total) if SWAP else total) + tl.load(bias_ptr + out_channel)[None, :]
    if C < CP:
        y = tl.where((out_channel < C)[None, :], y, 0.0)
    tl.store(y_ptr + pixel[:, None] * CP + out_channel[None, :], narrow(y, y_ptr.dtype.element_ty), mask=inside)


def launch(slots, srcs: tuple[int, ...], table, dst: int, weights, channels: int, tf32: bool, tile: Tile) -> None:
    """Runs a gate. slots: [slot, N, H, W, CP]; table: [len(srcs)] int64, srcs on the device; dst is none of srcs.

    weights: weight, scale, shift, bias, laid out as `gate` reads them.
    """
    count, n, height, width, padded = slots.shape
    pixels, block, run = n * height * width, channel_block(padded), tile.rows * tile.cols
    depth = min(block, tile.depth)
    described = tile.tma and _describable(slots, pixels, run)
    sources = slots
    if described:
        sources = TensorDescriptor(slots, [count, pixels, padded], [pixels * padded, padded, 1], [1, run, depth])
    gate[triton.cdiv(pixels, run), padded // block](
        sources,
        table,
        *weights,
        slots[dst],
        pixels,
        srcs[0],
        NUM_SRC=len(srcs),
        C=channels,
        CP=padded,
        BLOCK_C=block,
        BLOCK_IN=depth,
        BLOCK_P=run,
        TABLE=srcs != tuple(range(srcs[0], srcs[0] + len(srcs))),
        TF32=tf32,
        SWAP=tile.swap,
        TMA=described,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def _describable(slots, pixels: int, run: int) -> bool:
    """Whether a tensor descriptor can stand for the slots: an address that is a multiple of 16 (strides are, with 16 channels
    and more), coordinates of 32 bits with a sign, strides below 2^40 bytes."""
    stride = pixels * slots.shape[-1] * slots.element_size()
    return slots.data_ptr() % 16 == 0 and pixels + run <= 2**31 and stride < 2**40

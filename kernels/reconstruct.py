"""The reconstruction of all supervised outputs and their weighted sum, in one pass and in float32.

out = skip * image + sum_m head[m] * (bias + conv(relu(slot[srcs[m]] * scale[m] + shift[m]), weight))
"""

import triton
import triton.language as tl
from memnet_fast.kernels.activation import bn_relu, product
from memnet_fast.kernels.tile_config import Tile, channel_block, out_block


@triton.jit(do_not_specialize=["height", "width", "in_planes", "out_planes", "pixels"])
def reconstruct(
    slots_ptr,  # [slot, N, H, W, CP]
    table_ptr,  # [NUM_SRC] int64, slot of each head
    image_ptr,  # [N, in_planes, H, W] float32
    weight_ptr,  # [KERNEL * KERNEL, out_planes rounded up to BLOCK_OUT, CP] float32
    scale_ptr,  # [NUM_SRC, CP] float32
    shift_ptr,  # [NUM_SRC, CP] float32
    bias_ptr,  # [out_planes rounded up to BLOCK_OUT] float32
    head_ptr,  # [NUM_SRC] float32
    skip_ptr,  # [1] float32
    out_ptr,  # [N, out_planes, H, W] float32
    height,
    width,
    in_planes,
    out_planes,
    pixels,
    NUM_SRC: tl.constexpr,
    CP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    CLAMP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out = skip * image + sum_m head[m] * (bias + sum_tap weight[tap] @ relu(slot_m[pixel + tap] * scale[m] + shift[m]))

    One output plane: products are summed channel by channel and across channels once for each head. More planes: a float32
    product for each tap. CLAMP limits the result to [0, 1]; NaN stays NaN.
    """
    tiles_x = tl.cdiv(width, COLS)
    tiles_y = tl.cdiv(height, ROWS)
    program = tl.program_id(0)
    image = (program // (tiles_x * tiles_y)).to(tl.int64)
    lane = tl.arange(0, ROWS * COLS)
    row = (program // tiles_x) % tiles_y * ROWS + lane // COLS
    col = program % tiles_x * COLS + lane % COLS
    channel = tl.arange(0, BLOCK_C)
    plane = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    size = height.to(tl.int64) * width
    centre = row.to(tl.int64) * width + col
    padded_planes = tl.num_programs(1) * BLOCK_OUT

    at_image = (image * in_planes + tl.where(in_planes == 1, 0, plane))[None, :] * size + centre[:, None]
    at_out = (image * out_planes + plane)[None, :] * size + centre[:, None]
    inside_out = ((row < height) & (col < width))[:, None] & (plane < out_planes)[None, :]
    result = tl.load(skip_ptr) * tl.load(image_ptr + at_image, mask=inside_out, other=0.0)
    bias = tl.load(bias_ptr + plane)

    for m in range(NUM_SRC):
        slot_ptr = slots_ptr + (tl.load(table_ptr + m) * pixels + image * size) * CP
        total = tl.zeros((ROWS * COLS, BLOCK_C if BLOCK_OUT == 1 else BLOCK_OUT), tl.float32)
        for start in range(0, CP, BLOCK_C):
            in_channel = start + channel
            scale = tl.load(scale_ptr + m * CP + in_channel)
            shift = tl.load(shift_ptr + m * CP + in_channel)
            for tap in range(KERNEL * KERNEL):
                dy = tap // KERNEL - KERNEL // 2
                dx = tap % KERNEL - KERNEL // 2
                inside = (row + dy >= 0) & (row + dy < height) & (col + dx >= 0) & (col + dx < width)
                pixel = centre + (dy * width + dx)
                x = tl.load(slot_ptr + pixel[:, None] * CP + in_channel[None, :], mask=inside[:, None], other=0.0)
                a = tl.where(inside[:, None], bn_relu(x, scale, shift), 0.0)
                if BLOCK_OUT == 1:
                    weight = tl.load(weight_ptr + (tap * padded_planes + tl.program_id(1)) * CP + in_channel)
                    total += a * weight[None, :]
                else:
                    weight = tl.load(weight_ptr + (tap * padded_planes + plane[:, None]) * CP + in_channel[None, :])
                    total = product(a, tl.trans(weight), total, False)
        y = tl.sum(total, 1)[:, None] if BLOCK_OUT == 1 else total
        result += tl.load(head_ptr + m) * (y + bias[None, :])

    if CLAMP:
        # Comparisons with NaN are false, so NaN passes through.
        result = tl.where(result < 0.0, 0.0, tl.where(result > 1.0, 1.0, result))
    tl.store(out_ptr + at_out, result, mask=inside_out)


def launch(slots, table, image, out, weights, kernel: int, clamp: bool, tile: Tile) -> None:
    """Runs the reconstruction. slots: [slot, N, H, W, CP]; table: [heads] int64, their slots, on the device.

    image: [N, in_planes, H, W], out: [N, out_planes, H, W], both contiguous float32. weights: weight, scale, shift, bias, head,
    skip, laid out as `reconstruct` reads them. kernel: 1 or 3.
    """
    _, n, height, width, padded = slots.shape
    planes = out_block(out.shape[1])
    grid = (n * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.cols), triton.cdiv(out.shape[1], planes))
    reconstruct[grid](
        slots,
        table,
        image,
        *weights,
        out,
        height,
        width,
        image.shape[1],
        out.shape[1],
        n * height * width,
        NUM_SRC=table.shape[0],
        CP=padded,
        BLOCK_C=channel_block(padded),
        BLOCK_OUT=planes,
        KERNEL=kernel,
        CLAMP=clamp,
        ROWS=tile.rows,
        COLS=tile.cols,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )

"""A residual block as two launches of one 3x3 convolution kernel.

mid = relu(bias_a + conv3x3(relu(x * scale + shift), weight_a))
y   = x + (bias_b + conv3x3(mid, weight_b))
"""

import triton
import triton.language as tl
from memnet_fast.kernels.activation import bn_relu, narrow, product, relu, round_tf32
from memnet_fast.kernels.tile_config import Tile, channel_block


# Not specialised: one compilation serves every image size, and a size of 1 stays a number at run time.
@triton.jit(do_not_specialize=["height", "width"])
def conv3x3(
    x_ptr,  # [N, H, W, CP]
    weight_ptr,  # [9, CP out, CP in]
    scale_ptr,  # [CP] float32, first convolution only
    shift_ptr,  # [CP] float32, first convolution only
    bias_ptr,  # [CP] float32
    skip_ptr,  # [N, H, W, CP], second convolution only
    y_ptr,  # [N, H, W, CP]
    height,
    width,
    C: tl.constexpr,
    CP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIRST: tl.constexpr,
    TF32: tl.constexpr,
    SWAP: tl.constexpr,
):
    """FIRST:  y = relu(bias + sum_tap weight[tap] @ relu(x[pixel + tap] * scale + shift))
    else:   y = skip + bias + sum_tap weight[tap] @ x[pixel + tap]

    Sums in float32; a pixel outside the image counts as 0 after the activation; padding channels are written as 0. One program
    makes ROWS x COLS pixels and BLOCK_C channels. All nine taps read the same (ROWS + 2) x (COLS + 2) pixels: with ".ca" most
    of these reads can come from L1.
    """
    tiles_x = tl.cdiv(width, COLS)
    tiles_y = tl.cdiv(height, ROWS)
    program = tl.program_id(0)
    image = (program // (tiles_x * tiles_y)).to(tl.int64)
    lane = tl.arange(0, ROWS * COLS)
    row = (program // tiles_x) % tiles_y * ROWS + lane // COLS
    col = program % tiles_x * COLS + lane % COLS
    out_channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_pixel = image * height * width
    centre = first_pixel + row.to(tl.int64) * width + col

    total = tl.zeros((BLOCK_C, ROWS * COLS) if SWAP else (ROWS * COLS, BLOCK_C), tl.float32)
    for start in range(0, CP, BLOCK_IN):
        in_channel = start + tl.arange(0, BLOCK_IN)
        if FIRST:
            scale = tl.load(scale_ptr + in_channel)
            shift = tl.load(shift_ptr + in_channel)
        for tap in range(9):
            dy = tap // 3 - 1
            dx = tap % 3 - 1
            inside = (row + dy >= 0) & (row + dy < height) & (col + dx >= 0) & (col + dx < width)
            pixel = centre + (dy * width + dx)
            x = tl.load(
                x_ptr + pixel[:, None] * CP + in_channel[None, :], mask=inside[:, None], other=0.0, cache_modifier=".ca"
            )
            if FIRST:
                a = tl.where(inside[:, None], bn_relu(x, scale, shift), 0.0)
                if TF32:
                    a = round_tf32(a)
                x = narrow(a, x_ptr.dtype.element_ty)
            weight = tl.load(weight_ptr + (tap * CP + out_channel[:, None]) * CP + in_channel[None, :], cache_modifier=".ca")
            total = product(weight, tl.trans(x), total, TF32) if SWAP else product(x, tl.trans(weight), total, TF32)

    y = (tl.trans(total) if SWAP else total) + tl.load(bias_ptr + out_channel)[None, :]
    at = centre[:, None] * CP + out_channel[None, :]
    inside = ((row < height) & (col < width))[:, None]
    if FIRST:
        y = relu(y)
        if TF32:
            # The second convolution multiplies this as it stands.
            y = round_tf32(y)
    else:
        y += tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if C < CP:
        # Zero weights times an infinity would be NaN here, and the next operation would spread it.
        y = tl.where((out_channel < C)[None, :], y, 0.0)
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=inside)


def launch(x, mid, y, weights, channels: int, tf32: bool, tile_a: Tile, tile_b: Tile) -> None:
    """Runs a residual block. x, mid, y: three different slots [N, H, W, CP]; mid is scratch memory.

    weights: scale, shift, weight_a, bias_a, weight_b, bias_b, laid out as `conv3x3` reads them.
    """
    scale, shift, weight_a, bias_a, weight_b, bias_b = weights
    _convolve(x, weight_a, scale, shift, bias_a, x, mid, channels, True, tf32, tile_a)
    _convolve(mid, weight_b, scale, shift, bias_b, x, y, channels, False, tf32, tile_b)


def _convolve(x, weight, scale, shift, bias, skip, y, channels: int, first: bool, tf32: bool, tile: Tile) -> None:
    n, height, width, padded = x.shape
    block = channel_block(padded)
    grid = (n * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.cols), padded // block)
    conv3x3[grid](
        x,
        weight,
        scale,
        shift,
        bias,
        skip,
        y,
        height,
        width,
        C=channels,
        CP=padded,
        BLOCK_C=block,
        BLOCK_IN=min(block, tile.depth),
        ROWS=tile.rows,
        COLS=tile.cols,
        FIRST=first,
        TF32=tf32,
        SWAP=tile.swap,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )

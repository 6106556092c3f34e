"""The first convolution: from the planes of the image, in float32, to a feature map.

y = bias + conv3x3(relu(image * scale + shift), weight)
"""

import triton
import triton.language as tl
from memnet_fast.kernels.activation import narrow, relu
from memnet_fast.kernels.tile_config import Tile, channel_block


@triton.jit(do_not_specialize=["height", "width"])
def first_conv(
    image_ptr,  # [N, PLANES, H, W] float32
    weight_ptr,  # [PLANES, 9, CP] float32
    scale_ptr,  # [PLANES] float32
    shift_ptr,  # [PLANES] float32
    bias_ptr,  # [CP] float32
    y_ptr,  # [N, H, W, CP]
    height,
    width,
    PLANES: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = bias + sum_{plane, tap} weight[plane, tap] * relu(image[plane, pixel + tap] * scale[plane] + shift[plane])

    Nine products for each plane and channel are too few for a tensor core; plain float32 arithmetic, and rounded only by the
    store.
    """
    tiles_x = tl.cdiv(width, COLS)
    tiles_y = tl.cdiv(height, ROWS)
    program = tl.program_id(0)
    image = (program // (tiles_x * tiles_y)).to(tl.int64)
    lane = tl.arange(0, ROWS * COLS)
    row = (program // tiles_x) % tiles_y * ROWS + lane // COLS
    col = program % tiles_x * COLS + lane % COLS
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    size = height.to(tl.int64) * width
    centre = row.to(tl.int64) * width + col

    total = tl.zeros((ROWS * COLS, BLOCK_C), tl.float32)
    for plane in range(PLANES):
        scale = tl.load(scale_ptr + plane)
        shift = tl.load(shift_ptr + plane)
        plane_ptr = image_ptr + (image * PLANES + plane) * size
        for tap in tl.static_range(9):
            dy = tap // 3 - 1
            dx = tap % 3 - 1
            inside = (row + dy >= 0) & (row + dy < height) & (col + dx >= 0) & (col + dx < width)
            x = tl.load(plane_ptr + centre + (dy * width + dx), mask=inside, other=0.0)
            a = tl.where(inside, relu(x * scale + shift), 0.0)
            weight = tl.load(weight_ptr + (plane * 9 + tap) * CP + channel)
            total += a[:, None] * weight[None, :]

    y = total + tl.load(bias_ptr + channel)[None, :]
    if C < CP:
        y = tl.where((channel < C)[None, :], y, 0.0)
    at = (image * size + centre)[:, None] * CP + channel[None, :]
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=((row < height) & (col < width))[:, None])


def launch(image, y, weights, channels: int, tile: Tile) -> None:
    """Runs the first convolution. image: [N, planes, H, W] float32, contiguous; y: a slot [N, H, W, CP].

    weights: weight, scale, shift, bias, laid out as `first_conv` reads them.
    """
    n, height, width, padded = y.shape
    block = channel_block(padded)
    grid = (n * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.cols), padded // block)
    first_conv[grid](
        image,
        *weights,
        y,
        height,
        width,
        PLANES=image.shape[1],
        C=channels,
        CP=padded,
        BLOCK_C=block,
        ROWS=tile.rows,
        COLS=tile.cols,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )

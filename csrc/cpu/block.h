// Rectangular blocks of an image: the unit of work of the direct convolutions, the first convolution and the
// reconstruction.
#pragma once

#include "kernels.h"
#include "laps.h"
#include "simd.h"

namespace memnet::MEMNET_ISA {

struct Block {
  i64 image, y, x, rows, cols;
};

// 8 x 48 pixels: a patch of activations with its halo is 128 KB at 64 channels and stays in L2 beside the weights; one
// row of sums (12 KB) stays in L1; 48 is a multiple of the 6 rows of the register block.
constexpr i64 kBlockRows = 8;
constexpr i64 kBlockCols = 48;

MEMNET_INLINE i64 count_blocks(const Shape &shape) {
  return shape.n * ceil_div(shape.h, kBlockRows) * ceil_div(shape.w, kBlockCols);
}

MEMNET_INLINE Block block_at(const Shape &shape, i64 index) {
  const i64 down = ceil_div(shape.h, kBlockRows), across = ceil_div(shape.w, kBlockCols);
  Block block;
  block.image = index / (down * across);
  block.y = index / across % down * kBlockRows;
  block.x = index % across * kBlockCols;
  block.rows = smaller(kBlockRows, shape.h - block.y);
  block.cols = smaller(kBlockCols, shape.w - block.x);
  return block;
}

MEMNET_INLINE float *slot_at(const Frame &frame, i64 slot) {
  const Shape &shape = frame.shape;
  return frame.slots + slot * (shape.n * shape.h * shape.w * shape.cp);
}

} // namespace memnet::MEMNET_ISA

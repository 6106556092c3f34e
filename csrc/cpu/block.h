// Rectangular blocks of an image: the unit of work of the direct convolutions, the first convolution and the
// reconstruction.
#pragma once

#include "kernels.h"
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

// What a slot holds: MEMNET_STORED, where a translation unit defines it, or fp32.
#ifdef MEMNET_STORED
using Stored = MEMNET_STORED;
#else
using Stored = float;
#endif

MEMNET_INLINE Stored *slot_at(const Frame &frame, i64 slot) {
  const Shape &shape = frame.shape;
  return static_cast<Stored *>(frame.slots) + slot * (shape.n * shape.h * shape.w * shape.cp);
}

MEMNET_INLINE Stored *mid_of(const Frame &frame) { return static_cast<Stored *>(frame.mid); }

// How a convolution of a residual block begins and ends.
enum class Stage { kFirst, kSecond }; // BN-ReLU before, bias-ReLU after; nothing before, bias and skip after

MEMNET_INLINE i64 patch_pixels() { return (kBlockRows + 2) * (kBlockCols + 2); }

// patch [rows + 2][cols + 2][Cp]: the block with its halo, activated, zero outside the image.
template <Stage kStage, typename From, typename To>
void fill_patch(const From *src, const Shape &shape, const Block &block, const float *scale, const float *shift,
                To *patch) {
  const i64 cp = shape.cp;
  for (i64 y = block.y - 1; y <= block.y + block.rows; ++y)
    for (i64 x = block.x - 1; x <= block.x + block.cols; ++x, patch += cp) {
      const bool inside = y >= 0 && y < shape.h && x >= 0 && x < shape.w;
      const From *pixel = src + ((block.image * shape.h + y) * shape.w + x) * cp;
      for (i64 c = 0; c < cp; c += kLanes) {
        vec value = zero();
        if (inside) {
          value = load(pixel + c);
          if constexpr (kStage == Stage::kFirst)
            value = relu(fma(value, load(scale + c), load(shift + c)));
        }
        store(patch + c, value);
      }
    }
}

} // namespace memnet::MEMNET_ISA

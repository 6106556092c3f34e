// dst = bias + conv3x3(relu(image * scale + shift)): few input channels, so the nine taps are gathered into one
// product.
#pragma once

#include <omp.h>

#include "block.h"
#include "matmul.h"

namespace memnet::MEMNET_ISA {

MEMNET_INLINE i64 first_conv_scratch(const Shape &shape) { return kBlockCols * 9 * shape.cin; }

// taps [cols][9][Cin] of one row of a block, zero outside the image.
inline void gather_taps(const float *image, const Shape &shape, const float *scale, const float *shift, i64 y, i64 x0,
                        i64 cols, float *taps) {
  const i64 cin = shape.cin, plane = shape.h * shape.w;
  for (i64 ci = 0; ci < cin; ++ci)
    for (i64 ky = 0; ky < 3; ++ky) {
      const i64 iy = y + ky - 1;
      const bool row_inside = iy >= 0 && iy < shape.h;
      for (i64 kx = 0; kx < 3; ++kx) {
        float *tap = taps + (ky * 3 + kx) * cin + ci;
        for (i64 x = 0; x < cols; ++x) {
          const i64 ix = x0 + x + kx - 1;
          const bool inside = row_inside && ix >= 0 && ix < shape.w;
          tap[x * 9 * cin] = inside ? relu(image[ci * plane + iy * shape.w + ix] * scale[ci] + shift[ci]) : 0.0f;
        }
      }
    }
}

inline void first_conv(const Op &op, const Frame &frame) {
  const Shape &shape = frame.shape;
  const i64 cp = shape.cp, k = 9 * shape.cin, blocks = count_blocks(shape);
  const float *scale = floats(op.scale), *shift = floats(op.shift);     // [Cin]
  const float *weight = floats(op.weight_a), *bias = floats(op.bias_a); // [9][Cin][Cp], [Cp]
  float *dst = slot_at(frame, op.dst);                                  // [N, H, W, Cp]
#pragma omp parallel num_threads(frame.threads)
  {
    Laps laps(frame);
    float *taps = frame.scratch + omp_get_thread_num() * frame.scratch_floats;
#pragma omp for schedule(static)
    for (i64 index = 0; index < blocks; ++index) {
      const Block block = block_at(shape, index);
      const float *image = frame.image + block.image * shape.cin * shape.h * shape.w;
      for (i64 y = block.y; y < block.y + block.rows; ++y) {
        gather_taps(image, shape, scale, shift, y, block.x, block.cols, taps);
        laps.end_of(kInput);
        float *row = dst + ((block.image * shape.h + y) * shape.w + block.x) * cp;
        for (i64 x = 0; x < block.cols; ++x)
          for (i64 c = 0; c < cp; c += kLanes)
            store(row + x * cp + c, load(bias + c));
        matmul<true>(taps, k, weight, cp, k, row, cp, block.cols);
        laps.end_of(kProduct, 2 * block.cols * k * cp);
      }
    }
    laps.end_of(kWait);
  }
}

} // namespace memnet::MEMNET_ISA

// out[o] = skip_weight * image[o] + sum_m head_weight[m] * (conv(relu(slot_m * scale_m + shift_m))[o] + bias[o]).
//
// All heads share one convolution, which is linear: the heads are mixed first, and each slot is read once.
#pragma once

#include <omp.h>

#include "block.h"
#include "simd.h"

namespace memnet::MEMNET_ISA {

constexpr int kReconstructPixels = 4; // independent sums, to hide the latency of fma

MEMNET_INLINE i64 reconstruct_scratch(const Shape &shape) { return (kBlockRows + 2) * (kBlockCols + 2) * shape.cp; }

// mixed [rows + 2 * radius][cols + 2 * radius][Cp], zero outside the image.
inline void mix_heads(const Op &op, const Frame &frame, const Block &block, i64 radius, float *mixed) {
  const Shape &shape = frame.shape;
  const i64 cp = shape.cp;
  const std::int32_t *srcs = reinterpret_cast<const std::int32_t *>(op.srcs);
  const float *scale = floats(op.scale), *shift = floats(op.shift), *head = floats(op.head_weights);
  for (i64 y = block.y - radius; y < block.y + block.rows + radius; ++y)
    for (i64 x = block.x - radius; x < block.x + block.cols + radius; ++x, mixed += cp) {
      const bool inside = y >= 0 && y < shape.h && x >= 0 && x < shape.w;
      const i64 pixel = ((block.image * shape.h + y) * shape.w + x) * cp;
      for (i64 c = 0; c < cp; c += kLanes) {
        vec sum = zero();
        if (inside)
          for (i64 m = 0; m < op.num_src; ++m) {
            const vec value = load(slot_at(frame, srcs[m]) + pixel + c);
            sum = fma(relu(fma(value, load(scale + m * cp + c), load(shift + m * cp + c))), broadcast(head[m]), sum);
          }
        store(mixed + c, sum);
      }
    }
}

// sums [kP]: kP neighbouring pixels of one row against one output channel's weight [kernel * kernel][Cp], taps cout *
// cp apart.
template <int kP>
MEMNET_INLINE void dot_pixels(const float *mixed, i64 pitch, i64 cp, i64 kernel, const float *weight, i64 tap_stride,
                              float *sums) {
  vec sum[kP];
  for (int p = 0; p < kP; ++p)
    sum[p] = zero();
  for (i64 ky = 0; ky < kernel; ++ky)
    for (i64 kx = 0; kx < kernel; ++kx, weight += tap_stride) {
      const float *tap = mixed + ky * pitch + kx * cp;
      for (i64 c = 0; c < cp; c += kLanes) {
        const vec w = load(weight + c);
        for (int p = 0; p < kP; ++p)
          sum[p] = fma(load(tap + p * cp + c), w, sum[p]);
      }
    }
  for (int p = 0; p < kP; ++p)
    sums[p] = horizontal_sum(sum[p]);
}

inline void reconstruct(const Op &op, const Frame &frame) {
  const Shape &shape = frame.shape;
  const i64 cp = shape.cp, cout = shape.cout, plane = shape.h * shape.w, blocks = count_blocks(shape);
  const i64 kernel = op.kernel, radius = kernel / 2;
  const float *weight = floats(op.weight_a), *bias = floats(op.bias_a); // [kernel * kernel][Cout][Cp], [Cout]
  float head_sum = 0.0f;
  for (i64 m = 0; m < op.num_src; ++m)
    head_sum += floats(op.head_weights)[m];
#pragma omp parallel num_threads(frame.threads)
  {
    Laps laps(frame);
    float *mixed = frame.scratch + omp_get_thread_num() * frame.scratch_floats;
#pragma omp for schedule(static)
    for (i64 index = 0; index < blocks; ++index) {
      const Block block = block_at(shape, index);
      const i64 pitch = (block.cols + 2 * radius) * cp;
      mix_heads(op, frame, block, radius, mixed);
      laps.end_of(kInput);
      for (i64 o = 0; o < cout; ++o) {
        const float *image = frame.image + (block.image * shape.cin + (shape.cin == 1 ? 0 : o)) * plane;
        float *out = frame.out + (block.image * cout + o) * plane;
        const float offset = head_sum * bias[o];
        for (i64 y = 0; y < block.rows; ++y) {
          float sums[kBlockCols];
          const float *row = mixed + y * pitch;
          i64 x = 0;
          for (; x + kReconstructPixels <= block.cols; x += kReconstructPixels)
            dot_pixels<kReconstructPixels>(row + x * cp, pitch, cp, kernel, weight + o * cp, cout * cp, sums + x);
          for (; x < block.cols; ++x)
            dot_pixels<1>(row + x * cp, pitch, cp, kernel, weight + o * cp, cout * cp, sums + x);
          const i64 at = (block.y + y) * shape.w + block.x;
          for (x = 0; x < block.cols; ++x) {
            float value = sums[x] + offset;
            if (op.skip_weight != 0.0f)
              value += op.skip_weight * image[at + x];
            if (op.clamp)
              value = value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value; // a NaN fails both tests and stays
            out[at + x] = value;
          }
        }
      }
      laps.end_of(kProduct, 2 * block.rows * block.cols * cout * kernel * kernel * cp);
    }
    laps.end_of(kWait);
  }
}

} // namespace memnet::MEMNET_ISA

// dst = bias + sum_j relu(src_j * scale_j + shift_j) @ weight_j: a 1x1 convolution over slots that are never
// concatenated.
#pragma once

#include <omp.h>

#include "block.h"
#include "matmul.h"

namespace memnet::MEMNET_ISA {

// 96 pixels: activations and sums are 24 KB each at 64 channels, and 96 is a multiple of the 6 rows of the register
// block.
constexpr i64 kGatePixels = 96;

MEMNET_INLINE i64 gate_scratch(const Shape &shape) { return kGatePixels * shape.cp; }

inline void gate(const Op &op, const Frame &frame) {
  const Shape &shape = frame.shape;
  const i64 cp = shape.cp, pixels = shape.n * shape.h * shape.w, blocks = ceil_div(pixels, kGatePixels);
  const std::int32_t *srcs = reinterpret_cast<const std::int32_t *>(op.srcs);
  const float *scale = floats(op.scale), *shift = floats(op.shift);     // [num_src][Cp]
  const float *weight = floats(op.weight_a), *bias = floats(op.bias_a); // [num_src][Cp in][Cp out], [Cp]
  float *dst = slot_at(frame, op.dst);
#pragma omp parallel num_threads(frame.threads)
  {
    Laps laps(frame);
    float *active = frame.scratch + omp_get_thread_num() * frame.scratch_floats; // [kGatePixels][Cp]
#pragma omp for schedule(static)
    for (i64 index = 0; index < blocks; ++index) {
      const i64 first = index * kGatePixels, rows = smaller(kGatePixels, pixels - first);
      float *sums = dst + first * cp;
      for (i64 x = 0; x < rows; ++x)
        for (i64 c = 0; c < cp; c += kLanes)
          store(sums + x * cp + c, load(bias + c));
      for (i64 j = 0; j < op.num_src; ++j) {
        const float *src = slot_at(frame, srcs[j]) + first * cp;
        for (i64 x = 0; x < rows; ++x)
          for (i64 c = 0; c < cp; c += kLanes)
            store(active + x * cp + c,
                  relu(fma(load(src + x * cp + c), load(scale + j * cp + c), load(shift + j * cp + c))));
        laps.end_of(kInput);
        // While this source is multiplied, the next one travels to the cache.
        const Ahead ahead{j + 1 < op.num_src ? slot_at(frame, srcs[j + 1]) + first * cp : nullptr, nullptr, kRows * cp};
        matmul<true>(active, cp, weight + j * cp * cp, cp, cp, sums, cp, rows, ahead);
        laps.end_of(kProduct, 2 * rows * cp * cp);
      }
    }
    laps.end_of(kWait);
  }
}

} // namespace memnet::MEMNET_ISA

// The gate (gate.h) with bf16 operands: all sources of a few pixels side by side, so that one product sums over them.
#pragma once

#include <omp.h>

#include "bf16.h"
#include "direct.h"

namespace memnet::MEMNET_ISA {

// 48 pixels of 12 sources of 64 channels are 72 KB: they share L2 with the weights, and one row of sums stays in L1.
constexpr i64 kGatePixels = 48;
constexpr i64 kGateSources = 16; // a longer gate adds up partial sums

MEMNET_INLINE i64 bf16_gate_scratch(const Shape &shape) { return kGatePixels * kGateSources * shape.cp / 2; }

inline void bf16_gate(const Op &op, const Frame &frame) {
  const Shape &shape = frame.shape;
  const i64 cp = shape.cp, pixels = shape.n * shape.h * shape.w, blocks = ceil_div(pixels, kGatePixels);
  const std::int32_t *srcs = reinterpret_cast<const std::int32_t *>(op.srcs);
  const float *scale = floats(op.scale), *shift = floats(op.shift); // [num_src][Cp]
  const bf16 *weight = bf16s(op.weight_a);                          // [num_src][Cp in / 2][Cp out][2]
  const float *bias = floats(op.bias_a);                            // [Cp]
  float *dst = slot_at(frame, op.dst);
#pragma omp parallel num_threads(frame.threads)
  {
    Laps laps(frame);
    // [kGatePixels][sources][Cp]
    bf16 *active = reinterpret_cast<bf16 *>(frame.scratch + omp_get_thread_num() * frame.scratch_floats);
#pragma omp for schedule(static)
    for (i64 index = 0; index < blocks; ++index) {
      const i64 first = index * kGatePixels, rows = smaller(kGatePixels, pixels - first);
      float *sums = dst + first * cp;
      if (op.accumulate == 0)
        for (i64 x = 0; x < rows; ++x)
          for (i64 c = 0; c < cp; c += kLanes)
            store(sums + x * cp + c, load(bias + c));
      for (i64 done = 0; done < op.num_src; done += kGateSources) {
        const i64 sources = smaller(kGateSources, op.num_src - done), k = sources * cp;
        for (i64 j = 0; j < sources; ++j) {
          const float *src = slot_at(frame, srcs[done + j]) + first * cp;
          const float *s = scale + (done + j) * cp, *t = shift + (done + j) * cp;
          for (i64 x = 0; x < rows; ++x)
            for (i64 c = 0; c < cp; c += kLanes)
              store(active + x * k + j * cp + c, relu(fma(load(src + x * cp + c), load(s + c), load(t + c))));
        }
        laps.end_of(kInput);
        dot_product<true>(active, k, kOneTap, weight + done * cp * cp, cp, k, sums, cp, rows);
        laps.end_of(kProduct, 2 * rows * k * cp);
      }
    }
    laps.end_of(kWait);
  }
}

} // namespace memnet::MEMNET_ISA

// dst = bias + sum_j relu(src_j * scale_j + shift_j) @ weight_j: a 1x1 convolution over slots that are never
// concatenated.
#pragma once

#include <omp.h>

#include "block.h"
#include "matmul.h"

namespace memnet::MEMNET_ISA {

// 96 pixels: two sets of activations and the sums are 24 KB each at 64 channels, and 96 is a multiple of the 6 rows of
// the register block.
constexpr i64 kGatePixels = 96;

MEMNET_INLINE i64 gate_scratch(const Shape &shape) { return 2 * kGatePixels * shape.cp; }

// Writes relu(src * scale + shift) one pixel at a time, and prefetches another source and what it will be added to, as
// a side task of a product.
struct Activation {
  const float *src, *scale, *shift, *upcoming, *sums; // the last two may be null
  float *active;
  i64 rows, cp;

  MEMNET_INLINE void step() {
    if (rows == 0)
      return;
    --rows;
    for (i64 c = 0; c < cp; c += kLanes)
      store(active + c, relu(fma(load(src + c), load(scale + c), load(shift + c))));
    src += cp;
    active += cp;
    if (upcoming != nullptr) {
      for (i64 c = 0; c < cp; c += 16)
        __builtin_prefetch(upcoming + c, 0);
      upcoming += cp;
    }
    if (sums != nullptr) {
      for (i64 c = 0; c < cp; c += 16)
        __builtin_prefetch(sums + c, 1);
      sums += cp;
    }
  }
};

// A thread walks over its blocks of pixels, and in each over the sources. While one source is multiplied, the next one
// is activated and the one after that travels to the cache.
// kCp: the padded channels where they are known beforehand, or 0. source(j): the j-th of so many sources. scale, shift
// [sources][Cp]; weight [sources][Cp in][Cp out]; bias [Cp].
template <int kCp, class Source>
void gate_blocks(const Frame &frame, const Source &source, i64 sources, const float *scale, const float *shift,
                 const float *weight, const float *bias, bool accumulate, float *dst) {
  const Shape &shape = frame.shape;
  const i64 cp = kCp != 0 ? kCp : shape.cp, pixels = shape.n * shape.h * shape.w;
  const i64 blocks = ceil_div(pixels, kGatePixels);
#pragma omp parallel num_threads(frame.threads)
  {
    Laps laps(frame);
    const i64 thread = omp_get_thread_num(), team = omp_get_num_threads();
    float *scratch = frame.scratch + thread * frame.scratch_floats; // [2][kGatePixels][Cp]
    const i64 begin = blocks * thread / team * sources, end = blocks * (thread + 1) / team * sources;
    // Step `at` multiplies source at % sources of block at / sources.
    const auto source_at = [&](i64 at) {
      return at < end ? source(at % sources) + at / sources * kGatePixels * cp : nullptr;
    };
    const auto activation = [&](i64 at) {
      const i64 j = at % sources, rows = at < end ? smaller(kGatePixels, pixels - at / sources * kGatePixels) : 0;
      const float *sums = j == 0 && at < end ? dst + at / sources * kGatePixels * cp : nullptr;
      float *active = scratch + at % 2 * kGatePixels * cp;
      return Activation{source_at(at), scale + j * cp, shift + j * cp, source_at(at + 1), sums, active, rows, cp};
    };
    Activation first = activation(begin);
    while (first.rows > 0)
      first.step();
    laps.end_of(kInput);
    for (i64 at = begin; at < end; ++at) {
      const i64 j = at % sources, from = at / sources * kGatePixels, rows = smaller(kGatePixels, pixels - from);
      float *sums = dst + from * cp;
      const bool begins = j == 0 && !accumulate;
      matmul<true>(scratch + at % 2 * kGatePixels * cp, cp, weight + j * cp * cp, cp, cp, begins ? bias : sums,
                   begins ? 0 : cp, sums, cp, rows, activation(at + 1));
      laps.end_of(kProduct, 2 * rows * cp * cp);
    }
    laps.end_of(kWait);
  }
}

inline void gate(const Op &op, const Frame &frame) {
  const std::int32_t *srcs = reinterpret_cast<const std::int32_t *>(op.srcs);
  const auto source = [&](i64 j) { return static_cast<const float *>(slot_at(frame, srcs[j])); };
  const auto blocks = frame.shape.cp == 64 ? gate_blocks<64, decltype(source)> : gate_blocks<0, decltype(source)>;
  blocks(frame, source, op.num_src, floats(op.scale), floats(op.shift), floats(op.weight_a), floats(op.bias_a),
         op.accumulate != 0, slot_at(frame, op.dst));
}

} // namespace memnet::MEMNET_ISA

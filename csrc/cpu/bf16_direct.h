// The residual block by plain 3x3 convolutions with bf16 operands, exact on integers of up to 256. Operands are rounded
// where the backend "torch", the specification, rounds them; stores are fp32.
#pragma once

#include <omp.h>

#include "bf16.h"
#include "direct.h"

namespace memnet::MEMNET_ISA {

MEMNET_INLINE i64 bf16_direct_scratch(const Shape &shape) {
  return kBlockCols * shape.cp + (kBlockRows + 2) * (kBlockCols + 2) * shape.cp / 2;
}

// src, dst, skip [N, H, W, Cp]; weight [9][Cp in / 2][Cp out][2]; bias [Cp]; scale, shift [Cp] and skip as the stage
// needs.
template <Stage kStage>
void bf16_direct_conv(const Frame &frame, const float *src, float *dst, const float *skip, const float *scale,
                      const float *shift, const bf16 *weight, const float *bias) {
  const Shape &shape = frame.shape;
  const i64 cp = shape.cp, blocks = count_blocks(shape);
#pragma omp parallel num_threads(frame.threads)
  {
    Laps laps(frame);
    float *sums = frame.scratch + omp_get_thread_num() * frame.scratch_floats;
    bf16 *patch = reinterpret_cast<bf16 *>(sums + kBlockCols * cp);
#pragma omp for schedule(static)
    for (i64 index = 0; index < blocks; ++index) {
      const Block block = block_at(shape, index);
      fill_patch<kStage>(src, shape, block, scale, shift, patch);
      laps.end_of(kInput);
      const i64 pitch = (block.cols + 2) * cp;
      Taps taps = {9, {}};
      for (i64 tap = 0; tap < 9; ++tap)
        taps.offset[tap] = tap / 3 * pitch + tap % 3 * cp;
      for (i64 y = 0; y < block.rows; ++y) {
        dot_product<false>(patch + y * pitch, cp, taps, weight, cp, cp, sums, cp, block.cols);
        laps.end_of(kProduct, 18 * block.cols * cp * cp);
        store_row<kStage>(sums, shape, block, y, bias, skip, dst);
        laps.end_of(kOutput);
      }
    }
    laps.end_of(kWait);
  }
}

inline void bf16_direct_block(const Op &op, const Frame &frame) {
  const float *src = slot_at(frame, op.src);
  float *mid = frame.mid;
  bf16_direct_conv<Stage::kFirst>(frame, src, mid, nullptr, floats(op.scale), floats(op.shift), bf16s(op.weight_a),
                                  floats(op.bias_a));
  bf16_direct_conv<Stage::kSecond>(frame, mid, slot_at(frame, op.dst), src, nullptr, nullptr, bf16s(op.weight_b),
                                   floats(op.bias_b));
}

} // namespace memnet::MEMNET_ISA

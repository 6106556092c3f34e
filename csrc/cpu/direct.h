// The residual block by plain 3x3 convolutions: exact on integer networks, and a NaN stays in its receptive field.
#pragma once

#include <omp.h>

#include "block.h"
#include "matmul.h"

namespace memnet::MEMNET_ISA {

// How a convolution of a residual block begins and ends. Inference: BN-ReLU before, bias-ReLU after; nothing before,
// bias and skip after. Training (training.h): BN-ReLU before, bias after, with skip or without; backwards, the bias
// alone.
enum class Stage { kFirst, kSecond, kTrain, kTrainSkip, kGradient };

constexpr bool activates(Stage stage) { return stage != Stage::kSecond && stage != Stage::kGradient; }
constexpr bool rectifies(Stage stage) { return stage == Stage::kFirst; }
constexpr bool skips(Stage stage) { return stage == Stage::kSecond || stage == Stage::kTrainSkip; }

MEMNET_INLINE i64 direct_scratch(const Shape &shape) {
  return ((kBlockRows + 2) * (kBlockCols + 2) + kBlockCols) * shape.cp;
}

// patch [rows + 2][cols + 2][Cp]: the block with its halo, activated, zero outside the image.
template <Stage kStage, typename T>
void fill_patch(const float *src, const Shape &shape, const Block &block, const float *scale, const float *shift,
                T *patch) {
  const i64 cp = shape.cp;
  for (i64 y = block.y - 1; y <= block.y + block.rows; ++y)
    for (i64 x = block.x - 1; x <= block.x + block.cols; ++x, patch += cp) {
      const bool inside = y >= 0 && y < shape.h && x >= 0 && x < shape.w;
      const float *pixel = src + ((block.image * shape.h + y) * shape.w + x) * cp;
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

// sums [cols][Cp] of row y of the block go to dst, with what the stage adds.
template <Stage kStage>
MEMNET_INLINE void store_row(const float *sums, const Shape &shape, const Block &block, i64 y, const float *bias,
                             const float *skip, float *dst) {
  const i64 cp = shape.cp, offset = ((block.image * shape.h + block.y + y) * shape.w + block.x) * cp;
  for (i64 x = 0; x < block.cols; ++x)
    for (i64 c = 0; c < cp; c += kLanes) {
      const i64 at = x * cp + c;
      const vec value = load(sums + at) + load(bias + c);
      store(dst + offset + at, kStage == Stage::kFirst ? relu(value) : value + load(skip + offset + at));
    }
}

// src, dst, skip [N, H, W, Cp]; weight [9][Cp in][Cp out]; bias [Cp]; scale, shift [Cp] and skip as the stage needs.
template <Stage kStage>
void direct_conv(const Frame &frame, const float *src, float *dst, const float *skip, const float *scale,
                 const float *shift, const float *weight, const float *bias) {
  const Shape &shape = frame.shape;
  const i64 cp = shape.cp, blocks = count_blocks(shape);
#pragma omp parallel num_threads(frame.threads)
  {
    Laps laps(frame);
    float *patch = frame.scratch + omp_get_thread_num() * frame.scratch_floats;
    float *sums = patch + (kBlockRows + 2) * (kBlockCols + 2) * cp;
#pragma omp for schedule(static)
    for (i64 index = 0; index < blocks; ++index) {
      const Block block = block_at(shape, index);
      fill_patch<kStage>(src, shape, block, scale, shift, patch);
      laps.end_of(kInput);
      const i64 pitch = (block.cols + 2) * cp;
      for (i64 y = 0; y < block.rows; ++y) {
        // One tap's weights (16 KB at 64 channels) serve the whole row from L1.
        matmul<false>(patch + y * pitch, cp, weight, cp, cp, sums, cp, block.cols);
        for (i64 tap = 1; tap < 9; ++tap)
          matmul<true>(patch + (y + tap / 3) * pitch + tap % 3 * cp, cp, weight + tap * cp * cp, cp, cp, sums, cp,
                       block.cols);
        laps.end_of(kProduct, 18 * block.cols * cp * cp);
        store_row<kStage>(sums, shape, block, y, bias, skip, dst);
        laps.end_of(kOutput);
      }
    }
    laps.end_of(kWait);
  }
}

inline void direct_block(const Op &op, const Frame &frame) {
  const float *src = slot_at(frame, op.src);
  direct_conv<Stage::kFirst>(frame, src, frame.mid, nullptr, floats(op.scale), floats(op.shift), floats(op.weight_a),
                             floats(op.bias_a));
  direct_conv<Stage::kSecond>(frame, frame.mid, slot_at(frame, op.dst), src, nullptr, nullptr, floats(op.weight_b),
                              floats(op.bias_b));
}

} // namespace memnet::MEMNET_ISA

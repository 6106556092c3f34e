// How the residual block on Hopper divides its work: between the chooser (residual_block_sm90.cu) and the kernel's
// instances (residual_block_sm90_*.cu, one width each, so that they compile side by side).
#pragma once

#include <cstdint>

#include "kernels.h"
#include "tile_config.h"

namespace memnet::cuda::sm90 {

// What is multiplied. Slots are fp16, bf16 and fp16.
enum class Math { kFp16, kBf16, kE4m3 };

// All rows of all strips of all images are numbered, strip after strip; blocks take runs of them.
struct StripParams {
  const void *src;      // [N, H, W, 64]
  void *dst;            // [N, H, W, 64]
  const void *weight_a; // 16-bit [36][128][8] or e4m3 [18][128][16], see layouts/wgmma.py
  const void *weight_b;
  const float *gain_a; // [64], of e4m3 alone
  const float *gain_b;
  const float *bias_a; // [64], and so the others
  const float *bias_b;
  const float *scale;
  const float *shift;
  std::int64_t rows_per_block;
  std::int64_t longer_blocks; // the first so many blocks take one row more
  int h, w;
  int strips; // of an image
};

struct Share {
  StripParams params;
  unsigned blocks;
};

template <Math kMath, int kWidth>
cudaError_t launch_strips(const Share &share, bool early_weights, cudaStream_t stream);

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Pixels that the tensor cores pass through for the block with the most rows: what a launch costs, up to a factor.
constexpr std::int64_t strip_cost(int width, std::int64_t n, std::int64_t h, std::int64_t w, int blocks) {
  const std::int64_t total = n * ((w + width - 1) / width) * h, rows = (total + blocks - 1) / blocks;
  const std::int64_t mid = round_up(width + 2, 8);
  // Every segment begins with two rows of conv_a alone.
  return rows * (mid + width) + (1 + (rows - 1) / h) * 2 * mid;
}

// The width of least cost; the narrowest of equals, whose pipeline fills soonest.
constexpr int strip_width(std::int64_t n, std::int64_t h, std::int64_t w, int blocks) {
  int best = kStripWidths[0];
  for (const int width : kStripWidths)
    if (strip_cost(width, n, h, w, blocks) < strip_cost(best, n, h, w, blocks))
      best = width;
  return best;
}

// Every block has the same number of rows, or one more.
inline Share share_rows(const ResidualBlock &args, int width, int sm_count) {
  const std::int64_t strips = (args.w + width - 1) / width, rows = args.n * strips * args.h;
  const std::int64_t blocks = rows < sm_count ? rows : sm_count;
  Share share{};
  share.blocks = static_cast<unsigned>(blocks);
  StripParams &params = share.params;
  params.src = args.src;
  params.dst = args.dst;
  params.weight_a = args.weight_a;
  params.weight_b = args.weight_b;
  params.bias_a = args.bias_a;
  params.bias_b = args.bias_b;
  params.scale = args.scale;
  params.shift = args.shift;
  params.rows_per_block = rows / blocks;
  params.longer_blocks = rows % blocks;
  params.h = static_cast<int>(args.h);
  params.w = static_cast<int>(args.w);
  params.strips = static_cast<int>(strips);
  return share;
}

static_assert(strip_width(1, 1080, 1920, 132) == 96, "");
static_assert(strip_width(1, 1, 1, 132) == 32, "");

} // namespace memnet::cuda::sm90

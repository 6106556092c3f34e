// Residual block with mma.sync: both convolutions of a tile of the image in one block of threads. For every
// architecture from 8.0 on; 9.0 has a faster one of its own.
//
// The activated input tile lies in shared memory once and serves all nine taps of conv_a. Its result stays in registers
// until everyone has read the input, and then takes its place; so do the sums of conv_b after it.

#include <climits>

#include "kernels.h"
#include "launch.h"
#include "mma_tile.h"
#include "ptx.cuh"
#include "tile_config.h"

namespace memnet::cuda {
namespace {

struct Params {
  ResidualBlock block;
  int tiles_x, tiles_y;
};

// A tile of one image, and where its pixels lie in memory.
struct Place {
  std::int64_t image_pixels; // of all images before it
  int top, left;             // first output pixel
  int height, width;         // of the image

  __device__ bool inside(int y, int x) const {
    return static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
           static_cast<unsigned>(x) < static_cast<unsigned>(width);
  }

  // Bytes from the start of a slot to 8 channels of a pixel.
  __device__ std::int64_t offset(int y, int x, int chunk) const {
    return (image_pixels + static_cast<std::int64_t>(y) * width + x) * 128 + chunk * 16;
  }
};

template <class Tile> MEMNET_DEVICE void load_tap(std::uint32_t ring, const ResidualBlock &block, int step) {
  if (step < 18) {
    const char *tap = static_cast<const char *>(step < 9 ? block.weight_a : block.weight_b) +
                      (step < 9 ? step : step - 9) * Tile::kStageBytes;
    const std::uint32_t stage = ring + step % Tile::kStages * Tile::kStageBytes;
    for (int at = threadIdx.x * 16; at < Tile::kStageBytes; at += Tile::kThreads * 16)
      ptx::copy_async(stage + at, tap + at);
  }
  ptx::copy_async_commit(); // an empty group at the end keeps the count
}

// Sums of a 3x3 convolution from a tile [..][kInCols] in shared memory to kPixels pixels in rows of kCols: the warp's
// row blocks m, columns 8 n, as fragments. kFirst: step of its first tap, 0 for conv_a and 9 for conv_b.
template <Type kType, class Tile, int kFirst, int kBlocks, int kInCols, int kCols, int kPixels>
MEMNET_DEVICE void convolve(float (&sums)[kBlocks][8][4], std::uint32_t tile, std::uint32_t ring,
                            const ResidualBlock &block) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int corner[kBlocks]; // pixel of the first tap
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    // The last rows belong to no pixel; they repeat one and are dropped.
    const int row = (warp * kBlocks + m) * 16 + left_row(lane), pixel = row < kPixels ? row : kPixels - 1;
    corner[m] = pixel / kCols * kInCols + pixel % kCols;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[m][n][i] = 0.0f;
  }
#pragma unroll 1
  for (int tap = 0; tap < 9; ++tap) {
    const int step = kFirst + tap;
    // This step's weights are there, also those that others copied, and nobody reads the stage that is filled next.
    ptx::copy_async_wait<Tile::kStages - 2>();
    __syncthreads();
    load_tap<Tile>(ring, block, step + Tile::kStages - 1);

    const std::uint32_t weights = ring + step % Tile::kStages * Tile::kStageBytes;
    const int shift = tap / 3 * kInCols + tap % 3;
    std::uint32_t left[kBlocks];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
      left[m] = tile + chunk_offset(corner[m] + shift, left_chunk(lane));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint4 right[4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair)
        right[pair] = ptx::load_shared(weights + weight_offset(k, pair, lane));
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        std::uint32_t a[4];
        ptx::load_matrix(left[m] ^ (k << 5), a); // two chunks on: chunks are exchanged by exclusive or
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          ptx::multiply<kType>(sums[m][2 * pair], a, right[pair].x, right[pair].y);
          ptx::multiply<kType>(sums[m][2 * pair + 1], a, right[pair].z, right[pair].w);
        }
      }
    }
  }
}

// relu(x * scale + shift) of the input tile, zero outside the image, as the operand of conv_a.
template <Type kType, class Tile>
MEMNET_DEVICE void load_input(std::uint32_t tile, const ResidualBlock &block, const Place &place) {
  const int chunk = threadIdx.x & 7, first = threadIdx.x >> 3;
  const char *source = static_cast<const char *>(block.src);
  for (int pixel = first; pixel < Tile::kInPixels; pixel += Tile::kThreads / 8) {
    const int y = place.top - 2 + pixel / Tile::kInCols, x = place.left - 2 + pixel % Tile::kInCols;
    const bool inside = place.inside(y, x);
    ptx::copy_async_or_zero(tile + chunk_offset(pixel, chunk), source + (inside ? place.offset(y, x, chunk) : 0),
                            inside ? 16 : 0);
  }
  ptx::copy_async_commit();
}

template <Type kType, class Tile>
MEMNET_DEVICE void activate_input(std::uint32_t tile, const ResidualBlock &block, const Place &place) {
  const int chunk = threadIdx.x & 7, first = threadIdx.x >> 3;
  float scale[8], shift[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    scale[i] = block.scale[chunk * 8 + i];
    shift[i] = block.shift[chunk * 8 + i];
  }
  // A thread activates what it has copied itself: its input has arrived, the first weights may still be under way.
  ptx::copy_async_wait<Tile::kStages - 1>();
  for (int pixel = first; pixel < Tile::kInPixels; pixel += Tile::kThreads / 8) {
    const int y = place.top - 2 + pixel / Tile::kInCols, x = place.left - 2 + pixel % Tile::kInCols;
    if (!place.inside(y, x))
      continue; // zero already
    const std::uint32_t at = tile + chunk_offset(pixel, chunk);
    uint4 v = ptx::load_shared(at);
    std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x2 = ptx::unpack<kType>(words[i]);
      words[i] =
          ptx::pack_relu<kType>(fmaf(x2.x, scale[2 * i], shift[2 * i]), fmaf(x2.y, scale[2 * i + 1], shift[2 * i + 1]));
    }
    ptx::store_shared(at, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// Of the columns that a lane has in each of the eight products.
MEMNET_DEVICE void load_bias(float2 (&bias)[8], const float *source) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
    bias[n] = *reinterpret_cast<const float2 *>(source + 8 * n + sum_column(threadIdx.x & 31));
}

// relu(sums + bias), zero outside the image, as the operand of conv_b.
template <Type kType, class Tile>
MEMNET_DEVICE void store_mid(const float (&sums)[Tile::kMidBlocks][8][4], std::uint32_t tile,
                             const ResidualBlock &block, const Place &place) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float2 bias[8];
  load_bias(bias, block.bias_a);
#pragma unroll
  for (int m = 0; m < Tile::kMidBlocks; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int pixel = (warp * Tile::kMidBlocks + m) * 16 + sum_row(lane) + 8 * h;
      const bool inside = place.inside(place.top - 1 + pixel / Tile::kMidCols, place.left - 1 + pixel % Tile::kMidCols);
      // The last rows, which repeat a pixel, go to where the input had more pixels.
      static_assert(Tile::kMidBlocks * Tile::kWarps * 16 <= Tile::kInPixels, "");
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const std::uint32_t both =
            ptx::pack_relu<kType>(sums[m][n][2 * h] + bias[n].x, sums[m][n][2 * h + 1] + bias[n].y);
        ptx::store_shared(tile + chunk_offset(pixel, n) + 2 * sum_column(lane), inside ? both : 0u);
      }
    }
}

// sums + bias in fp32, so that the result is rounded once, after the skip.
template <class Tile>
MEMNET_DEVICE void store_sums(const float (&sums)[Tile::kBlocks][8][4], std::uint32_t tile,
                              const ResidualBlock &block) {
  static_assert(Tile::kBlocks * Tile::kWarps * 16 == Tile::kPixels, "no rows are dropped");
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float2 bias[8];
  load_bias(bias, block.bias_b);
#pragma unroll
  for (int m = 0; m < Tile::kBlocks; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int pixel = (warp * Tile::kBlocks + m) * 16 + sum_row(lane) + 8 * h;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const std::uint32_t at = sum_offset(pixel, n, sum_column(lane) >> 2) + 4 * (sum_column(lane) & 3);
        ptx::store_shared(tile + at, make_float2(sums[m][n][2 * h] + bias[n].x, sums[m][n][2 * h + 1] + bias[n].y));
      }
    }
}

template <Type kType, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    residual_block_kernel(const __grid_constant__ Params params) {
  const ResidualBlock &block = params.block;
  const std::uint32_t tile = ptx::dynamic_shared(), ring = tile + Tile::kRingOffset;

  const int column = blockIdx.x % params.tiles_x, row = blockIdx.x / params.tiles_x % params.tiles_y;
  const std::int64_t image = blockIdx.x / params.tiles_x / params.tiles_y;
  const Place place{image * block.h * block.w, row * Tile::kRows, column * Tile::kCols, static_cast<int>(block.h),
                    static_cast<int>(block.w)};

  load_input<kType, Tile>(tile, block, place);
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step)
    load_tap<Tile>(ring, block, step);
  activate_input<kType, Tile>(tile, block, place);
  {
    float sums[Tile::kMidBlocks][8][4];
    convolve<kType, Tile, 0, Tile::kMidBlocks, Tile::kInCols, Tile::kMidCols, Tile::kMidPixels>(sums, tile, ring,
                                                                                                block);
    __syncthreads(); // all have read the input, which now gives way
    store_mid<kType, Tile>(sums, tile, block, place);
  }
  {
    float sums[Tile::kBlocks][8][4];
    convolve<kType, Tile, 9, Tile::kBlocks, Tile::kMidCols, Tile::kCols, Tile::kPixels>(sums, tile, ring, block);
    __syncthreads(); // all have read the operands and the last weights
    store_sums<Tile>(sums, tile, block);
  }

  // Whole pixels to memory. The skip is read again rather than kept: it is in L2, and shared memory has no room for it.
  constexpr int kTurns = Tile::kPixels * 8 / Tile::kThreads;
  static_assert(kTurns * Tile::kThreads == Tile::kPixels * 8, "");
  const int chunk = threadIdx.x & 7, first = threadIdx.x >> 3;
  uint4 skip[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int pixel = first + turn * (Tile::kThreads / 8);
    const int y = place.top + pixel / Tile::kCols, x = place.left + pixel % Tile::kCols;
    skip[turn] = make_uint4(0, 0, 0, 0);
    if (place.inside(y, x))
      skip[turn] = ptx::load_global(static_cast<const char *>(block.src) + place.offset(y, x, chunk));
  }
  __syncthreads(); // the sums are there
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int pixel = first + turn * (Tile::kThreads / 8);
    const int y = place.top + pixel / Tile::kCols, x = place.left + pixel % Tile::kCols;
    if (!place.inside(y, x))
      continue;
    const float4 low = ptx::load_shared_float4(tile + sum_offset(pixel, chunk, 0));
    const float4 high = ptx::load_shared_float4(tile + sum_offset(pixel, chunk, 1));
    const float2 x0 = ptx::unpack<kType>(skip[turn].x), x1 = ptx::unpack<kType>(skip[turn].y);
    const float2 x2 = ptx::unpack<kType>(skip[turn].z), x3 = ptx::unpack<kType>(skip[turn].w);
    const uint4 result =
        make_uint4(ptx::pack<kType>(x0.x + low.x, x0.y + low.y), ptx::pack<kType>(x1.x + low.z, x1.y + low.w),
                   ptx::pack<kType>(x2.x + high.x, x2.y + high.y), ptx::pack<kType>(x3.x + high.z, x3.y + high.w));
    ptx::store_global(static_cast<char *>(block.dst) + place.offset(y, x, chunk), result);
  }
}

template <Type kType, class Tile> cudaError_t run(const ResidualBlock &block, cudaStream_t stream) {
  const std::int64_t tiles_x = (block.w + Tile::kCols - 1) / Tile::kCols;
  const std::int64_t tiles_y = (block.h + Tile::kRows - 1) / Tile::kRows;
  // Rows, columns and blocks of threads are counted in 32 bits; pixels and bytes in 64.
  if (block.h > INT_MAX - 64 || block.w > INT_MAX - 64 || tiles_x * tiles_y > INT_MAX / block.n)
    return cudaErrorInvalidValue;
  const Params params{block, static_cast<int>(tiles_x), static_cast<int>(tiles_y)};
  const Grid grid{static_cast<unsigned>(tiles_x * tiles_y * block.n), Tile::kThreads, Tile::kSharedBytes};
  return launch(residual_block_kernel<kType, Tile>, grid, stream, params);
}

template <Type kType> cudaError_t run(const ResidualBlock &block, const Device &device, cudaStream_t stream) {
  if (takes_small_tile(device.capability))
    return run<kType, SmallTile>(block, stream);
  return run<kType, LargeTile>(block, stream);
}

} // namespace

cudaError_t residual_block_sm80(Type type, const ResidualBlock &block, const Device &device, cudaStream_t stream) {
  return type == Type::kFp16 ? run<Type::kFp16>(block, device, stream) : run<Type::kBf16>(block, device, stream);
}

} // namespace memnet::cuda

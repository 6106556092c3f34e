// The first convolution: a few planes of fp32 to 64 channels of 16 bits, all arithmetic in fp32. Bound by the writes to
// HBM.

#include <climits>

#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"
#include "tile_config.h"

namespace memnet::cuda {
namespace {

struct Params {
  FirstConv conv;
  int tiles_x, tiles_y;
};

// Of one plane: its activated tile with a border of one pixel, then its weights [9][64].
constexpr int kTileRows = kFirstRows + 2, kTileCols = kFirstCols + 2;
constexpr int kTileBytes = kTileRows * kTileCols * 4;
constexpr int kWeights = 9 * kChannels;
constexpr int kSharedBytes = kTileBytes + kWeights * 4;
static_assert(kTileBytes % 16 == 0, "weights are read 16 bytes at a time");

// relu(image * scale + shift) of one plane, zero outside the image, and its weights.
MEMNET_DEVICE void load_plane(std::uint32_t memory, const FirstConv &conv, std::int64_t image, int plane, int top,
                              int left) {
  const int height = static_cast<int>(conv.h), width = static_cast<int>(conv.w);
  const float *source = conv.image + (image * conv.cin + plane) * conv.h * conv.w;
  const float scale = conv.scale[plane], shift = conv.shift[plane];
  for (int i = threadIdx.x; i < kTileRows * kTileCols; i += kFirstThreads) {
    const int y = top - 1 + i / kTileCols, x = left - 1 + i % kTileCols;
    float value = 0.0f;
    if (static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
        static_cast<unsigned>(x) < static_cast<unsigned>(width))
      value = ptx::relu(fmaf(source[std::int64_t{y} * width + x], scale, shift));
    ptx::store_shared(memory + i * 4, value);
  }
  for (int i = threadIdx.x; i < kWeights; i += kFirstThreads) {
    const std::int64_t tap = i / kChannels;
    ptx::store_shared(memory + kTileBytes + i * 4, conv.weight[(tap * conv.cin + plane) * kChannels + i % kChannels]);
  }
}

template <Type kType>
__global__ void __launch_bounds__(kFirstThreads, 2) first_conv_kernel(const __grid_constant__ Params params) {
  const FirstConv &conv = params.conv;
  const std::uint32_t memory = ptx::dynamic_shared();
  const int column = blockIdx.x % params.tiles_x, row = blockIdx.x / params.tiles_x % params.tiles_y;
  const std::int64_t image = blockIdx.x / params.tiles_x / params.tiles_y;
  const int top = row * kFirstRows, left = column * kFirstCols;
  // Eight threads share a run of pixels.
  const int chunk = threadIdx.x & 7, run = threadIdx.x >> 3;
  const int run_y = run / (kFirstCols / kFirstRun), run_x = run % (kFirstCols / kFirstRun) * kFirstRun;

  float sums[kFirstRun][8];
#pragma unroll
  for (int p = 0; p < kFirstRun; ++p)
#pragma unroll
    for (int c = 0; c < 8; ++c)
      sums[p][c] = 0.0f;

#pragma unroll 1
  for (int plane = 0; plane < conv.cin; ++plane) {
    __syncthreads(); // all have used the plane before
    load_plane(memory, conv, image, plane, top, left);
    __syncthreads();
#pragma unroll
    for (int ky = 0; ky < 3; ++ky) {
      float window[kFirstRun + 2];
#pragma unroll
      for (int i = 0; i < kFirstRun + 2; ++i)
        window[i] = ptx::load_shared_float(memory + ((run_y + ky) * kTileCols + run_x + i) * 4);
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
        const std::uint32_t at = memory + kTileBytes + ((ky * 3 + kx) * kChannels + chunk * 8) * 4;
        const float4 low = ptx::load_shared_float4(at), high = ptx::load_shared_float4(at + 16);
        const float weight[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int p = 0; p < kFirstRun; ++p)
#pragma unroll
          for (int c = 0; c < 8; ++c)
            sums[p][c] = fmaf(window[p + kx], weight[c], sums[p][c]);
      }
    }
  }

  float bias[8];
#pragma unroll
  for (int c = 0; c < 8; ++c)
    bias[c] = conv.bias[chunk * 8 + c];
  const int y = top + run_y;
  if (y >= conv.h)
    return;
  char *target = static_cast<char *>(conv.dst) + (image * conv.h + y) * conv.w * 128 + chunk * 16;
#pragma unroll
  for (int p = 0; p < kFirstRun; ++p) {
    const std::int64_t x = left + run_x + p;
    if (x >= conv.w)
      break;
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = ptx::pack<kType>(sums[p][2 * i] + bias[2 * i], sums[p][2 * i + 1] + bias[2 * i + 1]);
    ptx::store_global(target + x * 128, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

} // namespace

cudaError_t first_conv(Type type, const FirstConv &conv, const Device &, cudaStream_t stream) {
  const std::int64_t tiles_x = (conv.w + kFirstCols - 1) / kFirstCols;
  const std::int64_t tiles_y = (conv.h + kFirstRows - 1) / kFirstRows;
  if (conv.h > INT_MAX - 64 || conv.w > INT_MAX - 64 || conv.cin > INT_MAX || tiles_x * tiles_y > INT_MAX / conv.n)
    return cudaErrorInvalidValue;
  const Params params{conv, static_cast<int>(tiles_x), static_cast<int>(tiles_y)};
  const Grid grid{static_cast<unsigned>(tiles_x * tiles_y * conv.n), kFirstThreads, kSharedBytes};
  return type == Type::kFp16 ? launch(first_conv_kernel<Type::kFp16>, grid, stream, params)
                             : launch(first_conv_kernel<Type::kBf16>, grid, stream, params);
}

} // namespace memnet::cuda

// The reconstruction: all heads in one pass, fp32 arithmetic. Bound by the reads of the slots.
//
// All heads share one convolution, which is linear: the activated slots are mixed first. A pixel's mix is multiplied by
// the weights of every tap at once, and only these few products, not 64 channels, meet their neighbours in shared
// memory.

#include <climits>

#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"
#include "tile_config.h"

namespace memnet::cuda {
namespace {

struct Params {
  Reconstruct recon;
  int tiles_x, tiles_y, groups; // groups of output channels
};

constexpr int kPassPixels = kReconThreads / 8 * kReconRun; // eight threads share a run of pixels

// Tile with the border that a kernel of this size needs.
template <int kKernel> struct Tile {
  static constexpr int kTaps = kKernel * kKernel, kBorder = kKernel / 2;
  static constexpr int kCols = kReconCols + 2 * kBorder, kPixels = kCols * (kReconRows + 2 * kBorder);
  static constexpr int kOutputBytes = kTaps * kPixels * 4; // products [tap][pixel] of one output channel
};

// Sums each of kCount values over the 8 lanes of a run; lane i of them ends with the sums i * kCount / 8 and following
// in front. In each round, lanes exchange halves of what they hold. The tree is the same for every value, so that a
// result does not depend on the place of its pixel.
template <int kCount, int kDistance = 4, int kAll> MEMNET_DEVICE void sum_lanes(float (&values)[kAll]) {
  static_assert(kCount % 2 == 0, "");
  const bool upper = threadIdx.x & kDistance;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float give = upper ? values[i] : values[i + kCount / 2], keep = upper ? values[i + kCount / 2] : values[i];
    values[i] = keep + __shfl_xor_sync(0xffffffffu, give, kDistance);
  }
  if constexpr (kDistance > 1)
    sum_lanes<kCount / 2, kDistance / 2>(values);
}

// sum_m head_m * relu(slot_m * scale_m + shift_m) of 8 channels of a run of pixels; 0 where there is no pixel.
template <Type kType>
MEMNET_DEVICE void mix_heads(float (&mix)[kReconRun][8], const Reconstruct &recon,
                             const std::int64_t (&offsets)[kReconRun], int chunk) {
#pragma unroll
  for (int p = 0; p < kReconRun; ++p)
#pragma unroll
    for (int c = 0; c < 8; ++c)
      mix[p][c] = 0.0f;
#pragma unroll 2
  for (int m = 0; m < recon.num_src; ++m) {
    const char *slot = static_cast<const char *>(recon.slots) + m * recon.slot_stride * 2;
    uint4 raw[kReconRun];
#pragma unroll
    for (int p = 0; p < kReconRun; ++p) {
      raw[p] = make_uint4(0, 0, 0, 0);
      if (offsets[p] >= 0)
        raw[p] = ptx::load_global(slot + offsets[p]);
    }
    const float4 *scales = reinterpret_cast<const float4 *>(recon.scale + m * kChannels + chunk * 8);
    const float4 *shifts = reinterpret_cast<const float4 *>(recon.shift + m * kChannels + chunk * 8);
    const float4 scale0 = scales[0], scale1 = scales[1], shift0 = shifts[0], shift1 = shifts[1];
    const float scale[8] = {scale0.x, scale0.y, scale0.z, scale0.w, scale1.x, scale1.y, scale1.z, scale1.w};
    const float shift[8] = {shift0.x, shift0.y, shift0.z, shift0.w, shift1.x, shift1.y, shift1.z, shift1.w};
    const float head = recon.head[m];
#pragma unroll
    for (int p = 0; p < kReconRun; ++p) {
      if (offsets[p] < 0)
        continue;
      const std::uint32_t words[4] = {raw[p].x, raw[p].y, raw[p].z, raw[p].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = ptx::unpack<kType>(words[i]);
        mix[p][2 * i] = fmaf(head, ptx::relu(fmaf(x.x, scale[2 * i], shift[2 * i])), mix[p][2 * i]);
        mix[p][2 * i + 1] = fmaf(head, ptx::relu(fmaf(x.y, scale[2 * i + 1], shift[2 * i + 1])), mix[p][2 * i + 1]);
      }
    }
  }
}

template <Type kType, int kKernel>
__global__ void __launch_bounds__(kReconThreads, 2) reconstruct_kernel(const __grid_constant__ Params params) {
  using Tile = Tile<kKernel>;
  const Reconstruct &recon = params.recon;
  const std::uint32_t products = ptx::dynamic_shared();
  // Groups of output channels are neighbours, so that the second finds the slots in L2.
  const int first_output = static_cast<int>(blockIdx.x % params.groups) * kReconOutputs;
  const unsigned index = blockIdx.x / params.groups;
  const int outputs = min(kReconOutputs, static_cast<int>(recon.cout) - first_output);
  const int left = static_cast<int>(index % params.tiles_x) * kReconCols;
  const int top = static_cast<int>(index / params.tiles_x % params.tiles_y) * kReconRows;
  const std::int64_t image = index / params.tiles_x / params.tiles_y;
  const int height = static_cast<int>(recon.h), width = static_cast<int>(recon.w);

  const int chunk = threadIdx.x & 7, run = threadIdx.x >> 3;
#pragma unroll 1
  for (int start = 0; start < Tile::kPixels; start += kPassPixels) {
    std::int64_t offsets[kReconRun]; // bytes from the start of a slot; -1: no pixel
#pragma unroll
    for (int p = 0; p < kReconRun; ++p) {
      const int pixel = start + p * (kReconThreads / 8) + run;
      const int y = top - Tile::kBorder + pixel / Tile::kCols, x = left - Tile::kBorder + pixel % Tile::kCols;
      const bool inside = pixel < Tile::kPixels && static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
                          static_cast<unsigned>(x) < static_cast<unsigned>(width);
      offsets[p] = inside ? ((image * height + y) * width + x) * 128 + chunk * 16 : -1;
    }
    float mix[kReconRun][8];
    mix_heads<kType>(mix, recon, offsets, chunk);

#pragma unroll 1
    for (int output = 0; output < outputs; ++output) {
      constexpr int kValues = kReconRun * Tile::kTaps, kPadded = (kValues + 7) / 8 * 8, kOwn = kPadded / 8;
      float values[kPadded]; // [tap][pixel of the run]
#pragma unroll
      for (int i = 0; i < kPadded; ++i)
        values[i] = 0.0f;
#pragma unroll
      for (int tap = 0; tap < Tile::kTaps; ++tap) {
        const float4 *weights = reinterpret_cast<const float4 *>(
            recon.weight + (tap * recon.cout + first_output + output) * kChannels + chunk * 8);
        const float4 low = weights[0], high = weights[1];
        const float weight[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int p = 0; p < kReconRun; ++p)
#pragma unroll
          for (int c = 0; c < 8; ++c)
            values[tap * kReconRun + p] = fmaf(mix[p][c], weight[c], values[tap * kReconRun + p]);
      }
      sum_lanes<kPadded>(values);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int value = chunk * kOwn + i, tap = value / kReconRun;
        const int pixel = start + value % kReconRun * (kReconThreads / 8) + run;
        if (value < kValues && pixel < Tile::kPixels)
          ptx::store_shared(products + output * Tile::kOutputBytes + (tap * Tile::kPixels + pixel) * 4, values[i]);
      }
    }
  }
  __syncthreads();

  float heads = 0.0f;
  for (int m = 0; m < recon.num_src; ++m)
    heads += recon.head[m];
  const float skip = recon.skip[0];
  for (int i = threadIdx.x; i < outputs * kReconRows * kReconCols; i += kReconThreads) {
    const int output = i / (kReconRows * kReconCols), row = i / kReconCols % kReconRows, col = i % kReconCols;
    const int y = top + row, x = left + col;
    if (y >= height || x >= width)
      continue;
    const std::uint32_t corner = products + output * Tile::kOutputBytes + (row * Tile::kCols + col) * 4;
    float sum = 0.0f;
#pragma unroll
    for (int tap = 0; tap < Tile::kTaps; ++tap)
      sum += ptx::load_shared_float(corner + (tap * Tile::kPixels + tap / kKernel * Tile::kCols + tap % kKernel) * 4);
    const std::int64_t channel = first_output + output, pixel = std::int64_t{y} * width + x;
    const std::int64_t plane = recon.h * recon.w;
    const std::int64_t image_plane = image * recon.image_channels + (recon.image_channels == 1 ? 0 : channel);
    float value = fmaf(skip, recon.image[image_plane * plane + pixel], fmaf(heads, recon.bias[channel], sum));
    if (recon.clamp)
      value = value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value; // a NaN fails both tests and stays
    recon.out[(image * recon.cout + channel) * plane + pixel] = value;
  }
}

template <Type kType, int kKernel> cudaError_t run(const Params &params, unsigned blocks, cudaStream_t stream) {
  const int outputs = params.groups > 1 ? kReconOutputs : static_cast<int>(params.recon.cout);
  const Grid grid{blocks, kReconThreads, static_cast<unsigned>(outputs * Tile<kKernel>::kOutputBytes)};
  return launch(reconstruct_kernel<kType, kKernel>, grid, stream, params);
}

template <Type kType> cudaError_t run(const Params &params, unsigned blocks, cudaStream_t stream) {
  return params.recon.kernel == 1 ? run<kType, 1>(params, blocks, stream) : run<kType, 3>(params, blocks, stream);
}

} // namespace

cudaError_t reconstruct(Type type, const Reconstruct &recon, const Device &, cudaStream_t stream) {
  const std::int64_t tiles_x = (recon.w + kReconCols - 1) / kReconCols;
  const std::int64_t tiles_y = (recon.h + kReconRows - 1) / kReconRows;
  const std::int64_t groups = (recon.cout + kReconOutputs - 1) / kReconOutputs;
  if (recon.h > INT_MAX - 64 || recon.w > INT_MAX - 64 || recon.cout > INT_MAX - 64 ||
      tiles_x * tiles_y > INT_MAX / recon.n / groups)
    return cudaErrorInvalidValue;
  const Params params{recon, static_cast<int>(tiles_x), static_cast<int>(tiles_y), static_cast<int>(groups)};
  const unsigned blocks = static_cast<unsigned>(tiles_x * tiles_y * recon.n * groups);
  return type == Type::kFp16 ? run<Type::kFp16>(params, blocks, stream) : run<Type::kBf16>(params, blocks, stream);
}

} // namespace memnet::cuda

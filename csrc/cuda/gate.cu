// Gate of a memory block: a 1x1 convolution over neighbouring slots, without their concatenation. Bound by HBM: each
// source is read once, nothing but the result is written.
//
// A warp copies the 32 pixels that it multiplies itself, so warps wait for nobody as long as the weights are resident.

#include "kernels.h"
#include "launch.h"
#include "mma_tile.h"
#include "ptx.cuh"
#include "tile_config.h"

namespace memnet::cuda {
namespace {

constexpr int kRowBlocks = kGateWarpPixels / 16; // of a warp
constexpr int kWarpBytes = kGateWarpPixels * 128;

// Where a block stands in its walk over tiles of pixels and, within one, over sources.
struct Step {
  std::int64_t tile;
  int source;
  int stage; // of the ring

  template <int kStages> __device__ void next(int num_src) {
    if (++source == num_src) {
      source = 0;
      tile += gridDim.x;
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
};

// Ring of pixels [stage][warp][32 pixels][128 bytes], then parameters [source or stage][weights, scale, shift].
template <int kStages, bool kResident> struct Memory {
  std::uint32_t base;

  __device__ std::uint32_t pixels(const Step &step) const {
    return base + step.stage * kGatePixelBytes + (threadIdx.x >> 5) * kWarpBytes;
  }
  __device__ std::uint32_t parameters(const Step &step) const {
    return base + kStages * kGatePixelBytes + (kResident ? step.source : step.stage) * kGateParameterBytes;
  }
  // Whether the parameters of this step come with its pixels; resident ones do in the first tile of a block.
  __device__ bool brings_parameters(const Step &step) const { return !kResident || step.tile == blockIdx.x; }
};

template <int kStages, bool kResident>
MEMNET_DEVICE void load(const Gate &gate, const Memory<kStages, kResident> &memory, const Step &step,
                        std::int64_t tiles) {
  if (step.tile < tiles) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunk = lane & 7;
    const std::int64_t start = step.tile * kGatePixels + warp * kGateWarpPixels;
    const char *source = static_cast<const char *>(gate.slots) + step.source * gate.slot_stride * 2 + chunk * 16;
    const std::uint32_t ring = memory.pixels(step);
#pragma unroll
    for (int i = 0; i < kGateWarpPixels / 4; ++i) {
      const int row = i * 4 + (lane >> 3);
      const bool inside = start + row < gate.pixels;
      ptx::copy_async_or_zero(ring + chunk_offset(row, chunk), source + (inside ? (start + row) * 128 : 0),
                              inside ? 16 : 0);
    }
    if (memory.brings_parameters(step)) {
      const std::uint32_t parameters = memory.parameters(step);
      const char *weights = static_cast<const char *>(gate.weight) + std::int64_t{step.source} * kGateWeightBytes;
#pragma unroll
      for (int at = threadIdx.x * 16; at < kGateWeightBytes; at += kGateThreads * 16)
        ptx::copy_async(parameters + at, weights + at);
      if (threadIdx.x < 32) { // 64 scales, then 64 shifts
        const float *table = threadIdx.x < 16 ? gate.scale : gate.shift;
        ptx::copy_async(parameters + kGateWeightBytes + threadIdx.x * 16,
                        table + std::int64_t{step.source} * kChannels + (threadIdx.x & 15) * 4);
      }
    }
  }
  ptx::copy_async_commit(); // one group for each step, an empty one behind the last
}

// relu(x * scale + shift) of a fragment of the left operand, rounded once. scale and shift: of the channels 2 (lane %
// 4) + {0, 1} of the first and of the second eight.
template <Type kType>
MEMNET_DEVICE void activate(std::uint32_t (&a)[4], const float2 (&scale)[2], const float2 (&shift)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) { // registers 0 and 1 are of the first eight channels
    const float2 x = ptx::unpack<kType>(a[i]);
    a[i] = ptx::pack_relu<kType>(fmaf(x.x, scale[i / 2].x, shift[i / 2].x), fmaf(x.y, scale[i / 2].y, shift[i / 2].y));
  }
}

template <Type kType>
MEMNET_DEVICE void accumulate(float (&sums)[kRowBlocks][8][4], std::uint32_t pixels, std::uint32_t parameters) {
  const int lane = threadIdx.x & 31;
  std::uint32_t left[kRowBlocks];
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m)
    left[m] = pixels + chunk_offset(16 * m + left_row(lane), left_chunk(lane));
  const std::uint32_t scales = parameters + kGateWeightBytes + 4 * sum_column(lane);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 scale[2] = {ptx::load_shared_float2(scales + k * 64), ptx::load_shared_float2(scales + k * 64 + 32)};
    const float2 shift[2] = {ptx::load_shared_float2(scales + k * 64 + 256),
                             ptx::load_shared_float2(scales + k * 64 + 288)};
    std::uint32_t a[kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      ptx::load_matrix(left[m] ^ (k << 5), a[m]);
      activate<kType>(a[m], scale, shift);
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint4 right = ptx::load_shared(parameters + weight_offset(k, pair, lane));
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        ptx::multiply<kType>(sums[m][2 * pair], a[m], right.x, right.y);
        ptx::multiply<kType>(sums[m][2 * pair + 1], a[m], right.z, right.w);
      }
    }
  }
}

// sums + bias to memory, whole pixels at a time, by way of the stage that the warp has just read.
template <Type kType>
MEMNET_DEVICE void store(const float (&sums)[kRowBlocks][8][4], const Gate &gate, std::uint32_t pixels,
                         std::int64_t tile) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  __syncwarp(); // all lanes have read it
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 bias = *reinterpret_cast<const float2 *>(gate.bias + 8 * n + sum_column(lane));
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        ptx::store_shared(pixels + chunk_offset(16 * m + sum_row(lane) + 8 * h, n) + 2 * sum_column(lane),
                          ptx::pack<kType>(sums[m][n][2 * h] + bias.x, sums[m][n][2 * h + 1] + bias.y));
  }
  __syncwarp();
  const int chunk = lane & 7;
  const std::int64_t start = tile * kGatePixels + warp * kGateWarpPixels;
#pragma unroll
  for (int i = 0; i < kGateWarpPixels / 4; ++i) {
    const int row = i * 4 + (lane >> 3);
    if (start + row < gate.pixels)
      ptx::store_global(static_cast<char *>(gate.dst) + (start + row) * 128 + chunk * 16,
                        ptx::load_shared(pixels + chunk_offset(row, chunk)));
  }
}

MEMNET_DEVICE void clear(float (&sums)[kRowBlocks][8][4]) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[m][n][i] = 0.0f;
}

template <Type kType, int kStages, bool kResident>
__global__ void __launch_bounds__(kGateThreads, 1) gate_kernel(const __grid_constant__ Gate gate) {
  const Memory<kStages, kResident> memory{ptx::dynamic_shared()};
  const std::int64_t tiles = (gate.pixels + kGatePixels - 1) / kGatePixels;

  Step here{blockIdx.x, 0, 0}, ahead = here;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    load(gate, memory, ahead, tiles);
    ahead.next<kStages>(gate.num_src);
  }
  float sums[kRowBlocks][8][4];
  clear(sums);
  while (here.tile < tiles) {
    ptx::copy_async_wait<kStages - 2>(); // what this thread has copied for this step is there
    // Resident parameters and the warp's own pixels concern no other warp.
    if (memory.brings_parameters(here))
      __syncthreads();
    else
      __syncwarp();
    load(gate, memory, ahead, tiles); // into the stage of the step before
    ahead.next<kStages>(gate.num_src);

    accumulate<kType>(sums, memory.pixels(here), memory.parameters(here));
    if (here.source == gate.num_src - 1) {
      store<kType>(sums, gate, memory.pixels(here), here.tile);
      clear(sums);
    }
    here.next<kStages>(gate.num_src);
  }
}

template <Type kType> cudaError_t run(const Gate &gate, const Device &device, cudaStream_t stream) {
  const std::int64_t tiles = (gate.pixels + kGatePixels - 1) / kGatePixels;
  const GatePlan plan = gate_plan(device.capability, gate.num_src);
  const Grid grid{static_cast<unsigned>(tiles < device.sm_count ? tiles : device.sm_count), kGateThreads,
                  static_cast<unsigned>(gate_shared_bytes(plan, gate.num_src))};
  if (plan.resident)
    return launch(gate_kernel<kType, 3, true>, grid, stream, gate);
  if (plan.stages == 3)
    return launch(gate_kernel<kType, 3, false>, grid, stream, gate);
  return launch(gate_kernel<kType, 2, false>, grid, stream, gate);
}

} // namespace

cudaError_t gate(Type type, const Gate &args, const Device &device, cudaStream_t stream) {
  return type == Type::kFp16 ? run<Type::kFp16>(args, device, stream) : run<Type::kBf16>(args, device, stream);
}

} // namespace memnet::cuda

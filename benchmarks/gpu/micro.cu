// What the card does with the instructions that the residual block is made of. Prints one JSON object.
//
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -O3 -o micro micro.cu && ./micro
//
//   probe      which bytes of shared memory a wgmma descriptor names, without swizzle at every pixel shift and with
//   128-byte
//              swizzle at row shifts (four hypotheses)
//   wgmma      rate of the 36 products of a convolution, weights in registers, one and two warpgroups, without swizzle
//   and
//              with it, with and without a third warpgroup that loads and stores shared memory meanwhile
//   mma_sync   rate of the warp-wide product of sm_80
//   rows       bytes per second of row copies into shared memory by bulk copy and by cp.async, from HBM, from L2, and
//   with
//              every row read nine times
//
// Data are random: zeros run faster than real numbers. Every product of the probe is exact.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_fp16.h>

#include "../../csrc/cuda/ptx.cuh"
#include "../../csrc/cuda/wgmma.cuh"

namespace {

using memnet::cuda::Type;
namespace ptx = memnet::cuda::ptx;

void check(cudaError_t error, int line) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "micro.cu:%d: %s\n", line, cudaGetErrorString(error));
    std::exit(1);
  }
}
#define CHECK(call) check(call, __LINE__)

constexpr int kSharedBytes = 227 * 1024;
constexpr int kSteps = 36; // 9 taps of 4 steps of 16 channels; e4m3 takes 2 steps of 32

// How shared memory is laid out for B: bits 62 and 63 of the descriptor.
enum Swizzle : int { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// `|`, not `+`: a carry must never leave its field. Addresses and offsets are multiples of 16 bytes.
__host__ __device__ constexpr std::uint64_t descriptor(std::uint32_t start, std::uint32_t leading, std::uint32_t stride,
                                                       std::uint32_t base_offset, int swizzle) {
  return static_cast<std::uint64_t>((start & 0x3FFFF) >> 4) | static_cast<std::uint64_t>(leading >> 4) << 16 |
         static_cast<std::uint64_t>(stride >> 4) << 32 | static_cast<std::uint64_t>(base_offset & 7) << 49 |
         static_cast<std::uint64_t>(swizzle) << 62;
}

__host__ __device__ inline std::uint32_t next_random(std::uint32_t &state) {
  return state = state * 1664525u + 1013904223u;
}

// Two random halves of magnitude 0.5 to 1 and either sign, or four e4m3 of magnitude below 2.
__host__ __device__ inline std::uint32_t random_word(std::uint32_t &state, bool e4m3 = false) {
  const std::uint32_t bits = next_random(state) ^ next_random(state) >> 16;
  return e4m3 ? bits & 0xBFBFBFBFu : (bits & 0x83FF83FFu) | 0x38003800u;
}

// ---- Probe
// -----------------------------------------------------------------------------------------------------------------

constexpr int kProbePixels = 96;
constexpr int kProbeBytes = 64 * 1024;

// found[pixel][channel]: the byte offset from the base of shared memory that B[channel][pixel] was read from. A is the
// identity, so D[channel][pixel] = B; each half of shared memory holds its own number, in two passes of exact values.
__global__ void __launch_bounds__(128, 1) probe(int *found, std::uint32_t start, std::uint32_t leading,
                                                std::uint32_t stride, std::uint32_t base_offset, int swizzle) {
  const std::uint32_t base = ptx::dynamic_shared();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  std::uint32_t a[4] = {};
  if (warp == 0) { // rows 0..15 of A are the identity, the others 0
    const int row = lane >> 2, k = (lane & 3) * 2;
    const std::uint32_t one = row == k ? 0x3C00u : row == k + 1 ? 0x3C000000u : 0u;
    a[0] = one; // rows 0..7, channels 0..7
    a[3] = one; // rows 8..15, channels 8..15
  }
  float sums[2][kProbePixels / 2];
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = threadIdx.x; i < kProbeBytes / 4; i += blockDim.x) {
      const auto number = [&](int half) { return __half_as_ushort(__int2half_rn(pass ? half >> 9 : half & 511)); };
      ptx::store_shared(base + 4 * i, static_cast<std::uint32_t>(number(2 * i) | number(2 * i + 1) << 16));
    }
    ptx::fence_async();
    __syncthreads();
    ptx::wgmma_fence();
    ptx::wgmma<Type::kFp16, kProbePixels>(sums[pass], a,
                                          descriptor(base + start, leading, stride, base_offset, swizzle), false);
    ptx::wgmma_commit();
    ptx::wgmma_wait();
    __syncthreads();
  }
  if (warp != 0)
    return;
#pragma unroll
  for (int i = 0; i < kProbePixels / 2; ++i) {
    const int row = (lane >> 2) + (i & 2 ? 8 : 0), pixel = 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
    found[pixel * 16 + row] = 2 * (static_cast<int>(sums[1][i]) * 512 + static_cast<int>(sums[0][i]));
  }
}

// Hypotheses for a swizzled layout: the bits that are exchanged are those of the absolute address; of the offset within
// the start; of the address less, or plus, base_offset.
int expected(int hypothesis, int start, int leading, int stride, int base_offset, int swizzle, int pixel, int channel) {
  const int bytes = channel * 2;
  if (swizzle == kNone)
    return start + pixel / 8 * stride + pixel % 8 * 16 + bytes / 16 * leading + bytes % 16;
  const int row = swizzle == k128 ? 128 : swizzle == k64 ? 64 : 32, mask = row / 16 - 1;
  const int offset = pixel / 8 * stride + pixel % 8 * row + bytes;
  if (hypothesis == 1)
    return start + (offset ^ (((offset >> 7) & mask) << 4));
  const int address = start + offset, shift = hypothesis == 2 ? -base_offset : hypothesis == 3 ? base_offset : 0;
  return address ^ ((((address >> 7) + shift) & mask) << 4);
}

class Probe {
public:
  Probe() : host_(kProbePixels * 16) {
    CHECK(cudaMalloc(&device_, host_.size() * sizeof(int)));
    CHECK(cudaFuncSetAttribute(probe, cudaFuncAttributeMaxDynamicSharedMemorySize, kProbeBytes));
  }
  ~Probe() { cudaFree(device_); }

  // Values that came from elsewhere than the hypothesis says, for each hypothesis (one without swizzle).
  std::vector<int> run(int start, int leading, int stride, int base_offset, int swizzle) {
    CHECK(cudaMemset(device_, 0xFF, host_.size() * sizeof(int)));
    probe<<<1, 128, kProbeBytes>>>(device_, start, leading, stride, base_offset, swizzle);
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(host_.data(), device_, host_.size() * sizeof(int), cudaMemcpyDeviceToHost));
    std::vector<int> wrong(swizzle == kNone ? 1 : 4, 0);
    for (std::size_t h = 0; h < wrong.size(); ++h)
      for (int p = 0; p < kProbePixels; ++p)
        for (int c = 0; c < 16; ++c)
          wrong[h] +=
              host_[p * 16 + c] != expected(static_cast<int>(h), start, leading, stride, base_offset, swizzle, p, c);
    return wrong;
  }

private:
  int *device_ = nullptr;
  std::vector<int> host_;
};

void print_probe() {
  Probe probe;
  std::printf("\"probe\": [");
  const char *separator = "";
  for (int shift = 0; shift < 10; ++shift) { // planes of an odd number of pixels, as the kernels have them
    const int wrong = probe.run(16 * shift, 101 * 16, 128, 0, kNone)[0];
    std::printf("%s\n  {\"swizzle\": 0, \"pixel_shift\": %d, \"wrong\": [%d]}", separator, shift, wrong);
    separator = ",";
  }
  for (int shift = 0; shift <= 8; ++shift)
    for (int base_offset = 0; base_offset <= (shift & 7); base_offset += std::max(1, shift & 7)) // 0 and the shift
      for (int step = 0; step < 128; step += 32) {
        const std::vector<int> wrong = probe.run(128 * shift + step, 16, 1024, base_offset, k128);
        std::printf(",\n  {\"swizzle\": 128, \"pixel_shift\": %d, \"byte_step\": %d, \"base_offset\": %d, "
                    "\"wrong\": [%d, %d, %d, %d]}",
                    shift, step, base_offset, wrong[0], wrong[1], wrong[2], wrong[3]);
      }
  std::printf("],\n");
}

// ---- Rates of wgmma
// --------------------------------------------------------------------------------------------------------

struct Group { // of 36 products
  const uint4 *weights;
  float *out;
  long long *clocks;
  int groups, workers, noise;
};

// Warpgroups 0 and 1 do the products of one row after another on four rows in shared memory; warpgroup 2 copies 16
// bytes per thread `noise` times for each group, and nothing with noise 0.
template <int kN, int kSwizzle, bool kE4m3> __global__ void __launch_bounds__(384, 1) rate(const Group g) {
  constexpr int kProducts = kE4m3 ? kSteps / 2 : kSteps, kPerTap = kProducts / 9;
  constexpr std::uint32_t kPitch = ((kN + 2) | 1) * 16, kPlanes = 8 * kPitch; // without swizzle
  constexpr std::uint32_t kRow = ((kN + 8) * 128 + 1023) / 1024 * 1024;       // with it
  const std::uint32_t base = ptx::dynamic_shared();
  std::uint32_t state = threadIdx.x * 7919u + blockIdx.x * 104729u + 1;
  for (std::uint32_t i = threadIdx.x * 4; i < kSharedBytes - 4; i += blockDim.x * 4)
    ptx::store_shared(base + i, random_word(state, kE4m3));
  ptx::fence_async();
  __syncthreads();
  const int group = ptx::uniform(threadIdx.x >> 7), thread = threadIdx.x & 127;
  if (group == 2) {
    ptx::give_registers<40>();
    const std::uint32_t own = base + 160 * 1024 + thread * 16;
    for (int i = 0; i < g.groups * g.noise; ++i) {
      const std::uint32_t at = own + (i & 7) * 2048;
      ptx::store_shared(at, ptx::load_shared(at));
    }
    return;
  }
  ptx::take_registers<224>();
  if (group >= g.workers)
    return;
  std::uint32_t a[kProducts][4];
#pragma unroll
  for (int k = 0; k < kProducts; ++k) {
    const uint4 v = ptx::load_global(g.weights + k * 128 + thread);
    a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
  }
  float sums[kN / 2] = {};
  const long long begin = clock64();
  for (int i = 0; i < g.groups; ++i) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      const int tap = k / kPerTap, channels = k % kPerTap;
      std::uint64_t b;
      if constexpr (kSwizzle == kNone) {
        const std::uint32_t row = base + ((i + tap / 3) & 3) * kPlanes;
        b = descriptor(row + tap % 3 * 16 + channels * 2 * kPitch, kPitch, 128, 0, kNone);
      } else {
        const std::uint32_t row = base + ((i + tap / 3) & 3) * kRow;
        b = descriptor(row + tap % 3 * 128 + channels * 32, 16, 1024, 0, k128);
      }
      if constexpr (kE4m3)
        ptx::wgmma_e4m3<kN>(sums, a[k], b, true);
      else
        ptx::wgmma<Type::kFp16, kN>(sums, a[k], b, true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait();
  }
  const long long end = clock64();
  float total = 0;
#pragma unroll
  for (float s : sums)
    total += s;
  g.out[blockIdx.x * 256 + group * 128 + thread] = total;
  if (thread == 0)
    g.clocks[blockIdx.x * 2 + group] = end - begin;
}

// Milliseconds between two events around the work.
template <class Work> float timed(const Work &work) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  CHECK(cudaEventRecord(begin));
  work();
  CHECK(cudaEventRecord(end));
  CHECK(cudaGetLastError());
  CHECK(cudaEventSynchronize(end));
  float ms = 0;
  CHECK(cudaEventElapsedTime(&ms, begin, end));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return ms;
}

class Rates {
public:
  explicit Rates(int blocks) : blocks_(blocks) {
    std::vector<std::uint32_t> weights(kSteps * 128 * 4);
    std::uint32_t state = 5;
    for (const bool e4m3 : {false, true}) {
      for (auto &w : weights)
        w = random_word(state, e4m3);
      CHECK(cudaMalloc(&weights_[e4m3], weights.size() * 4));
      CHECK(cudaMemcpy(weights_[e4m3], weights.data(), weights.size() * 4, cudaMemcpyHostToDevice));
    }
    CHECK(cudaMalloc(&out_, blocks * 256 * sizeof(float)));
    CHECK(cudaMalloc(&clocks_, blocks * 2 * sizeof(long long)));
    std::printf("\"wgmma\": [");
  }

  template <int kN, int kSwizzle, bool kE4m3 = false> void add(int workers, int noise) {
    const auto kernel = rate<kN, kSwizzle, kE4m3>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    Group g{weights_[kE4m3], out_, clocks_, 200, workers, noise};
    kernel<<<blocks_, 384, kSharedBytes>>>(g); // warm
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    g.groups = 4000;
    const float ms = timed([&] { kernel<<<blocks_, 384, kSharedBytes>>>(g); });
    long long clocks = 0;
    CHECK(cudaMemcpy(&clocks, clocks_, sizeof clocks, cudaMemcpyDeviceToHost));
    const double flop = 2.0 * 64 * kN * 576 * g.groups * workers * blocks_;
    const double per_group = static_cast<double>(clocks) / g.groups, ideal = (kE4m3 ? 18 : 36) * (kN / 2.0) * workers;
    std::printf(
        "%s\n  {\"type\": \"%s\", \"n\": %d, \"swizzle\": %d, \"warpgroups\": %d, \"noise\": %d, \"tflops\": %.1f, "
        "\"cycles_per_row\": %.0f, \"of_ideal\": %.3f, \"mhz\": %.0f}",
        separator_, kE4m3 ? "e4m3" : "fp16", kN, kSwizzle == kNone ? 0 : 128, workers, noise, flop / ms * 1e-9,
        per_group, ideal / per_group, clocks / ms * 1e-3);
    separator_ = ",";
  }

  ~Rates() {
    std::printf("],\n");
    cudaFree(weights_[0]);
    cudaFree(weights_[1]);
    cudaFree(out_);
    cudaFree(clocks_);
  }

private:
  int blocks_;
  uint4 *weights_[2] = {}; // fp16, e4m3
  float *out_ = nullptr;
  long long *clocks_ = nullptr;
  const char *separator_ = "";
};

// ---- Rate of mma.sync
// ------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(256, 2) warp_products(float *out, int groups) {
  std::uint32_t a[4][4], b[4][2], state = threadIdx.x * 7919u + 1;
  float d[4][4][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (auto &v : a[i])
      v = random_word(state);
    b[i][0] = random_word(state), b[i][1] = random_word(state);
  }
  for (int k = 0; k < groups; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        ptx::multiply<Type::kFp16>(d[i][j], a[i], b[j][0], b[j][1]);
  float total = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i)
    total += d[i / 16][i / 4 % 4][i % 4];
  out[blockIdx.x * 256 + threadIdx.x] = total;
}

void print_warp_products(int blocks) {
  float *out = nullptr;
  CHECK(cudaMalloc(&out, 2 * blocks * 256 * sizeof(float)));
  warp_products<<<2 * blocks, 256>>>(out, 200);
  CHECK(cudaDeviceSynchronize());
  const int groups = 20000;
  const float ms = timed([&] { warp_products<<<2 * blocks, 256>>>(out, groups); });
  const double flop = 2.0 * blocks * 8 * groups * 16 * (2.0 * 16 * 8 * 16);
  std::printf("\"mma_sync\": {\"tflops\": %.1f},\n", flop / ms * 1e-9);
  CHECK(cudaFree(out));
}

// ---- Rows into shared memory
// -----------------------------------------------------------------------------------------------

constexpr int kStages = 8;
constexpr int kMaxRow = 16384;

struct Rows {
  const unsigned char *from;
  std::int64_t rows; // of row_bytes, read over and over by all blocks together
  int row_bytes, copies, repeats;
};

MEMNET_DEVICE const unsigned char *row_address(const Rows &r, int copy) {
  const std::int64_t row = (static_cast<std::int64_t>(copy / r.repeats) * gridDim.x + blockIdx.x) % r.rows;
  return r.from + row * r.row_bytes;
}

// One thread, one bulk copy a row, eight rows in flight.
__global__ void __launch_bounds__(32, 1) bulk_rows(const Rows r) {
  __shared__ __align__(8) unsigned long long barriers[kStages];
  const std::uint32_t base = ptx::dynamic_shared();
  const auto barrier = [&](int i) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(barriers + i)); };
  if (threadIdx.x != 0)
    return;
  for (int i = 0; i < kStages; ++i)
    ptx::barrier_init(barrier(i), 1);
  ptx::fence_barrier_init();
  const auto begin = [&](int copy) {
    const int stage = copy % kStages;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier(stage)), "r"(r.row_bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     base + stage * kMaxRow),
                 "l"(row_address(r, copy)), "r"(r.row_bytes), "r"(barrier(stage))
                 : "memory");
  };
  for (int copy = 0; copy < min(kStages, r.copies); ++copy)
    begin(copy);
  for (int copy = 0; copy < r.copies; ++copy) {
    ptx::barrier_wait(barrier(copy % kStages), copy / kStages & 1);
    if (copy + kStages < r.copies)
      begin(copy + kStages);
  }
}

// Four warps, 16 bytes per thread and instruction, eight rows in flight.
__global__ void __launch_bounds__(128, 1) async_rows(const Rows r) {
  const std::uint32_t base = ptx::dynamic_shared();
  const auto begin = [&](int copy) {
    if (copy < r.copies)
      for (int at = threadIdx.x * 16; at < r.row_bytes; at += blockDim.x * 16)
        ptx::copy_async(base + copy % kStages * kMaxRow + at, row_address(r, copy) + at);
    ptx::copy_async_commit();
  };
  for (int copy = 0; copy < kStages - 1; ++copy)
    begin(copy);
  for (int copy = 0; copy < r.copies; ++copy) {
    ptx::copy_async_wait<kStages - 2>();
    __syncthreads();
    begin(copy + kStages - 1);
  }
}

void print_rows(int blocks) {
  constexpr std::int64_t kBytes = std::int64_t{2} << 30;
  unsigned char *memory = nullptr;
  CHECK(cudaMalloc(&memory, kBytes));
  CHECK(cudaMemset(memory, 0x5A, kBytes));
  std::printf("\"rows\": [");
  const char *separator = "";
  struct Kind {
    const char *name;
    void (*kernel)(Rows);
    int threads;
  };
  struct Place {
    const char *name;
    std::int64_t bytes;
    int repeats;
  };
  for (const Kind &kind : {Kind{"bulk", bulk_rows, 32}, Kind{"cp.async", async_rows, 128}}) {
    CHECK(cudaFuncSetAttribute(kind.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStages * kMaxRow));
    for (int row_bytes : {4096, 12800, 16384})
      for (const Place &place : {Place{"HBM", kBytes, 1}, Place{"L2", 20 << 20, 1}, Place{"nine times", kBytes, 9}}) {
        Rows r{memory, place.bytes / row_bytes, row_bytes, 200, place.repeats};
        kind.kernel<<<blocks, kind.threads, kStages * kMaxRow>>>(r);
        CHECK(cudaGetLastError());
        CHECK(cudaDeviceSynchronize());
        r.copies = 4000;
        const float ms = timed([&] { kind.kernel<<<blocks, kind.threads, kStages * kMaxRow>>>(r); });
        std::printf("%s\n  {\"by\": \"%s\", \"row_bytes\": %d, \"from\": \"%s\", \"tbps\": %.2f}", separator, kind.name,
                    row_bytes, place.name, static_cast<double>(blocks) * r.copies * row_bytes / ms * 1e-9);
        separator = ",";
      }
  }
  std::printf("]\n");
  CHECK(cudaFree(memory));
}

} // namespace

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9) {
    std::fprintf(stderr, "%s is no sm_90 GPU\n", device.name);
    return 2;
  }
  const int blocks = device.multiProcessorCount;
  std::printf("{\"device\": \"%s\", \"sm_count\": %d,\n", device.name, blocks);
  print_probe();
  std::fflush(stdout);
  {
    Rates rates(blocks);
    for (int workers : {1, 2}) {
      rates.add<64, kNone>(workers, 0);
      rates.add<64, k128>(workers, 0);
      rates.add<96, kNone>(workers, 0);
      rates.add<96, k128>(workers, 0);
      rates.add<104, kNone>(workers, 0);
      rates.add<104, k128>(workers, 0);
      rates.add<96, kNone, true>(workers, 0);
      rates.add<104, kNone, true>(workers, 0);
    }
    for (int noise : {4, 8, 16, 24, 32})
      rates.add<104, kNone>(2, noise), rates.add<104, kNone, true>(2, noise);
  }
  print_warp_products(blocks);
  std::fflush(stdout);
  print_rows(blocks);
  std::printf("}\n");
  return 0;
}

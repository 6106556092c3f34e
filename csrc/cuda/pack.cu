// Folds batch normalisation and lays the weights out, on the caller's stream: what a kernel reads is what the
// parameters are. Every step is rounded by itself, in the order of `Recipe` in memnet_fast/plan.py, so that the result
// is that of the lowering on the CPU bit for bit.
#include "pack.h"

#include "launch.h"
#include "ptx.cuh"

namespace memnet::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(sizeof(PackParams) <= 4096 && sizeof(FoldParams) <= 4096 && sizeof(QuantiseParams) <= 4096,
              "more than the arguments of a kernel may have");
constexpr double kLargestE4m3 = 448;
constexpr int kTaps = 9;

// Never contracted into a fused multiply-add.
__device__ double times(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

__device__ double plus(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

__device__ double load(const void *address, std::uint8_t type, std::int64_t i) {
  switch (type) {
  case kSourceFp64:
    return static_cast<const double *>(address)[i];
  case kSourceFp32:
    return static_cast<const float *>(address)[i];
  case kSourceFp16:
    return ptx::unpack<Type::kFp16>(static_cast<const std::uint16_t *>(address)[i]).x;
  case kSourceByte:
    return static_cast<const unsigned char *>(address)[i];
  default:
    return ptx::unpack<Type::kBf16>(static_cast<const std::uint16_t *>(address)[i]).x;
  }
}

// NaN stays.
__device__ double larger(double a, double b) { return b > a || b != b ? b : a; }

__device__ double largest_of_warp(double value) {
  for (int mask = 16; mask > 0; mask /= 2)
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, mask));
  return value;
}

__device__ double step_of(double largest) { return largest > 0 ? largest / kLargestE4m3 : 1; }

// The nearest e4m3 number, ties to even, what is larger than 448 as 448; its bits and its value.
struct E4m3 {
  std::uint32_t bits;
  float value;
};

__device__ E4m3 to_e4m3(float x) {
  if (x != x)
    return {0x7f, x};
  const float magnitude = fminf(fabsf(x), static_cast<float>(kLargestE4m3));
  std::uint32_t bits;
  float rounded;
  if (magnitude < 0.015625f) { // below the smallest normal number: multiples of 2^-9
    rounded = rintf(magnitude * 512);
    bits = static_cast<std::uint32_t>(rounded);
    rounded /= 512;
  } else {
    bits = __float_as_uint(magnitude);
    bits = (bits + 0x7ffff + (bits >> 20 & 1)) & ~0xfffffu;
    rounded = __uint_as_float(bits);
    bits = (bits >> 20) - (120 << 3); // exponent bias 7 in place of 127
  }
  const bool negative = __float_as_uint(x) >> 31; // also of -0
  return negative ? E4m3{bits | 0x80, -rounded} : E4m3{bits, rounded};
}

__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ FoldParams params) {
  const FoldJob job = params.jobs[blockIdx.x];
  const int first = static_cast<int>(blockIdx.x) * kSourcesPerFold;
  const auto source = [&](int which, int i) {
    return load(params.sources.address[first + which], params.sources.type[first + which], i);
  };
  double *out = params.fold + job.out;
  if (job.kind == kFoldTotal) {
    if (threadIdx.x != 0)
      return;
    double sum = source(0, 0);
    for (int i = 1; i < job.count; ++i)
      sum = plus(sum, source(0, i));
    out[0] = sum;
    return;
  }
  if (job.kind == kFoldStep || job.kind == kFoldNormStep) {
    if (threadIdx.x >= 32)
      return;
    double largest = -INFINITY;
    for (int i = static_cast<int>(threadIdx.x); i < job.count; i += 32)
      largest =
          larger(largest, job.kind == kFoldStep ? source(0, i) : plus(source(1, i), times(8, fabs(source(0, i)))));
    largest = largest_of_warp(largest);
    if (threadIdx.x == 0)
      out[0] = step_of(largest);
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < job.count; i += kThreads) {
    if (job.kind == kFoldConstant) {
      out[i] = job.value;
      continue;
    }
    const double weight = source(0, i), bias = source(1, i), mean = source(2, i), variance = source(3, i);
    const double scale = weight / sqrt(plus(variance, job.value));
    out[i] = scale;
    out[job.count + i] = plus(bias, -times(mean, scale));
  }
}

// One warp for each output channel, one lane for each of its kernels.
__global__ void __launch_bounds__(32) quantise_kernel(const __grid_constant__ QuantiseParams params) {
  const int index = static_cast<int>(blockIdx.x) / params.rows, row = static_cast<int>(blockIdx.x) % params.rows;
  const QuantiseJob job = params.jobs[index];
  const void *address = params.sources.address[index];
  const std::uint8_t type = params.sources.type[index];
  const auto weight = [&](int i) {
    const double value = load(address, type, static_cast<std::int64_t>(row) * job.inner + i);
    return job.scale < 0 ? value : times(value, params.fold[job.scale + row]);
  };
  double largest = 0;
  for (int i = static_cast<int>(threadIdx.x); i < job.inner; i += 32)
    largest = larger(largest, fabs(weight(i)));
  const double step = step_of(largest_of_warp(largest));
  if (threadIdx.x == 0)
    params.fold[job.step + row] = step;
  unsigned char *out = params.packed + job.out + static_cast<std::int64_t>(row) * job.inner;
  for (int first = kTaps * static_cast<int>(threadIdx.x); first < job.inner; first += kTaps * 32) {
    float tap[kTaps];
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
      tap[k] = static_cast<float>(weight(first + k) / step);
    // From the largest to the smallest, of equals the first, NaN before all; each takes over the error of the one
    // before.
    int rank[kTaps];
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      rank[k] = 0;
#pragma unroll
      for (int other = 0; other < kTaps; ++other) {
        const float a = fabsf(tap[other]), b = fabsf(tap[k]);
        const bool equal = a == b || (a != a && b != b);
        rank[k] += equal ? other < k : a > b || a != a;
      }
    }
    float carry = 0;
#pragma unroll
    for (int turn = 0; turn < kTaps; ++turn) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k)
        if (rank[k] == turn) {
          const float wanted = tap[k] + carry;
          const E4m3 rounded = to_e4m3(wanted);
          carry = wanted - rounded.value;
          out[first + k] = static_cast<unsigned char>(rounded.bits);
        }
    }
  }
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackParams params) {
  const Chunk chunk = params.chunks[blockIdx.x];
  const PackJob job = params.jobs[chunk.job];
  const int source = chunk.job - params.first_job;
  const bool folded = params.sources.address[source] == nullptr;
  const void *address = folded ? params.fold : params.sources.address[source];
  const std::uint8_t type = folded ? static_cast<std::uint8_t>(kSourceFp64) : params.sources.type[source];
  unsigned char *out = params.packed + job.out;
  const int end = min(job.count, chunk.start + kChunk);
  for (int i = chunk.start + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const std::int32_t j = params.maps[job.map + i];
    double value = 0;
    if (j >= 0) {
      value = load(address, type, job.base + j);
      if (job.scale >= 0)
        value = times(value, params.fold[job.scale + j / job.inner]);
      if (job.shift >= 0)
        value = plus(value, params.fold[job.shift + j / job.inner]);
      if (job.multiply >= 0)
        value = times(value, params.fold[job.multiply]);
      if (job.divide >= 0)
        value = value / params.fold[job.divide];
    }
    if (job.type == kPackedByte) {
      out[i] = static_cast<unsigned char>(value);
      continue;
    }
    // Through float32 to 16 bit, as backends/torch.py rounds.
    const float single = static_cast<float>(value);
    if (job.type == kPackedFp32)
      reinterpret_cast<float *>(out)[i] = single;
    else
      reinterpret_cast<std::uint16_t *>(out)[i] = static_cast<std::uint16_t>(
          job.type == kPackedFp16 ? ptx::pack<Type::kFp16>(single, 0) : ptx::pack<Type::kBf16>(single, 0));
  }
}

} // namespace

cudaError_t fold(const FoldParams &params, int jobs, cudaStream_t stream) {
  return launch(fold_kernel, Grid{static_cast<unsigned>(jobs), kThreads, 0}, stream, params);
}

cudaError_t quantise(const QuantiseParams &params, int jobs, cudaStream_t stream) {
  return launch(quantise_kernel, Grid{static_cast<unsigned>(jobs * params.rows), 32, 0}, stream, params);
}

cudaError_t pack(const PackParams &params, int chunks, cudaStream_t stream) {
  return launch(pack_kernel, Grid{static_cast<unsigned>(chunks), kThreads, 0}, stream, params);
}

} // namespace memnet::cuda

// What the kernels use of CUDA's own headers, for a C++ compiler: see simt.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  std::uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(std::uint32_t x, std::uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
using std::max;
using std::min;

using cudaError_t = int;
using cudaStream_t = void *;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;

#define threadIdx (::simt::this_thread().thread_index)
#define blockIdx (::simt::this_thread().block_index)
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

inline void __syncthreads() { ::simt::sync_block(); }
inline void __syncwarp(std::uint32_t = 0xffffffffu) { ::simt::sync_warp(); }

template <class T> T __shfl_sync(std::uint32_t, T value, int lane) { return ::simt::shuffle(value, lane & 31); }
template <class T> T __shfl_xor_sync(std::uint32_t, T value, int mask) {
  return ::simt::shuffle(value, (::simt::this_thread().lane ^ mask) & 31);
}
template <class T> T __shfl_down_sync(std::uint32_t, T value, int delta) {
  const int lane = ::simt::this_thread().lane;
  return ::simt::shuffle(value, lane + delta < 32 ? lane + delta : lane);
}

template <class T> T __ldg(const T *address) { return *address; }

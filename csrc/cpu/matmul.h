// The one product that every operation is made of: a few rows of activations times a [k][cp] weight panel.
#pragma once

#include "simd.h"

namespace memnet::MEMNET_ISA {

// Register block. AVX-512: 6 x 4 accumulators, 4 weights and a broadcast in 32 registers. 16 registers: 6 x 2.
// kGroup vectors always divide 16 channels (AVX-512 handles a remainder of 1 to 3 vectors), and cp is a multiple of 16.
constexpr int kRows = 6;
constexpr int kGroup = kLanes == 16 ? 4 : 2;

template <bool kAccumulate, int kR, int kV>
MEMNET_INLINE void multiply_block(const float *a, i64 lda, const float *weight, i64 cp, i64 k, float *c, i64 ldc) {
  vec sum[kR][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v)
      sum[r][v] = zero();
  for (i64 i = 0; i < k; ++i) {
    vec column[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v)
      column[v] = load(weight + i * cp + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const vec x = broadcast(a[r * lda + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v)
        sum[r][v] = fma(x, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v)
      store(c + r * ldc + v * kLanes, kAccumulate ? load(c + r * ldc + v * kLanes) + sum[r][v] : sum[r][v]);
}

// Memory that the caller touches next: with every register block, `step` floats are prefetched from where it will read
// and `step` floats from where it will write. Either may be null.
struct Ahead {
  const float *read = nullptr;
  const float *write = nullptr;
  i64 step = 0;
};

MEMNET_INLINE void prefetch(Ahead &ahead) {
  if (ahead.read != nullptr) {
    for (i64 i = 0; i < ahead.step; i += 16)
      __builtin_prefetch(ahead.read + i, 0);
    ahead.read += ahead.step;
  }
  if (ahead.write != nullptr) {
    for (i64 i = 0; i < ahead.step; i += 16)
      __builtin_prefetch(ahead.write + i, 1);
    ahead.write += ahead.step;
  }
}

template <bool kAccumulate, int kV>
void multiply_rows(const float *a, i64 lda, const float *weight, i64 cp, i64 k, float *c, i64 ldc, i64 rows,
                   Ahead ahead) {
  for (; rows >= kRows; rows -= kRows, a += kRows * lda, c += kRows * ldc) {
    prefetch(ahead);
    multiply_block<kAccumulate, kRows, kV>(a, lda, weight, cp, k, c, ldc);
  }
  if (rows > 0)
    prefetch(ahead);
  switch (rows) {
  case 5:
    return multiply_block<kAccumulate, 5, kV>(a, lda, weight, cp, k, c, ldc);
  case 4:
    return multiply_block<kAccumulate, 4, kV>(a, lda, weight, cp, k, c, ldc);
  case 3:
    return multiply_block<kAccumulate, 3, kV>(a, lda, weight, cp, k, c, ldc);
  case 2:
    return multiply_block<kAccumulate, 2, kV>(a, lda, weight, cp, k, c, ldc);
  case 1:
    return multiply_block<kAccumulate, 1, kV>(a, lda, weight, cp, k, c, ldc);
  default:
    return;
  }
}

// c [rows][cp] = or += a [rows][k] @ weight [k][cp]. Each element is summed over k in ascending order with one
// accumulator, whatever the number of rows; what c held is added last. So a long sum (a gate: up to 1,280 terms) is
// made of partial sums over one tap or source, and loses half as much as one running sum. c may equal a when one group
// covers all channels (see covers_in_one_group).
template <bool kAccumulate>
MEMNET_INLINE void matmul(const float *a, i64 lda, const float *weight, i64 cp, i64 k, float *c, i64 ldc, i64 rows,
                          Ahead ahead = {}) {
  i64 left = cp / kLanes;
  for (; left >= kGroup; left -= kGroup, weight += kGroup * kLanes, c += kGroup * kLanes) {
    multiply_rows<kAccumulate, kGroup>(a, lda, weight, cp, k, c, ldc, rows, ahead);
    ahead = {}; // once is enough
  }
  if constexpr (kGroup == 4) {
    if (left == 3)
      multiply_rows<kAccumulate, 3>(a, lda, weight, cp, k, c, ldc, rows, ahead);
    else if (left == 2)
      multiply_rows<kAccumulate, 2>(a, lda, weight, cp, k, c, ldc, rows, ahead);
    else if (left == 1)
      multiply_rows<kAccumulate, 1>(a, lda, weight, cp, k, c, ldc, rows, ahead);
  }
}

MEMNET_INLINE bool covers_in_one_group(i64 cp) { return cp <= kGroup * kLanes; }

} // namespace memnet::MEMNET_ISA

// bf16 values in memory, and the product of bf16 pairs that every bf16 operation is made of. AVX512-BF16 only.
//
// vdpbf16ps adds two products of bf16 values to an fp32 sum; it rounds to nearest even and takes subnormal numbers for
// zero, whatever the process has set. Stores round to nearest even, too.
#pragma once

#include "simd.h"

namespace memnet::MEMNET_ISA {

using bf16 = std::uint16_t;

MEMNET_INLINE vec load(const bf16 *p) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
MEMNET_INLINE void store(bf16 *p, vec x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }

MEMNET_INLINE const bf16 *bf16s(std::uint64_t address) { return reinterpret_cast<const bf16 *>(address); }

// Where the pixels that one product sums over lie behind its row: one for a 1x1 product, nine for a 3x3 convolution.
struct Taps {
  i64 count;
  i64 offset[9];
};

constexpr Taps kOneTap = {1, {0}};

constexpr int kPairRows = 6;    // register block: 6 x 4 sums, 4 weights and a broadcast in 32 registers
constexpr int kPairVectors = 4; // cp is a multiple of 16, so 1 to 3 vectors may remain

typedef std::int32_t loose_pair __attribute__((aligned(4), may_alias));

template <bool kAccumulate, int kR, int kV>
MEMNET_INLINE void dot_block(const bf16 *a, i64 lda, const Taps &taps, const bf16 *weight, i64 cp, i64 k, float *c,
                             i64 ldc) {
  vec sum[kR][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v)
      sum[r][v] = zero();
  for (i64 tap = 0; tap < taps.count; ++tap, weight += k * cp) {
    const bf16 *row = a + taps.offset[tap];
    for (i64 i = 0; i < k; i += 2) {
      __m512bh column[kV];
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v)
        column[v] = (__m512bh)_mm512_loadu_si512(weight + i * cp + v * 2 * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const loose_pair *)(row + r * lda + i));
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v)
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, column[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v)
      store(c + r * ldc + v * kLanes, kAccumulate ? load(c + r * ldc + v * kLanes) + sum[r][v] : sum[r][v]);
}

template <bool kAccumulate, int kV>
void dot_rows(const bf16 *a, i64 lda, const Taps &taps, const bf16 *weight, i64 cp, i64 k, float *c, i64 ldc,
              i64 rows) {
  for (; rows >= kPairRows; rows -= kPairRows, a += kPairRows * lda, c += kPairRows * ldc)
    dot_block<kAccumulate, kPairRows, kV>(a, lda, taps, weight, cp, k, c, ldc);
  switch (rows) {
  case 5:
    return dot_block<kAccumulate, 5, kV>(a, lda, taps, weight, cp, k, c, ldc);
  case 4:
    return dot_block<kAccumulate, 4, kV>(a, lda, taps, weight, cp, k, c, ldc);
  case 3:
    return dot_block<kAccumulate, 3, kV>(a, lda, taps, weight, cp, k, c, ldc);
  case 2:
    return dot_block<kAccumulate, 2, kV>(a, lda, taps, weight, cp, k, c, ldc);
  case 1:
    return dot_block<kAccumulate, 1, kV>(a, lda, taps, weight, cp, k, c, ldc);
  default:
    return;
  }
}

// c [rows][cp] = or += sum over taps of a [rows][k] @ weight [k][cp], k even; weight [taps][k / 2][cp][2]. Each element
// is one sum, over taps and k in ascending order, whatever the number of rows; what c held is added last.
template <bool kAccumulate>
MEMNET_INLINE void dot_product(const bf16 *a, i64 lda, const Taps &taps, const bf16 *weight, i64 cp, i64 k, float *c,
                               i64 ldc, i64 rows) {
  constexpr i64 kWide = kPairVectors * kLanes;
  i64 left = cp;
  for (; left >= kWide; left -= kWide, weight += 2 * kWide, c += kWide)
    dot_rows<kAccumulate, kPairVectors>(a, lda, taps, weight, cp, k, c, ldc, rows);
  if (left == 3 * kLanes)
    dot_rows<kAccumulate, 3>(a, lda, taps, weight, cp, k, c, ldc, rows);
  else if (left == 2 * kLanes)
    dot_rows<kAccumulate, 2>(a, lda, taps, weight, cp, k, c, ldc, rows);
  else if (left == kLanes)
    dot_rows<kAccumulate, 1>(a, lda, taps, weight, cp, k, c, ldc, rows);
}

} // namespace memnet::MEMNET_ISA

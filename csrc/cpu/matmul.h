// The one product that every operation is made of: a few rows of activations times a [k][cp] weight panel.
#pragma once

#include "simd.h"

namespace memnet::MEMNET_ISA {

// Register block. AVX-512: 6 x 4 accumulators, 4 weights and a broadcast in 32 registers. 16 registers: 6 x 2.
// kGroup vectors always divide 16 channels (AVX-512 handles a remainder of 1 to 3 vectors), and cp is a multiple of 16.
constexpr int kRows = 6;
constexpr int kGroup = kLanes == 16 ? 4 : 2;

// What a product does besides: step() is called once for each row, spread over the multiply-adds, which hide it.
struct Nothing {
  MEMNET_INLINE void step() {}
};

// Memory that the caller touches next: with every row, `floats` of where it will read and of where it will write travel
// to the cache. Either may be null.
struct Ahead {
  const float *read = nullptr;
  const float *write = nullptr;
  i64 floats = 0;

  MEMNET_INLINE void step() {
    if (read != nullptr) {
      for (i64 i = 0; i < floats; i += 16)
        __builtin_prefetch(read + i, 0);
      read += floats;
    }
    if (write != nullptr) {
      for (i64 i = 0; i < floats; i += 16)
        __builtin_prefetch(write + i, 1);
      write += floats;
    }
  }
};

// How a product reads its left side: row r, column i of a lies at a[r * lda + i], or of its transpose at a[i * lda +
// r].
enum class Left { kPlain, kTransposed };

// c = base + a @ weight, or without base. base may be c, and ldb 0 for one row that serves all.
template <bool kBase, Left kLeft, int kR, int kV, class Side>
MEMNET_INLINE void multiply_block(const float *a, i64 lda, const float *weight, i64 cp, i64 k, const float *base,
                                  i64 ldb, float *c, i64 ldc, Side &side) {
  vec sum[kR][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v)
      sum[r][v] = zero();
  i64 i = 0;
  for (int row = 1; row <= kR; ++row) {
    side.step();
    for (const i64 end = k * row / kR; i < end; ++i) {
      vec column[kV];
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v)
        column[v] = load(weight + i * cp + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        const vec x = broadcast(kLeft == Left::kPlain ? a[r * lda + i] : a[i * lda + r]);
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v)
          sum[r][v] = fma(x, column[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v)
      store(c + r * ldc + v * kLanes, kBase ? load(base + r * ldb + v * kLanes) + sum[r][v] : sum[r][v]);
}

template <bool kBase, Left kLeft, int kV, class Side>
void multiply_rows(const float *a, i64 lda, const float *weight, i64 cp, i64 k, const float *base, i64 ldb, float *c,
                   i64 ldc, i64 rows, Side &side) {
  for (; rows >= kRows;
       rows -= kRows, a += kRows * (kLeft == Left::kPlain ? lda : 1), base += kRows * ldb, c += kRows * ldc)
    multiply_block<kBase, kLeft, kRows, kV>(a, lda, weight, cp, k, base, ldb, c, ldc, side);
  switch (rows) {
  case 5:
    return multiply_block<kBase, kLeft, 5, kV>(a, lda, weight, cp, k, base, ldb, c, ldc, side);
  case 4:
    return multiply_block<kBase, kLeft, 4, kV>(a, lda, weight, cp, k, base, ldb, c, ldc, side);
  case 3:
    return multiply_block<kBase, kLeft, 3, kV>(a, lda, weight, cp, k, base, ldb, c, ldc, side);
  case 2:
    return multiply_block<kBase, kLeft, 2, kV>(a, lda, weight, cp, k, base, ldb, c, ldc, side);
  case 1:
    return multiply_block<kBase, kLeft, 1, kV>(a, lda, weight, cp, k, base, ldb, c, ldc, side);
  default:
    return;
  }
}

// c [rows][cp] = a [rows][k] @ weight [k][cp], plus base [rows][cp] with kBase. Each element is summed over k in
// ascending order with one accumulator, whatever the number of rows; the base is added last. So a long sum (a gate: up
// to 1,280 terms) is made of partial sums over one tap or source, and loses half as much as one running sum. c may
// equal a when one group covers all channels (see covers_in_one_group). kTransposed: a is [k][rows].
template <bool kBase, Left kLeft = Left::kPlain, class Side>
MEMNET_INLINE void matmul(const float *a, i64 lda, const float *weight, i64 cp, i64 k, const float *base, i64 ldb,
                          float *c, i64 ldc, i64 rows, Side side) {
  constexpr i64 width = kGroup * kLanes;
  Nothing nothing;
  i64 left = cp / kLanes;
  if (left >= kGroup) {
    multiply_rows<kBase, kLeft, kGroup>(a, lda, weight, cp, k, base, ldb, c, ldc, rows, side);
    for (left -= kGroup, weight += width, base += kBase ? width : 0, c += width; left >= kGroup;
         left -= kGroup, weight += width, base += kBase ? width : 0, c += width)
      multiply_rows<kBase, kLeft, kGroup>(a, lda, weight, cp, k, base, ldb, c, ldc, rows, nothing);
    if constexpr (kGroup == 4) {
      if (left == 3)
        multiply_rows<kBase, kLeft, 3>(a, lda, weight, cp, k, base, ldb, c, ldc, rows, nothing);
      else if (left == 2)
        multiply_rows<kBase, kLeft, 2>(a, lda, weight, cp, k, base, ldb, c, ldc, rows, nothing);
      else if (left == 1)
        multiply_rows<kBase, kLeft, 1>(a, lda, weight, cp, k, base, ldb, c, ldc, rows, nothing);
    }
  } else if constexpr (kGroup == 4) {
    if (left == 3)
      multiply_rows<kBase, kLeft, 3>(a, lda, weight, cp, k, base, ldb, c, ldc, rows, side);
    else if (left == 2)
      multiply_rows<kBase, kLeft, 2>(a, lda, weight, cp, k, base, ldb, c, ldc, rows, side);
    else if (left == 1)
      multiply_rows<kBase, kLeft, 1>(a, lda, weight, cp, k, base, ldb, c, ldc, rows, side);
  }
}

// c = or += a @ weight.
template <bool kAccumulate>
MEMNET_INLINE void matmul(const float *a, i64 lda, const float *weight, i64 cp, i64 k, float *c, i64 ldc, i64 rows) {
  matmul<kAccumulate>(a, lda, weight, cp, k, c, ldc, c, ldc, rows, Nothing{});
}

MEMNET_INLINE bool covers_in_one_group(i64 cp) { return cp <= kGroup * kLanes; }

} // namespace memnet::MEMNET_ISA

// A vector of kLanes floats for the instruction set that this translation unit is compiled for.
//
// Everything lives in namespace memnet::MEMNET_ISA: two translation units compiled with different -m flags must never
// share a symbol, or the linker might keep the AVX-512 copy for a machine that has none. For the same reason the
// kernels instantiate nothing from namespace std. The build sets -ffp-contract=off; fusing happens in fma() alone, so
// an element sees the same roundings whichever loop computes it.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MEMNET_INLINE inline __attribute__((always_inline))

namespace memnet::MEMNET_ISA {

using i64 = std::int64_t;

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using vec = __m512;
MEMNET_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
MEMNET_INLINE vec fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }
MEMNET_INLINE vec broadcast(float x) { return _mm512_set1_ps(x); }
// maxps returns its second operand when either is NaN, hence the order.
MEMNET_INLINE vec relu(vec x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }
// value where x is above zero or NaN, elsewhere zero: the gradient of relu(x).
MEMNET_INLINE vec where_positive(vec x, vec value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), value);
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kLanes = 8;
using vec = __m256;
MEMNET_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
MEMNET_INLINE vec fnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
MEMNET_INLINE vec broadcast(float x) { return _mm256_set1_ps(x); }
MEMNET_INLINE vec relu(vec x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }
MEMNET_INLINE vec where_positive(vec x, vec value) {
  return _mm256_and_ps(value, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ));
}

#elif defined(__SSE2__)

constexpr int kLanes = 4;
using vec = __m128;
MEMNET_INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }
MEMNET_INLINE vec fnma(vec a, vec b, vec c) { return c - a * b; }
MEMNET_INLINE vec broadcast(float x) { return _mm_set1_ps(x); }
MEMNET_INLINE vec relu(vec x) { return _mm_max_ps(_mm_setzero_ps(), x); }
MEMNET_INLINE vec where_positive(vec x, vec value) { return _mm_and_ps(value, _mm_cmpnle_ps(x, _mm_setzero_ps())); }

#elif defined(__ARM_NEON) && defined(__aarch64__)

constexpr int kLanes = 4;
using vec = float32x4_t;
MEMNET_INLINE vec fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
MEMNET_INLINE vec fnma(vec a, vec b, vec c) { return vfmsq_f32(c, a, b); }
MEMNET_INLINE vec broadcast(float x) { return vdupq_n_f32(x); }
MEMNET_INLINE vec relu(vec x) { return vmaxq_f32(x, vdupq_n_f32(0.0f)); } // FMAX propagates NaN
MEMNET_INLINE vec where_positive(vec x, vec value) {
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), vcleq_f32(x, vdupq_n_f32(0.0f))));
}

#else

constexpr int kLanes = 4;
typedef float vec __attribute__((vector_size(16)));
MEMNET_INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }
MEMNET_INLINE vec fnma(vec a, vec b, vec c) { return c - a * b; }
MEMNET_INLINE vec broadcast(float x) { return vec{x, x, x, x}; }
MEMNET_INLINE vec relu(vec x) {
  // A comparison with NaN is false and so keeps the NaN.
  for (int i = 0; i < kLanes; ++i)
    x[i] = x[i] < 0.0f ? 0.0f : x[i];
  return x;
}
MEMNET_INLINE vec where_positive(vec x, vec value) {
  for (int i = 0; i < kLanes; ++i)
    value[i] = x[i] <= 0.0f ? 0.0f : value[i];
  return value;
}

#endif

typedef float loose_vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

MEMNET_INLINE vec load(const float *p) { return (vec)(*(const loose_vec *)p); }
MEMNET_INLINE void store(float *p, vec x) { *(loose_vec *)p = (loose_vec)x; }
MEMNET_INLINE vec zero() { return broadcast(0.0f); }

MEMNET_INLINE float horizontal_sum(vec x) {
  alignas(64) float lane[kLanes];
  store(lane, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      lane[i] += lane[i + half];
  return lane[0];
}

MEMNET_INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }

MEMNET_INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
MEMNET_INLINE constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

MEMNET_INLINE const float *floats(std::uint64_t address) { return reinterpret_cast<const float *>(address); }

} // namespace memnet::MEMNET_ISA

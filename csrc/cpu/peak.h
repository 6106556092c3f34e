// The most that fused multiply-adds can give: what products are measured against.
#pragma once

#include <omp.h>

#include "simd.h"

namespace memnet::MEMNET_ISA {

constexpr int kChains = 12; // independent sums: more than latency times rate anywhere, and they fit 16 registers

// `rounds` of kChains vector multiply-adds on each thread; returns the FLOP of all threads that OpenMP granted.
inline i64 multiply_add(int threads, i64 rounds) {
  volatile float memory = 0.5f; // what comes from here and goes here is not the compiler's to compute or to leave out
  i64 team = 1;
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_thread_num() == 0)
      team = omp_get_num_threads();
    const float half = memory;
    const vec factor = broadcast(half), summand = broadcast(half);
    vec sums[kChains];
    for (int i = 0; i < kChains; ++i)
      sums[i] = broadcast(half + static_cast<float>(i));
    for (i64 round = 0; round < rounds; ++round)
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i)
        sums[i] = fma(sums[i], factor, summand);
    for (int i = 1; i < kChains; ++i)
      sums[0] = sums[0] + sums[i];
    const float sum = horizontal_sum(sums[0]);
    if (sum < 0.0f) // never
      memory = sum;
  }
  return 2 * kChains * kLanes * rounds * team;
}

} // namespace memnet::MEMNET_ISA

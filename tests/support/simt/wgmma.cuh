// The twin of csrc/cuda/wgmma.cuh.
#pragma once

#include "ptx.cuh"

namespace memnet::cuda::ptx {

MEMNET_DEVICE void wgmma_fence() { ::simt::products_fence(); }
MEMNET_DEVICE void wgmma_commit() { ::simt::products_commit(); }
MEMNET_DEVICE void wgmma_wait() { ::simt::products_wait(); }

template <Type kType, int kN>
MEMNET_DEVICE void wgmma(float (&d)[kN / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool add) {
  ::simt::products_issue({a, d, b, kN, static_cast<int>(kType), add});
}

template <int kN>
MEMNET_DEVICE void wgmma_e4m3(float (&d)[kN / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool add) {
  ::simt::products_issue({a, d, b, kN, ::simt::kE4m3, add});
}

} // namespace memnet::cuda::ptx

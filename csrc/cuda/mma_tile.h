// Where the operands of mma.m16n8k16 lie: feature maps in shared memory, and the fragments of its sums.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MEMNET_INDEX __host__ __device__ __forceinline__ constexpr
#else
#define MEMNET_INDEX inline constexpr
#endif

namespace memnet::cuda {

// A tile [pixel][64 channels] of 16-bit values: 128 bytes for each pixel, its eight chunks of 8 channels exchanged so
// that eight neighbouring pixels have the same chunk in different banks. ldmatrix then reads any eight of them, shifted
// by any tap, without a conflict; where they cross the end of a row, two share a bank.
MEMNET_INDEX std::uint32_t chunk_offset(int pixel, int chunk) {
  return static_cast<std::uint32_t>(pixel) * 128 + (static_cast<std::uint32_t>(chunk ^ (pixel & 7)) << 4);
}

// A tile [pixel][64 channels] of fp32 sums, 256 bytes for each pixel: `half` 0 or 1 is the first or second four
// channels of a chunk. Conflict-free for fragments that are written and for chunks that are read.
MEMNET_INDEX std::uint32_t sum_offset(int pixel, int chunk, int half) {
  return static_cast<std::uint32_t>(pixel) * 256 + half * 128 +
         (static_cast<std::uint32_t>(chunk ^ (pixel & 7) ^ (half << 2)) << 4);
}

// Row of a 16x16 left operand, and which of its two chunks, whose address a lane gives to ldmatrix.
MEMNET_INDEX int left_row(int lane) { return lane & 15; }
MEMNET_INDEX int left_chunk(int lane) { return lane >> 4; }

// Sums: a lane has in d[2 h], d[2 h + 1] the columns sum_column and the next of row sum_row(lane) + 8 h.
MEMNET_INDEX int sum_row(int lane) { return lane >> 2; }
MEMNET_INDEX int sum_column(int lane) { return 2 * (lane & 3); }

// Packed weights of 64x64 (memnet_fast/layouts/mma.py): 16 bytes for each [step of 16 inputs][pair of 8 outputs][lane],
// the fragments of two products.
MEMNET_INDEX std::uint32_t weight_offset(int step, int pair, int lane) {
  return static_cast<std::uint32_t>((step * 4 + pair) * 32 + lane) * 16;
}

} // namespace memnet::cuda

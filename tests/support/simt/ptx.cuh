// The twin of csrc/cuda/ptx.cuh: the same functions, as PTX defines them, over the model of simt.h.
#pragma once

#include "cuda_runtime.h"
#include "kernels.h"

#define MEMNET_DEVICE inline

namespace memnet::cuda::ptx {

template <Type kType> MEMNET_DEVICE std::uint32_t pack(float low, float high) {
  return ::simt::to_16bit(low, static_cast<int>(kType)) |
         static_cast<std::uint32_t>(::simt::to_16bit(high, static_cast<int>(kType))) << 16;
}

MEMNET_DEVICE std::uint32_t pack_e4m3_relu(float a, float b, float c, float d) {
  std::uint32_t packed = 0;
  int shift = 0;
  for (const float x : {a, b, c, d}) {
    packed |= static_cast<std::uint32_t>(::simt::to_e4m3(x < 0 ? 0 : x)) << shift;
    shift += 8;
  }
  return packed;
}

MEMNET_DEVICE float relu(float x) { return x != x || x > 0 ? x : 0; }

template <Type kType> MEMNET_DEVICE std::uint32_t pack_relu(float low, float high) {
  return pack<kType>(relu(low), relu(high));
}

template <Type kType> MEMNET_DEVICE float2 unpack(std::uint32_t packed) {
  return {::simt::from_16bit(static_cast<std::uint16_t>(packed), static_cast<int>(kType)),
          ::simt::from_16bit(static_cast<std::uint16_t>(packed >> 16), static_cast<int>(kType))};
}

MEMNET_DEVICE std::uint32_t dynamic_shared() { return ::simt::kSharedBase; }

template <class T> T read_shared(std::uint32_t address) {
  T value;
  std::memcpy(&value, ::simt::read_shared(address, sizeof value), sizeof value);
  return value;
}
template <class T> void write_shared(std::uint32_t address, T value) {
  std::memcpy(::simt::write_shared(address, sizeof value), &value, sizeof value);
}

MEMNET_DEVICE uint4 load_shared(std::uint32_t address) { return read_shared<uint4>(address); }
MEMNET_DEVICE void store_shared(std::uint32_t address, uint4 v) { write_shared(address, v); }
MEMNET_DEVICE void store_shared(std::uint32_t address, std::uint32_t v) { write_shared(address, v); }
MEMNET_DEVICE void store_shared(std::uint32_t address, float v) { write_shared(address, v); }
MEMNET_DEVICE void store_shared(std::uint32_t address, float2 v) { write_shared(address, v); }
MEMNET_DEVICE float load_shared_float(std::uint32_t address) { return read_shared<float>(address); }
MEMNET_DEVICE float2 load_shared_float2(std::uint32_t address) { return read_shared<float2>(address); }
MEMNET_DEVICE float4 load_shared_float4(std::uint32_t address) { return read_shared<float4>(address); }

struct MatrixLane {
  std::uint32_t address;
  std::uint32_t r[4];
  ::simt::Thread *thread;
};

// Element (row, column) of matrix i: the lane and the half of its register i that hold it.
inline int matrix_lane(bool transposed, int row, int column) {
  return transposed ? column * 4 + row / 2 : row * 4 + column / 2;
}
inline int matrix_half(bool transposed, int row, int column) { return (transposed ? row : column) & 1; }

inline void load_matrices(bool transposed, std::uint32_t address, std::uint32_t (&r)[4]) {
  MatrixLane mine{address, {}, &::simt::this_thread()};
  ::simt::warp_collective(transposed ? "ldmatrix.trans" : "ldmatrix", &mine, [transposed](void **lanes) {
    for (int i = 0; i < 4; ++i)
      for (int row = 0; row < 8; ++row) {
        std::uint16_t line[8];
        std::memcpy(line, ::simt::read_shared(static_cast<MatrixLane *>(lanes[8 * i + row])->address, 16), 16);
        for (int column = 0; column < 8; ++column)
          static_cast<MatrixLane *>(lanes[matrix_lane(transposed, row, column)])->r[i] |=
              static_cast<std::uint32_t>(line[column]) << (16 * matrix_half(transposed, row, column));
      }
  });
  std::memcpy(r, mine.r, sizeof r);
}

MEMNET_DEVICE void load_matrix(std::uint32_t address, std::uint32_t (&r)[4]) { load_matrices(false, address, r); }
MEMNET_DEVICE void load_matrix_transposed(std::uint32_t address, std::uint32_t (&r)[4]) {
  load_matrices(true, address, r);
}

template <int kCount>
MEMNET_DEVICE void store_matrix_transposed(std::uint32_t address, const std::uint32_t (&r)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "x1, x2 and x4");
  MatrixLane mine{address, {}, &::simt::this_thread()};
  std::memcpy(mine.r, r, sizeof r);
  ::simt::warp_collective(kCount == 4   ? "stmatrix.x4.trans"
                          : kCount == 2 ? "stmatrix.x2.trans"
                                        : "stmatrix.x1.trans",
                          &mine, [](void **lanes) {
                            for (int i = 0; i < kCount; ++i)
                              for (int row = 0; row < 8; ++row) {
                                std::uint16_t line[8];
                                for (int column = 0; column < 8; ++column)
                                  line[column] = static_cast<std::uint16_t>(
                                      static_cast<MatrixLane *>(lanes[matrix_lane(true, row, column)])->r[i] >>
                                      (16 * matrix_half(true, row, column)));
                                const MatrixLane *giver = static_cast<MatrixLane *>(lanes[8 * i + row]);
                                std::memcpy(::simt::write_shared(giver->address, 16, *giver->thread), line, 16);
                              }
                          });
}

MEMNET_DEVICE uint4 load_global(const void *address) {
  uint4 value;
  ::simt::check_global_read(address, sizeof value);
  std::memcpy(&value, address, sizeof value);
  return value;
}
MEMNET_DEVICE void store_global(void *address, uint4 value) {
  ::simt::check_global_write(address, sizeof value);
  std::memcpy(address, &value, sizeof value);
}

MEMNET_DEVICE void copy_async_or_zero(std::uint32_t shared, const void *global, std::uint32_t bytes) {
  ::simt::Copy copy;
  copy.shared = shared;
  copy.global = global;
  copy.bytes = bytes;
  ::simt::begin_copy(copy);
}
MEMNET_DEVICE void copy_async(std::uint32_t shared, const void *global) { copy_async_or_zero(shared, global, 16); }
MEMNET_DEVICE void copy_async_commit() { ::simt::commit_copies(); }
template <int kPending> MEMNET_DEVICE void copy_async_wait() { ::simt::wait_for_copies(kPending); }

struct MultiplyLane {
  float *d;
  const std::uint32_t *a;
  std::uint32_t b[2];
};

template <Type kType>
MEMNET_DEVICE void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  MultiplyLane mine{d, a, {b0, b1}};
  ::simt::warp_collective("mma.m16n8k16", &mine, [](void **lanes) {
    const float *values = ::simt::values_of_16bit(static_cast<int>(kType));
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const MultiplyLane *from = static_cast<MultiplyLane *>(lanes[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i)
          a[group + i % 2 * 8][pair + i / 2 * 8 + e] = values[from->a[i] >> (16 * e) & 0xffff];
        for (int i = 0; i < 2; ++i)
          b[pair + i * 8 + e][group] = values[from->b[i] >> (16 * e) & 0xffff];
      }
    }
    for (int row = 0; row < 16; ++row) {
      double sums[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column)
          sums[column] += a[row][k] * b[k][column];
      for (int column = 0; column < 8; ++column) {
        float &out = static_cast<MultiplyLane *>(lanes[row % 8 * 4 + column / 2])->d[row / 8 * 2 + column % 2];
        out = static_cast<float>(out + sums[column]);
      }
    }
  });
}

MEMNET_DEVICE void barrier_init(std::uint32_t barrier, std::uint32_t count) { ::simt::barrier_init(barrier, count); }
MEMNET_DEVICE void barrier_arrive(std::uint32_t barrier, std::uint32_t count = 1) {
  ::simt::barrier_arrive(barrier, count);
}
MEMNET_DEVICE void barrier_arrive_after_copies(std::uint32_t barrier) {
  ::simt::Copy copy;
  copy.barrier = barrier;
  ::simt::begin_copy(copy);
}
MEMNET_DEVICE void barrier_wait(std::uint32_t barrier, std::uint32_t parity) { ::simt::barrier_wait(barrier, parity); }
MEMNET_DEVICE void fence_barrier_init() {}
MEMNET_DEVICE void fence_async() { ::simt::fence_async(); }

template <int kRegisters> MEMNET_DEVICE void take_registers() { ::simt::set_registers(kRegisters); }
template <int kRegisters> MEMNET_DEVICE void give_registers() { ::simt::set_registers(kRegisters); }

MEMNET_DEVICE void wait_for_previous_kernel() { ::simt::this_thread().waited_for_previous = true; }
MEMNET_DEVICE void let_next_kernel_start() {}

MEMNET_DEVICE int uniform(int x) {
  const int first = ::simt::shuffle(x, 0);
  if (x != first)
    ::simt::fail("uniform(): the lanes differ");
  return first;
}

} // namespace memnet::cuda::ptx

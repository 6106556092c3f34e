// The PTX that the kernels use: one instruction per function, nothing else. A kernel has no inline assembly of its own,
// so that this file is the only device text which tests on a CPU replace (tests/support/simt/ptx.cuh does the same in
// C++). Addresses in shared memory are the 32-bit ones of the shared window, in bytes.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "kernels.h"

#define MEMNET_DEVICE __device__ __forceinline__

namespace memnet::cuda::ptx {

// ---- Conversions: two 16-bit values in a register, the lower half first ---------------------------------------------

// Rounded to nearest even; too large becomes infinity, as in PyTorch.
template <Type kType> MEMNET_DEVICE std::uint32_t pack(float low, float high) {
  std::uint32_t packed;
  if constexpr (kType == Type::kFp16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// As pack, negative values become 0 and NaN stays NaN.
template <Type kType> MEMNET_DEVICE std::uint32_t pack_relu(float low, float high) {
  std::uint32_t packed;
  if constexpr (kType == Type::kFp16)
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <Type kType> MEMNET_DEVICE float2 unpack(std::uint32_t packed) {
  float2 value;
  if constexpr (kType == Type::kFp16)
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(value.x), "=f"(value.y)
        : "r"(packed));
  else // a bf16 is the upper half of an fp32
    value = make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
  return value;
}

// Four e4m3 values in a register, a in its lowest byte: rounded to nearest even, too large becomes 448, negative values
// 0, NaN stays NaN (sm_89).
MEMNET_DEVICE std::uint32_t pack_e4m3_relu(float a, float b, float c, float d) {
  std::uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.relu.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.relu.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

// max(x, 0) with NaN kept (fmaxf would lose it).
MEMNET_DEVICE float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Shared memory --------------------------------------------------------------------------------------------------

// Start of the dynamic shared memory of the block, on a 1024-byte boundary.
MEMNET_DEVICE std::uint32_t dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
}

MEMNET_DEVICE uint4 load_shared(std::uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

MEMNET_DEVICE void store_shared(std::uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

MEMNET_DEVICE void store_shared(std::uint32_t address, std::uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

MEMNET_DEVICE void store_shared(std::uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

MEMNET_DEVICE void store_shared(std::uint32_t address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

MEMNET_DEVICE float load_shared_float(std::uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}

MEMNET_DEVICE float2 load_shared_float2(std::uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

MEMNET_DEVICE float4 load_shared_float4(std::uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of the 16 bytes of row r of matrix i. Lane l
// gets of matrix i the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
MEMNET_DEVICE void load_matrix(std::uint32_t address, std::uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// As load_matrix, of the transposed matrices: lane l gets element l / 4 of the rows 2 (l % 4) and 2 (l % 4) + 1.
MEMNET_DEVICE void load_matrix_transposed(std::uint32_t address, std::uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The inverse of load_matrix_transposed (sm_90).
MEMNET_DEVICE void store_matrix_transposed(std::uint32_t address, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Of one matrix; lanes 0 to 7 give the addresses (sm_90).
MEMNET_DEVICE void store_matrix_transposed(std::uint32_t address, const std::uint32_t (&r)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0]) : "memory");
}

// Of two matrices; lanes 0 to 15 give the addresses (sm_90).
MEMNET_DEVICE void store_matrix_transposed(std::uint32_t address, const std::uint32_t (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1])
               : "memory");
}

// ---- Global memory --------------------------------------------------------------------------------------------------

MEMNET_DEVICE uint4 load_global(const void *address) {
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

MEMNET_DEVICE void store_global(void *address, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- Asynchronous copies of 16 bytes from global to shared memory, past the L1 cache --------------------------------

MEMNET_DEVICE void copy_async(std::uint32_t shared, const void *global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The first `bytes` bytes, the rest zeros; with 0 nothing is read.
MEMNET_DEVICE void copy_async_or_zero(std::uint32_t shared, const void *global, std::uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

MEMNET_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's groups are under way.
template <int kPending> MEMNET_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Warp-wide product: D[16][8] += A[16][16] B[16][8], fp32 sums ---------------------------------------------------

template <Type kType>
MEMNET_DEVICE void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (kType == Type::kFp16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Barriers -------------------------------------------------------------------------------------------------------

// An mbarrier (8 bytes of shared memory) whose phase ends after `count` arrivals.
MEMNET_DEVICE void barrier_init(std::uint32_t barrier, std::uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

MEMNET_DEVICE void barrier_arrive(std::uint32_t barrier, std::uint32_t count = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// One of the expected arrivals, made when all copies that this thread has begun are complete.
MEMNET_DEVICE void barrier_arrive_after_copies(std::uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Until the phase of this parity (0 for the first) has ended; a fresh barrier counts as having ended parity 1.
MEMNET_DEVICE void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile("{\n.reg .pred done;\nWAIT_%=:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra WAIT_%=;\n}" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

// Fresh mbarriers become visible to asynchronous copies and to the tensor cores.
MEMNET_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// This thread's stores to shared memory become visible to wgmma.
MEMNET_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Registers and launches -----------------------------------------------------------------------------------------

template <int kRegisters> MEMNET_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters> MEMNET_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Until the kernels in front of this one have ended and their stores are visible; at once after an ordinary launch.
MEMNET_DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may start where there is room, if it was launched to overlap.
MEMNET_DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// x, equal in all lanes, in a form that the compiler knows to be equal.
MEMNET_DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

} // namespace memnet::cuda::ptx

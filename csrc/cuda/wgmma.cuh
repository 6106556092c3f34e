// The products of a warpgroup on Hopper's tensor cores: D[64][N] (+)= A[64][16] B[16][N], A in registers, B in shared
// memory, fp32 sums. As ptx.cuh: one instruction per function. sm_90a only.
#pragma once

#include "ptx.cuh"

namespace memnet::cuda::ptx {

// In front of the first product: the registers it takes are settled.
MEMNET_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MEMNET_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
MEMNET_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Without add, D is overwritten. Lane l of warp w holds, of row 16 w + l / 4 (and, two registers later, 8 rows below),
// the columns 8 j + 2 (l % 4) and the next in d[4 j], d[4 j + 1] (d[4 j + 2], d[4 j + 3]).
template <Type kType, int kN>
MEMNET_DEVICE void wgmma(float (&d)[kN / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool add);

// The same of e4m3: A[64][32], four values in each register, B[32][N].
template <int kN>
MEMNET_DEVICE void wgmma_e4m3(float (&d)[kN / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool add);

// Numbers and operands of the N / 2 accumulators of each N in use.
#define MEMNET_NUMBERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MEMNET_SUMS_16                                                                                                 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),          \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define MEMNET_NUMBERS_20 MEMNET_NUMBERS_16 ", %16, %17, %18, %19"
#define MEMNET_SUMS_20 MEMNET_SUMS_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define MEMNET_NUMBERS_32 MEMNET_NUMBERS_20 ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MEMNET_SUMS_32                                                                                                 \
  MEMNET_SUMS_20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]),           \
      "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define MEMNET_NUMBERS_36 MEMNET_NUMBERS_32 ", %32, %33, %34, %35"
#define MEMNET_SUMS_36 MEMNET_SUMS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define MEMNET_NUMBERS_40 MEMNET_NUMBERS_36 ", %36, %37, %38, %39"
#define MEMNET_SUMS_40 MEMNET_SUMS_36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define MEMNET_NUMBERS_44 MEMNET_NUMBERS_40 ", %40, %41, %42, %43"
#define MEMNET_SUMS_44 MEMNET_SUMS_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define MEMNET_NUMBERS_48 MEMNET_NUMBERS_44 ", %44, %45, %46, %47"
#define MEMNET_SUMS_48 MEMNET_SUMS_44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define MEMNET_NUMBERS_52 MEMNET_NUMBERS_48 ", %48, %49, %50, %51"
#define MEMNET_SUMS_52 MEMNET_SUMS_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])

// a0 .. a3, b, add: the numbers of the operands behind the accumulators.
#define MEMNET_WGMMA(function, n, count, shape, tail, a0, a1, a2, a3, b_, add_)                                        \
  template <> MEMNET_DEVICE void function(float (&d)[count], const std::uint32_t (&a)[4], std::uint64_t b, bool add) { \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_ ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #n shape " {" MEMNET_NUMBERS_##count                              \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_ ", add, 1, 1" tail ";\n}"                        \
                 : MEMNET_SUMS_##count                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                    \
  }
// The specialisations: one name in parentheses may hold a comma.
#define MEMNET_NAME(...) __VA_ARGS__
#define MEMNET_WGMMA_ALL(n, count, ...)                                                                                \
  MEMNET_WGMMA(MEMNET_NAME(wgmma<Type::kFp16, n>), n, count, "k16.f32.f16.f16", ", 0", __VA_ARGS__)                    \
  MEMNET_WGMMA(MEMNET_NAME(wgmma<Type::kBf16, n>), n, count, "k16.f32.bf16.bf16", ", 0", __VA_ARGS__)                  \
  MEMNET_WGMMA(wgmma_e4m3<n>, n, count, "k32.f32.e4m3.e4m3", "", __VA_ARGS__)

MEMNET_WGMMA_ALL(32, 16, 16, 17, 18, 19, 20, 21)
MEMNET_WGMMA_ALL(40, 20, 20, 21, 22, 23, 24, 25)
MEMNET_WGMMA_ALL(64, 32, 32, 33, 34, 35, 36, 37)
MEMNET_WGMMA_ALL(72, 36, 36, 37, 38, 39, 40, 41)
MEMNET_WGMMA_ALL(80, 40, 40, 41, 42, 43, 44, 45)
MEMNET_WGMMA_ALL(88, 44, 44, 45, 46, 47, 48, 49)
MEMNET_WGMMA_ALL(96, 48, 48, 49, 50, 51, 52, 53)
MEMNET_WGMMA_ALL(104, 52, 52, 53, 54, 55, 56, 57)

#undef MEMNET_WGMMA_ALL
#undef MEMNET_NAME
#undef MEMNET_WGMMA
#undef MEMNET_NUMBERS_16
#undef MEMNET_SUMS_16
#undef MEMNET_NUMBERS_20
#undef MEMNET_SUMS_20
#undef MEMNET_NUMBERS_32
#undef MEMNET_SUMS_32
#undef MEMNET_NUMBERS_36
#undef MEMNET_SUMS_36
#undef MEMNET_NUMBERS_40
#undef MEMNET_SUMS_40
#undef MEMNET_NUMBERS_44
#undef MEMNET_SUMS_44
#undef MEMNET_NUMBERS_48
#undef MEMNET_SUMS_48
#undef MEMNET_NUMBERS_52
#undef MEMNET_SUMS_52

} // namespace memnet::cuda::ptx

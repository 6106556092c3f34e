// The plain data that crosses the boundary between Python and native code. No torch header, no owning type.
#pragma once

#include <cstdint>

namespace memnet {

enum Kind : std::int32_t { kFirstConv = 0, kResidualBlock = 1, kGate = 2, kReconstruct = 3 };

enum class Algorithm : std::int32_t { kDirect = 0, kWinograd = 1 };

// One fused operation. Python fills an array of these through a NumPy dtype made from this very struct, so pointers are
// stored as integers. All tensors are contiguous fp32; Cp = channels rounded up to a multiple of 16; a slot is
// [N, H, W, Cp]. With isa avx512_bf16 the weights of residual blocks and gates are bf16, two input channels side by
// side: [9, 25 or num_src][Cp in / 2][Cp out][2]. Which fields an operation reads, and their shapes:
//
//   kFirstConv      dst; scale, shift [Cin]; weight_a [9][Cin][Cp]; bias_a [Cp]
//   kResidualBlock  src, dst; scale, shift, bias_a, bias_b [Cp]; weight_a, weight_b [9 or 64][Cp in][Cp out]
//   kGate           dst, num_src, srcs, accumulate; scale, shift [num_src][Cp]; weight_a [num_src][Cp in][Cp out];
//                   bias_a [Cp], in whose place stands what dst holds, with accumulate
//   kReconstruct    num_src, srcs, kernel, clamp, skip_weight; scale, shift [num_src][Cp];
//                   weight_a [kernel * kernel][Cout][Cp]; bias_a [Cout]; head_weights [num_src]
struct Op {
  std::int32_t kind;
  std::int32_t src;
  std::int32_t dst;
  std::int32_t num_src;
  std::int32_t kernel;
  std::int32_t clamp;
  float skip_weight;
  std::int32_t accumulate;
  std::uint64_t srcs; // const std::int32_t * [num_src]
  std::uint64_t scale;
  std::uint64_t shift;
  std::uint64_t weight_a;
  std::uint64_t bias_a;
  std::uint64_t weight_b;
  std::uint64_t bias_b;
  std::uint64_t head_weights;
};

struct Shape {
  std::int64_t n;
  std::int64_t h;
  std::int64_t w;
  std::int64_t cin;
  std::int64_t cout;
  std::int64_t cp;
  std::int64_t num_slots;
};

} // namespace memnet

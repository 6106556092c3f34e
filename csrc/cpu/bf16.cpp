// The kernels of precision "bf16", compiled for AVX512-BF16 alone (isa.cpp holds the fp32 ones).
#include "bf16_direct.h"
#include "bf16_gate.h"
#include "bf16_winograd.h"
#include "first_conv.h"
#include "peak.h"
#include "reconstruct.h"

namespace memnet {
namespace MEMNET_ISA {

static i64 scratch_floats(const Shape &shape, Algorithm algorithm, int threads) {
  const i64 needs[] = {first_conv_scratch(shape), bf16_gate_scratch(shape), reconstruct_scratch(shape),
                       algorithm == Algorithm::kDirect ? bf16_direct_scratch(shape)
                                                       : bf16_winograd_scratch(shape, threads)};
  i64 most = 0;
  for (const i64 need : needs)
    most = need > most ? need : most;
  return ceil_div(most, 16) * 16;
}

static i64 mid_floats(const Shape &shape, Algorithm algorithm, int) {
  return algorithm == Algorithm::kDirect ? shape.n * shape.h * shape.w * shape.cp : 0;
}

static void run_op(const Op &op, const Frame &frame) {
  switch (op.kind) {
  case kFirstConv:
    return first_conv(op, frame);
  case kResidualBlock:
    return frame.algorithm == Algorithm::kDirect ? bf16_direct_block(op, frame) : bf16_winograd_block(op, frame);
  case kGate:
    return bf16_gate(op, frame);
  case kReconstruct:
    return reconstruct(op, frame);
  }
}

} // namespace MEMNET_ISA

const Kernels &avx512_bf16_kernels() {
  static const Kernels table = {"avx512_bf16",
                                MEMNET_ISA::scratch_floats,
                                MEMNET_ISA::mid_floats,
                                MEMNET_ISA::run_op,
                                MEMNET_ISA::multiply_add,
                                nullptr,
                                nullptr,
                                nullptr,
                                nullptr,
                                nullptr};
  return table;
}

} // namespace memnet

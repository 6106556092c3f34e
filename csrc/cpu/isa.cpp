// Compiled once per instruction set; MEMNET_ISA names the namespace and the -m flags choose simd.h's vector.
#include "direct.h"
#include "first_conv.h"
#include "gate.h"
#include "peak.h"
#include "reconstruct.h"
#include "unit.h"

#define MEMNET_JOIN(a, b) a##b
#define MEMNET_TABLE(isa) MEMNET_JOIN(isa, _kernels)
#define MEMNET_TEXT(isa) #isa
#define MEMNET_NAME(isa) MEMNET_TEXT(isa)

namespace memnet {
namespace MEMNET_ISA {

static i64 scratch_floats(const Shape &shape, Algorithm algorithm, int threads) {
  const i64 needs[] = {first_conv_scratch(shape), gate_scratch(shape), reconstruct_scratch(shape),
                       algorithm == Algorithm::kDirect ? direct_scratch(shape) : winograd_scratch(shape, threads)};
  i64 most = 0;
  for (const i64 need : needs)
    most = need > most ? need : most;
  return ceil_div(most, 16) * 16;
}

static i64 mid_floats(const Shape &shape, Algorithm algorithm, int threads) {
  return algorithm == Algorithm::kDirect ? shape.n * shape.h * shape.w * shape.cp : winograd_mid(shape, threads);
}

static void run_op(const Op &op, const Frame &frame) {
  switch (op.kind) {
  case kFirstConv:
    return first_conv(op, frame);
  case kResidualBlock:
    return frame.algorithm == Algorithm::kDirect ? direct_block(op, frame) : winograd_block(op, frame);
  case kGate:
    return gate(op, frame);
  case kReconstruct:
    return reconstruct(op, frame);
  }
}

} // namespace MEMNET_ISA

const Kernels &MEMNET_TABLE(MEMNET_ISA)() {
  static const Kernels table = {MEMNET_NAME(MEMNET_ISA),       MEMNET_ISA::scratch_floats,
                                MEMNET_ISA::mid_floats,        MEMNET_ISA::run_op,
                                MEMNET_ISA::multiply_add,      MEMNET_ISA::unit_scratch_floats,
                                MEMNET_ISA::run_unit_forward,  MEMNET_ISA::run_unit_backward,
                                MEMNET_ISA::statistics_floats, MEMNET_ISA::run_statistics};
  return table;
}

} // namespace memnet

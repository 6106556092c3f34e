// What one instruction set offers to the runner. Each ISA's translation unit fills one Kernels table.
#pragma once

#include "../plan.h"

namespace memnet {

// Everything an operation needs besides its own fields. Slots and scratch lie in the caller's workspace.
struct Frame {
  Shape shape;
  Algorithm algorithm;
  int threads;
  const float *image;          // [N, Cin, H, W]
  float *out;                  // [N, Cout, H, W]
  float *slots;                // [num_slots][N, H, W, Cp]
  float *mid;                  // [N, H, W, Cp], null where needs_mid says no
  float *scratch;              // [threads][scratch_floats]
  std::int64_t scratch_floats; // per thread, a multiple of 16
};

struct Kernels {
  const char *isa;
  std::int64_t (*scratch_floats)(const Shape &shape, Algorithm algorithm, int threads); // per thread, a multiple of 16
  bool (*needs_mid)(const Shape &shape, Algorithm algorithm, int threads);
  void (*run_op)(const Op &op, const Frame &frame);
};

// The tables that were compiled in; whether this machine can run one is for runner.cpp to say.
const Kernels &baseline_kernels();
#ifdef MEMNET_X86
const Kernels &avx2_kernels();
const Kernels &avx512_kernels();
#endif
#ifdef MEMNET_AVX512_BF16
const Kernels &avx512_bf16_kernels();
#endif

} // namespace memnet

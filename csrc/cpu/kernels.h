// What one instruction set offers to the runner. Each ISA's translation unit fills one Kernels table.
#pragma once

#include <string>

#include "../plan.h"
#include "training.h"

namespace memnet {

// Steady, from an origin that only differences know.
std::int64_t nanoseconds();

// What a thread does within an operation. Input: reading and BN-ReLU, with the transform or the zero padding that the
// product wants. Product: the multiplications (of a reconstruction with its output). Output: transform, bias, skip,
// store. Wait: for the other threads.
enum Phase : int { kInput = 0, kProduct = 1, kOutput = 2, kWait = 3, kPhases = 4 };

// The time of one operation in one thread, or as a whole (then begin and end alone). Zero: the thread took no part.
struct Times {
  std::int64_t begin, end; // nanoseconds()
  std::int64_t flop;       // of its products, as they were computed: with padding and with what is computed twice
  std::int64_t phases[kPhases];
};

// Everything an operation needs besides its own fields. Slots and scratch lie in the caller's workspace.
struct Frame {
  Shape shape;
  Algorithm algorithm;
  int threads;
  const float *image;          // [N, Cin, H, W]
  float *out;                  // [N, Cout, H, W]
  float *slots;                // [num_slots][N, H, W, Cp]
  float *mid;                  // [mid_floats], null where that is 0
  float *scratch;              // [threads][scratch_floats]
  std::int64_t scratch_floats; // per thread, a multiple of 16
  Times *times;                // [threads] of this operation; null: nobody asks
};

struct Kernels {
  const char *isa;
  std::int64_t (*scratch_floats)(const Shape &shape, Algorithm algorithm, int threads); // per thread, a multiple of 16
  std::int64_t (*mid_floats)(const Shape &shape, Algorithm algorithm, int threads); // between convolutions, as above
  void (*run_op)(const Op &op, const Frame &frame);
  std::int64_t (*multiply_add)(int threads, std::int64_t rounds); // see peak.h
  // Of training.h, or null.
  std::int64_t (*unit_scratch)(const Unit &unit, bool backward);
  void (*unit_forward)(const Unit &unit, float *scratch);
  void (*unit_backward)(const Unit &unit, float *scratch);
  std::int64_t (*statistics_scratch)(std::int64_t pixels, std::int64_t c);
  void (*statistics)(const float *x, std::int64_t pixels, std::int64_t c, float *mean, float *var, float *scratch,
                     int threads);
};

// The table of an instruction set by its name, or of the best one for "auto". Throws std::invalid_argument.
const Kernels &choose_kernels(const std::string &isa);

// Huge pages: 4 KB pages would fault tens of thousands of times in the first call, and the 64 points of a transform lie
// on more pages than the first-level TLB holds. A hint; where it is refused, nothing changes but the time.
void prefer_huge_pages(void *workspace, std::int64_t bytes);

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

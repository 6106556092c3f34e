// Runs a whole plan on the CPU: chooses the instruction set, checks the arguments, lays out the workspace.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "kernels.h"

namespace memnet {

// Instruction sets for fp32 that were compiled in and that this machine and its operating system can run, best first.
std::vector<std::string> runnable_isas();

// Why isa "avx512_bf16", the only one that computes in bf16, cannot run here; empty if it can.
std::string why_no_bf16();

Algorithm parse_algorithm(const std::string &name);

// Bytes from a 64-byte aligned base: [num_slots][N, H, W, Cp] fp32, what lies between the convolutions of a residual
// block where the algorithm needs it (that tensor, or the seams of bands), scratch per thread. A schedule for fewer
// images may need more. Throws std::invalid_argument.
std::int64_t workspace_bytes(const Shape &shape, Algorithm algorithm, const std::string &isa, int threads);

// Runs ops[0..count). image [N, Cin, H, W], out [N, Cout, H, W] fp32. Throws std::invalid_argument before anything is
// written. times: null, or zeros [count][threads + 1] to be filled: each operation as a whole, then in each thread.
void run(const Op *ops, std::size_t count, const Shape &shape, void *workspace, std::int64_t bytes, const float *image,
         float *out, Algorithm algorithm, const std::string &isa, int threads, Times *times);

// FLOP per second of fused multiply-adds that wait for nothing, measured for about `seconds`. Throws as run does.
double multiply_add_rate(const std::string &isa, int threads, double seconds);

} // namespace memnet

// One unit of a training step on the CPU, BN-ReLU-convolution, forwards and backwards. Plain data, no torch header.
#pragma once

#include <cstdint>
#include <string>

namespace memnet {

// out = bias (+ skip) + sum over sources j of conv_j(relu(bn_j(x_j))), where bn(x) = (x - mean) * invstd * gamma +
// beta. All tensors are contiguous fp32, maps [N, H, W, C] with C a multiple of 16. Three kinds: a 3x3 convolution of
// one source; a 1x1 convolution of any number of sources (a gate); a 3x3 or 1x1 convolution of one source with few
// outputs (a reconstruction), whose out is [N, outputs, H, W].
struct Unit {
  std::int64_t n, h, w, c;
  std::int64_t kernel;  // 1 or 3
  std::int64_t outputs; // 0: C of them, as another map
  std::int64_t sources;
  const float *const *x;                     // [sources] of maps
  const float *gamma, *beta, *mean, *invstd; // [sources][C]
  const float *weight;                       // [out][sources * C][kernel][kernel]
  int threads;

  // Forwards.
  const float *bias; // [out]
  const float *skip; // a map, or null; of a 3x3 convolution from map to map
  float *out;

  // Backwards.
  const float *grad;             // of out
  bool batch_statistics;         // whether mean and invstd are those of x, and so depend on it
  float *const *grad_x;          // [sources] of maps
  float *grad_gamma, *grad_beta; // [sources][C]
  float *grad_weight;            // as weight
  float *grad_bias;              // [out]
};

// Floats of scratch, 64-byte aligned, that unit_forward (or unit_backward) needs. All three throw
// std::invalid_argument, and then nothing is written. The same bits for any number of threads.
std::int64_t unit_scratch(const Unit &unit, bool backward, const std::string &isa);
void unit_forward(const Unit &unit, float *scratch, std::int64_t floats, const std::string &isa);
void unit_backward(const Unit &unit, float *scratch, std::int64_t floats, const std::string &isa);

// mean and biased variance of each channel of x [pixels, C], C a multiple of 16; scratch as statistics_scratch() says.
std::int64_t statistics_scratch(std::int64_t pixels, std::int64_t c, const std::string &isa);
void channel_statistics(const float *x, std::int64_t pixels, std::int64_t c, float *mean, float *var, float *scratch,
                        std::int64_t floats, int threads, const std::string &isa);

} // namespace memnet

#include "training.h"

#include <stdexcept>

#include "kernels.h"

namespace memnet {

namespace {

constexpr std::int64_t kMaxFloats = std::int64_t{1} << 48;
constexpr std::int64_t kMaxChannels = 1 << 12;
constexpr std::int64_t kMaxSources = 1 << 12;
constexpr std::int64_t kMaxOutputs = 64;
constexpr int kMaxThreads = 1024;

void require(bool good, const char *what) {
  if (!good)
    throw std::invalid_argument(what);
}

const Kernels &training_kernels(const std::string &isa) {
  const Kernels &kernels = choose_kernels(isa);
  require(kernels.unit_forward != nullptr, "training computes in fp32; this isa computes in bf16");
  return kernels;
}

void check_map(std::int64_t n, std::int64_t h, std::int64_t w, std::int64_t c) {
  require(n >= 1 && h >= 1 && w >= 1, "n, h and w must be at least 1");
  require(c >= 16 && c <= kMaxChannels && c % 16 == 0, "c must be a multiple of 16 in 16..4096");
  std::int64_t floats = c;
  for (const std::int64_t size : {n, h, w})
    require(!__builtin_mul_overflow(floats, size, &floats) && floats <= kMaxFloats, "the map is too large");
}

void check_threads(int threads) { require(threads >= 1 && threads <= kMaxThreads, "threads must be in 1..1024"); }

void check_shape(const Unit &unit) {
  check_map(unit.n, unit.h, unit.w, unit.c);
  check_threads(unit.threads);
  require(unit.kernel == 1 || unit.kernel == 3, "kernel must be 1 or 3");
  require(unit.sources >= 1 && unit.sources <= kMaxSources, "sources must be in 1..4096");
  require(unit.outputs >= 0 && unit.outputs <= kMaxOutputs, "outputs must be in 0..64");
  require(unit.sources == 1 || (unit.kernel == 1 && unit.outputs == 0),
          "only a 1x1 convolution from maps to a map has several sources");
}

bool good(const void *pointer) {
  return pointer != nullptr && reinterpret_cast<std::uintptr_t>(pointer) % alignof(float) == 0;
}

void check_pointers(const Unit &unit) {
  for (std::int64_t j = 0; j < unit.sources; ++j)
    require(good(unit.x[j]), "a source is null or not aligned to 4 bytes");
  for (const float *pointer : {unit.gamma, unit.beta, unit.mean, unit.invstd, unit.weight})
    require(good(pointer), "a parameter is null or not aligned to 4 bytes");
}

void check_scratch(const float *scratch, std::int64_t floats, std::int64_t needed) {
  require(scratch != nullptr && reinterpret_cast<std::uintptr_t>(scratch) % 64 == 0,
          "scratch is null or not aligned to 64 bytes");
  require(floats >= needed, "scratch is too small");
}

} // namespace

std::int64_t unit_scratch(const Unit &unit, bool backward, const std::string &isa) {
  check_shape(unit);
  return training_kernels(isa).unit_scratch(unit, backward);
}

void unit_forward(const Unit &unit, float *scratch, std::int64_t floats, const std::string &isa) {
  check_scratch(scratch, floats, unit_scratch(unit, false, isa));
  check_pointers(unit);
  require(good(unit.bias) && good(unit.out), "the bias or the output is null or not aligned to 4 bytes");
  require(unit.skip == nullptr || (unit.kernel == 3 && unit.outputs == 0 && good(unit.skip)),
          "a skip belongs to a 3x3 convolution from map to map and is aligned to 4 bytes");
  prefer_huge_pages(scratch, floats * static_cast<std::int64_t>(sizeof(float)));
  training_kernels(isa).unit_forward(unit, scratch);
}

void unit_backward(const Unit &unit, float *scratch, std::int64_t floats, const std::string &isa) {
  check_scratch(scratch, floats, unit_scratch(unit, true, isa));
  check_pointers(unit);
  for (const float *pointer :
       {unit.grad, static_cast<const float *>(unit.grad_gamma), static_cast<const float *>(unit.grad_beta),
        static_cast<const float *>(unit.grad_weight), static_cast<const float *>(unit.grad_bias)})
    require(good(pointer), "a gradient is null or not aligned to 4 bytes");
  for (std::int64_t j = 0; j < unit.sources; ++j)
    require(good(unit.grad_x[j]), "the gradient of a source is null or not aligned to 4 bytes");
  prefer_huge_pages(scratch, floats * static_cast<std::int64_t>(sizeof(float)));
  training_kernels(isa).unit_backward(unit, scratch);
}

std::int64_t statistics_scratch(std::int64_t pixels, std::int64_t c, const std::string &isa) {
  check_map(1, 1, pixels, c);
  return training_kernels(isa).statistics_scratch(pixels, c);
}

void channel_statistics(const float *x, std::int64_t pixels, std::int64_t c, float *mean, float *var, float *scratch,
                        std::int64_t floats, int threads, const std::string &isa) {
  check_scratch(scratch, floats, statistics_scratch(pixels, c, isa));
  check_threads(threads);
  require(good(x) && good(mean) && good(var), "a map or its statistics are null or not aligned to 4 bytes");
  training_kernels(isa).statistics(x, pixels, c, mean, var, scratch, threads);
}

} // namespace memnet

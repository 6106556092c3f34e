// Runs one unit of a training step, on a machine that has no Python: portable_unit_driver INPUT OUTPUT.
//
// INPUT: int64 call (0: forwards, 1: backwards), whether to say only how many floats of scratch it needs, n, h, w, c,
// kernel, outputs, sources, threads, whether the statistics are those of the batch, whether there is a skip; then the
// arrays, in the order of struct Unit. OUTPUT: the arrays of results, in that order, too, or a decimal number.
#include <vector>

#include "cpu/training.h"
#include "portable_memory.h"

int main(int, char **argv) try {
  std::FILE *in = std::fopen(argv[1], "rb"), *out = std::fopen(argv[2], "wb");
  std::int64_t head[12];
  read(in, head, sizeof head);
  memnet::Unit unit = {};
  const bool backward = head[0] != 0;
  unit.n = head[2], unit.h = head[3], unit.w = head[4], unit.c = head[5];
  unit.kernel = head[6], unit.outputs = head[7], unit.sources = head[8];
  unit.threads = static_cast<int>(head[9]);
  unit.batch_statistics = head[10] != 0;
  const std::int64_t scratch_floats = memnet::unit_scratch(unit, backward, "baseline");
  if (head[1] != 0) {
    std::fprintf(out, "%lld", static_cast<long long>(scratch_floats));
    return std::fclose(out);
  }
  std::vector<Guarded> inputs, results;
  const auto input = [&](std::int64_t floats) {
    inputs.emplace_back(floats * sizeof(float));
    read(in, inputs.back().data(), inputs.back().size);
    return reinterpret_cast<const float *>(inputs.back().data());
  };
  const auto result = [&](std::int64_t floats) {
    results.emplace_back(floats * sizeof(float));
    return reinterpret_cast<float *>(results.back().data());
  };
  const std::int64_t outputs = unit.outputs != 0 ? unit.outputs : unit.c, pixels = unit.n * unit.h * unit.w;
  const std::int64_t channels = unit.sources * unit.c, weights = outputs * channels * unit.kernel * unit.kernel;
  std::vector<const float *> x;
  std::vector<float *> grad_x;
  for (std::int64_t j = 0; j < unit.sources; ++j)
    x.push_back(input(pixels * unit.c));
  unit.x = x.data();
  unit.gamma = input(channels);
  unit.beta = input(channels);
  unit.mean = input(channels);
  unit.invstd = input(channels);
  unit.weight = input(weights);
  const Guarded scratch(scratch_floats * sizeof(float));
  float *memory = reinterpret_cast<float *>(scratch.data());
  if (backward) {
    unit.grad = input(pixels * outputs);
    for (std::int64_t j = 0; j < unit.sources; ++j)
      grad_x.push_back(result(pixels * unit.c));
    unit.grad_x = grad_x.data();
    unit.grad_gamma = result(channels);
    unit.grad_beta = result(channels);
    unit.grad_weight = result(weights);
    unit.grad_bias = result(outputs);
    memnet::unit_backward(unit, memory, scratch_floats, "baseline");
  } else {
    unit.bias = input(outputs);
    unit.skip = head[11] != 0 ? input(pixels * unit.c) : nullptr;
    unit.out = result(pixels * outputs);
    memnet::unit_forward(unit, memory, scratch_floats, "baseline");
  }
  scratch.check("scratch");
  for (const Guarded &array : inputs)
    array.check("an input");
  for (const Guarded &array : results) {
    array.check("a result");
    std::fwrite(array.data(), 1, array.size, out);
  }
  return std::fclose(out);
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}

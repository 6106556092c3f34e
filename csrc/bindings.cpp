// The native module memnet_fast._native: raw addresses in, one call per plan, the GIL released while it runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/runner.h"
#include "cpu/training.h"
#include "plan.h"

namespace py = pybind11;

namespace {

using Ops = py::array_t<memnet::Op, py::array::c_style>;

using Timed = py::array_t<memnet::Times, py::array::c_style>;

// times: of count * (threads + 1) elements, or null.
void run_plan(const Ops &ops, const memnet::Shape &shape, std::uint64_t workspace, std::int64_t bytes,
              std::uint64_t image, std::uint64_t out, const std::string &algorithm, const std::string &isa, int threads,
              memnet::Times *times) {
  if (ops.ndim() != 1)
    throw std::invalid_argument("ops must be a one-dimensional array of op_dtype");
  const memnet::Op *data = ops.data();
  const auto count = static_cast<std::size_t>(ops.size());
  const memnet::Algorithm chosen = memnet::parse_algorithm(algorithm);
  py::gil_scoped_release release;
  memnet::run(data, count, shape, reinterpret_cast<void *>(workspace), bytes, reinterpret_cast<const float *>(image),
              reinterpret_cast<float *>(out), chosen, isa, threads, times);
}

using Addresses = py::array_t<std::uint64_t, py::array::c_style>;
using Sizes = py::array_t<std::int64_t, py::array::c_style>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

bool same_bytes(const Addresses &addresses, const Sizes &sizes, const Bytes &expected) {
  if (addresses.ndim() != 1 || sizes.ndim() != 1 || expected.ndim() != 1 || addresses.size() != sizes.size())
    throw std::invalid_argument("addresses and sizes must be of one length");
  const std::int64_t *size = sizes.data();
  std::int64_t total = 0;
  for (py::ssize_t i = 0; i < sizes.size(); ++i) {
    if (size[i] < 0 || size[i] > expected.size() - total)
      throw std::invalid_argument("sizes must add up to the length of expected");
    total += size[i];
  }
  if (total != expected.size())
    throw std::invalid_argument("sizes must add up to the length of expected");
  const std::uint8_t *at = expected.data();
  for (py::ssize_t i = 0; i < sizes.size(); at += size[i++])
    if (std::memcmp(reinterpret_cast<const void *>(addresses.data()[i]), at, static_cast<std::size_t>(size[i])) != 0)
      return false;
  return true;
}

// As one value for each field of memnet::Unit, by name; pointers are addresses, of which `x` and `grad_x` are arrays.
// What a call does not need may be left out.
struct PyUnit {
  memnet::Unit unit = {};
  std::vector<const float *> x;
  std::vector<float *> grad_x;

  explicit PyUnit(const py::dict &fields) {
    const auto number = [&](const char *name) {
      if (!fields.contains(name))
        return std::uint64_t{0};
      try {
        return fields[name].cast<std::uint64_t>();
      } catch (const py::cast_error &) {
        throw std::invalid_argument(std::string(name) + " must be a whole number from 0 on");
      }
    };
    const auto pointer = [&](const char *name) { return reinterpret_cast<float *>(number(name)); };
    const auto size = [&](const char *name) { return static_cast<std::int64_t>(number(name)); };
    unit.n = size("n");
    unit.h = size("h");
    unit.w = size("w");
    unit.c = size("c");
    unit.kernel = size("kernel");
    unit.outputs = size("outputs");
    // Too many for an int are too many.
    unit.threads = static_cast<int>(std::min<std::uint64_t>(number("threads"), std::numeric_limits<int>::max()));
    for (const py::handle address : fields["x"])
      x.push_back(reinterpret_cast<const float *>(address.cast<std::uint64_t>()));
    if (fields.contains("grad_x"))
      for (const py::handle address : fields["grad_x"])
        grad_x.push_back(reinterpret_cast<float *>(address.cast<std::uint64_t>()));
    grad_x.resize(x.size());
    unit.sources = static_cast<std::int64_t>(x.size());
    unit.x = x.data();
    unit.grad_x = grad_x.data();
    unit.gamma = pointer("gamma");
    unit.beta = pointer("beta");
    unit.mean = pointer("mean");
    unit.invstd = pointer("invstd");
    unit.weight = pointer("weight");
    unit.bias = pointer("bias");
    unit.skip = pointer("skip");
    unit.out = pointer("out");
    unit.grad = pointer("grad");
    unit.batch_statistics = number("batch_statistics") != 0;
    unit.grad_gamma = pointer("grad_gamma");
    unit.grad_beta = pointer("grad_beta");
    unit.grad_weight = pointer("grad_weight");
    unit.grad_bias = pointer("grad_bias");
  }
};

} // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native MemNet operations on raw addresses. Checked arguments raise ValueError.";

  PYBIND11_NUMPY_DTYPE(memnet::Op, kind, src, dst, num_src, kernel, clamp, skip_weight, accumulate, srcs, scale, shift,
                       weight_a, bias_a, weight_b, bias_b, head_weights);
  m.attr("op_dtype") = py::dtype::of<memnet::Op>();
  PYBIND11_NUMPY_DTYPE(memnet::Times, begin, end, flop, phases);
  m.attr("times_dtype") = py::dtype::of<memnet::Times>();
  m.attr("PHASES") = py::make_tuple("input", "product", "output", "wait"); // in the order of memnet::Phase
  m.attr("FIRST_CONV") = static_cast<int>(memnet::kFirstConv);
  m.attr("RESIDUAL_BLOCK") = static_cast<int>(memnet::kResidualBlock);
  m.attr("GATE") = static_cast<int>(memnet::kGate);
  m.attr("RECONSTRUCT") = static_cast<int>(memnet::kReconstruct);

  m.def("version", [] { return MEMNET_VERSION; });
  m.def("compiler", [] { return MEMNET_COMPILER; });
  m.def("isas", &memnet::runnable_isas, "Instruction sets for fp32 that run on this machine, best first.");
  m.def("why_no_bf16", &memnet::why_no_bf16, "Why isa avx512_bf16 cannot run on this machine; empty if it can.");

  // Keeps the GIL: it takes a tenth of a millisecond, in which nobody can give the memory back.
  m.def("same_bytes", &same_bytes, py::arg("addresses").noconvert(), py::arg("sizes").noconvert(),
        py::arg("expected").noconvert(),
        "Whether the blocks at addresses (uint64), sizes (int64) bytes each, hold expected (uint8), one after the "
        "other.");

  m.def(
      "workspace_bytes",
      [](std::int64_t n, std::int64_t h, std::int64_t w, std::int64_t cin, std::int64_t cout, std::int64_t cp,
         std::int64_t num_slots, const std::string &algorithm, const std::string &isa, int threads) {
        return memnet::workspace_bytes({n, h, w, cin, cout, cp, num_slots}, memnet::parse_algorithm(algorithm), isa,
                                       threads);
      },
      py::arg("n"), py::arg("h"), py::arg("w"), py::arg("cin"), py::arg("cout"), py::arg("cp"), py::arg("num_slots"),
      py::arg("algorithm"), py::arg("isa"), py::arg("threads"),
      "Bytes that run() needs from a 64-byte aligned address with exactly these arguments.");

  m.def(
      "run",
      [](const Ops &ops, // [count] op_dtype; the shapes behind its addresses stand in plan.h
         std::int64_t n, std::int64_t h, std::int64_t w, std::int64_t cin, std::int64_t cout, std::int64_t cp,
         std::int64_t num_slots,
         std::uint64_t workspace_ptr,  // [num_slots][N, H, W, Cp] and scratch, 64-byte aligned
         std::int64_t workspace_bytes, // at least workspace_bytes(...)
         std::uint64_t image_ptr,      // [N, Cin, H, W] fp32, contiguous
         std::uint64_t out_ptr,        // [N, Cout, H, W] fp32, contiguous
         const std::string &algorithm, // "direct" | "winograd"
         const std::string &isa,       // "auto" | one of isas() | "avx512_bf16"
         int threads) {                // OpenMP threads, 1..1024
        run_plan(ops, {n, h, w, cin, cout, cp, num_slots}, workspace_ptr, workspace_bytes, image_ptr, out_ptr,
                 algorithm, isa, threads, nullptr);
      },
      py::arg("ops").noconvert(), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("cin"), py::arg("cout"),
      py::arg("cp"), py::arg("num_slots"), py::arg("workspace_ptr"), py::arg("workspace_bytes"), py::arg("image_ptr"),
      py::arg("out_ptr"), py::arg("algorithm"), py::arg("isa"), py::arg("threads"), "Runs a whole plan.");

  m.def(
      "run_timed",
      [](const Ops &ops, std::int64_t n, std::int64_t h, std::int64_t w, std::int64_t cin, std::int64_t cout,
         std::int64_t cp, std::int64_t num_slots, std::uint64_t workspace_ptr, std::int64_t workspace_bytes,
         std::uint64_t image_ptr, std::uint64_t out_ptr, const std::string &algorithm, const std::string &isa,
         int threads) {
        // Refuses what run() would refuse, before an array of so many threads is made.
        memnet::workspace_bytes({n, h, w, cin, cout, cp, num_slots}, memnet::parse_algorithm(algorithm), isa, threads);
        Timed times({static_cast<py::ssize_t>(ops.size()), static_cast<py::ssize_t>(threads) + 1});
        std::memset(times.mutable_data(), 0, static_cast<std::size_t>(times.nbytes()));
        run_plan(ops, {n, h, w, cin, cout, cp, num_slots}, workspace_ptr, workspace_bytes, image_ptr, out_ptr,
                 algorithm, isa, threads, times.mutable_data());
        return times;
      },
      py::arg("ops").noconvert(), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("cin"), py::arg("cout"),
      py::arg("cp"), py::arg("num_slots"), py::arg("workspace_ptr"), py::arg("workspace_bytes"), py::arg("image_ptr"),
      py::arg("out_ptr"), py::arg("algorithm"), py::arg("isa"), py::arg("threads"),
      "run(), returning times_dtype [operations, 1 + threads]: each operation as a whole, then in each thread.");

  m.def(
      "multiply_add_rate",
      [](const std::string &isa, int threads, double seconds) {
        py::gil_scoped_release release;
        return memnet::multiply_add_rate(isa, threads, seconds);
      },
      py::arg("isa"), py::arg("threads"), py::arg("seconds"),
      "FLOP per second of fused multiply-adds that wait for nothing, measured for about this long.");

  // Of csrc/cpu/training.h, where the fields of a unit stand.
  m.def(
      "unit_scratch",
      [](const py::dict &fields, bool backward, const std::string &isa) {
        return memnet::unit_scratch(PyUnit(fields).unit, backward, isa);
      },
      py::arg("unit"), py::arg("backward"), py::arg("isa"), "Floats of scratch, from a 64-byte aligned address.");
  m.def(
      "unit_forward",
      [](const py::dict &fields, std::uint64_t scratch, std::int64_t floats, const std::string &isa) {
        const PyUnit held(fields);
        py::gil_scoped_release release;
        memnet::unit_forward(held.unit, reinterpret_cast<float *>(scratch), floats, isa);
      },
      py::arg("unit"), py::arg("scratch_ptr"), py::arg("floats"), py::arg("isa"), "BN-ReLU-convolution.");
  m.def(
      "unit_backward",
      [](const py::dict &fields, std::uint64_t scratch, std::int64_t floats, const std::string &isa) {
        const PyUnit held(fields);
        py::gil_scoped_release release;
        memnet::unit_backward(held.unit, reinterpret_cast<float *>(scratch), floats, isa);
      },
      py::arg("unit"), py::arg("scratch_ptr"), py::arg("floats"), py::arg("isa"), "The gradients of unit_forward.");
  m.def("statistics_scratch", &memnet::statistics_scratch, py::arg("pixels"), py::arg("c"), py::arg("isa"),
        "Floats of scratch that channel_statistics needs, from a 64-byte aligned address.");
  m.def(
      "channel_statistics",
      [](std::uint64_t x, std::int64_t pixels, std::int64_t c, std::uint64_t mean, std::uint64_t var,
         std::uint64_t scratch, std::int64_t floats, int threads, const std::string &isa) {
        py::gil_scoped_release release;
        memnet::channel_statistics(reinterpret_cast<const float *>(x), pixels, c, reinterpret_cast<float *>(mean),
                                   reinterpret_cast<float *>(var), reinterpret_cast<float *>(scratch), floats, threads,
                                   isa);
      },
      py::arg("x_ptr"), py::arg("pixels"), py::arg("c"), py::arg("mean_ptr"), py::arg("var_ptr"),
      py::arg("scratch_ptr"), py::arg("floats"), py::arg("threads"), py::arg("isa"),
      "Mean and biased variance of each channel of x [pixels, c] fp32.");
}

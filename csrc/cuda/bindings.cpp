// The native module memnet_fast._native_cuda: raw device addresses in, one call for each forward pass, the GIL
// released. Importing it starts no CUDA; the CUDA runtime is linked in, and without a driver only the calls fail.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runner.h"

namespace py = pybind11;
using namespace memnet::cuda;

namespace {

template <class T> using Array = py::array_t<T, py::array::c_style>;

template <class T> std::vector<T> to_vector(const Array<T> &array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

Parameters parameters_of(const Array<std::uint64_t> &addresses, const Array<std::uint8_t> &types,
                         std::int64_t expected) {
  if (addresses.size() != expected || types.size() != expected)
    throw std::invalid_argument("one address and one type for each parameter: " + std::to_string(expected));
  return {addresses.data(), types.data()};
}

// The driver and the devices as the runtime sees them; starts the driver, but makes no context.
py::dict status() {
  py::dict report;
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  report["driver"] = driver; // 1000 * major + 10 * minor, 0: none
  report["runtime"] = runtime;
  report["devices"] = error == cudaSuccess ? count : 0;
  report["error"] = error == cudaSuccess ? py::object(py::none()) : py::object(py::str(cudaGetErrorString(error)));
  return report;
}

struct PlanAndSize {
  PlanAndSize(Description description) : num_parameters(description.num_parameters), plan(std::move(description)) {}
  std::int64_t num_parameters;
  Plan plan;
};

Call call_of(const PlanAndSize &plan, int device, std::uint64_t stream, const Array<std::uint64_t> &addresses,
             const Array<std::uint8_t> &types, std::uint64_t workspace, std::int64_t bytes, std::uint64_t image,
             std::uint64_t out, std::int64_t n, std::int64_t h, std::int64_t w) {
  Call call{};
  call.device = device;
  call.stream = reinterpret_cast<cudaStream_t>(stream);
  call.parameters = parameters_of(addresses, types, plan.num_parameters);
  call.workspace = reinterpret_cast<void *>(workspace);
  call.workspace_bytes = bytes;
  call.image = reinterpret_cast<const float *>(image);
  call.out = reinterpret_cast<float *>(out);
  call.n = n, call.h = h, call.w = w;
  return call;
}

} // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "MemNet on NVIDIA GPUs. Checked arguments raise ValueError, what CUDA reports raises CudaError.";

  auto &error = py::register_exception<Error>(m, "CudaError", PyExc_RuntimeError);
  py::register_exception<OutOfMemory>(m, "CudaOutOfMemory", error.ptr());

  PYBIND11_NUMPY_DTYPE(Op, kind, src, dst, num_src, kernel, clamp, scale, shift, weight_a, bias_a, weight_b, bias_b,
                       head, skip, gain_a, gain_b);
  PYBIND11_NUMPY_DTYPE(FoldJob, kind, count, out, value);
  PYBIND11_NUMPY_DTYPE(QuantiseJob, out, step, scale, rows, inner);
  PYBIND11_NUMPY_DTYPE(PackJob, out, map, base, scale, shift, multiply, divide, count, inner, type, reserved);
  m.attr("op_dtype") = py::dtype::of<Op>();
  m.attr("fold_job_dtype") = py::dtype::of<FoldJob>();
  m.attr("quantise_job_dtype") = py::dtype::of<QuantiseJob>();
  m.attr("pack_job_dtype") = py::dtype::of<PackJob>();

  m.def("version", [] { return MEMNET_VERSION; });
  m.def("compiler", [] { return MEMNET_CUDA_COMPILER; });
  m.def("archs", [] { return MEMNET_CUDA_ARCHS; }, "What it holds code for, as in MEMNET_CUDA_ARCHS.");
  m.def("status", &status, "driver, runtime, devices, error: what the CUDA runtime sees. Makes no context.");

  py::class_<Graph>(m, "Graph", "A captured call; it holds the addresses of that call, not the memory.")
      .def(
          "launch",
          [](const Graph &graph, std::uint64_t stream) {
            py::gil_scoped_release release;
            graph.launch(reinterpret_cast<cudaStream_t>(stream));
          },
          py::arg("stream"));

  py::class_<Timeline>(m, "Timeline", "When each launch of one call ran; given to Plan.run.")
      .def(py::init<std::vector<std::string>>(), py::arg("names"), "names: of the operations, for NVTX ranges.")
      .def(
          "rows",
          [](Timeline &timeline) {
            std::vector<Timeline::Row> rows;
            cudaError_t error;
            {
              py::gil_scoped_release release;
              error = timeline.finish(rows);
            }
            if (error != cudaSuccess)
              throw Error(std::string("timeline: ") + cudaGetErrorString(error));
            py::list list;
            for (const Timeline::Row &row : rows)
              list.append(py::make_tuple(row.op, row.name, row.begin, row.end, row.host_begin, row.host_end));
            return list;
          },
          "Waits for the call. (operation or -1, name, begin and end in ms on the device, begin and end in ns on the "
          "host) of each launch.");

  py::class_<PlanAndSize>(m, "Plan", "A network without addresses; memnet_fast/backends/cuda_tables.py describes it.")
      .def(py::init([](bool bf16, bool fp8, bool hopper, std::int64_t cin, std::int64_t cout, std::int32_t num_slots,
                       std::int64_t num_parameters, std::int64_t packed_bytes, std::int64_t fold_count,
                       const Array<Op> &ops,                        // [operations]
                       const Array<FoldJob> &fold_jobs,             // [F]
                       const Array<std::int32_t> &fold_sources,     // [F, 4], indices of parameters, -1: none
                       const Array<QuantiseJob> &quantise_jobs,     // [Q]
                       const Array<std::int32_t> &quantise_sources, // [Q]
                       const Array<PackJob> &pack_jobs,             // [P]
                       const Array<std::int32_t> &pack_sources,     // [P], -1: fold, -2: bytes of the packed weights
                       const Array<std::int32_t> &maps) {
             Description d{bf16 ? Type::kBf16 : Type::kFp16,
                           fp8,
                           hopper,
                           cin,
                           cout,
                           num_slots,
                           num_parameters,
                           packed_bytes,
                           fold_count,
                           to_vector(ops),
                           to_vector(fold_jobs),
                           to_vector(fold_sources),
                           to_vector(quantise_jobs),
                           to_vector(quantise_sources),
                           to_vector(pack_jobs),
                           to_vector(pack_sources),
                           to_vector(maps)};
             return std::make_unique<PlanAndSize>(std::move(d));
           }),
           py::arg("bf16"), py::arg("fp8"), py::arg("hopper"), py::arg("cin"), py::arg("cout"), py::arg("num_slots"),
           py::arg("num_parameters"), py::arg("packed_bytes"), py::arg("fold_count"), py::arg("ops").noconvert(),
           py::arg("fold_jobs").noconvert(), py::arg("fold_sources").noconvert(), py::arg("quantise_jobs").noconvert(),
           py::arg("quantise_sources").noconvert(), py::arg("pack_jobs").noconvert(),
           py::arg("pack_sources").noconvert(), py::arg("maps").noconvert())
      .def(
          "workspace_bytes",
          [](const PlanAndSize &self, std::int64_t n, std::int64_t h, std::int64_t w) {
            return self.plan.workspace_bytes(n, h, w);
          },
          py::arg("n"), py::arg("h"), py::arg("w"))
      .def(
          "run",
          [](const PlanAndSize &self, int device,
             std::uint64_t stream,                  // cudaStream_t of that device
             const Array<std::uint64_t> &addresses, // [num_parameters] on that device, contiguous tensors
             const Array<std::uint8_t> &types,      // [num_parameters] 0: fp64, 1: fp32, 2: fp16, 3: bf16
             std::uint64_t workspace,               // slots [num_slots][N, H, W, 64] and weights, 64-byte aligned
             std::int64_t workspace_bytes,          // at least workspace_bytes(n, h, w)
             std::uint64_t image,                   // [N, Cin, H, W] fp32, contiguous
             std::uint64_t out,                     // [N, Cout, H, W] fp32, contiguous
             std::int64_t n, std::int64_t h, std::int64_t w,
             Timeline *timeline) { // or None
            Call call =
                call_of(self, device, stream, addresses, types, workspace, workspace_bytes, image, out, n, h, w);
            call.timeline = timeline;
            py::gil_scoped_release release;
            self.plan.run(call);
          },
          py::arg("device"), py::arg("stream"), py::arg("addresses").noconvert(), py::arg("types").noconvert(),
          py::arg("workspace"), py::arg("workspace_bytes"), py::arg("image"), py::arg("out"), py::arg("n"),
          py::arg("h"), py::arg("w"), py::arg("timeline") = py::none(), "Enqueues the whole network and returns.")
      .def(
          "capture",
          [](const PlanAndSize &self, int device, const Array<std::uint64_t> &addresses,
             const Array<std::uint8_t> &types, std::uint64_t workspace, std::int64_t workspace_bytes,
             std::uint64_t image, std::uint64_t out, std::int64_t n, std::int64_t h, std::int64_t w) {
            const Call call =
                call_of(self, device, 0, addresses, types, workspace, workspace_bytes, image, out, n, h, w);
            // Work of the host alone, with the interpreter held: while a stream captures, nobody may synchronise the
            // device.
            return self.plan.capture(call);
          },
          py::arg("device"), py::arg("addresses").noconvert(), py::arg("types").noconvert(), py::arg("workspace"),
          py::arg("workspace_bytes"), py::arg("image"), py::arg("out"), py::arg("n"), py::arg("h"), py::arg("w"),
          "The same call as run() as a graph; nothing is computed before its launch.");
}

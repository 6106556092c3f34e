#include "runner.h"

#include <algorithm>
#include <cstring>

namespace memnet::cuda {
namespace {

constexpr std::int64_t kAlignment = 64;        // of the workspace
constexpr std::int64_t kPartAlignment = 256;   // of the parts of the workspace, relative to it
constexpr std::int64_t kMaxExtent = 1LL << 40; // n, h, w and their product: nothing below overflows 64 bits
constexpr std::int32_t kBytes = -2;            // a source: bytes of the packed weights
constexpr const char *kNames[] = {"first_conv", "residual_block", "gate", "reconstruct"};

[[noreturn]] void refuse(const std::string &what) { throw std::invalid_argument(what); }

void require(bool good, const std::string &what) {
  if (!good)
    refuse(what);
}

void check_cuda(cudaError_t error, const std::string &where) {
  if (error == cudaSuccess)
    return;
  const std::string what = where + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  if (error == cudaErrorMemoryAllocation)
    throw OutOfMemory(what);
  throw Error(what);
}

std::int64_t rounded_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Always set, and not put back: which device is current is the driver's business, what each copy of the CUDA runtime in
// a process believes of it may be out of date. The caller has a guard of its own.
void use_device(int device) { check_cuda(cudaSetDevice(device), "device " + std::to_string(device)); }

// While a stream is being captured, by this thread or another one, CUDA forbids calls that could wait or allocate on
// others: also the loading of a kernel at its first launch. None of ours touches the captured stream in such a way.
class RelaxedCapture {
public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture &) = delete;
  RelaxedCapture &operator=(const RelaxedCapture &) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A stream of our own that waits for nobody.
class PrivateStream {
public:
  PrivateStream() { check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "private stream"); }
  PrivateStream(const PrivateStream &) = delete;
  PrivateStream &operator=(const PrivateStream &) = delete;
  ~PrivateStream() { cudaStreamDestroy(stream_); }
  operator cudaStream_t() const { return stream_; }

private:
  cudaStream_t stream_ = nullptr;
};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "device " + std::to_string(device));
  return value;
}

template <class T> std::int64_t bytes_of(const std::vector<T> &values) {
  return rounded_up(static_cast<std::int64_t>(values.size() * sizeof(T)), kPartAlignment);
}

template <class T> T *at(void *memory, std::int64_t offset) {
  return reinterpret_cast<T *>(static_cast<unsigned char *>(memory) + offset);
}

} // namespace

Graph::~Graph() {
  // A graph in flight is freed when it has ended. Errors: the process is going down, and the driver with it.
  cudaGraphExecDestroy(exec_);
}

void Graph::launch(cudaStream_t stream) const {
  use_device(device_);
  check_cuda(cudaGraphLaunch(exec_, stream), "graph");
}

Plan::Plan(Description description) : description_(std::move(description)) {
  const Description &d = description_;
#ifndef MEMNET_HOPPER
  require(!d.hopper, "this module was built without the kernels for sm_90a");
#endif
  require(!d.fp8 || (d.hopper && d.type == Type::kFp16), "fp8 runs on the kernels for sm_90a, beside fp16");
  require(d.cin >= 1 && d.cout >= 1 && (d.cin == 1 || d.cin == d.cout), "cin must be 1 or equal cout");
  require(d.num_slots >= 1, "num_slots must be at least 1");
  require(d.packed_bytes >= 0 && d.packed_bytes % kPartAlignment == 0 && d.fold_count >= 0,
          "packed_bytes must be a multiple of 256");
  require(d.fold_sources.size() == d.fold_jobs.size() * kSourcesPerFold &&
              d.pack_sources.size() == d.pack_jobs.size() && d.quantise_sources.size() == d.quantise_jobs.size(),
          "one entry of sources for each job");
  const auto check_sources = [&d](const std::vector<std::int32_t> &sources, std::int32_t lowest) {
    for (std::int32_t source : sources)
      require(source >= lowest && source < d.num_parameters, "a job reads a parameter that does not exist");
  };
  check_sources(d.fold_sources, -1);
  check_sources(d.quantise_sources, 0);
  check_sources(d.pack_sources, kBytes);
  for (const QuantiseJob &job : d.quantise_jobs)
    require(job.rows >= 1 && job.rows == d.quantise_jobs[0].rows && job.inner >= 9 && job.inner % 9 == 0 &&
                job.out >= 0 && job.out + std::int64_t{job.rows} * job.inner <= d.packed_bytes && job.step >= 0 &&
                job.step + job.rows <= d.fold_count && job.scale + job.rows <= d.fold_count,
            "a quantise job writes outside");
  for (const FoldJob &job : d.fold_jobs) {
    const std::int64_t written = job.kind == kFoldNorm ? 2 * job.count : job.kind == kFoldConstant ? job.count : 1;
    require(job.count >= 1 && job.out >= 0 && job.out + written <= d.fold_count, "a fold job writes outside fold");
  }
  for (const PackJob &job : d.pack_jobs) {
    const int size = job.type == kPackedFp32 ? 4 : job.type == kPackedByte ? 1 : 2;
    require(job.count >= 1 && job.inner >= 1 && job.out >= 0 &&
                job.out + std::int64_t{job.count} * size <= d.packed_bytes,
            "a pack job writes outside the packed weights");
    require(job.map >= 0 && job.map + job.count <= static_cast<std::int64_t>(d.maps.size()), "a pack job reads no map");
    require(job.scale < d.fold_count && job.shift < d.fold_count && job.multiply < d.fold_count &&
                job.divide < d.fold_count && job.base >= 0,
            "a pack job reads outside fold");
  }
  for (std::size_t i = 0; i < d.ops.size(); ++i) {
    const Op &op = d.ops[i];
    const std::string where = "op " + std::to_string(i);
    require(op.kind >= kFirstConv && op.kind <= kReconstruct, where + ": unknown kind");
    require(op.kind == kReconstruct || (op.dst >= 0 && op.dst < d.num_slots), where + ": dst is no slot");
    if (op.kind == kResidualBlock)
      require(op.src >= 0 && op.src < d.num_slots && op.src != op.dst, where + ": src is no slot, or is dst");
    if (op.kind == kGate)
      require(op.num_src >= 1 && op.num_src <= d.num_slots && op.dst >= op.num_src, where + ": dst is a source");
    if (op.kind == kReconstruct)
      require(op.num_src >= 1 && op.src >= 0 && op.src + op.num_src <= d.num_slots &&
                  (op.kernel == 1 || op.kernel == 3),
              where + ": sources are no slots, or kernel is not 1 or 3");
    for (std::int64_t offset :
         {op.scale, op.shift, op.weight_a, op.bias_a, op.weight_b, op.bias_b, op.head, op.skip, op.gain_a, op.gain_b})
      require(offset >= 0 && offset % 16 == 0 && offset <= d.packed_bytes, where + ": a weight lies outside");
  }
  const auto folds = static_cast<std::int32_t>(d.fold_jobs.size()),
             packs = static_cast<std::int32_t>(d.pack_jobs.size());
  constexpr std::int32_t kFoldsPerLaunch = kMaxSources / kSourcesPerFold;
  for (std::int32_t first = 0; first < folds; first += kFoldsPerLaunch)
    folds_.push_back({first, std::min(kFoldsPerLaunch, folds - first), 0, 0});
  const auto quantised = static_cast<std::int32_t>(d.quantise_jobs.size());
  for (std::int32_t first = 0; first < quantised; first += kMaxSources)
    quantisings_.push_back({first, std::min(kMaxSources, quantised - first), 0, 0});
  for (std::int32_t first = 0; first < packs; first += kMaxSources) {
    Launch launch{first, std::min(kMaxSources, packs - first), static_cast<std::int64_t>(chunks_.size()), 0};
    for (std::int32_t job = first; job < first + launch.count; ++job)
      for (std::int32_t start = 0; start < d.pack_jobs[job].count; start += kChunk)
        chunks_.push_back({job, start});
    launch.chunks = static_cast<std::int32_t>(static_cast<std::int64_t>(chunks_.size()) - launch.first_chunk);
    packs_.push_back(launch);
  }
}

Plan::~Plan() {
  const RelaxedCapture relaxed; // another thread may be capturing
  for (auto &[device, here] : on_device_)
    cudaFree(here.memory);
}

std::int64_t Plan::workspace_bytes(std::int64_t n, std::int64_t h, std::int64_t w) const {
  require(n >= 1 && h >= 1 && w >= 1 && n <= kMaxExtent && h <= kMaxExtent / n && w <= kMaxExtent / (n * h),
          "n, h and w must be at least 1 and their product at most 2^40");
  const std::int64_t slot = n * h * w * kChannels * 2;
  require(slot <= (1LL << 62) / description_.num_slots, "the workspace size overflows 64 bits");
  return rounded_up(slot * description_.num_slots, kPartAlignment) + description_.packed_bytes +
         description_.fold_count * static_cast<std::int64_t>(sizeof(double));
}

void Plan::check(const Call &call) const {
  const std::int64_t needed = workspace_bytes(call.n, call.h, call.w);
  require(call.workspace != nullptr && call.image != nullptr && call.out != nullptr, "a pointer is null");
  require(reinterpret_cast<std::uintptr_t>(call.workspace) % kAlignment == 0,
          "the workspace is not aligned to 64 bytes");
  require(reinterpret_cast<std::uintptr_t>(call.image) % alignof(float) == 0 &&
              reinterpret_cast<std::uintptr_t>(call.out) % alignof(float) == 0,
          "the image or the output is not aligned to 4 bytes");
  require(call.workspace_bytes >= needed, "the workspace has " + std::to_string(call.workspace_bytes) + " bytes; " +
                                              std::to_string(needed) + " are needed");
  for (std::int64_t i = 0; i < description_.num_parameters; ++i)
    require(call.parameters.addresses[i] != 0 && call.parameters.types[i] <= kSourceBf16,
            "parameter " + std::to_string(i) + " has no address, or an unknown type");
}

void Plan::run(const Call &call) const {
  check(call);
  require(call.timeline == nullptr ||
              (call.timeline->operations() == description_.ops.size() && !call.timeline->used()),
          "a timeline serves one call, and names each operation");
  const RelaxedCapture relaxed; // before the first call that may begin a context
  use_device(call.device);
  enqueue(call, on_device(call.device));
}

std::unique_ptr<Graph> Plan::capture(const Call &call) const {
  check(call);
  const RelaxedCapture relaxed; // before the first call that may begin a context
  use_device(call.device);
  const OnDevice &here = on_device(call.device);
  const PrivateStream stream;
  Call inside = call;
  inside.stream = stream;
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "capture");
  try {
    enqueue(inside, here);
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph != nullptr)
      cudaGraphDestroy(graph);
    throw;
  }
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  cudaGraphExec_t exec = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(error, "graph");
  return std::make_unique<Graph>(call.device, exec);
}

const Plan::OnDevice &Plan::on_device(int device) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = on_device_.find(device);
  if (found != on_device_.end())
    return found->second;
  const Description &d = description_;
  const std::int64_t fold_jobs = 0, quantise_jobs = fold_jobs + bytes_of(d.fold_jobs),
                     pack_jobs = quantise_jobs + bytes_of(d.quantise_jobs), chunks = pack_jobs + bytes_of(d.pack_jobs),
                     maps = chunks + bytes_of(chunks_), size = maps + bytes_of(d.maps);
  std::vector<unsigned char> image(static_cast<std::size_t>(size));
  const auto put = [&image](std::int64_t offset, const auto &values) {
    if (!values.empty())
      std::memcpy(image.data() + offset, values.data(), values.size() * sizeof(values[0]));
  };
  put(fold_jobs, d.fold_jobs);
  put(quantise_jobs, d.quantise_jobs);
  put(pack_jobs, d.pack_jobs);
  put(chunks, chunks_);
  put(maps, d.maps);
  OnDevice here{};
  here.device.sm_count = attribute(cudaDevAttrMultiProcessorCount, device);
  here.device.capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  // Memory of our own, and a stream of our own: the caller's stream may be under capture, and nothing of it is waited
  // for.
  check_cuda(cudaMalloc(&here.memory, static_cast<std::size_t>(std::max<std::int64_t>(size, 1))),
             "tables of the weights");
  try {
    const PrivateStream stream;
    check_cuda(cudaMemcpyAsync(here.memory, image.data(), image.size(), cudaMemcpyHostToDevice, stream),
               "tables of the weights");
    check_cuda(cudaStreamSynchronize(stream), "tables of the weights");
  } catch (...) {
    cudaFree(here.memory);
    throw;
  }
  here.fold_jobs = at<FoldJob>(here.memory, fold_jobs);
  here.quantise_jobs = at<QuantiseJob>(here.memory, quantise_jobs);
  here.pack_jobs = at<PackJob>(here.memory, pack_jobs);
  here.chunks = at<Chunk>(here.memory, chunks);
  here.maps = at<std::int32_t>(here.memory, maps);
  return on_device_.emplace(device, here).first->second;
}

void Plan::enqueue(const Call &call, const OnDevice &here) const {
  const std::int64_t slot = call.n * call.h * call.w * kChannels * 2;
  const std::int64_t packed_at = rounded_up(slot * description_.num_slots, kPartAlignment);
  auto *packed = at<unsigned char>(call.workspace, packed_at);
  auto *fold = at<double>(call.workspace, packed_at + description_.packed_bytes);
  const TimedCall whole(call.timeline, call.stream);
  pack_weights(call, here, packed, fold);
  for (std::size_t i = 0; i < description_.ops.size(); ++i) {
    const Op &op = description_.ops[i];
    const Timed timed(call.timeline, call.stream, static_cast<std::int32_t>(i));
    const cudaError_t error = launch(op, i == 0, call, here, packed);
    if (error != cudaSuccess)
      check_cuda(error, "op " + std::to_string(i) + " (" + kNames[op.kind] + ")");
  }
}

void Plan::pack_weights(const Call &call, const OnDevice &here, unsigned char *packed, double *fold_values) const {
  const auto set = [&](Sources &sources, std::int32_t i, std::int32_t parameter) {
    if (parameter == kBytes) {
      sources.address[i] = packed;
      sources.type[i] = kSourceByte;
    } else if (parameter >= 0) {
      sources.address[i] = reinterpret_cast<const void *>(call.parameters.addresses[parameter]);
      sources.type[i] = call.parameters.types[parameter];
    } else {
      sources.address[i] = nullptr;
    }
  };
  for (const Launch &part : folds_) {
    FoldParams params{};
    for (std::int32_t i = 0; i < part.count * kSourcesPerFold; ++i)
      set(params.sources, i, description_.fold_sources[static_cast<std::size_t>(part.first) * kSourcesPerFold + i]);
    params.jobs = here.fold_jobs + part.first;
    params.fold = fold_values;
    const Timed timed(call.timeline, call.stream, -1, "weights: fold");
    check_cuda(fold(params, part.count, call.stream), "folding of weights");
  }
  for (const Launch &part : quantisings_) {
    QuantiseParams params{};
    for (std::int32_t i = 0; i < part.count; ++i)
      set(params.sources, i, description_.quantise_sources[static_cast<std::size_t>(part.first) + i]);
    params.jobs = here.quantise_jobs + part.first;
    params.rows = description_.quantise_jobs[0].rows;
    params.fold = fold_values;
    params.packed = packed;
    const Timed timed(call.timeline, call.stream, -1, "weights: quantise");
    check_cuda(quantise(params, part.count, call.stream), "quantising of weights");
  }
  for (const Launch &part : packs_) {
    PackParams params{};
    for (std::int32_t i = 0; i < part.count; ++i)
      set(params.sources, i, description_.pack_sources[static_cast<std::size_t>(part.first) + i]);
    params.first_job = part.first;
    params.jobs = here.pack_jobs;
    params.chunks = here.chunks + part.first_chunk;
    params.maps = here.maps;
    params.fold = fold_values;
    params.packed = packed;
    const Timed timed(call.timeline, call.stream, -1, "weights: pack");
    check_cuda(pack(params, part.chunks, call.stream), "packing of weights");
  }
}

cudaError_t Plan::launch(const Op &op, bool first, const Call &call, const OnDevice &here,
                         unsigned char *packed) const {
  const Description &d = description_;
  const std::int64_t stride = call.n * call.h * call.w * kChannels; // elements of a slot
  const auto slot = [&](std::int32_t index) { return at<unsigned char>(call.workspace, index * stride * 2); };
  const auto floats = [&](std::int64_t offset) { return at<const float>(packed, offset); };
  switch (op.kind) {
  case kFirstConv: {
    FirstConv args{};
    args.image = call.image;
    args.dst = slot(op.dst);
    args.scale = floats(op.scale);
    args.shift = floats(op.shift);
    args.weight = floats(op.weight_a);
    args.bias = floats(op.bias_a);
    args.n = call.n, args.cin = d.cin, args.h = call.h, args.w = call.w;
    return first_conv(d.type, args, here.device, call.stream);
  }
  case kResidualBlock: {
    ResidualBlockFp8 args{};
    args.src = slot(op.src);
    args.dst = slot(op.dst);
    args.scale = floats(op.scale);
    args.shift = floats(op.shift);
    args.weight_a = packed + op.weight_a;
    args.bias_a = floats(op.bias_a);
    args.weight_b = packed + op.weight_b;
    args.bias_b = floats(op.bias_b);
    args.n = call.n, args.h = call.h, args.w = call.w;
    args.early_weights = !first; // in front of the first operation are the kernels that pack the weights
#ifdef MEMNET_HOPPER
    args.gain_a = floats(op.gain_a);
    args.gain_b = floats(op.gain_b);
    if (d.fp8)
      return residual_block_sm90_fp8(args, here.device, call.stream);
    if (d.hopper)
      return residual_block_sm90(d.type, args, here.device, call.stream);
#endif
    return residual_block_sm80(d.type, args, here.device, call.stream);
  }
  case kGate: {
    Gate args{};
    args.slots = call.workspace;
    args.slot_stride = stride;
    args.num_src = op.num_src;
    args.dst = slot(op.dst);
    args.scale = floats(op.scale);
    args.shift = floats(op.shift);
    args.weight = packed + op.weight_a;
    args.bias = floats(op.bias_a);
    args.pixels = call.n * call.h * call.w;
    return gate(d.type, args, here.device, call.stream);
  }
  default: {
    Reconstruct args{};
    args.slots = slot(op.src);
    args.slot_stride = stride;
    args.num_src = op.num_src;
    args.kernel = op.kernel;
    args.clamp = op.clamp;
    args.image = call.image;
    args.out = call.out;
    args.scale = floats(op.scale);
    args.shift = floats(op.shift);
    args.weight = floats(op.weight_a);
    args.bias = floats(op.bias_a);
    args.head = floats(op.head);
    args.skip = floats(op.skip);
    args.n = call.n, args.cout = d.cout, args.h = call.h, args.w = call.w;
    args.image_channels = d.cin;
    return reconstruct(d.type, args, here.device, call.stream);
  }
  }
}

} // namespace memnet::cuda

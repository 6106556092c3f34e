#include "runner.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <chrono>
#include <stdexcept>

#include "kernels.h"

namespace memnet {

std::int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

namespace {

constexpr std::int64_t kAlignment = 64;
constexpr std::int64_t kMaxChannels = 1 << 16;
constexpr int kMaxThreads = 1024;

[[noreturn]] void fail(const std::string &what) { throw std::invalid_argument(what); }

void require(bool good, const std::string &what) {
  if (!good)
    fail(what);
}

std::vector<const Kernels *> runnable_kernels() {
  std::vector<const Kernels *> found;
#ifdef MEMNET_X86
  __builtin_cpu_init(); // also asks the operating system whether it saves the wide registers
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    found.push_back(&avx512_kernels());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&avx2_kernels());
#endif
  found.push_back(&baseline_kernels());
  return found;
}

std::int64_t times(std::int64_t a, std::int64_t b) {
  std::int64_t product;
  require(!__builtin_mul_overflow(a, b, &product), "the workspace size overflows 64 bits");
  return product;
}

std::int64_t plus(std::int64_t a, std::int64_t b) {
  std::int64_t sum;
  require(!__builtin_add_overflow(a, b, &sum), "the workspace size overflows 64 bits");
  return sum;
}

struct Layout {
  std::int64_t slot_floats;
  std::int64_t mid_floats;
  std::int64_t scratch_floats; // per thread
  std::int64_t bytes;
};

Layout lay_out(const Shape &shape, Algorithm algorithm, const Kernels &kernels, int threads) {
  require(shape.n >= 1 && shape.h >= 1 && shape.w >= 1, "n, h and w must be at least 1");
  require(shape.cin >= 1 && shape.cin <= kMaxChannels, "cin must be in 1..65536");
  require(shape.cout >= 1 && shape.cout <= kMaxChannels, "cout must be in 1..65536");
  require(shape.cp >= 16 && shape.cp <= kMaxChannels && shape.cp % 16 == 0, "cp must be a multiple of 16 in 16..65536");
  require(shape.num_slots >= 1 && shape.num_slots <= kMaxChannels, "num_slots must be in 1..65536");
  require(threads >= 1 && threads <= kMaxThreads, "threads must be in 1..1024");
  const std::int64_t pixels = times(times(shape.n, shape.h), shape.w);
  times(times(pixels, shape.cin > shape.cout ? shape.cin : shape.cout), sizeof(float));
  Layout layout;
  layout.slot_floats = times(pixels, shape.cp);
  // Scratch holds a few rows or blocks; once a slot's bytes fit 64 bits thousandfold, its size cannot overflow either.
  times(layout.slot_floats, 4096);
  layout.mid_floats = kernels.mid_floats(shape, algorithm, threads);
  layout.scratch_floats = kernels.scratch_floats(shape, algorithm, threads);
  const std::int64_t slots = plus(times(layout.slot_floats, shape.num_slots), layout.mid_floats);
  layout.bytes = times(plus(slots, times(layout.scratch_floats, threads)), sizeof(float));
  return layout;
}

// One operation's arguments against the plan; `where` names the operation in messages.
struct Checker {
  const Shape &shape;
  std::string where;

  void slot(std::int32_t index, const char *name) const {
    require(index >= 0 && index < shape.num_slots, where + ": " + name + " slot " + std::to_string(index) +
                                                       " is not in 0.." + std::to_string(shape.num_slots - 1));
  }
  void pointer(std::uint64_t address, const char *name) const {
    require(address != 0, where + ": " + name + " is null");
    require(address % alignof(float) == 0, where + ": " + name + " is not aligned to 4 bytes");
  }
  void sources(const Op &op) const {
    require(op.num_src >= 1, where + ": num_src must be at least 1");
    pointer(op.srcs, "srcs");
    for (std::int32_t j = 0; j < op.num_src; ++j)
      slot(reinterpret_cast<const std::int32_t *>(op.srcs)[j], "source");
  }
  void check(const Op &op) const {
    require(op.kind >= kFirstConv && op.kind <= kReconstruct, where + ": unknown kind " + std::to_string(op.kind));
    pointer(op.scale, "scale");
    pointer(op.shift, "shift");
    pointer(op.weight_a, "weight_a");
    pointer(op.bias_a, "bias_a");
    if (op.kind != kReconstruct)
      slot(op.dst, "dst");
    if (op.kind == kResidualBlock) {
      slot(op.src, "src");
      require(op.src != op.dst, where + ": dst must differ from src");
      pointer(op.weight_b, "weight_b");
      pointer(op.bias_b, "bias_b");
    }
    if (op.kind == kGate || op.kind == kReconstruct)
      sources(op);
    if (op.kind == kGate)
      for (std::int32_t j = 0; j < op.num_src; ++j)
        require(reinterpret_cast<const std::int32_t *>(op.srcs)[j] != op.dst, where + ": dst must not be a source");
    if (op.kind == kReconstruct) {
      pointer(op.head_weights, "head_weights");
      require(op.kernel == 1 || op.kernel == 3, where + ": kernel must be 1 or 3");
      require(op.skip_weight == 0.0f || shape.cin == 1 || shape.cin == shape.cout,
              where + ": the global skip needs cin == 1 or cin == cout");
    }
  }
};

} // namespace

void prefer_huge_pages(void *workspace, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  constexpr std::int64_t huge_page = 1 << 21;
  if (bytes < 2 * huge_page)
    return;
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(workspace) / page * page;
  const std::uintptr_t last = (reinterpret_cast<std::uintptr_t>(workspace) + bytes + page - 1) / page * page;
  madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
  (void)workspace;
  (void)bytes;
#endif
}

const Kernels &choose_kernels(const std::string &isa) {
  std::vector<const Kernels *> found = runnable_kernels();
#ifdef MEMNET_AVX512_BF16
  if (why_no_bf16().empty())
    found.push_back(&avx512_bf16_kernels()); // behind the others: "auto" is fp32
#endif
  std::string names;
  for (const Kernels *kernels : found) {
    if (isa == "auto" || isa == kernels->isa)
      return *kernels;
    names += std::string(" ") + kernels->isa;
  }
  fail("isa '" + isa + "' is not available; this machine runs: auto" + names);
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Kernels *kernels : runnable_kernels())
    names.emplace_back(kernels->isa);
  return names;
}

std::string why_no_bf16() {
#if defined(MEMNET_AVX512_BF16)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return "";
  return "this CPU has no AVX512-BF16";
#elif defined(MEMNET_X86)
  return "the compiler that built the native module knows no AVX512-BF16";
#else
  return "bf16 needs an x86-64 CPU with AVX512-BF16";
#endif
}

Algorithm parse_algorithm(const std::string &name) {
  if (name == "direct")
    return Algorithm::kDirect;
  if (name == "winograd")
    return Algorithm::kWinograd;
  fail("algorithm '" + name + "' is unknown; choose direct or winograd");
}

std::int64_t workspace_bytes(const Shape &shape, Algorithm algorithm, const std::string &isa, int threads) {
  return lay_out(shape, algorithm, choose_kernels(isa), threads).bytes;
}

void run(const Op *ops, std::size_t count, const Shape &shape, void *workspace, std::int64_t bytes, const float *image,
         float *out, Algorithm algorithm, const std::string &isa, int threads, Times *times) {
  const Kernels &kernels = choose_kernels(isa);
  const Layout layout = lay_out(shape, algorithm, kernels, threads);
  require(workspace != nullptr, "the workspace pointer is null");
  require(reinterpret_cast<std::uintptr_t>(workspace) % kAlignment == 0, "the workspace is not aligned to 64 bytes");
  require(bytes >= layout.bytes,
          "the workspace has " + std::to_string(bytes) + " bytes; " + std::to_string(layout.bytes) + " are needed");
  require(image != nullptr && out != nullptr, "the image or output pointer is null");
  require(reinterpret_cast<std::uintptr_t>(image) % alignof(float) == 0 &&
              reinterpret_cast<std::uintptr_t>(out) % alignof(float) == 0,
          "the image or output pointer is not aligned to 4 bytes");
  for (std::size_t i = 0; i < count; ++i)
    Checker{shape, "op " + std::to_string(i)}.check(ops[i]);

  prefer_huge_pages(workspace, layout.bytes);
  Frame frame;
  frame.shape = shape;
  frame.algorithm = algorithm;
  frame.threads = threads;
  frame.image = image;
  frame.out = out;
  frame.slots = static_cast<float *>(workspace);
  float *behind = frame.slots + layout.slot_floats * shape.num_slots;
  frame.mid = layout.mid_floats == 0 ? nullptr : behind;
  frame.scratch = behind + layout.mid_floats;
  frame.scratch_floats = layout.scratch_floats;
  frame.times = nullptr;
  for (std::size_t i = 0; i < count; ++i) {
    if (times == nullptr) {
      kernels.run_op(ops[i], frame);
      continue;
    }
    Times *whole = times + i * (static_cast<std::size_t>(threads) + 1);
    frame.times = whole + 1;
    whole->begin = nanoseconds();
    kernels.run_op(ops[i], frame);
    whole->end = nanoseconds();
  }
}

double multiply_add_rate(const std::string &isa, int threads, double seconds) {
  const Kernels &kernels = choose_kernels(isa);
  require(threads >= 1 && threads <= kMaxThreads, "threads must be in 1..1024");
  require(seconds > 0.0 && seconds <= 10.0, "seconds must be above 0 and at most 10");
  for (std::int64_t rounds = 1 << 16;; rounds *= 2) {
    const std::int64_t begin = nanoseconds(), flop = kernels.multiply_add(threads, rounds);
    const double took = 1e-9 * static_cast<double>(nanoseconds() - begin);
    if (2 * took >= seconds)
      return static_cast<double>(flop) / took;
  }
}

} // namespace memnet

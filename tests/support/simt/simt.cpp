// The model of simt.h.
#include "simt.h"

#include <cmath>
#include <csetjmp>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>

#include <ucontext.h>

namespace simt {

unsigned order = 0;
int check_only_launch = 0;
int last_block_only = 0;
std::string last_error;
unsigned last_blocks, last_threads, last_shared_bytes;

namespace {

constexpr std::size_t kStackBytes = 256 * 1024 + 4160; // no power of two: stacks would share cache lines

struct Range {
  const unsigned char *begin;
  std::uint64_t bytes;
  bool written, previous;
  std::vector<bool> stored;
};
std::vector<Range> ranges;

struct Barrier {
  std::uint32_t count, pending, phase; // phases ended so far
};

struct Warp {
  const char *operation = nullptr;
  int arrived = 0;
  unsigned generation = 0;
  void *lanes[32];
  int registers = 0;
  std::deque<std::vector<std::vector<Product>>> committed; // [batch][lane][product]
  std::size_t done = 0;                                    // products of the front batch
};

struct Rendezvous {
  int arrived = 0;
  unsigned generation = 0;
  int threads = 0;
};

enum class When { kAtOnce, kLate, kRandom };

struct Block {
  Index grid{}, size{}, index{};
  std::vector<unsigned char> shared, shared_async;
  std::map<std::uint32_t, Barrier> barriers;
  std::map<int, Rendezvous> named;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  int free_registers = 0;
  bool overlap = false;
  When when = When::kAtOnce;
  std::mt19937 random;
};
Block block;

struct Fiber {
  jmp_buf resume;
  std::function<bool()> condition;
  const char *waiting_for = nullptr;
  bool started = false, finished = false;
};
std::vector<Fiber> fibers;
std::unique_ptr<unsigned char[]> stacks;
std::size_t stack_count = 0;
std::size_t current = 0;
jmp_buf scheduler;
const std::function<void()> *kernel_body = nullptr;
bool failed = false, in_fiber = false;

void fiber_entry() {
  (*kernel_body)();
  fibers[current].finished = true;
  _longjmp(scheduler, 1);
}

void switch_to(std::size_t index) {
  current = index;
  in_fiber = true;
  if (_setjmp(scheduler) != 0) {
    in_fiber = false;
    return;
  }
  Fiber &fiber = fibers[index];
  if (fiber.started)
    _longjmp(fiber.resume, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks.get() + index * kStackBytes;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_entry, 0);
  setcontext(&context);
}

bool chance(double probability) { return std::uniform_real_distribution<>(0, 1)(block.random) < probability; }

const Range *find_range(const void *address, std::uint32_t bytes) {
  const auto *p = static_cast<const unsigned char *>(address);
  for (const Range &range : ranges)
    if (p >= range.begin && p + bytes <= range.begin + range.bytes)
      return &range;
  return nullptr;
}

// ---- Asynchronous copies

// The oldest entry of the thread's queue happens.
void step_copies(Thread &thread) {
  const Copy copy = thread.copies.front();
  thread.copies.pop_front();
  if (copy.barrier) {
    barrier_arrive(copy.barrier, 1);
  } else if (!copy.commit) {
    unsigned char *to = write_shared(copy.shared, 16, thread);
    if (copy.bytes)
      std::memcpy(to, copy.global, copy.bytes);
    std::memset(to + copy.bytes, 0, 16 - copy.bytes);
  }
}

// ---- Products

struct Halves {
  float value[2][65536];
  Halves() {
    for (unsigned bits = 0; bits < 65536; ++bits) {
      const unsigned sign = bits >> 15, exponent = bits >> 10 & 31, mantissa = bits & 1023;
      float v = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                 : std::ldexp(static_cast<float>(mantissa + 1024), static_cast<int>(exponent) - 25);
      value[0][bits] = sign ? -v : v;
      const std::uint32_t wide = bits << 16;
      std::memcpy(&value[1][bits], &wide, 4);
    }
  }
};
const Halves &halves() {
  static const Halves table;
  return table;
}

struct Bytes {
  float value[256];
  Bytes() {
    for (int bits = 0; bits < 256; ++bits) {
      const int exponent = bits >> 3 & 15, mantissa = bits & 7;
      const float v = (bits & 127) == 127 ? NAN
                      : exponent == 0     ? std::ldexp(static_cast<float>(mantissa), -9)
                                          : std::ldexp(static_cast<float>(mantissa + 8), exponent - 10);
      value[bits] = bits & 128 ? -v : v;
    }
  }
};
const Bytes &e4m3() {
  static const Bytes table;
  return table;
}

// 16 bytes of operands as numbers: 16 of e4m3, else 8.
void decode(const void *bytes, int type, float *values) {
  if (type == kE4m3) {
    for (int k = 0; k < 16; ++k)
      values[k] = e4m3().value[static_cast<const unsigned char *>(bytes)[k]];
    return;
  }
  for (int k = 0; k < 8; ++k) {
    std::uint16_t bits;
    std::memcpy(&bits, static_cast<const unsigned char *>(bytes) + 2 * k, 2);
    values[k] = halves().value[type][bits];
  }
}

// One wgmma of a warp: rows 16 w .. 16 w + 15 of the warpgroup's D, B without swizzle from the tensor cores' view of
// shared memory: 16 bytes of column n and of the first (second) half of K at start + n / 8 * stride + n % 8 * 16 (+
// leading). Of A, register r holds 4 bytes of row lane / 4 + r % 2 * 8, beginning at byte lane % 4 * 4 of half r / 2.
void step_product(Warp &warp) {
  auto &lanes = warp.committed.front();
  const std::size_t i = warp.done;
  const Product &first = lanes[0][i];
  for (const auto &lane : lanes)
    if (lane[i].descriptor != first.descriptor || lane[i].n != first.n || lane[i].add != first.add)
      fail("wgmma: the lanes give different operands");
  const auto field = [&](int shift) { return static_cast<std::uint32_t>(first.descriptor >> shift & 0x3fff) << 4; };
  const std::uint32_t start = field(0), leading = field(16), stride = field(32);
  if (first.descriptor >> 46 || (first.descriptor & 0xc000c000u) != 0)
    fail("wgmma: a descriptor with swizzling, base offset or an address that does not fit");
  static float a[16][32], b[256][32];
  const int count = first.type == kE4m3 ? 32 : 16;
  for (int row = 0; row < 16; ++row)
    for (int half = 0; half < 2; ++half) {
      std::uint32_t registers[4];
      for (int quarter = 0; quarter < 4; ++quarter)
        registers[quarter] = lanes[row % 8 * 4 + quarter][i].a[half * 2 + row / 8];
      decode(registers, first.type, a[row] + half * count / 2);
    }
  for (int n = 0; n < first.n; ++n)
    for (int half = 0; half < 2; ++half)
      decode(read_shared_async(start + n / 8 * stride + n % 8 * 16 + half * leading, 16), first.type,
             b[n] + half * count / 2);
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < first.n / 2; ++j) {
      const float *row = a[lane / 4 + (j >> 1 & 1) * 8], *column = b[j / 4 * 8 + lane % 4 * 2 + (j & 1)];
      float sum = 0;
      for (int k = 0; k < count; ++k)
        sum += row[k] * column[k];
      float &d = lanes[lane][i].d[j];
      d = first.add ? d + sum : sum;
    }
  if (++warp.done == lanes[0].size()) {
    warp.committed.pop_front();
    warp.done = 0;
  }
}

bool products_ready(const Warp &warp) {
  if (warp.committed.empty())
    return false;
  const auto &lanes = warp.committed.front();
  for (const auto &lane : lanes)
    if (lane.size() != lanes[0].size() || lane.empty())
      return false;
  return true;
}

// Some asynchronous work happens; false if there is none.
bool step_asynchronous() {
  std::vector<std::size_t> copying, multiplying;
  for (std::size_t t = 0; t < block.threads.size(); ++t)
    if (!block.threads[t].copies.empty())
      copying.push_back(t);
  for (std::size_t w = 0; w < block.warps.size(); ++w)
    if (products_ready(block.warps[w]))
      multiplying.push_back(w);
  const std::size_t count = copying.size() + multiplying.size();
  if (count == 0)
    return false;
  // Products and copies are equally likely, however many threads copy.
  if (!multiplying.empty() && (copying.empty() || chance(.5))) {
    Warp &warp = block.warps[multiplying[block.random() % multiplying.size()]];
    for (std::size_t n = 1 + block.random() % 36; n > 0 && products_ready(warp); --n)
      step_product(warp);
  } else {
    for (std::size_t n = 1 + block.random() % 64; n > 0; --n) {
      Thread &thread = block.threads[copying[block.random() % copying.size()]];
      if (!thread.copies.empty())
        step_copies(thread);
    }
  }
  return true;
}

bool runnable(Fiber &fiber) {
  if (fiber.finished)
    return false;
  return !fiber.condition || fiber.condition();
}

// Lanes that run only when nobody else can.
std::vector<bool> starving;

// Runs the lanes of the warp that can run, once; false if none could. At random, some of them only: lanes need not stay
// together. all: the starving ones too.
bool run_warp(std::size_t warp, bool all) {
  bool any = false;
  const std::size_t first = warp * 32, count = std::min<std::size_t>(32, fibers.size() - first);
  const bool some = block.when == When::kRandom && chance(.3);
  const std::size_t start = some ? block.random() % count : 0, end = some ? 1 + block.random() % count : count;
  for (std::size_t i = 0; (i < end || !any) && i < count && !failed; ++i) {
    const std::size_t index = first + (block.when == When::kLate ? count - 1 - i : (start + i) % count);
    Fiber &fiber = fibers[index];
    if ((!all && starving[index]) || !runnable(fiber))
      continue;
    any = true;
    fiber.condition = nullptr;
    switch_to(index);
  }
  return any;
}

std::string who_waits() {
  std::map<std::string, std::set<std::size_t>> waiting;
  for (std::size_t t = 0; t < fibers.size(); ++t)
    if (!fibers[t].finished)
      waiting[fibers[t].waiting_for ? fibers[t].waiting_for : "?"].insert(t / 32);
  std::string text;
  for (const auto &[what, warps] : waiting) {
    text += (text.empty() ? "" : "; ") + what + ": warps";
    for (std::size_t warp : warps)
      text += " " + std::to_string(warp);
  }
  return text;
}

void run_block() {
  const std::size_t warps = block.warps.size();
  starving.assign(fibers.size(), false);
  if (block.when == When::kRandom && chance(.5))
    for (std::size_t t = 0; t < starving.size(); ++t)
      starving[t] = chance(.3);
  // Each role of a kernel is fast in some runs and slow in others.
  std::vector<double> weight(warps, 1);
  if (block.when == When::kRandom) {
    static constexpr double kChoices[] = {1, 1, 3, 10};
    for (double &w : weight)
      w = kChoices[block.random() % 4];
  }
  const double asynchronous = block.when != When::kRandom ? 0 : std::vector<double>{.02, .2, .6}[block.random() % 3];
  std::size_t next = 0;
  for (;;) {
    if (asynchronous > 0 && chance(asynchronous))
      step_asynchronous();
    std::size_t start = next;
    if (block.when == When::kRandom)
      start = std::discrete_distribution<std::size_t>(weight.begin(), weight.end())(block.random);
    bool any = false;
    for (std::size_t i = 0; i < 2 * warps && !any && !failed; ++i) {
      const std::size_t warp = block.when == When::kLate ? (start + 2 * warps - i) % warps : (start + i) % warps;
      any = run_warp(warp, i >= warps);
      next = block.when == When::kLate ? (warp + warps - 1) % warps : (warp + 1) % warps;
    }
    if (failed)
      return;
    if (!any) {
      bool finished = true;
      for (const Fiber &fiber : fibers)
        finished = finished && fiber.finished;
      if (finished)
        return;
      if (!step_asynchronous()) {
        last_error = "deadlock: " + who_waits();
        failed = true;
        return;
      }
    }
  }
}

} // namespace

Thread &this_thread() { return block.threads[current]; }
Index block_size() { return block.size; }
Index grid_size() { return block.grid; }

void fail(const std::string &message) {
  if (!failed)
    last_error = message + " (block " + std::to_string(block.index.x) + ", thread " + std::to_string(current) + ")";
  failed = true;
  if (!in_fiber)
    throw std::runtime_error(last_error);
  _longjmp(scheduler, 1); // the fiber is abandoned
}

void wait_until(std::function<bool()> condition, const char *what) {
  if (condition())
    return;
  Fiber &fiber = fibers[current];
  fiber.condition = std::move(condition);
  fiber.waiting_for = what;
  if (_setjmp(fiber.resume) == 0)
    _longjmp(scheduler, 1);
}

void warp_collective(const char *name, void *mine, const std::function<void(void **)> &action) {
  Warp &warp = block.warps[this_thread().warp];
  if (warp.arrived == 0)
    warp.operation = name;
  else if (std::strcmp(warp.operation, name) != 0)
    fail(std::string("lanes of a warp call ") + warp.operation + " and " + name);
  warp.lanes[this_thread().lane] = mine;
  const unsigned generation = warp.generation;
  if (++warp.arrived == 32) {
    action(warp.lanes);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_until([&warp, generation] { return warp.generation != generation; }, name);
  }
}

void sync_warp() {
  warp_collective("syncwarp", nullptr, [](void **) {});
}

void sync_named(int barrier, int threads) {
  Rendezvous &meeting = block.named[barrier];
  if (meeting.arrived == 0)
    meeting.threads = threads;
  else if (meeting.threads != threads)
    fail("a named barrier with two thread counts");
  const unsigned generation = meeting.generation;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    wait_until([&meeting, generation] { return meeting.generation != generation; }, "named barrier");
  }
}

void sync_block() { sync_named(0, static_cast<int>(block.size.x)); }

// ---- Memory

namespace {
std::size_t shared_offset(std::uint32_t address, std::uint32_t bytes) {
  if (address < kSharedBase || address - kSharedBase + bytes > block.shared.size())
    fail("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(address) + " of " +
         std::to_string(block.shared.size()) + " from " + std::to_string(kSharedBase));
  if (address % bytes != 0)
    fail("shared memory: address " + std::to_string(address) + " is not aligned to " + std::to_string(bytes));
  return address - kSharedBase;
}
} // namespace

const unsigned char *read_shared(std::uint32_t address, std::uint32_t bytes) {
  return block.shared.data() + shared_offset(address, bytes);
}

unsigned char *write_shared(std::uint32_t address, std::uint32_t bytes, Thread &by) {
  const std::size_t offset = shared_offset(address, bytes);
  const auto barrier = block.barriers.lower_bound(address > 8 ? address - 7 : 0);
  if (barrier != block.barriers.end() && barrier->first < address + bytes)
    fail("a store to an mbarrier");
  by.unfenced.emplace_back(address, bytes);
  return block.shared.data() + offset;
}

const unsigned char *read_shared_async(std::uint32_t address, std::uint32_t bytes) {
  return block.shared_async.data() + shared_offset(address, bytes);
}

void fence_async() {
  for (const auto &[address, bytes] : this_thread().unfenced)
    std::memcpy(block.shared_async.data() + (address - kSharedBase), block.shared.data() + (address - kSharedBase),
                bytes);
  this_thread().unfenced.clear();
}

void check_global_read(const void *address, std::uint32_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0)
    fail("a global load that is not aligned");
  if (ranges.empty())
    return;
  const Range *range = find_range(address, bytes);
  if (!range)
    fail("a global load out of bounds");
  if (range->previous && block.overlap && !this_thread().waited_for_previous)
    fail("a load of the previous kernel's output before waiting for it");
}

void check_global_write(const void *address, std::uint32_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0)
    fail("a global store that is not aligned");
  if (ranges.empty())
    return;
  Range *range = const_cast<Range *>(find_range(address, bytes));
  if (!range || !range->written)
    fail("a global store out of bounds");
  const std::size_t first = static_cast<const unsigned char *>(address) - range->begin;
  for (std::size_t i = first; i < first + bytes; ++i) {
    if (range->stored[i])
      fail("a second global store to one place");
    range->stored[i] = true;
  }
}

void begin_copy(const Copy &copy) {
  if (!copy.barrier) {
    shared_offset(copy.shared, 16);
    if (copy.bytes > 16)
      fail("cp.async of more than 16 bytes");
    if (copy.bytes)
      check_global_read(copy.global, 16);
  }
  this_thread().copies.push_back(copy);
  if (block.when == When::kAtOnce)
    step_copies(this_thread());
}

void commit_copies() {
  Copy copy;
  copy.commit = true;
  if (block.when != When::kAtOnce)
    this_thread().copies.push_back(copy);
}

void wait_for_copies(int pending_groups) {
  Thread &thread = this_thread();
  int groups = 0;
  for (const Copy &copy : thread.copies)
    groups += copy.commit;
  // What was begun after the last commit belongs to no group and is not waited for.
  while (groups > pending_groups) {
    groups -= thread.copies.front().commit;
    step_copies(thread);
  }
}

// ---- mbarriers

namespace {
Barrier &barrier_at(std::uint32_t address) {
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end())
    fail("not an mbarrier: " + std::to_string(address));
  return found->second;
}
} // namespace

void barrier_init(std::uint32_t address, std::uint32_t count) {
  shared_offset(address, 8);
  if (count == 0)
    fail("an mbarrier that expects nobody");
  if (!block.barriers.emplace(address, Barrier{count, count, 0}).second)
    fail("an mbarrier initialised twice");
}

void barrier_arrive(std::uint32_t address, std::uint32_t count) {
  Barrier &barrier = barrier_at(address);
  if (barrier.pending < count)
    fail("one arrival too many at the mbarrier at " + std::to_string(address));
  barrier.pending -= count;
  if (barrier.pending == 0) {
    barrier.pending = barrier.count;
    ++barrier.phase;
  }
}

void barrier_wait(std::uint32_t address, std::uint32_t parity) {
  const Barrier &barrier = barrier_at(address);
  wait_until([&barrier, parity] { return (barrier.phase & 1) != parity; }, "mbarrier");
}

// ---- Products and registers

// wgmma's instructions are .sync.aligned: the lanes of a warp go through them together.
void products_fence() {
  sync_warp();
  this_thread().fenced_registers = true;
}

void products_issue(const Product &product) {
  Thread &thread = this_thread();
  if (!thread.fenced_registers)
    fail("wgmma without wgmma.fence in front of it");
  if (!product.add)
    for (int i = 0; i < product.n / 2; ++i)
      product.d[i] = NAN; // unknown until the wait
  thread.issued.push_back(product);
}

void products_commit() {
  sync_warp();
  Thread &thread = this_thread();
  Warp &warp = block.warps[thread.warp];
  // The lanes of a warp commit one after the other into the same batch: the first that this lane has not joined.
  for (auto &batch : warp.committed)
    if (batch[thread.lane].empty()) {
      batch[thread.lane] = std::move(thread.issued);
      thread.issued.clear();
      goto committed;
    }
  warp.committed.emplace_back(32);
  warp.committed.back()[thread.lane] = std::move(thread.issued);
  thread.issued.clear();
committed:
  if (block.when == When::kAtOnce)
    while (products_ready(warp))
      step_product(warp);
}

void products_wait() {
  Thread &thread = this_thread();
  Warp &warp = block.warps[thread.warp];
  const int lane = thread.lane;
  // Late: the products of this warp happen now, so that everything before saw shared memory without them.
  sync_warp();
  if (block.when == When::kLate)
    while (products_ready(warp))
      step_product(warp);
  wait_until(
      [&warp, lane] {
        for (const auto &batch : warp.committed)
          if (!batch[lane].empty())
            return false;
        return true;
      },
      "wgmma");
  thread.fenced_registers = false;
}

void set_registers(int registers) {
  sync_warp();
  Thread &thread = this_thread();
  Warp &warp = block.warps[thread.warp];
  if (thread.lane == 0) {
    const int more = (registers - warp.registers) * 32;
    wait_until([more] { return block.free_registers >= more; }, "setmaxnreg");
    block.free_registers -= more;
    warp.registers = registers;
  }
  sync_warp();
}

float from_16bit(std::uint16_t bits, int type) { return halves().value[type][bits]; }
const float *values_of_16bit(int type) { return halves().value[type]; }

std::uint8_t to_e4m3(float value) {
  if (value != value)
    return 0x7f;
  const std::uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude >= 448)
    return sign | 0x7e;
  if (magnitude < 0.015625) // subnormal: multiples of 2^-9
    return sign | static_cast<std::uint8_t>(std::nearbyint(std::ldexp(magnitude, 9)));
  int exponent;
  std::frexp(magnitude, &exponent);
  const auto mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 4 - exponent))); // 8 .. 16
  return sign | static_cast<std::uint8_t>(((exponent + 6) << 3) + (mantissa - 8));
}

std::uint16_t to_16bit(float value, int type) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  if (value != value)
    return 0x7fff; // the canonical NaN of both
  if (type == 1)
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude >= 65520)
    return sign | 0x7c00;
  if (magnitude < 6.103515625e-05) // subnormal: multiples of 2^-24
    return sign | static_cast<std::uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  int exponent;
  std::frexp(magnitude, &exponent); // magnitude = [.5, 1) 2^exponent
  const auto mantissa =
      static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, 11 - exponent))); // 1024 .. 2048
  return sign | static_cast<std::uint16_t>(((exponent + 14) << 10) + (mantissa - 1024));
}

// ---- Launching

bool run(const std::function<void()> &kernel, unsigned blocks, unsigned threads, unsigned shared_bytes, bool overlap) {
  last_blocks = blocks;
  last_threads = threads;
  last_shared_bytes = shared_bytes;
  last_error.clear();
  if (check_only_launch)
    return true;
  if (threads == 0 || threads % 32 || threads > 1024 || blocks == 0 || shared_bytes > 232448) {
    last_error = "a launch that no GPU takes";
    return false;
  }
  if (stack_count < threads) {
    stacks.reset(new unsigned char[threads * kStackBytes]);
    stack_count = threads;
  }
  kernel_body = &kernel;
  for (unsigned b = last_block_only ? blocks - 1 : 0; b < blocks; ++b) {
    block = Block();
    block.grid = {blocks, 1, 1};
    block.size = {threads, 1, 1};
    block.index = {b, 0, 0};
    block.shared.assign(shared_bytes, 0xff);
    block.shared_async.assign(shared_bytes, 0xff);
    block.overlap = overlap;
    block.when = order == 0 ? When::kAtOnce : order == 1 ? When::kLate : When::kRandom;
    block.random.seed(order * 1000003u + b);
    block.warps.resize(threads / 32);
    const int registers = 65536 / static_cast<int>(threads) / 8 * 8;
    block.free_registers = 65536 - registers * static_cast<int>(threads);
    for (Warp &warp : block.warps)
      warp.registers = registers;
    block.threads.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
      block.threads[t].thread_index = {t, 0, 0};
      block.threads[t].block_index = {b, 0, 0};
      block.threads[t].lane = static_cast<int>(t % 32);
      block.threads[t].warp = static_cast<int>(t / 32);
    }
    fibers.clear();
    fibers.resize(threads);
    failed = false;
    try {
      run_block();
    } catch (const std::runtime_error &) {
      // Asynchronous work failed: last_error says how.
    }
    if (failed)
      return false;
  }
  return true;
}

} // namespace simt

extern "C" {
void simt_order(unsigned order) { simt::order = order; }
void simt_record_only(int on) { simt::check_only_launch = on; }
void simt_last_block_only(int on) { simt::last_block_only = on; }
void simt_clear_ranges() { simt::ranges.clear(); }
void simt_range(const void *begin, std::uint64_t bytes, int written, int previous) {
  simt::ranges.push_back({static_cast<const unsigned char *>(begin), bytes, written != 0, previous != 0, {}});
  if (written)
    simt::ranges.back().stored.resize(bytes);
}
std::uint64_t simt_stored_bytes() {
  std::uint64_t count = 0;
  for (const auto &range : simt::ranges)
    for (const bool stored : range.stored)
      count += stored;
  return count;
}
const char *simt_error() { return simt::last_error.c_str(); }
void simt_last_launch(unsigned out[3]) {
  out[0] = simt::last_blocks;
  out[1] = simt::last_threads;
  out[2] = simt::last_shared_bytes;
}
}

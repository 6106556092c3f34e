// Runs CUDA kernels on a CPU, as they stand: every thread of a block is a fiber, and a seed decides who runs next.
//
// The kernels' own text is compiled by a C++ compiler against the headers of this directory, which replace CUDA's and
// the few of csrc/cuda that hold machine instructions (ptx.cuh, wgmma.cuh, launch.h). What is modelled, and makes a
// launch fail:
// - shared memory by bytes, poisoned with NaN, bounds and alignment checked; global memory by ranges, stores once only;
// - warps: a collective operation waits for its 32 lanes; lanes that call different operations, or never come, are an
// error;
// - mbarriers with counts and phases, named barriers; waiting for ever is a deadlock, arriving once too often an error;
// - asynchronous copies and wgmma happen at once, as late as a wait allows, or at random, as the seed says;
// - wgmma reads a second image of shared memory, which a thread's stores reach by its fence.proxy.async alone.
// Not modelled: timing, banks, the weak order of ordinary stores (they are seen at once), and what the instructions of
// the replaced headers really do on a GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace simt {

struct Index {
  unsigned x, y, z;
};

constexpr std::uint32_t kSharedBase = 4096; // address of the first byte of dynamic shared memory

// What one thread gives to a wgmma: its registers of A and of D[64][n] (+)= A[64][16] B[16][n].
constexpr int kE4m3 = 2; // of Product::type, after the two of kernels.h
struct Product {
  const std::uint32_t *a;
  float *d;
  std::uint64_t descriptor;
  int n;
  int type;
  bool add;
};

struct Copy {
  std::uint32_t shared = 0;
  const void *global = nullptr;
  std::uint32_t bytes = 0;
  std::uint32_t barrier = 0; // not a copy: an arrival here
  bool commit = false;       // not a copy: the end of a group
};

struct Thread {
  Index thread_index, block_index;
  int lane, warp;
  bool waited_for_previous = false;
  std::deque<Copy> copies;
  std::vector<std::pair<std::uint32_t, std::uint32_t>> unfenced; // address, bytes
  bool fenced_registers = false;                                 // wgmma.fence since the accumulators were last touched
  std::vector<Product> issued;                                   // since the last commit
};

Thread &this_thread();
Index block_size();
Index grid_size();
[[noreturn]] void fail(const std::string &message);

// Suspends the calling thread until the condition holds.
void wait_until(std::function<bool()> condition, const char *what);

// All lanes of the warp come together; the last one runs the action on what they brought.
void warp_collective(const char *name, void *mine, const std::function<void(void **)> &action);

void sync_warp();
void sync_block();
void sync_named(int barrier, int threads);

template <class T> T shuffle(T value, int from) {
  struct Lane {
    T value, result;
    int from;
  } mine{value, value, from};
  warp_collective("shfl", &mine, [](void **lanes) {
    for (int i = 0; i < 32; ++i)
      static_cast<Lane *>(lanes[i])->result = static_cast<Lane *>(lanes[static_cast<Lane *>(lanes[i])->from])->value;
  });
  return mine.result;
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

// A pointer to `bytes` bytes of shared memory after the checks; a store is remembered for the thread's next fence.
const unsigned char *read_shared(std::uint32_t address, std::uint32_t bytes);
unsigned char *write_shared(std::uint32_t address, std::uint32_t bytes, Thread &by);
inline unsigned char *write_shared(std::uint32_t address, std::uint32_t bytes) {
  return write_shared(address, bytes, this_thread());
}
const unsigned char *read_shared_async(std::uint32_t address, std::uint32_t bytes); // as the tensor cores see it
void fence_async();

void check_global_read(const void *address, std::uint32_t bytes);
void check_global_write(const void *address, std::uint32_t bytes);

void begin_copy(const Copy &copy);
void commit_copies();
void wait_for_copies(int pending_groups);

// ---- mbarriers, products, registers ---------------------------------------------------------------------------------

void barrier_init(std::uint32_t address, std::uint32_t count);
void barrier_arrive(std::uint32_t address, std::uint32_t count);
void barrier_wait(std::uint32_t address, std::uint32_t parity);

void products_fence();
void products_issue(const Product &product);
void products_commit();
void products_wait();

void set_registers(int registers);

float from_16bit(std::uint16_t bits, int type); // type 0: fp16, 1: bf16
const float *values_of_16bit(int type);         // of all 65536 bit patterns
std::uint16_t to_16bit(float value, int type);
std::uint8_t to_e4m3(float value); // saturated

// ---- Launching ------------------------------------------------------------------------------------------------------

// False on failure, see last_error().
bool run(const std::function<void()> &kernel, unsigned blocks, unsigned threads, unsigned shared_bytes, bool overlap);

extern unsigned order; // 0: threads in order, asynchronous work at once; 1: backwards, as late as possible; else a seed
extern int check_only_launch; // non-zero: launches are recorded, not run
extern int last_block_only;   // non-zero: of a launch, only its last block runs
extern std::string last_error;
extern unsigned last_blocks, last_threads, last_shared_bytes;

} // namespace simt

// For ctypes.
extern "C" {
void simt_order(unsigned order);
void simt_record_only(int on);
void simt_last_block_only(int on); // of each launch: for addresses far from the start
void simt_clear_ranges();
// Global memory that kernels may touch; written says whether they may store there (each byte once). Without any range
// nothing is checked. previous: written by the kernel in front, so not to be read before waiting for it.
void simt_range(const void *begin, std::uint64_t bytes, int written, int previous);
// Bytes of the writable ranges that were stored to since simt_clear_ranges().
std::uint64_t simt_stored_bytes();
const char *simt_error();
void simt_last_launch(unsigned out[3]);
}

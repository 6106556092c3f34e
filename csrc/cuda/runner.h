// Runs a whole plan with one call: packs the weights from the parameters as they are now, then launches every
// operation.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "pack.h"
#include "timeline.h"

namespace memnet::cuda {

// One operation as it is on every device. Offsets are bytes from the start of the packed weights; slots are numbers.
struct Op {
  std::int32_t kind; // OpKind
  std::int32_t src;  // residual block
  std::int32_t dst;
  std::int32_t num_src; // gate: slots 0 .. num_src - 1; reconstruction: src .. src + num_src - 1
  std::int32_t kernel;  // reconstruction
  std::int32_t clamp;
  std::int64_t scale;
  std::int64_t shift;
  std::int64_t weight_a;
  std::int64_t bias_a;
  std::int64_t weight_b;
  std::int64_t bias_b;
  std::int64_t head;
  std::int64_t skip;
  std::int64_t gain_a; // fp8
  std::int64_t gain_b;
};

enum OpKind : std::int32_t { kFirstConv = 0, kResidualBlock = 1, kGate = 2, kReconstruct = 3 };

// A plan without addresses. Built by memnet_fast/backends/cuda_tables.py.
struct Description {
  Type type;
  bool fp8;    // residual blocks in e4m3, everything else as `type`, which is fp16
  bool hopper; // residual blocks by the sm_90a kernel; the packed layout is that kernel's
  std::int64_t cin, cout;
  std::int32_t num_slots;
  std::int64_t num_parameters;
  std::int64_t packed_bytes;
  std::int64_t fold_count; // float64 values
  std::vector<Op> ops;
  std::vector<FoldJob> fold_jobs;
  std::vector<std::int32_t> fold_sources; // [fold_jobs][kSourcesPerFold], indices of parameters, -1: none
  std::vector<QuantiseJob> quantise_jobs;
  std::vector<std::int32_t> quantise_sources; // [quantise_jobs]
  std::vector<PackJob> pack_jobs;
  std::vector<std::int32_t> pack_sources; // [pack_jobs], -1: fold, -2: bytes of the packed weights
  std::vector<std::int32_t> maps;
};

// The parameters of one call.
struct Parameters {
  const std::uint64_t *addresses; // [num_parameters]
  const std::uint8_t *types;      // [num_parameters], SourceType
};

struct Call {
  int device;
  cudaStream_t stream;
  Parameters parameters;
  void *workspace; // slots [num_slots][N, H, W, 64], packed weights, fold; 64-byte aligned
  std::int64_t workspace_bytes;
  const float *image; // [N, Cin, H, W]
  float *out;         // [N, Cout, H, W]
  std::int64_t n, h, w;
  Timeline *timeline; // null: nobody asks. Not for a stream under capture, whose events tell no time
};

// What the driver or a launch said; `what()` names the operation.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct OutOfMemory : Error {
  using Error::Error;
};

// A captured call. It reads the parameters, the image and the workspace at the addresses that the call named.
class Graph {
public:
  Graph(int device, cudaGraphExec_t exec) : device_(device), exec_(exec) {}
  Graph(const Graph &) = delete;
  Graph &operator=(const Graph &) = delete;
  ~Graph();
  void launch(cudaStream_t stream) const;

private:
  int device_;
  cudaGraphExec_t exec_;
};

class Plan {
public:
  explicit Plan(Description description);
  Plan(const Plan &) = delete;
  Plan &operator=(const Plan &) = delete;
  ~Plan();

  std::int64_t workspace_bytes(std::int64_t n, std::int64_t h, std::int64_t w) const;
  // Enqueues everything on the stream and returns. Does not wait, except for the upload of the tables at the first call
  // on a device, which stays current. Safe from several threads, and while the stream is being captured.
  void run(const Call &call) const;
  std::unique_ptr<Graph> capture(const Call &call) const;

private:
  struct Launch { // jobs [first, first + count), and for pack their chunks
    std::int32_t first, count;
    std::int64_t first_chunk;
    std::int32_t chunks;
  };
  struct OnDevice { // the tables in the memory of a device
    Device device;
    void *memory;
    const FoldJob *fold_jobs;
    const QuantiseJob *quantise_jobs;
    const PackJob *pack_jobs;
    const Chunk *chunks;
    const std::int32_t *maps;
  };

  void check(const Call &call) const;
  const OnDevice &on_device(int device) const;
  void enqueue(const Call &call, const OnDevice &here) const;
  void pack_weights(const Call &call, const OnDevice &here, unsigned char *packed, double *fold) const;
  cudaError_t launch(const Op &op, bool first, const Call &call, const OnDevice &here, unsigned char *packed) const;

  Description description_;
  std::vector<Chunk> chunks_;
  std::vector<Launch> folds_, quantisings_, packs_;
  mutable std::mutex mutex_;
  mutable std::map<int, OnDevice> on_device_;
};

} // namespace memnet::cuda

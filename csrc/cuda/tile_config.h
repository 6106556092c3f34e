// Tile and stage choices of the CUDA kernels, each with its reason. Plain constants: the host, the kernels and the
// tests read the same lines. No line has been timed on a GPU yet.
#pragma once

namespace memnet::cuda {

// Shared memory that one block may have, in bytes, by compute capability (80 for 8.0).
constexpr int shared_limit(int capability) {
  switch (capability) {
  case 80:
  case 87:
    return 163 * 1024;
  case 90:
  case 100:
  case 103:
  case 110:
    return 227 * 1024;
  default: // 8.6, 8.9, 12.x, and the least that any tensor core generation since 8.0 has
    return 99 * 1024;
  }
}

// ---- Residual block, sm_80 ------------------------------------------------------------------------------------------

// A block computes kRows x kCols output pixels. Its input and the tensor between the convolutions have a border of two
// and of one pixel, and each warp takes a run of 16-pixel row blocks of the products.
template <int kWarps_, int kRows_, int kCols_, int kBlocksPerSm_> struct BlockTile {
  static constexpr int kWarps = kWarps_, kRows = kRows_, kCols = kCols_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMidRows = kRows + 2, kMidCols = kCols + 2, kInRows = kRows + 4, kInCols = kCols + 4;
  static constexpr int kPixels = kRows * kCols, kMidPixels = kMidRows * kMidCols, kInPixels = kInRows * kInCols;
  static constexpr int kMidBlocks = (kMidPixels + 16 * kWarps - 1) / (16 * kWarps); // of a warp, in conv_a
  static constexpr int kBlocks = (kPixels + 16 * kWarps - 1) / (16 * kWarps);       // of a warp, in conv_b
  // Weights pass through a ring, one tap (8 KB) for each stage: one in use, two under way.
  static constexpr int kStages = 3, kStageBytes = 8192;
  static constexpr int kRingOffset = kInPixels * 128;
  static constexpr int kOperandBytes = kRingOffset + kStages * kStageBytes;
  static constexpr int kSumBytes = kPixels * 256; // fp32 sums on their way to memory, in the place of the operands
  static constexpr int kSharedBytes = kOperandBytes > kSumBytes ? kOperandBytes : kSumBytes;
};

// Both: 64 x 64 products for each warp (of 64 x 32, shared memory would limit the tensor cores), 16.7 % of them for
// pixels of the border or of no image. 64 KB: two blocks on a multiprocessor, so that one multiplies while the other
// loads or stores.
using SmallTile = BlockTile<4, 12, 16, 2>;
// 96 KB, for multiprocessors that have no more than 100 KB.
using LargeTile = BlockTile<8, 16, 24, 1>;

// A block takes 1 KB beyond what it asks for.
constexpr bool takes_small_tile(int capability) {
  return SmallTile::kBlocksPerSm * (SmallTile::kSharedBytes + 1024) <= shared_limit(capability) + 1024;
}

static_assert(LargeTile::kSharedBytes <= shared_limit(86), "the large tile is for 99 KB");
static_assert(takes_small_tile(80) && takes_small_tile(90) && !takes_small_tile(86) && !takes_small_tile(120), "");

// ---- Residual block, sm_90 ------------------------------------------------------------------------------------------

// Widths of the strips, in pixels. Each row costs the tensor cores width + (width + 2 rounded up to 8) pixels, of which
// 2 width are useful: 12.5, 6.2, 5.0 and 4.2 % over. 104 and more do not fit into the registers; small images have more
// strips to share out when these are narrow.
constexpr int kStripWidths[] = {32, 64, 80, 96};
// Rows in flight: four of act and of mid are three in use and one being written; raw holds a row from its load until
// its output is stored, five rows later, and one is being loaded.
constexpr int kRawRows = 7, kActRows = 4, kMidRows = 4;

// ---- Gate -----------------------------------------------------------------------------------------------------------

// A warp multiplies 32 pixels, so that each read of a weight serves two row blocks: with 16, shared memory would limit
// the gate before HBM does. A block takes 256 pixels of one source in a step; it has a multiprocessor for itself and
// walks over tiles.
constexpr int kGateWarps = 8, kGateThreads = 32 * kGateWarps;
constexpr int kGateWarpPixels = 32, kGatePixels = kGateWarps * kGateWarpPixels;
constexpr int kGatePixelBytes = kGatePixels * 128;
// The weights of a source (8 KB), its scale and its shift (256 bytes each).
constexpr int kGateWeightBytes = 8192, kGateParameterBytes = kGateWeightBytes + 512;

struct GatePlan {
  int stages;    // of the ring: all but one are under way
  bool resident; // all weights stay in shared memory, else they pass through the ring with the pixels
};

constexpr int gate_shared_bytes(GatePlan plan, int num_src) {
  return plan.stages * kGatePixelBytes + (plan.resident ? num_src : plan.stages) * kGateParameterBytes;
}

// Latency times bandwidth is about 25 KB for each multiprocessor of an H200, 15 KB of an A100: three stages keep 64 KB
// under way. Resident weights save 34 bytes of L2 traffic beside the 128 of a pixel and source, which the H200 wants
// (its L2 has little more than the bandwidth of its HBM) and others hardly notice. 15 sources fit into 227 KB, 7 into
// 163 KB; 99 KB hold two stages and no resident weights.
constexpr GatePlan gate_plan(int capability, int num_src) {
  const int limit = shared_limit(capability);
  // More sources than a product in int could hold are certainly more than fit.
  if (num_src < 1024 && gate_shared_bytes({3, true}, num_src) <= limit)
    return {3, true};
  if (gate_shared_bytes({3, false}, num_src) <= limit)
    return {3, false};
  return {2, false};
}

static_assert(gate_shared_bytes({2, false}, 1) <= shared_limit(86), "every capability can run every gate");
static_assert(gate_plan(90, 12).resident && !gate_plan(80, 12).resident && gate_plan(86, 1).stages == 2, "");

// ---- First convolution ----------------------------------------------------------------------------------------------

// A thread computes 8 channels of 8 neighbouring pixels: 16 reads of shared memory for the 192 multiplications of a row
// of taps, and 64 sums in registers. 8 threads side by side write the 128 bytes of a pixel.
constexpr int kFirstThreads = 256, kFirstRun = 8, kFirstCols = 32;
constexpr int kFirstRows = kFirstThreads / 8 * kFirstRun / kFirstCols;

// ---- Reconstruction -------------------------------------------------------------------------------------------------

// A tile reads a border of one pixel again, 19.5 % of its pixels, most of them from L2; 32 columns are whole lines of
// the image.
constexpr int kReconThreads = 256, kReconRows = 16, kReconCols = 32;
// Pixels of a thread in one pass, so that a read of scale, shift or weight serves four.
constexpr int kReconRun = 4;
// Output channels that share one reading of the slots; more go to blocks of their own.
constexpr int kReconOutputs = 4;

} // namespace memnet::cuda

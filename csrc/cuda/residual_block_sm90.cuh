// The residual block on Hopper: both convolutions in one persistent kernel that streams rows, weights in registers.
//
// The images are cut into vertical strips; a block of threads takes a run of rows, from the top of a strip to its end
// and on in the next one (a segment for each strip it touches). Transposed products, D[out channel][pixel] = W X^T, let
// the weights be the operand in registers: all 36 steps of K = 9 taps x 64 channels, loaded once. A row passes through
//
//   global -> raw ring -> act ring -> conv_a -> mid ring -> conv_b -> raw ring (in place) -> global
//
// loader:    copies a row with its border of two pixels from NHWC into a slot of the raw ring, chunks of 8 channels
//            permuted within the pixel (raw_offset) so that 8 pixels of one chunk lie in different banks
// transform: relu(scale x + shift), zero outside the image, rounded to operands, into planes of the act ring: a plane
//            [pixel][16 bytes] of 8 channels (16 in e4m3) is wgmma's layout without swizzling, and a tap is a start
//            address 16 bytes further
// conv_a:    warpgroup 0; bias, ReLU, zero outside the image, into planes of the mid ring
// conv_b:    warpgroup 1; bias and skip in fp32, rounded once, over the row's skip in the raw ring
// drain:     from the raw ring to global memory
//
// In e4m3 (fp8) slots and skip stay fp16, both sums are multiplied by a gain for each output channel, and there are 18
// steps. A store of 16 bits then holds two operands, the channels c and c + 8 of 16: mid has them side by side, and the
// weights of conv_b follow.
//
// A segment of L output rows needs L + 2 rows of mid and L + 4 rows of act: row i of act is image row y - 2 + i, row j
// of mid needs rows j .. j + 2 of act, output row k rows k .. k + 2 of mid and row k + 2 of raw.
#pragma once

#include "launch.h"
#include "residual_block_sm90.h"
#include "wgmma.cuh"

namespace memnet::cuda::sm90 {

// Threads: warpgroup 0 conv_a, warpgroup 1 conv_b, then two warps of transform, the drain and the loader.
constexpr int kThreads = 384;
constexpr int kTransformWarps = 2, kDrainWarp = 2, kLoaderWarp = 3;
// 224 + 224 + 56 registers for three warpgroups are what 168 for each thread of the launch make.
constexpr int kConvRegisters = 224, kHelperRegisters = 56;

template <Math kMath_> struct Format {
  static constexpr Math kMath = kMath_;
  static constexpr bool kBytes = kMath == Math::kE4m3;                             // operands of one byte
  static constexpr Type kStore = kMath == Math::kBf16 ? Type::kBf16 : Type::kFp16; // slots, skip, result
  static constexpr int kChannelsOfPlane = kBytes ? 16 : 8, kPlanes = kChannels / kChannelsOfPlane;
  // A product takes two planes.
  static constexpr int kStepsOfTap = kPlanes / 2, kSteps = 9 * kStepsOfTap;
};

template <Math kMath, int kWidth_> struct Strip : Format<kMath> {
  using Format<kMath>::kPlanes;
  static constexpr int kWidth = kWidth_;
  static constexpr int kIn = kWidth + 4;              // pixels of a row of raw and act
  static constexpr int kMidUsed = kWidth + 2;         // pixels of a row of mid that conv_b reads
  static constexpr int kMid = (kMidUsed + 7) / 8 * 8; // pixels of a row of mid that conv_a writes
  // Bytes. The transform stores 8 planes of a pixel at once, or 4 of two pixels: a pitch of an odd number of pixels, or
  // of two more than a multiple of four, puts them into different banks.
  static constexpr int kActPitch = kPlanes == 8 ? kIn | 1 : kIn / 4 * 4 + (kIn % 4 > 2 ? 6 : 2);
  static constexpr int kActPlane = kActPitch * 16, kMidPlane = (kMid | 1) * 16;
  static constexpr int kRawRow = kIn * 128, kActRow = kPlanes * kActPlane, kMidRow = kPlanes * kMidPlane;
  static constexpr int kRaw = 0, kAct = kRaw + kRawRows * kRawRow, kMidRing = kAct + kActRows * kActRow;
  static constexpr int kBarriers = kMidRing + kMidRows * kMidRow;
  // mbarriers
  static constexpr int kRawFull = 0, kRawFree = kRawFull + kRawRows, kOutFull = kRawFree + kRawRows;
  static constexpr int kActFull = kOutFull + kRawRows, kActFree = kActFull + kActRows;
  static constexpr int kMidFull = kActFree + kActRows, kMidFree = kMidFull + kMidRows;
  static constexpr int kTurnA = kMidFree + kMidRows, kTurnB = kTurnA + 1, kBarrierCount = kTurnB + 1;
  static constexpr int kSharedBytes = kBarriers + 8 * kBarrierCount;

  // The columns of conv_a beyond kMidUsed are never read; their products read up to 2 pixels more than kMid.
  static_assert((kMid + 2) * 16 - kActPlane <= kMidRow, "conv_a reads past the act ring no further than the mid ring");
  static_assert(kWidth + 2 <= kMid, "conv_b reads what conv_a wrote");
  static_assert(kActPitch >= kIn, "planes do not overlap");
  static_assert(kWidth % 16 == 0, "conv_b stores two blocks of 8 pixels at once");
  static_assert(kSharedBytes <= 232448, "227 KB is what a block can have");
};

// Of 16 bytes of a pixel in a row of raw. Pixels are 128 bytes apart, which would put 8 of them into the same banks.
MEMNET_DEVICE constexpr int raw_offset(int pixel, int chunk) { return pixel * 128 + ((chunk ^ (pixel & 7)) << 4); }

// Slots of a ring in order, with the parity of the lap.
template <int kSlots> struct Ring {
  int slot = 0;
  std::uint32_t parity = 0;
  MEMNET_DEVICE void next() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
  MEMNET_DEVICE Ring after() const {
    Ring ring = *this;
    ring.next();
    return ring;
  }
};

// `rows` rows of the strip from column x, of which y is the first.
struct Segment {
  int image, x, y, rows;
};

// The segments of this block, in order.
class Segments {
public:
  MEMNET_DEVICE explicit Segments(const StripParams &params) : height_(params.h), strips_(params.strips) {
    const std::int64_t block = blockIdx.x;
    const std::int64_t first = block * params.rows_per_block + min(block, params.longer_blocks);
    left_ = static_cast<int>(params.rows_per_block + (block < params.longer_blocks ? 1 : 0));
    const std::int64_t column = first / height_; // counted over all strips of all images
    y_ = static_cast<int>(first - column * height_);
    image_ = static_cast<int>(column / strips_);
    strip_ = static_cast<int>(column - static_cast<std::int64_t>(image_) * strips_);
  }

  template <int kWidth> MEMNET_DEVICE bool next(Segment &segment) {
    if (left_ == 0)
      return false;
    segment = {image_, strip_ * kWidth, y_, min(left_, height_ - y_)};
    left_ -= segment.rows;
    y_ = 0;
    if (++strip_ == strips_) {
      strip_ = 0;
      ++image_;
    }
    return true;
  }

private:
  int height_, strips_, image_, strip_, y_, left_;
};

template <class S> struct Shared {
  std::uint32_t base;

  MEMNET_DEVICE std::uint32_t raw(int slot) const { return base + S::kRaw + slot * S::kRawRow; }
  MEMNET_DEVICE std::uint32_t act(int slot) const { return base + S::kAct + slot * S::kActRow; }
  MEMNET_DEVICE std::uint32_t mid(int slot) const { return base + S::kMidRing + slot * S::kMidRow; }
  MEMNET_DEVICE std::uint32_t barrier(int index) const { return base + S::kBarriers + 8 * index; }

  // Every phase takes these arrivals. One lane speaks for its warp, after __syncwarp(), except where copies arrive.
  MEMNET_DEVICE void init_barriers() const {
    for (int i = 0; i < kRawRows; ++i) {
      ptx::barrier_init(barrier(S::kRawFull + i), 32);              // the lanes of the loader
      ptx::barrier_init(barrier(S::kRawFree + i), kTransformWarps); // or the drain, for rows that are a skip
      ptx::barrier_init(barrier(S::kOutFull + i), 4);
    }
    for (int i = 0; i < kActRows; ++i) {
      ptx::barrier_init(barrier(S::kActFull + i), kTransformWarps);
      ptx::barrier_init(barrier(S::kActFree + i), 4);
    }
    for (int i = 0; i < kMidRows; ++i) {
      ptx::barrier_init(barrier(S::kMidFull + i), 4);
      ptx::barrier_init(barrier(S::kMidFree + i), 4);
    }
    ptx::barrier_init(barrier(S::kTurnA), 4);
    ptx::barrier_init(barrier(S::kTurnB), 4);
    ptx::fence_barrier_init();
  }
};

// ---- Helpers --------------------------------------------------------------------------------------------------------

template <class S>
MEMNET_DEVICE void load_rows(const StripParams &params, Segments segments, Shared<S> shared, int lane) {
  const int chunk = lane & 7;
  const char *src = static_cast<const char *>(params.src) + chunk * 16;
  Ring<kRawRows> raw;
  Segment segment;
  while (segments.next<S::kWidth>(segment)) {
    const int left = segment.x - 2, begin = max(left, 0), end = min(segment.x + S::kWidth + 2, params.w);
    for (int i = 0; i < segment.rows + 4; ++i, raw.next()) {
      const int y = segment.y - 2 + i;
      ptx::barrier_wait(shared.barrier(S::kRawFree + raw.slot), raw.parity ^ 1);
      if (y >= 0 && y < params.h) {
        const std::uint32_t row = shared.raw(raw.slot);
        const std::int64_t pixels = (static_cast<std::int64_t>(segment.image) * params.h + y) * params.w;
        for (int x = begin + (lane >> 3); x < end; x += 4)
          ptx::copy_async(row + raw_offset(x - left, chunk), src + (pixels + x) * 128);
      }
      ptx::barrier_arrive_after_copies(shared.barrier(S::kRawFull + raw.slot));
    }
  }
}

template <class S>
MEMNET_DEVICE void transform_rows(const StripParams &params, Segments segments, Shared<S> shared, int thread) {
  constexpr int kCount = S::kChannelsOfPlane, kStride = 32 * kTransformWarps / S::kPlanes;
  const int plane = thread % S::kPlanes, first = thread / S::kPlanes, lane = thread & 31;
  float scale[kCount], shift[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    scale[c] = params.scale[plane * kCount + c];
    shift[c] = params.shift[plane * kCount + c];
  }
  Ring<kRawRows> raw;
  Ring<kActRows> act;
  Segment segment;
  while (segments.next<S::kWidth>(segment)) {
    for (int i = 0; i < segment.rows + 4; ++i, raw.next(), act.next()) {
      const int y = segment.y - 2 + i;
      const bool row_inside = y >= 0 && y < params.h;
      const std::uint32_t from = shared.raw(raw.slot), to = shared.act(act.slot) + plane * S::kActPlane;
      ptx::barrier_wait(shared.barrier(S::kRawFull + raw.slot), raw.parity);
      ptx::barrier_wait(shared.barrier(S::kActFree + act.slot), act.parity ^ 1);
#pragma unroll 2
      for (int pixel = first; pixel < S::kIn; pixel += kStride) {
        const int x = segment.x - 2 + pixel;
        uint4 v = make_uint4(0, 0, 0, 0);
        // A branch, for what lies outside the image was never loaded and may be NaN.
        if (row_inside && x >= 0 && x < params.w) {
          std::uint32_t *words = &v.x;
#pragma unroll
          for (int chunk = 0; chunk < kCount / 8; ++chunk) {
            const uint4 from_raw = ptx::load_shared(from + raw_offset(pixel, plane * (kCount / 8) + chunk));
            const std::uint32_t pairs[4] = {from_raw.x, from_raw.y, from_raw.z, from_raw.w};
            float a[8];
#pragma unroll
            for (int c = 0; c < 8; c += 2) {
              const float2 x2 = ptx::unpack<S::kStore>(pairs[c / 2]);
              a[c] = fmaf(x2.x, scale[chunk * 8 + c], shift[chunk * 8 + c]);
              a[c + 1] = fmaf(x2.y, scale[chunk * 8 + c + 1], shift[chunk * 8 + c + 1]);
            }
            if constexpr (S::kBytes) {
              words[2 * chunk] = ptx::pack_e4m3_relu(a[0], a[1], a[2], a[3]);
              words[2 * chunk + 1] = ptx::pack_e4m3_relu(a[4], a[5], a[6], a[7]);
            } else {
#pragma unroll
              for (int c = 0; c < 8; c += 2)
                words[c / 2] = ptx::pack_relu<S::kStore>(a[c], a[c + 1]);
            }
          }
        }
        ptx::store_shared(to + pixel * 16, v);
      }
      ptx::fence_async();
      __syncwarp();
      if (lane == 0) {
        ptx::barrier_arrive(shared.barrier(S::kActFull + act.slot));
        if (i < 2 || i >= segment.rows + 2) // no output row has this one as its skip
          ptx::barrier_arrive(shared.barrier(S::kRawFree + raw.slot));
      }
    }
  }
}

template <class S>
MEMNET_DEVICE void drain_rows(const StripParams &params, Segments segments, Shared<S> shared, int lane) {
  const int chunk = lane & 7;
  char *dst = static_cast<char *>(params.dst) + chunk * 16;
  Ring<kRawRows> raw, out;
  Segment segment;
  while (segments.next<S::kWidth>(segment)) {
    const int pixels = min(S::kWidth, params.w - segment.x);
    raw.next();
    raw.next();
    for (int k = 0; k < segment.rows; ++k, raw.next(), out.next()) {
      const std::uint32_t row = shared.raw(raw.slot);
      char *to =
          dst + ((static_cast<std::int64_t>(segment.image) * params.h + segment.y + k) * params.w + segment.x) * 128;
      ptx::barrier_wait(shared.barrier(S::kOutFull + out.slot), out.parity);
#pragma unroll 4
      for (int pixel = lane >> 3; pixel < pixels; pixel += 4)
        ptx::store_global(to + pixel * 128, ptx::load_shared(row + raw_offset(pixel + 2, chunk)));
      __syncwarp();
      if (lane == 0)
        ptx::barrier_arrive(shared.barrier(S::kRawFree + raw.slot), kTransformWarps);
    }
    raw.next();
    raw.next();
  }
}

// ---- Convolutions ---------------------------------------------------------------------------------------------------

// All products of a row: sum[64][kPixels] = W X^T, the three rows of X at `rows`, kPlane bytes between its planes.
template <Math kMath, int kPixels, int kPlane>
MEMNET_DEVICE void multiply_row(float (&sum)[kPixels / 2], const std::uint32_t (&weight)[Format<kMath>::kSteps][4],
                                const std::uint32_t (&rows)[3]) {
  constexpr int kStepsOfTap = Format<kMath>::kStepsOfTap;
  // Leading dimension: from a plane to the next. Stride dimension: from 8 pixels to the next. No swizzling.
  constexpr std::uint64_t kLayout =
      static_cast<std::uint64_t>(kPlane >> 4) << 16 | static_cast<std::uint64_t>(8 * 16 >> 4) << 32;
#pragma unroll
  for (int step = 0; step < Format<kMath>::kSteps; ++step) {
    const int tap = step / kStepsOfTap, part = step % kStepsOfTap; // of the channels
    const std::uint32_t start = rows[tap / 3] + tap % 3 * 16 + part * 2 * kPlane;
    const std::uint64_t descriptor = kLayout | static_cast<std::uint64_t>(start >> 4);
    if constexpr (Format<kMath>::kBytes)
      ptx::wgmma_e4m3<kPixels>(sum, weight[step], descriptor, step != 0);
    else
      ptx::wgmma<Format<kMath>::kStore, kPixels>(sum, weight[step], descriptor, step != 0);
  }
}

// Registers of the thread: the fragments of its warpgroup's convolution, see layouts/wgmma.py.
template <int kSteps>
MEMNET_DEVICE void load_weights(const void *packed, int thread, std::uint32_t (&weight)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint4 v = ptx::load_global(static_cast<const uint4 *>(packed) + step * 128 + thread);
    weight[step][0] = v.x;
    weight[step][1] = v.y;
    weight[step][2] = v.z;
    weight[step][3] = v.w;
  }
}

// Of the two output channels of a lane: what follows a convolution.
struct Affine {
  float gain[2], bias[2];
};

template <bool kGain> MEMNET_DEVICE Affine load_affine(const float *gain, const float *bias, int channel) {
  return {{kGain ? gain[channel] : 1.f, kGain ? gain[channel + 8] : 1.f}, {bias[channel], bias[channel + 8]}};
}

// sum[i] with gain and bias: registers 4 j and 4 j + 1 are the lane's first channel, the next two the one 8 further.
template <bool kGain> MEMNET_DEVICE float apply(const Affine &affine, float sum, int i) {
  const int which = i >> 1 & 1;
  return kGain ? fmaf(sum, affine.gain[which], affine.bias[which]) : sum + affine.bias[which];
}

// Sums of conv_a, ready but for ReLU and rounding, into a row of mid. Each matrix is 16 bytes of 8 pixels.
template <class S>
MEMNET_DEVICE void store_mid(const float (&sum)[S::kMid / 2], std::uint32_t row, int warp, int lane) {
  if constexpr (S::kBytes) {
    // One plane of this warp: matrix i is pixels 8 i to 8 i + 7, four at once, then the rest.
    const std::uint32_t to = row + warp * S::kMidPlane + lane * 16;
    const auto pack = [&](int i) {
      return ptx::pack_e4m3_relu(sum[4 * i], sum[4 * i + 2], sum[4 * i + 1], sum[4 * i + 3]);
    };
    constexpr int kBlocks = S::kMid / 8, kFours = kBlocks / 4 * 4, kTwos = kBlocks / 2 * 2;
#pragma unroll
    for (int i = 0; i < kFours; i += 4)
      ptx::store_matrix_transposed(to + i * 128, {pack(i), pack(i + 1), pack(i + 2), pack(i + 3)});
    if constexpr (kTwos > kFours)
      ptx::store_matrix_transposed(to + kFours * 128, {pack(kFours), pack(kFours + 1)});
    if constexpr (kBlocks > kTwos)
      ptx::store_matrix_transposed(to + kTwos * 128, {pack(kTwos)});
  } else {
    // Two planes of this warp: matrices 0 and 1 are both of 8 pixels, 2 and 3 of the next 8.
    const std::uint32_t to = row + (2 * warp + (lane >> 3 & 1)) * S::kMidPlane + ((lane >> 4) * 8 + (lane & 7)) * 16;
    const auto pack = [&](int i) { return ptx::pack_relu<S::kStore>(sum[i], sum[i + 1]); };
#pragma unroll
    for (int i = 0; i < S::kMid / 2; i += 8) {
      if (i + 8 <= S::kMid / 2)
        ptx::store_matrix_transposed(to + i / 4 * 128, {pack(i), pack(i + 2), pack(i + 4), pack(i + 6)});
      else
        ptx::store_matrix_transposed(to + i / 4 * 128, {pack(i), pack(i + 2)});
    }
  }
}

template <class S>
MEMNET_DEVICE void convolve_a(const StripParams &params, Segments segments, Shared<S> shared, int thread) {
  const int warp = thread >> 5, lane = thread & 31;
  std::uint32_t weight[S::kSteps][4];
  load_weights(params.weight_a, thread, weight);
  const Affine affine = load_affine<S::kBytes>(params.gain_a, params.bias_a, warp * 16 + (lane >> 2));

  Ring<kActRows> act;
  Ring<kMidRows> mid;
  std::uint32_t turn = 0;
  Segment segment;
  while (segments.next<S::kWidth>(segment)) {
    // Pixel p of a row of mid is column segment.x - 1 + p: inside the image for begin <= p < end.
    const int begin = 1 - segment.x, end = params.w - segment.x + 1;
    const bool border = begin > 0 || end < S::kMidUsed;
    Ring<kActRows> act1 = act.after(), act2 = act1.after();
    ptx::barrier_wait(shared.barrier(S::kActFull + act.slot), act.parity);
    ptx::barrier_wait(shared.barrier(S::kActFull + act1.slot), act1.parity);
    for (int j = 0; j < segment.rows + 2; ++j, mid.next()) {
      ptx::barrier_wait(shared.barrier(S::kActFull + act2.slot), act2.parity);
      // The tensor cores serve one convolution while the other stores its sums: a 0 1 2 3, b 0, a 4, b 1, a 5, b 2 ...
      if (j >= 4) {
        ptx::barrier_wait(shared.barrier(S::kTurnA), turn);
        turn ^= 1;
      }
      float sum[S::kMid / 2];
      ptx::wgmma_fence();
      multiply_row<S::kMath, S::kMid, S::kActPlane>(
          sum, weight, {shared.act(act.slot), shared.act(act1.slot), shared.act(act2.slot)});
      ptx::wgmma_commit();
      if (j >= 3 && lane == 0)
        ptx::barrier_arrive(shared.barrier(S::kTurnB));
      ptx::wgmma_wait();
      if (lane == 0) {
        ptx::barrier_arrive(shared.barrier(S::kActFree + act.slot));
        if (j == segment.rows + 1) { // the segment ends: nobody else needs its last two rows
          ptx::barrier_arrive(shared.barrier(S::kActFree + act1.slot));
          ptx::barrier_arrive(shared.barrier(S::kActFree + act2.slot));
        }
      }
      const int y = segment.y - 1 + j;
      const bool row_inside = y >= 0 && y < params.h;
#pragma unroll
      for (int i = 0; i < S::kMid / 2; ++i)
        sum[i] = apply<S::kBytes>(affine, sum[i], i);
      if (border || !row_inside) { // conv_b's padding
#pragma unroll
        for (int i = 0; i < S::kMid / 2; ++i) {
          const int pixel = i / 4 * 8 + (lane & 3) * 2 + (i & 1);
          if (!row_inside || pixel < begin || pixel >= end)
            sum[i] = 0;
        }
      }
      ptx::barrier_wait(shared.barrier(S::kMidFree + mid.slot), mid.parity ^ 1);
      store_mid<S>(sum, shared.mid(mid.slot), warp, lane);
      ptx::fence_async();
      __syncwarp();
      if (lane == 0)
        ptx::barrier_arrive(shared.barrier(S::kMidFull + mid.slot));
      act = act1;
      act1 = act2;
      act2.next();
    }
    act = act2;
  }
}

template <class S>
MEMNET_DEVICE void convolve_b(const StripParams &params, Segments segments, Shared<S> shared, int thread) {
  const int warp = thread >> 5, lane = thread & 31;
  std::uint32_t weight[S::kSteps][4];
  load_weights(params.weight_b, thread, weight);
  const Affine affine = load_affine<S::kBytes>(params.gain_b, params.bias_b, warp * 16 + (lane >> 2));
  // What this lane addresses of four 8x8 blocks, chunks 2 warp and 2 warp + 1 of 8 pixels and of the next 8, in a row
  // of raw, where output pixel p is pixel p + 2: the skip is read and the sum stored here.
  const int skip = raw_offset((lane >> 4) * 8 + (lane & 7) + 2, 2 * warp + (lane >> 3 & 1));

  Ring<kMidRows> mid;
  Ring<kRawRows> raw, out;
  std::uint32_t turn = 0;
  Segment segment;
  while (segments.next<S::kWidth>(segment)) {
    Ring<kMidRows> mid1 = mid.after(), mid2 = mid1.after();
    raw.next();
    raw.next();
    ptx::barrier_wait(shared.barrier(S::kMidFull + mid.slot), mid.parity);
    ptx::barrier_wait(shared.barrier(S::kMidFull + mid1.slot), mid1.parity);
    for (int k = 0; k < segment.rows; ++k, raw.next(), out.next()) {
      ptx::barrier_wait(shared.barrier(S::kMidFull + mid2.slot), mid2.parity);
      if (k + 3 < segment.rows + 2) { // conv_a has a row k + 3 in this segment, which goes first
        ptx::barrier_wait(shared.barrier(S::kTurnB), turn);
        turn ^= 1;
      }
      float sum[S::kWidth / 2];
      ptx::wgmma_fence();
      multiply_row<S::kMath, S::kWidth, S::kMidPlane>(
          sum, weight, {shared.mid(mid.slot), shared.mid(mid1.slot), shared.mid(mid2.slot)});
      ptx::wgmma_commit();
      if (k + 4 < segment.rows + 2 && lane == 0)
        ptx::barrier_arrive(shared.barrier(S::kTurnA));
      ptx::wgmma_wait();
      if (lane == 0) {
        ptx::barrier_arrive(shared.barrier(S::kMidFree + mid.slot));
        if (k == segment.rows - 1) {
          ptx::barrier_arrive(shared.barrier(S::kMidFree + mid1.slot));
          ptx::barrier_arrive(shared.barrier(S::kMidFree + mid2.slot));
        }
      }
      ptx::barrier_wait(shared.barrier(S::kRawFull + raw.slot), raw.parity); // long since: for the sight of it
      const std::uint32_t at = shared.raw(raw.slot) + skip;
#pragma unroll
      for (int i = 0; i < S::kWidth / 2; i += 8) {
        std::uint32_t x[4];
        ptx::load_matrix_transposed(at + i / 4 * 1024, x);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int first = i + 2 * e;
          const float2 x2 = ptx::unpack<S::kStore>(x[e]);
          x[e] = ptx::pack<S::kStore>(x2.x + apply<S::kBytes>(affine, sum[first], first),
                                      x2.y + apply<S::kBytes>(affine, sum[first + 1], first + 1));
        }
        ptx::store_matrix_transposed(at + i / 4 * 1024, x);
      }
      __syncwarp();
      if (lane == 0)
        ptx::barrier_arrive(shared.barrier(S::kOutFull + out.slot));
      mid = mid1;
      mid1 = mid2;
      mid2.next();
    }
    mid = mid2;
    raw.next();
    raw.next();
  }
}

// ---- Kernel ---------------------------------------------------------------------------------------------------------

template <Math kMath, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) residual_block_kernel(const __grid_constant__ StripParams params) {
  using S = Strip<kMath, kWidth>;
  const Shared<S> shared{ptx::dynamic_shared()};
  const int thread = threadIdx.x, lane = thread & 31;
  // The compiler must see that a warpgroup takes one branch, else it computes descriptors lane by lane.
  const int group = ptx::uniform(thread >> 7);
  if (thread == 0)
    shared.init_barriers();
  __syncthreads();
  ptx::let_next_kernel_start();
  const Segments segments(params);
  // Half the weights, in e4m3, fit into the registers that every thread has.
  if (group == 0) {
    if constexpr (!S::kBytes)
      ptx::take_registers<kConvRegisters>();
    convolve_a<S>(params, segments, shared, thread);
  } else if (group == 1) {
    if constexpr (!S::kBytes)
      ptx::take_registers<kConvRegisters>();
    convolve_b<S>(params, segments, shared, thread - 128);
  } else {
    if constexpr (!S::kBytes)
      ptx::give_registers<kHelperRegisters>();
    const int warp = ptx::uniform(thread >> 5 & 3);
    if (warp == kLoaderWarp) {
      ptx::wait_for_previous_kernel(); // nobody else reads what that kernel wrote, or stores before these rows are here
      load_rows<S>(params, segments, shared, lane);
    } else if (warp == kDrainWarp) {
      drain_rows<S>(params, segments, shared, lane);
    } else {
      transform_rows<S>(params, segments, shared, thread & 63);
    }
  }
}

template <Math kMath, int kWidth>
cudaError_t launch_strips(const Share &share, bool early_weights, cudaStream_t stream) {
  const Grid grid{share.blocks, kThreads, Strip<kMath, kWidth>::kSharedBytes};
  return launch(residual_block_kernel<kMath, kWidth>, grid, stream, share.params, early_weights);
}

} // namespace memnet::cuda::sm90

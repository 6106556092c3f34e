// The launchers of kernels.h for ctypes: MEMNET_ENTRY_name says which of them this library holds.
#include "kernels.h"
#ifdef MEMNET_ENTRY_residual_block_sm80
#include "mma_tile.h"
#endif

#ifdef MEMNET_ENTRY_residual_block_sm90
#include "residual_block_sm90.cuh"

namespace memnet::cuda::sm90 {

// Widths whose file is not in the library: chosen by no test that built it so.
#define MEMNET_ABSENT(width)                                                                                           \
  template <> cudaError_t launch_strips<Math::kFp16, width>(const Share &, bool, cudaStream_t) { return -width; }      \
  template <> cudaError_t launch_strips<Math::kBf16, width>(const Share &, bool, cudaStream_t) { return -width; }
#ifndef MEMNET_ENTRY_residual_block_sm90_32
MEMNET_ABSENT(32)
#endif
#ifndef MEMNET_ENTRY_residual_block_sm90_64
MEMNET_ABSENT(64)
#endif
#ifndef MEMNET_ENTRY_residual_block_sm90_80
MEMNET_ABSENT(80)
#endif
#ifndef MEMNET_ENTRY_residual_block_sm90_96
MEMNET_ABSENT(96)
#endif

// What the blocks of a launch would work on, without doing it: [image, x, y, rows] of each segment, -1s behind each
// block's.
struct Listing {
  StripParams params;
  std::int64_t *out;
  std::int64_t per_block; // segments that fit
};

template <int kWidth> void list_segments(Listing listing) {
  if (threadIdx.x != 0)
    return;
  Segments segments(listing.params);
  Segment segment;
  std::int64_t *out = listing.out + blockIdx.x * listing.per_block * 4;
  for (std::int64_t i = 0; i < listing.per_block; ++i, out += 4) {
    const bool any = segments.next<kWidth>(segment);
    out[0] = any ? segment.image : -1;
    out[1] = any ? segment.x : -1;
    out[2] = any ? segment.y : -1;
    out[3] = any ? segment.rows : -1;
  }
}

} // namespace memnet::cuda::sm90
#endif

using namespace memnet::cuda;
using Int = std::int64_t;
using Floats = const float *;

extern "C" {

#ifdef MEMNET_ENTRY_residual_block_sm80
int run_residual_block_sm80(Int type, Int capability, Int sms, const void *src, void *dst, Floats scale, Floats shift,
                            const void *weight_a, Floats bias_a, const void *weight_b, Floats bias_b, Int n, Int h,
                            Int w) {
  ResidualBlock block{};
  block.src = src;
  block.dst = dst;
  block.scale = scale;
  block.shift = shift;
  block.weight_a = weight_a;
  block.bias_a = bias_a;
  block.weight_b = weight_b;
  block.bias_b = bias_b;
  block.n = n;
  block.h = h;
  block.w = w;
  return residual_block_sm80(static_cast<Type>(type), block, {static_cast<int>(sms), static_cast<int>(capability)},
                             nullptr);
}

// Offsets in shared memory, for bank conflicts.
unsigned index_chunk_offset(Int pixel, Int chunk) {
  return chunk_offset(static_cast<int>(pixel), static_cast<int>(chunk));
}
unsigned index_sum_offset(Int pixel, Int chunk, Int half) {
  return sum_offset(static_cast<int>(pixel), static_cast<int>(chunk), static_cast<int>(half));
}
#endif

#ifdef MEMNET_ENTRY_residual_block_sm90
int run_residual_block_sm90(Int type, Int capability, Int sms, const void *src, void *dst, Floats scale, Floats shift,
                            const void *weight_a, Floats bias_a, const void *weight_b, Floats bias_b, Int early_weights,
                            Int n, Int h, Int w) {
  ResidualBlock block{};
  block.src = src;
  block.dst = dst;
  block.scale = scale;
  block.shift = shift;
  block.weight_a = weight_a;
  block.bias_a = bias_a;
  block.weight_b = weight_b;
  block.bias_b = bias_b;
  block.n = n;
  block.h = h;
  block.w = w;
  block.early_weights = early_weights != 0;
  return residual_block_sm90(static_cast<Type>(type), block, {static_cast<int>(sms), static_cast<int>(capability)},
                             nullptr);
}
int raw_offset_sm90(int pixel, int chunk) { return sm90::raw_offset(pixel, chunk); }
int plane_bytes_sm90(int width, int bytes, int which) {
  using namespace sm90;
  const auto of = [=](auto half, auto byte) {
    return bytes ? which ? byte.kMidPlane : byte.kActPlane : which ? half.kMidPlane : half.kActPlane;
  };
  return width == 32   ? of(Strip<Math::kFp16, 32>(), Strip<Math::kE4m3, 32>())
         : width == 64 ? of(Strip<Math::kFp16, 64>(), Strip<Math::kE4m3, 64>())
         : width == 80 ? of(Strip<Math::kFp16, 80>(), Strip<Math::kE4m3, 80>())
                       : of(Strip<Math::kFp16, 96>(), Strip<Math::kE4m3, 96>());
}
int strip_width_sm90(Int n, Int h, Int w, Int blocks) { return sm90::strip_width(n, h, w, static_cast<int>(blocks)); }
int list_segments_sm90(Int n, Int h, Int w, Int sms, std::int64_t *out, Int per_block) {
  ResidualBlock block{};
  block.n = n;
  block.h = h;
  block.w = w;
  const sm90::Share share = sm90::share_rows(block, 96, static_cast<int>(sms));
  const sm90::Listing listing{share.params, out, per_block};
  return launch(sm90::list_segments<96>, Grid{share.blocks, 32, 0}, nullptr, listing) == cudaSuccess
             ? static_cast<int>(share.blocks)
             : -1;
}
#endif

#ifdef MEMNET_ENTRY_residual_block_sm90_fp8
int run_residual_block_sm90_fp8(Int, Int capability, Int sms, const void *src, void *dst, Floats scale, Floats shift,
                                const void *weight_a, Floats bias_a, const void *weight_b, Floats bias_b,
                                Int early_weights, Floats gain_a, Floats gain_b, Int n, Int h, Int w) {
  ResidualBlockFp8 block{};
  block.src = src;
  block.dst = dst;
  block.scale = scale;
  block.shift = shift;
  block.weight_a = weight_a;
  block.bias_a = bias_a;
  block.weight_b = weight_b;
  block.bias_b = bias_b;
  block.n = n;
  block.h = h;
  block.w = w;
  block.early_weights = early_weights != 0;
  block.gain_a = gain_a;
  block.gain_b = gain_b;
  return residual_block_sm90_fp8(block, {static_cast<int>(sms), static_cast<int>(capability)}, nullptr);
}
#endif

#ifdef MEMNET_ENTRY_gate
int run_gate(Int type, Int capability, Int sms, const void *slots, Int slot_stride, Int num_src, void *dst,
             Floats scale, Floats shift, const void *weight, Floats bias, Int pixels) {
  Gate args{};
  args.slots = slots;
  args.slot_stride = slot_stride;
  args.num_src = static_cast<std::int32_t>(num_src);
  args.dst = dst;
  args.scale = scale;
  args.shift = shift;
  args.weight = weight;
  args.bias = bias;
  args.pixels = pixels;
  return gate(static_cast<Type>(type), args, {static_cast<int>(sms), static_cast<int>(capability)}, nullptr);
}
#endif

#ifdef MEMNET_ENTRY_first_conv
int run_first_conv(Int type, Int capability, Int sms, Floats image, void *dst, Floats scale, Floats shift,
                   Floats weight, Floats bias, Int n, Int cin, Int h, Int w) {
  FirstConv conv{};
  conv.image = image;
  conv.dst = dst;
  conv.scale = scale;
  conv.shift = shift;
  conv.weight = weight;
  conv.bias = bias;
  conv.n = n;
  conv.cin = cin;
  conv.h = h;
  conv.w = w;
  return first_conv(static_cast<Type>(type), conv, {static_cast<int>(sms), static_cast<int>(capability)}, nullptr);
}
#endif

#ifdef MEMNET_ENTRY_reconstruct
int run_reconstruct(Int type, Int capability, Int sms, const void *slots, Int slot_stride, Int num_src, Int kernel,
                    Int clamp, Floats image, float *out, Floats scale, Floats shift, Floats weight, Floats bias,
                    Floats head, Floats skip, Int n, Int cout, Int h, Int w, Int image_channels) {
  Reconstruct recon{};
  recon.slots = slots;
  recon.slot_stride = slot_stride;
  recon.num_src = static_cast<std::int32_t>(num_src);
  recon.kernel = static_cast<std::int32_t>(kernel);
  recon.clamp = static_cast<std::int32_t>(clamp);
  recon.image = image;
  recon.out = out;
  recon.scale = scale;
  recon.shift = shift;
  recon.weight = weight;
  recon.bias = bias;
  recon.head = head;
  recon.skip = skip;
  recon.n = n;
  recon.cout = cout;
  recon.h = h;
  recon.w = w;
  recon.image_channels = image_channels;
  return reconstruct(static_cast<Type>(type), recon, {static_cast<int>(sms), static_cast<int>(capability)}, nullptr);
}
#endif
}

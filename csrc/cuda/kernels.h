// What each CUDA kernel takes and the functions that launch it. No torch header: raw device addresses and a stream.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace memnet::cuda {

// Of slots and of the operands of products; sums, biases, BN and the image path are fp32.
enum class Type : std::int32_t { kFp16 = 0, kBf16 = 1 };

// Channels of a slot. A network with fewer is padded with zeros: scale, shift, weights and biases of the rest are 0.
constexpr int kChannels = 64;

struct Device {
  int sm_count;
  int capability; // 80 for 8.0
};

// y = x + (bias_b + conv_b(relu(bias_a + conv_a(relu(x * scale + shift)))))
struct ResidualBlock {
  const void *src;      // [N, H, W, 64]
  void *dst;            // [N, H, W, 64], not src
  const float *scale;   // [64]
  const float *shift;   // [64]
  const void *weight_a; // packed for the kernel, see memnet_fast/layouts/
  const float *bias_a;  // [64]
  const void *weight_b; // as weight_a
  const float *bias_b;  // [64]
  std::int64_t n, h, w;
  // The weights (all but src) were complete before the kernel in front of this one in the stream began: then this one
  // may start to load them while that one still runs.
  bool early_weights = false;
};

// act = e4m3(relu(x * scale + shift)), mid = e4m3(relu(gain_a * conv_a(act) + bias_a)), y = x + (gain_b * conv_b(mid) +
// bias_b): x and y fp16, weights e4m3
struct ResidualBlockFp8 : ResidualBlock {
  const float *gain_a; // [64]
  const float *gain_b; // [64]
};

// y = bias + sum_j weight_j relu(slot_j * scale_j + shift_j) over the slots 0 .. num_src - 1
struct Gate {
  const void *slots;        // [num_src or more][N, H, W, 64]
  std::int64_t slot_stride; // elements from one slot to the next
  std::int32_t num_src;
  void *dst;           // [N, H, W, 64], none of the sources
  const float *scale;  // [num_src][64]
  const float *shift;  // [num_src][64]
  const void *weight;  // packed for the kernel
  const float *bias;   // [64]
  std::int64_t pixels; // N * H * W
};

// y = bias + conv3x3(relu(image * scale + shift)), all in fp32, stored as Type
struct FirstConv {
  const float *image;  // [N, Cin, H, W]
  void *dst;           // [N, H, W, 64]
  const float *scale;  // [Cin]
  const float *shift;  // [Cin]
  const float *weight; // [9][Cin][64]
  const float *bias;   // [64]
  std::int64_t n, cin, h, w;
};

// out = skip * image + sum_m head_m * (bias + conv(relu(slot_m * scale_m + shift_m))) over consecutive slots, all in
// fp32
struct Reconstruct {
  const void *slots;        // first source: [num_src][N, H, W, 64]
  std::int64_t slot_stride; // elements
  std::int32_t num_src;
  std::int32_t kernel; // 1 or 3
  std::int32_t clamp;  // to [0, 1]
  const float *image;  // [N, image_channels, H, W]
  float *out;          // [N, Cout, H, W]
  const float *scale;  // [num_src][64]
  const float *shift;  // [num_src][64]
  const float *weight; // [kernel * kernel][Cout][64]
  const float *bias;   // [Cout]
  const float *head;   // [num_src]
  const float *skip;   // [1]
  std::int64_t n, cout, h, w;
  std::int64_t image_channels; // cout, or 1: one image for every output channel
};

// Each launches on the stream and returns at once; the error is that of the launch. Sizes are checked by the caller.
cudaError_t residual_block_sm90(Type type, const ResidualBlock &args, const Device &device, cudaStream_t stream);
cudaError_t residual_block_sm90_fp8(const ResidualBlockFp8 &args, const Device &device, cudaStream_t stream);
cudaError_t residual_block_sm80(Type type, const ResidualBlock &args, const Device &device, cudaStream_t stream);
cudaError_t gate(Type type, const Gate &args, const Device &device, cudaStream_t stream);
cudaError_t first_conv(Type type, const FirstConv &args, const Device &device, cudaStream_t stream);
cudaError_t reconstruct(Type type, const Reconstruct &args, const Device &device, cudaStream_t stream);

} // namespace memnet::cuda

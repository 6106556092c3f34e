// The residual block on Hopper with convolutions in e4m3, in strips of every width.
#include "residual_block_sm90.cuh"

namespace memnet::cuda {
namespace {

template <int kWidth> cudaError_t launch_width(const sm90::Share &share, bool early_weights, cudaStream_t stream) {
  return sm90::launch_strips<sm90::Math::kE4m3, kWidth>(share, early_weights, stream);
}

} // namespace

cudaError_t residual_block_sm90_fp8(const ResidualBlockFp8 &args, const Device &device, cudaStream_t stream) {
  const int width = sm90::strip_width(args.n, args.h, args.w, device.sm_count);
  sm90::Share share = sm90::share_rows(args, width, device.sm_count);
  share.params.gain_a = args.gain_a;
  share.params.gain_b = args.gain_b;
  switch (width) {
  case 32:
    return launch_width<32>(share, args.early_weights, stream);
  case 64:
    return launch_width<64>(share, args.early_weights, stream);
  case 80:
    return launch_width<80>(share, args.early_weights, stream);
  case 96:
    return launch_width<96>(share, args.early_weights, stream);
  default: // a width of kStripWidths without an instance
    return cudaErrorInvalidValue;
  }
}

} // namespace memnet::cuda

// Chooses the strip width of the residual block on Hopper and divides the rows over the multiprocessors.
#include "residual_block_sm90.h"

namespace memnet::cuda {
namespace {

template <int kWidth>
cudaError_t launch_width(Type type, const sm90::Share &share, bool early_weights, cudaStream_t stream) {
  return type == Type::kFp16 ? sm90::launch_strips<sm90::Math::kFp16, kWidth>(share, early_weights, stream)
                             : sm90::launch_strips<sm90::Math::kBf16, kWidth>(share, early_weights, stream);
}

} // namespace

cudaError_t residual_block_sm90(Type type, const ResidualBlock &args, const Device &device, cudaStream_t stream) {
  const int width = sm90::strip_width(args.n, args.h, args.w, device.sm_count);
  const sm90::Share share = sm90::share_rows(args, width, device.sm_count);
  switch (width) {
  case 32:
    return launch_width<32>(type, share, args.early_weights, stream);
  case 64:
    return launch_width<64>(type, share, args.early_weights, stream);
  case 80:
    return launch_width<80>(type, share, args.early_weights, stream);
  case 96:
    return launch_width<96>(type, share, args.early_weights, stream);
  default: // a width of kStripWidths without an instance
    return cudaErrorInvalidValue;
  }
}

} // namespace memnet::cuda

// The residual block on Hopper in strips of 96 pixels.
#include "residual_block_sm90.cuh"

namespace memnet::cuda::sm90 {

template cudaError_t launch_strips<Math::kFp16, 96>(const Share &, bool, cudaStream_t);
template cudaError_t launch_strips<Math::kBf16, 96>(const Share &, bool, cudaStream_t);

} // namespace memnet::cuda::sm90

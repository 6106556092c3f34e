// How kernels are launched. A kernel takes one struct of parameters.
#pragma once

#include <cuda_runtime.h>

namespace memnet::cuda {

struct Grid {
  unsigned blocks;
  unsigned threads;
  unsigned shared_bytes; // dynamic
};

// overlap: the kernel may start before the one in front of it in the stream has ended; it must then call
// ptx::wait_for_previous_kernel() before it touches what that kernel reads or writes.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const Grid &grid, cudaStream_t stream, const Params &params,
                   bool overlap = false) {
  if (grid.shared_bytes > 48 * 1024) { // more than a kernel has without asking
    // Always all that the device has: another thread may be launching the same kernel with another size.
    int device = 0, limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   limit);
    if (error == cudaSuccess) // L1 gets the rest, so that as many blocks as fit share a multiprocessor
      error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                   cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess)
      return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

} // namespace memnet::cuda

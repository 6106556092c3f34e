// The twin of csrc/cuda/launch.h.
#pragma once

#include "cuda_runtime_api.h"

namespace memnet::cuda {

struct Grid {
  unsigned blocks;
  unsigned threads;
  unsigned shared_bytes;
};

template <class Params>
cudaError_t launch(void (*kernel)(Params), const Grid &grid, cudaStream_t stream, const Params &params,
                   bool overlap = false) {
  return ::simt::submit(stream, [=] {
    return ::simt::run([&] { kernel(params); }, grid.blocks, grid.threads, grid.shared_bytes, overlap);
  });
}

} // namespace memnet::cuda

// Ranges as the modelled runtime sees them: see ../cuda_runtime_api.h.
#pragma once

#include "../cuda_runtime_api.h"

inline int nvtxRangePushA(const char *name) {
  simt::runtime.ranges.emplace_back(name);
  return static_cast<int>(simt::runtime.ranges.size()) - 1;
}
inline int nvtxRangePop() {
  simt::runtime.ranges.pop_back();
  return static_cast<int>(simt::runtime.ranges.size());
}

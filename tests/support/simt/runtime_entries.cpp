// The state of the modelled CUDA runtime, for ctypes.
#include "cuda_runtime_api.h"

extern "C" {
void runtime_fail_after(int launches) { simt::runtime.fail_after = launches; } // -1: never
void runtime_forget() {
  simt::runtime.used.clear();
  simt::runtime.within.clear();
  simt::runtime.launches = simt::runtime.uploads = 0;
}
long runtime_launches() { return simt::runtime.launches; }
long runtime_uploads() { return simt::runtime.uploads; }
long runtime_events() { return simt::runtime.events; }
// The NVTX ranges around launch i since runtime_forget().
const char *runtime_within(long i) { return simt::runtime.within[static_cast<std::size_t>(i)].c_str(); }
long runtime_open_ranges() { return static_cast<long>(simt::runtime.ranges.size()); }
long runtime_allocated() { return simt::runtime.allocated; }
// Whether every launch since runtime_forget() went to this device and stream.
int runtime_all_on(int device, std::uint64_t stream) {
  for (const auto &[on, at] : simt::runtime.used)
    if (on != device || reinterpret_cast<std::uint64_t>(at) != stream)
      return 0;
  return 1;
}
}

// Where the time of one thread in one operation goes. Costs one test of a pointer where nobody asked for it, and
// nothing where MEMNET_NO_TIMING is defined: benchmarks/profile_overhead.py measures the three against each other.
#pragma once

#include <omp.h>

#include "kernels.h"
#include "simd.h"

namespace memnet::MEMNET_ISA {

#ifndef MEMNET_NO_TIMING

// Made by each thread in the parallel region of an operation. A lap is all that the thread did since the one before, so
// the laps of a region add up to its time. Kernels end one for each group or block, not for each row or tile: reading
// the clock takes 20 to 40 ns.
class Laps {
public:
  MEMNET_INLINE explicit Laps(const Frame &frame)
      : times_(frame.times == nullptr ? nullptr : frame.times + omp_get_thread_num()) {
    if (times_ != nullptr)
      begin_ = last_ = nanoseconds();
  }
  Laps(const Laps &) = delete;
  Laps &operator=(const Laps &) = delete;

  // flop: of products in this lap, two for each multiply-add.
  MEMNET_INLINE void end_of(Phase phase, i64 flop = 0) {
    if (times_ == nullptr)
      return;
    const i64 now = nanoseconds();
    sums_[phase] += now - last_;
    flop_ += flop;
    last_ = now;
  }

  // Sums stay with the thread until now: neighbours in the array share cache lines. An operation of several regions
  // adds up.
  MEMNET_INLINE ~Laps() {
    if (times_ == nullptr)
      return;
    if (times_->begin == 0)
      times_->begin = begin_;
    times_->end = last_;
    times_->flop += flop_;
    for (int phase = 0; phase < kPhases; ++phase)
      times_->phases[phase] += sums_[phase];
  }

private:
  Times *times_;
  i64 begin_ = 0, last_ = 0, flop_ = 0;
  i64 sums_[kPhases] = {};
};

#else

struct Laps {
  MEMNET_INLINE explicit Laps(const Frame &) {}
  MEMNET_INLINE void end_of(Phase, i64 = 0) {}
};

#endif

} // namespace memnet::MEMNET_ISA

// When each launch of a call ran: CUDA events between the launches, and NVTX ranges around them for tools that look on.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

// Header-only, part of the toolkit: without a tool in the process a range costs a test of a pointer.
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#else
inline void nvtxRangePushA(const char *) {}
inline void nvtxRangePop() {}
#endif

namespace memnet::cuda {

// Made for one call. One event stands between two launches, so the times of all launches add up to that of the call;
// what the device waits for the host is in them. A kernel that would have begun early under the one before it does not.
class Timeline {
public:
  struct Row {
    std::int32_t op; // -1: packing of the weights
    std::string name;
    double begin, end;                 // on the device, milliseconds from the first event
    std::int64_t host_begin, host_end; // of the enqueueing, nanoseconds of the steady clock
  };

  // names: of the operations of the plan.
  explicit Timeline(std::vector<std::string> names) : names_(std::move(names)) {}
  Timeline(const Timeline &) = delete;
  Timeline &operator=(const Timeline &) = delete;
  ~Timeline() {
    for (cudaEvent_t event : events_)
      cudaEventDestroy(event);
  }

  std::size_t operations() const { return names_.size(); }
  bool used() const { return !events_.empty(); }

  // The first event, on the current device; the range around all others.
  void start(cudaStream_t stream) {
    nvtxRangePushA("memnet");
    record(stream);
  }
  void stop() { nvtxRangePop(); }
  void enter(std::int32_t op, const char *packing) {
    rows_.push_back({op, op < 0 ? packing : names_[static_cast<std::size_t>(op)], 0.0, 0.0, now(), 0});
    nvtxRangePushA(rows_.back().name.c_str());
  }
  void leave(cudaStream_t stream) {
    nvtxRangePop();
    record(stream);
    rows_.back().host_end = now();
  }

  // Waits for the end of the call. The error is the first one of all events.
  cudaError_t finish(std::vector<Row> &rows) {
    if (error_ == cudaSuccess && used())
      error_ = cudaEventSynchronize(events_.back());
    for (std::size_t i = 0; i < rows_.size() && error_ == cudaSuccess; ++i) {
      float milliseconds = 0.0f;
      error_ = cudaEventElapsedTime(&milliseconds, events_[0], events_[i + 1]);
      rows_[i].begin = i == 0 ? 0.0 : rows_[i - 1].end;
      rows_[i].end = milliseconds;
    }
    rows = rows_;
    return error_;
  }

private:
  static std::int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  void record(cudaStream_t stream) {
    cudaEvent_t event = nullptr;
    if (error_ == cudaSuccess)
      error_ = cudaEventCreate(&event);
    if (error_ != cudaSuccess)
      return;
    events_.push_back(event);
    error_ = cudaEventRecord(event, stream);
  }

  std::vector<std::string> names_;
  std::vector<cudaEvent_t> events_;
  std::vector<Row> rows_;
  cudaError_t error_ = cudaSuccess;
};

// Stands in the scope of one launch; does nothing without a timeline. packing: the name of a launch that is no
// operation.
class Timed {
public:
  Timed(Timeline *timeline, cudaStream_t stream, std::int32_t op, const char *packing = "")
      : timeline_(timeline), stream_(stream) {
    if (timeline_ != nullptr)
      timeline_->enter(op, packing);
  }
  Timed(const Timed &) = delete;
  Timed &operator=(const Timed &) = delete;
  ~Timed() {
    if (timeline_ != nullptr)
      timeline_->leave(stream_);
  }

private:
  Timeline *timeline_;
  cudaStream_t stream_;
};

// The range of the whole call.
class TimedCall {
public:
  TimedCall(Timeline *timeline, cudaStream_t stream) : timeline_(timeline) {
    if (timeline_ != nullptr)
      timeline_->start(stream);
  }
  TimedCall(const TimedCall &) = delete;
  TimedCall &operator=(const TimedCall &) = delete;
  ~TimedCall() {
    if (timeline_ != nullptr)
      timeline_->stop();
  }

private:
  Timeline *timeline_;
};

} // namespace memnet::cuda

// What csrc/cuda/runner.cpp asks of the CUDA runtime, on one device whose memory is that of the host. A launch on a
// stream under capture is kept; a graph is what was kept, and a launch of it runs that. The state is for tests to look
// at and to spoil.
#pragma once

#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"

constexpr cudaError_t cudaErrorMemoryAllocation = 2;
constexpr cudaError_t cudaErrorInvalidDevice = 101;

namespace simt {

using Launches = std::vector<std::function<bool()>>;

struct Runtime {
  int devices = 2, current = 0, capability = 80;
  int driver = 13000, fail_after = -1; // launches until one reports that memory is short
  long uploads = 0, launches = 0, allocated = 0;
  std::map<cudaStream_t, Launches> captured;
  long events = 0;                 // alive
  std::vector<std::string> ranges; // of NVTX, open now
  std::vector<std::string> within; // of each launch: the ranges around it, the outermost first, joined by '/'
  std::vector<std::pair<int, cudaStream_t>> used; // device and stream of each launch
};
inline Runtime runtime;

inline cudaError_t submit(cudaStream_t stream, std::function<bool()> launch) {
  ++runtime.launches;
  runtime.used.emplace_back(runtime.current, stream);
  std::string within;
  for (const std::string &range : runtime.ranges)
    within += (within.empty() ? "" : "/") + range;
  runtime.within.push_back(within);
  if (runtime.fail_after >= 0 && runtime.fail_after-- == 0)
    return cudaErrorMemoryAllocation;
  const auto found = runtime.captured.find(stream);
  if (found != runtime.captured.end()) {
    found->second.push_back(std::move(launch));
    return cudaSuccess;
  }
  return launch() ? cudaSuccess : cudaErrorInvalidValue;
}

} // namespace simt

using cudaGraph_t = simt::Launches *;
using cudaGraphExec_t = simt::Launches *;
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
constexpr unsigned cudaStreamNonBlocking = 1;

inline const char *cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorInvalidValue";
}
inline const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : simt::last_error.c_str();
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int *version) {
  *version = simt::runtime.driver;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int *count) {
  *count = simt::runtime.devices;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int *device) {
  *device = simt::runtime.current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= simt::runtime.devices)
    return cudaErrorInvalidDevice;
  simt::runtime.current = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr name, int) {
  const int capability = simt::runtime.capability;
  *value = name == cudaDevAttrMultiProcessorCount      ? 3
           : name == cudaDevAttrComputeCapabilityMajor ? capability / 10
                                                       : capability % 10;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
  *stream = new char;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete static_cast<char *>(stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMalloc(void **memory, std::size_t size) {
  *memory = std::malloc(size);
  ++simt::runtime.allocated;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void *memory) {
  std::free(memory);
  --simt::runtime.allocated;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  ++simt::runtime.uploads;
  return cudaSuccess;
}
// An event tells how many launches were before it; each lasts a millisecond.
using cudaEvent_t = long *;
inline cudaError_t cudaEventCreate(cudaEvent_t *event) {
  *event = new long(-1);
  ++simt::runtime.events;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = simt::runtime.launches;
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  if (*from < 0 || *to < 0)
    return cudaErrorInvalidValue;
  *milliseconds = static_cast<float>(*to - *from);
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  --simt::runtime.events;
  return cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  simt::runtime.captured[stream] = {};
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = new simt::Launches(std::move(simt::runtime.captured[stream]));
  simt::runtime.captured.erase(stream);
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned) {
  *exec = new simt::Launches(*graph);
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const auto &launch : *exec)
    if (!launch())
      return cudaErrorInvalidValue;
  return cudaSuccess;
}

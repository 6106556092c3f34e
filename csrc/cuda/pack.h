// How parameters become the weights of the kernels: the jobs of pack.cu, plain data that Python describes.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace memnet::cuda {

enum SourceType : std::uint8_t { kSourceFp64 = 0, kSourceFp32 = 1, kSourceFp16 = 2, kSourceBf16 = 3, kSourceByte = 4 };
enum PackedType : std::int32_t { kPackedFp32 = 0, kPackedFp16 = 1, kPackedBf16 = 2, kPackedByte = 3 };
enum FoldKind : std::int32_t { kFoldNorm = 0, kFoldTotal = 1, kFoldConstant = 2, kFoldNormStep = 3, kFoldStep = 4 };

// Small vectors that are computed first, in float64: `fold`.
//   kFoldNorm      sources weight, bias, running mean, running variance [count]; value = eps;
//                  fold[out + i] = scale, fold[out + count + i] = shift
//   kFoldTotal     source [count]; fold[out] = its sum, from the first element to the last
//   kFoldConstant  fold[out + i] = value
//   kFoldNormStep  sources weight, bias [count]; fold[out] = step(max_i(bias + 8 |weight|))
//   kFoldStep      source [1]; fold[out] = step(source)
// step(largest) = largest / 448 is what an e4m3 number is multiplied with; 1 where nothing is positive.
struct FoldJob {
  std::int32_t kind;
  std::int32_t count;
  std::int64_t out;
  double value;
};

// A convolution in e4m3, [rows][inner / 9][9] bytes from `out` of the packed weights on, for pack jobs to lay out:
// fold[step + row] = step(the largest of |v * fold[scale + row]|), and each kernel of nine taps, divided by that, is
// rounded so that it keeps its sum.
struct QuantiseJob {
  std::int64_t out;
  std::int64_t step;
  std::int64_t scale; // -1: none
  std::int32_t rows;
  std::int32_t inner;
};

// One packed array: element i is (v[base + j] * fold[scale + j / inner] + fold[shift + j / inner]) * fold[multiply] /
// fold[divide] with j = maps[map + i], and 0 where j < 0. v: a parameter, fold itself, or bytes of the packed weights.
// scale, shift, multiply, divide: -1 for none.
struct PackJob {
  std::int64_t out; // bytes from the start of the packed weights
  std::int64_t map;
  std::int64_t base;
  std::int64_t scale;
  std::int64_t shift;
  std::int64_t multiply;
  std::int64_t divide;
  std::int32_t count;
  std::int32_t inner;
  std::int32_t type; // PackedType
  std::int32_t reserved;
};

// The addresses that jobs read travel as kernel arguments: nothing has to be uploaded when a parameter moves, and a
// captured graph holds them. The arguments of a kernel may have 4096 bytes.
constexpr int kSourcesPerFold = 4;
constexpr int kMaxSources = 440;

struct Sources {
  const void *address[kMaxSources]; // null: fold
  std::uint8_t type[kMaxSources];   // SourceType
};

// Elements of one array that one thread block packs.
constexpr int kChunk = 2048;

struct Chunk {
  std::int32_t job;
  std::int32_t start;
};

struct FoldParams {
  Sources sources;     // kSourcesPerFold for each job
  const FoldJob *jobs; // of this launch, one for each block
  double *fold;
};

struct QuantiseParams {
  Sources sources;         // one for each job
  const QuantiseJob *jobs; // of this launch, `rows` blocks for each
  std::int32_t rows;
  double *fold;
  unsigned char *packed;
};

struct PackParams {
  Sources sources; // one for each job from first_job on
  std::int32_t first_job;
  const PackJob *jobs;
  const Chunk *chunks; // of this launch, one for each block
  const std::int32_t *maps;
  const double *fold;
  unsigned char *packed;
};

cudaError_t fold(const FoldParams &params, int jobs, cudaStream_t stream);
cudaError_t quantise(const QuantiseParams &params, int jobs, cudaStream_t stream);
cudaError_t pack(const PackParams &params, int chunks, cudaStream_t stream);

} // namespace memnet::cuda

// The units of a training step (training.h). A convolution backwards is three products like the one forwards: of the
// gradient with the flipped weights, and of input and gradient for the weights, which is Winograd again, F(3x3, 6x6)
// with the same points: dw = G^T ((B^T d B) * (A g A^T)) G, summed over tiles before the last transform.
//
// Sums over pixels are made of parts that depend on the shape alone, added in order: the same bits for any number of
// threads.
#pragma once

#include <omp.h>

#include "gate.h"
#include "reconstruct.h"
#include "unit_weights.h"
#include "winograd.h"

namespace memnet::MEMNET_ISA {

// Tiles whose products for the weights are one matrix product for each point: enough that the sums, 1 MB, travel
// seldom.
constexpr i64 kChunk = 64;

// Parts of a sum over pixels.
constexpr i64 kMaxParts = 32;
constexpr i64 kPartPixels = 2048;
constexpr i64 kSums = 3; // over pixels: g', g' (x - mean), g, where g' is what comes through the ReLU

MEMNET_INLINE i64 count_parts(i64 pixels) {
  const i64 parts = ceil_div(pixels, kPartPixels);
  return parts > kMaxParts ? kMaxParts : parts;
}

MEMNET_INLINE i64 pixels_of(const Unit &unit) { return unit.n * unit.h * unit.w; }

// Both convolutions of a block apart: between them are the statistics of the whole batch.
MEMNET_INLINE Tiling unit_tiling(const Unit &unit) {
  Tiling t;
  t.down = ceil_div(unit.h, kTile);
  t.across = ceil_div(unit.w, kTile);
  t.group = tiles_per_group(unit.c);
  const i64 most = t.across >= t.group ? 1 : smaller(t.down, t.group / t.across);
  t.tall = ceil_div(t.down, ceil_div(t.down, most));
  t.stages = ceil_div(t.down, t.tall);
  t.panels = 1;
  t.bands = 0;
  return t;
}

MEMNET_INLINE Shape unit_shape(const Unit &unit) { return {unit.n, unit.h, unit.w, 1, 1, unit.c, 1}; }

MEMNET_INLINE i64 chunk_stride(i64 c) { return kChunk * c + 16; }

// Behind one another in scratch; every size is a multiple of 16.
struct UnitScratch {
  i64 fold, weights, thread, parts, chunks, sums;

  MEMNET_INLINE i64 total(i64 threads) const { return fold + weights + threads * thread + parts + chunks + sums; }
};

MEMNET_INLINE void clear(float *values, i64 count) {
  for (i64 i = 0; i < count; ++i)
    values[i] = 0.0f;
}

MEMNET_INLINE i64 round_up(i64 floats) { return ceil_div(floats, 16) * 16; }

// fold: scale and shift of all sources, and zeros. weights: as the products want them. parts: sums over pixels for BN.
// chunks, sums: for the gradient of the weights.
inline UnitScratch unit_scratch_of(const Unit &unit, bool backward) {
  const i64 c = unit.c, parts = count_parts(pixels_of(unit)), taps = unit.kernel * unit.kernel;
  UnitScratch s = {2 * unit.sources * c + c, 0, 0, 0, 0, 0};
  if (unit.outputs != 0) {
    s.weights = round_up(taps * unit.outputs * c);
    s.thread = backward ? round_up(taps * unit.w) : reconstruct_scratch(unit_shape(unit));
    s.parts = backward ? parts * kSums * c : 0;
    s.sums = backward ? parts * taps * unit.outputs * c : 0;
  } else if (unit.kernel == 3) {
    const Tiling t = unit_tiling(unit);
    s.weights = kPoints * c * c;
    s.thread = group_scratch(t, c);
    if (backward) {
      s.parts = unit.n * t.stages * kSums * c;
      s.chunks = 2 * 2 * kPoints * chunk_stride(c);
      s.sums = kPoints * c * c;
    }
  } else {
    s.weights = unit.sources * c * c;
    s.thread = 2 * kGatePixels * c;
    if (backward) {
      s.parts = unit.sources * parts * kSums * c;
      s.sums = unit.sources * parts * c * c;
    }
  }
  return s;
}

struct UnitMemory {
  float *scale, *shift, *zeros, *weights, *threads, *parts, *chunks, *sums;
};

MEMNET_INLINE UnitMemory lay_out(const Unit &unit, const UnitScratch &s, float *scratch) {
  UnitMemory m;
  m.scale = scratch;
  m.shift = m.scale + unit.sources * unit.c;
  m.zeros = m.shift + unit.sources * unit.c;
  m.weights = scratch + s.fold;
  m.threads = m.weights + s.weights;
  m.parts = m.threads + unit.threads * s.thread;
  m.chunks = m.parts + s.parts;
  m.sums = m.chunks + s.chunks;
  return m;
}

static i64 unit_scratch_floats(const Unit &unit, bool backward) {
  return unit_scratch_of(unit, backward).total(unit.threads);
}

// scale, shift [sources][C]: bn(x) = x * scale + shift.
inline void fold_norms(const Unit &unit, const UnitMemory &m) {
  for (i64 i = 0; i < unit.sources * unit.c; ++i) {
    m.scale[i] = unit.gamma[i] * unit.invstd[i];
    m.shift[i] = unit.beta[i] - unit.mean[i] * m.scale[i];
  }
  clear(m.zeros, unit.c);
}

MEMNET_INLINE Plane image_of(const Unit &unit, const float *map, i64 image) {
  const i64 pitch = unit.w * unit.c;
  // Sources of a Plane are only read.
  return Plane{const_cast<float *>(map) + image * unit.h * pitch, unit.h, pitch, 0};
}

template <Stage kStage, int kCp>
void unit_convolution(const Unit &unit, const float *src, float *dst, const Conv &conv, float *scratch,
                      i64 per_thread) {
  const Shape shape = unit_shape(unit);
  const Tiling t = unit_tiling(unit);
  Frame frame = {};
#pragma omp parallel num_threads(unit.threads)
  {
    Laps laps(frame);
    float *own = scratch + omp_get_thread_num() * per_thread;
#pragma omp for schedule(static)
    for (i64 i = 0; i < unit.n * t.stages; ++i) {
      const i64 image = i / t.stages;
      const Plane skip = skips(kStage) ? image_of(unit, unit.skip, image) : Plane{};
      winograd_stage<kStage, kCp>(shape, t, t.stages - 1 - i % t.stages, 0, t.across, image_of(unit, src, image),
                                  image_of(unit, dst, image), skip, conv, own, laps);
    }
  }
}

template <int kCp> void forward_of(const Unit &unit, float *scratch) {
  const UnitScratch s = unit_scratch_of(unit, false);
  const UnitMemory m = lay_out(unit, s, scratch);
  fold_norms(unit, m);
  Frame frame = {};
  frame.shape = unit_shape(unit);
  frame.threads = unit.threads;
  frame.scratch = m.threads;
  frame.scratch_floats = s.thread;
  if (unit.outputs != 0) {
    // A reconstruction with one head, that of the weight 1.
    gather_taps(unit, m.weights);
    frame.shape.cout = unit.outputs;
    frame.slots = const_cast<float *>(unit.x[0]);
    frame.out = unit.out;
    const std::int32_t first = 0;
    const float whole = 1.0f;
    const auto address = [](const void *pointer) { return reinterpret_cast<std::uint64_t>(pointer); };
    Op op = {};
    op.num_src = 1;
    op.kernel = static_cast<std::int32_t>(unit.kernel);
    op.srcs = address(&first);
    op.scale = address(m.scale);
    op.shift = address(m.shift);
    op.weight_a = address(m.weights);
    op.bias_a = address(unit.bias);
    op.head_weights = address(&whole);
    return reconstruct(op, frame);
  }
  if (unit.kernel == 1) {
    gather_weights<false>(unit, m.weights);
    gate_blocks<kCp>(
        frame, [&](i64 j) { return unit.x[j]; }, unit.sources, m.scale, m.shift, m.weights, unit.bias, false, unit.out);
    return;
  }
  transform_weights<false>(unit, m.weights);
  const Conv conv{m.scale, m.shift, m.weights, unit.bias};
  if (unit.skip == nullptr)
    unit_convolution<Stage::kTrain, kCp>(unit, unit.x[0], unit.out, conv, m.threads, s.thread);
  else
    unit_convolution<Stage::kTrainSkip, kCp>(unit, unit.x[0], unit.out, conv, m.threads, s.thread);
}

static void run_unit_forward(const Unit &unit, float *scratch) {
  unit.c == 64 ? forward_of<64>(unit, scratch) : forward_of<0>(unit, scratch);
}

// grad_a [pixels][C], of what the ReLU gave, becomes g', that of what it was given; sums [kSums][C] grow, the third
// only with kBias.
template <bool kBias>
void through_relu(i64 pixels, i64 c, const float *x, const float *grad, const float *scale, const float *shift,
                  const float *mean, float *grad_a, float *sums) {
  for (i64 v = 0; v < c; v += kLanes) {
    const vec s = load(scale + v), t = load(shift + v), m = load(mean + v);
    vec beta = zero(), gamma = zero(), bias = zero();
    for (i64 i = v; i < pixels * c; i += c) {
      const vec value = load(x + i), g = where_positive(fma(value, s, t), load(grad_a + i));
      store(grad_a + i, g);
      beta = beta + g;
      gamma = fma(g, value - m, gamma);
      if constexpr (kBias)
        bias = bias + load(grad + i);
    }
    store(sums + v, load(sums + v) + beta);
    store(sums + c + v, load(sums + c + v) + gamma);
    store(sums + 2 * c + v, load(sums + 2 * c + v) + bias);
  }
}

// What is left of BN backwards when the sums over all pixels are known: grad_x = p g' + q (x - mean) + r for each
// channel. parts: [count][kSums][C] of source j. coefficients: [kSums][C].
inline void finish_sums(const Unit &unit, i64 j, i64 count, const float *parts, float *coefficients) {
  const i64 c = unit.c, at = j * c;
  const double pixels = static_cast<double>(pixels_of(unit));
  for (i64 v = 0; v < c; ++v) {
    double beta = 0.0, gamma = 0.0, bias = 0.0;
    for (i64 part = 0; part < count; ++part) {
      const float *sums = parts + part * kSums * c + v;
      beta += sums[0];
      gamma += sums[c];
      bias += sums[2 * c];
    }
    const double invstd = unit.invstd[at + v], p = unit.gamma[at + v] * invstd;
    unit.grad_beta[at + v] = static_cast<float>(beta);
    unit.grad_gamma[at + v] = static_cast<float>(gamma * invstd);
    if (j == 0 && unit.outputs == 0)
      unit.grad_bias[v] = static_cast<float>(bias);
    coefficients[v] = static_cast<float>(p);
    coefficients[c + v] = unit.batch_statistics ? static_cast<float>(-p * invstd * invstd * gamma / pixels) : 0.0f;
    coefficients[2 * c + v] = unit.batch_statistics ? static_cast<float>(-p * beta / pixels) : 0.0f;
  }
}

inline void finish_pixels(const Unit &unit, i64 j, i64 from, i64 to, const float *coefficients) {
  const i64 c = unit.c;
  const float *x = unit.x[j], *mean = unit.mean + j * c;
  float *grad = unit.grad_x[j];
  for (i64 pixel = from; pixel < to; ++pixel)
    for (i64 v = 0; v < c; v += kLanes) {
      const i64 at = pixel * c + v;
      const vec offset = fma(load(coefficients + c + v), load(x + at) - load(mean + v), load(coefficients + 2 * c + v));
      store(grad + at, fma(load(coefficients + v), load(grad + at), offset));
    }
}

// parts: [sources][count][kSums][C]. Each source's coefficients take the place of its first part.
inline void finish_unit(const Unit &unit, i64 count, float *parts) {
  const i64 blocks = count_parts(pixels_of(unit)), pixels = pixels_of(unit), stride = count * kSums * unit.c;
#pragma omp parallel num_threads(unit.threads)
  {
#pragma omp for schedule(static)
    for (i64 j = 0; j < unit.sources; ++j)
      finish_sums(unit, j, count, parts + j * stride, parts + j * stride);
#pragma omp for schedule(static)
    for (i64 i = 0; i < unit.sources * blocks; ++i)
      finish_pixels(unit, i / blocks, pixels * (i % blocks) / blocks, pixels * (i % blocks + 1) / blocks,
                    parts + i / blocks * stride);
  }
}

// t = A d: the values of a polynomial with six coefficients at the points.
MEMNET_INLINE void gradient_points(const vec (&d)[kTile], vec (&t)[kSpan]) {
  t[0] = d[0];
  vec even = d[0] + (d[2] + d[4]), odd = d[1] + (d[3] + d[5]);
  t[1] = even + odd;
  t[2] = even - odd;
  even = fma(broadcast(16.0f), d[4], fma(broadcast(4.0f), d[2], d[0]));
  odd = fma(broadcast(32.0f), d[5], fma(broadcast(8.0f), d[3], d[1] + d[1]));
  t[3] = even + odd;
  t[4] = even - odd;
  even = fma(broadcast(0.0625f), d[4], fma(broadcast(0.25f), d[2], d[0]));
  odd = fma(broadcast(0.03125f), d[5], fma(broadcast(0.125f), d[3], broadcast(0.5f) * d[1]));
  t[5] = even + odd;
  t[6] = even - odd;
  t[7] = d[5];
}

// A g A^T of one tile, of which height x width pixels lie in the image. g: its first pixel.
MEMNET_INLINE void transform_gradient(const float *g, i64 pitch, i64 c, i64 height, i64 width, float *points,
                                      i64 stride) {
  for (i64 v = 0; v < c; v += kLanes) {
    vec columns[kSpan][kTile];
#pragma GCC unroll 6
    for (int x = 0; x < kTile; ++x) {
      vec d[kTile], t[kSpan];
#pragma GCC unroll 6
      for (int y = 0; y < kTile; ++y)
        d[y] = y < height && x < width ? load(g + y * pitch + x * c + v) : zero();
      gradient_points(d, t);
#pragma GCC unroll 8
      for (int y = 0; y < kSpan; ++y)
        columns[y][x] = t[y];
    }
#pragma GCC unroll 8
    for (int y = 0; y < kSpan; ++y) {
      vec t[kSpan];
      gradient_points(columns[y], t);
#pragma GCC unroll 8
      for (int x = 0; x < kSpan; ++x)
        store(points + (y * kSpan + x) * stride + v, t[x]);
    }
  }
}

// Both transforms of one tile of all images.
template <int kCp>
void transform_pair(const Unit &unit, const Tiling &t, i64 tile, const UnitMemory &m, float *input, float *gradient) {
  const i64 c = kCp != 0 ? kCp : unit.c, stride = chunk_stride(c), image = tile / (t.down * t.across);
  const i64 y0 = tile / t.across % t.down * kTile, x0 = tile % t.across * kTile;
  const Plane src = image_of(unit, unit.x[0], image), grad = image_of(unit, unit.grad, image);
  transform_input<true>(src, y0 - 1, x0 - 1, unit.h, unit.w, c, m.scale, m.shift, input, stride);
  const float *g = pixel_at(grad, y0, x0, c);
  if (y0 + kTile <= unit.h && x0 + kTile <= unit.w)
    transform_gradient(g, grad.pitch, c, kTile, kTile, gradient, stride);
  else
    transform_gradient(g, grad.pitch, c, unit.h - y0, unit.w - x0, gradient, stride);
}

// A chunk is transformed by all threads, tile by tile, and then multiplied, point by point, while others transform the
// next one.
template <int kCp> void weight_gradient(const Unit &unit, const UnitMemory &m) {
  const Tiling t = unit_tiling(unit);
  const i64 c = kCp != 0 ? kCp : unit.c, stride = chunk_stride(c), tiles = unit.n * t.down * t.across;
#pragma omp parallel num_threads(unit.threads)
  {
    for (i64 chunk = 0; chunk * kChunk < tiles; ++chunk) {
      float *inputs = m.chunks + chunk % 2 * 2 * kPoints * stride, *gradients = inputs + kPoints * stride;
      const i64 from = chunk * kChunk, count = smaller(kChunk, tiles - from);
#pragma omp for schedule(static)
      for (i64 i = 0; i < count; ++i)
        transform_pair<kCp>(unit, t, from + i, m, inputs + i * c, gradients + i * c);
#pragma omp for schedule(static) nowait
      for (i64 k = 0; k < kPoints; ++k) {
        float *sums = m.sums + k * c * c;
        const float *a = inputs + k * stride, *b = gradients + k * stride;
        if (chunk == 0)
          matmul<false, Left::kTransposed>(a, c, b, c, count, nullptr, 0, sums, c, c, Nothing{});
        else
          matmul<true, Left::kTransposed>(a, c, b, c, count, sums, c, sums, c, c, Nothing{});
      }
    }
  }
  transform_weight_sums(unit, m.sums);
}

template <int kCp> void backward_3x3(const Unit &unit, const UnitScratch &s, const UnitMemory &m) {
  const Tiling t = unit_tiling(unit);
  const i64 c = unit.c, units = unit.n * t.stages, pitch = unit.w * c;
  const Shape shape = unit_shape(unit);
  const Conv conv{nullptr, nullptr, m.weights, m.zeros};
  transform_weights<true>(unit, m.weights);
  Frame frame = {};
#pragma omp parallel num_threads(unit.threads)
  {
    Laps laps(frame);
    float *group = m.threads + omp_get_thread_num() * s.thread;
#pragma omp for schedule(static)
    for (i64 i = 0; i < units; ++i) {
      const i64 image = i / t.stages, stage = t.stages - 1 - i % t.stages, y0 = stage * t.tall * kTile;
      const i64 y1 = smaller(unit.h, y0 + t.tall * kTile);
      winograd_stage<Stage::kGradient, kCp>(shape, t, stage, 0, t.across, image_of(unit, unit.grad, image),
                                            image_of(unit, unit.grad_x[0], image), {}, conv, group, laps);
      // What the convolution wrote is still in the cache.
      float *sums = m.parts + i * kSums * c;
      clear(sums, kSums * c);
      for (i64 y = y0; y < y1; ++y) {
        const i64 at = (image * unit.h + y) * pitch;
        through_relu<true>(unit.w, c, unit.x[0] + at, unit.grad + at, m.scale, m.shift, unit.mean, unit.grad_x[0] + at,
                           sums);
      }
    }
  }
  weight_gradient<kCp>(unit, m);
  finish_unit(unit, units, m.parts);
}

template <int kCp> void backward_1x1(const Unit &unit, const UnitScratch &s, const UnitMemory &m) {
  const i64 c = kCp != 0 ? kCp : unit.c, pixels = pixels_of(unit), count = count_parts(pixels);
  gather_weights<true>(unit, m.weights);
#pragma omp parallel num_threads(unit.threads)
  {
    float *active = m.threads + omp_get_thread_num() * s.thread;
#pragma omp for schedule(static)
    for (i64 i = 0; i < unit.sources * count; ++i) {
      const i64 j = i / count, first = pixels * (i % count) / count, last = pixels * (i % count + 1) / count;
      const float *scale = m.scale + j * c, *shift = m.shift + j * c;
      float *parts = m.parts + i * kSums * c, *sums = m.sums + i * c * c; // [C out][C in]
      clear(parts, kSums * c);
      for (i64 from = first; from < last; from += kGatePixels) {
        const i64 rows = smaller(kGatePixels, last - from);
        const float *x = unit.x[j] + from * c, *grad = unit.grad + from * c;
        float *grad_x = unit.grad_x[j] + from * c;
        // While the gradient is multiplied, the source is activated.
        matmul<false>(grad, c, m.weights + j * c * c, c, c, nullptr, 0, grad_x, c, rows,
                      Activation{x, scale, shift, nullptr, nullptr, active, rows, c});
        if (from == first)
          matmul<false, Left::kTransposed>(grad, c, active, c, rows, nullptr, 0, sums, c, c, Nothing{});
        else
          matmul<true, Left::kTransposed>(grad, c, active, c, rows, sums, c, sums, c, c, Nothing{});
        through_relu<true>(rows, c, x, grad, scale, shift, unit.mean + j * c, grad_x, parts);
      }
    }
#pragma omp for schedule(static)
    for (i64 row = 0; row < c; ++row)
      for (i64 j = 0; j < unit.sources; ++j)
        for (i64 v = 0; v < c; v += kLanes) {
          const float *at = m.sums + (j * count * c + row) * c + v;
          vec sum = load(at);
          for (i64 part = 1; part < count; ++part)
            sum = sum + load(at + part * c * c);
          store(unit.grad_weight + (row * unit.sources + j) * c + v, sum);
        }
  }
  finish_unit(unit, count, m.parts);
}

// Of one row: near [taps][w], the gradient of output o around each pixel, where each tap took it to.
inline void gather_gradients(const Unit &unit, i64 image, i64 y, i64 o, float *near) {
  const i64 radius = unit.kernel / 2;
  const float *plane = unit.grad + (image * unit.outputs + o) * unit.h * unit.w;
  for (i64 dy = radius; dy >= -radius; --dy)
    for (i64 dx = radius; dx >= -radius; --dx, near += unit.w)
      for (i64 x = 0; x < unit.w; ++x) {
        const bool inside = y + dy >= 0 && y + dy < unit.h && x + dx >= 0 && x + dx < unit.w;
        near[x] = inside ? plane[(y + dy) * unit.w + x + dx] : 0.0f;
      }
}

// grad_a [w][C] of one row = or += near^T weight, and sums [kTaps][stride] += near relu(bn(x)).
template <int kTaps>
void spread_row(const Unit &unit, const float *x, const UnitMemory &m, const float *near, const float *weight,
                i64 stride, bool begins, float *grad_a, float *sums) {
  const i64 c = unit.c;
  for (i64 v = 0; v < c; v += kLanes) {
    const vec s = load(m.scale + v), t = load(m.shift + v);
    vec w[kTaps], sum[kTaps];
    for (int tap = 0; tap < kTaps; ++tap) {
      w[tap] = load(weight + tap * stride + v);
      sum[tap] = load(sums + tap * stride + v);
    }
    for (i64 i = 0; i < unit.w; ++i) {
      const vec a = relu(fma(load(x + i * c + v), s, t));
      vec g = begins ? zero() : load(grad_a + i * c + v);
      for (int tap = 0; tap < kTaps; ++tap) {
        const vec near_tap = broadcast(near[tap * unit.w + i]);
        g = fma(near_tap, w[tap], g);
        sum[tap] = fma(near_tap, a, sum[tap]);
      }
      store(grad_a + i * c + v, g);
    }
    for (int tap = 0; tap < kTaps; ++tap)
      store(sums + tap * stride + v, sum[tap]);
  }
}

inline void backward_reconstruction(const Unit &unit, const UnitScratch &s, const UnitMemory &m) {
  const i64 c = unit.c, taps = unit.kernel * unit.kernel, rows = unit.n * unit.h, stride = unit.outputs * c;
  const i64 count = count_parts(pixels_of(unit));
  gather_taps(unit, m.weights);
#pragma omp parallel num_threads(unit.threads)
  {
    float *near = m.threads + omp_get_thread_num() * s.thread;
#pragma omp for schedule(static)
    for (i64 part = 0; part < count; ++part) {
      float *parts = m.parts + part * kSums * c, *sums = m.sums + part * taps * stride;
      clear(parts, kSums * c);
      clear(sums, taps * stride);
      for (i64 row = rows * part / count; row < rows * (part + 1) / count; ++row) {
        const float *x = unit.x[0] + row * unit.w * c;
        float *grad_x = unit.grad_x[0] + row * unit.w * c;
        for (i64 o = 0; o < unit.outputs; ++o) {
          gather_gradients(unit, row / unit.h, row % unit.h, o, near);
          const auto spread = unit.kernel == 3 ? spread_row<9> : spread_row<1>;
          spread(unit, x, m, near, m.weights + o * c, stride, o == 0, grad_x, sums + o * c);
        }
        through_relu<false>(unit.w, c, x, nullptr, m.scale, m.shift, unit.mean, grad_x, parts);
      }
    }
  }
  for (i64 o = 0; o < unit.outputs; ++o) {
    for (i64 i = 0; i < c; ++i)
      for (i64 tap = 0; tap < taps; ++tap) {
        float sum = 0.0f;
        for (i64 part = 0; part < count; ++part)
          sum += m.sums[(part * taps + tap) * stride + o * c + i];
        unit.grad_weight[(o * c + i) * taps + tap] = sum;
      }
    double bias = 0.0;
    for (i64 image = 0; image < unit.n; ++image)
      for (i64 i = 0; i < unit.h * unit.w; ++i)
        bias += unit.grad[(image * unit.outputs + o) * unit.h * unit.w + i];
    unit.grad_bias[o] = static_cast<float>(bias);
  }
  finish_unit(unit, count, m.parts);
}

static void run_unit_backward(const Unit &unit, float *scratch) {
  const UnitScratch s = unit_scratch_of(unit, true);
  const UnitMemory m = lay_out(unit, s, scratch);
  fold_norms(unit, m);
  if (unit.outputs != 0)
    backward_reconstruction(unit, s, m);
  else if (unit.kernel == 3)
    unit.c == 64 ? backward_3x3<64>(unit, s, m) : backward_3x3<0>(unit, s, m);
  else
    unit.c == 64 ? backward_1x1<64>(unit, s, m) : backward_1x1<0>(unit, s, m);
}

static i64 statistics_floats(i64 pixels, i64 c) { return (count_parts(pixels) * 2 + 1) * c; }

// What sums are taken relative to, so that a mean far from zero costs no digits: the mean of a few pixels, of which
// hardly any is far from it. Not at every count-th part, which in a batch of 64 would be corners of images, all of
// them.
inline void choose_origin(const float *x, i64 pixels, i64 c, float *origin) {
  const i64 count = smaller(pixels, kMaxParts);
  for (i64 v = 0; v < c; v += kLanes) {
    vec sum = zero();
    for (i64 i = 0; i < count; ++i)
      sum = fma(broadcast(1.0f / static_cast<float>(count)), load(x + pixels * (i + 1) / (count + 1) * c + v), sum);
    store(origin + v, sum);
  }
}

// parts: [count][2][C], and [C] of the origin.
static void run_statistics(const float *x, i64 pixels, i64 c, float *mean, float *var, float *parts, int threads) {
  const i64 count = count_parts(pixels);
  float *origin = parts + count * 2 * c;
  choose_origin(x, pixels, c, origin);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 part = 0; part < count; ++part) {
    const i64 first = pixels * part / count, last = pixels * (part + 1) / count;
    float *sums = parts + part * 2 * c;
    clear(sums, 2 * c);
    for (i64 from = first; from < last; from += kGatePixels)
      for (i64 v = 0; v < c; v += kLanes) {
        const vec start = load(origin + v);
        vec sum = zero(), squares = zero();
        for (i64 pixel = from; pixel < smaller(last, from + kGatePixels); ++pixel) {
          const vec value = load(x + pixel * c + v) - start;
          sum = sum + value;
          squares = fma(value, value, squares);
        }
        store(sums + v, load(sums + v) + sum);
        store(sums + c + v, load(sums + c + v) + squares);
      }
  }
  for (i64 v = 0; v < c; ++v) {
    double sum = 0.0, squares = 0.0;
    for (i64 part = 0; part < count; ++part) {
      sum += parts[part * 2 * c + v];
      squares += parts[part * 2 * c + c + v];
    }
    const double offset = sum / static_cast<double>(pixels), spread = squares / static_cast<double>(pixels);
    mean[v] = static_cast<float>(origin[v] + offset);
    const double variance = spread - offset * offset;
    var[v] = static_cast<float>(variance < 0.0 ? 0.0 : variance);
  }
}

} // namespace memnet::MEMNET_ISA

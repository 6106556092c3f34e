// The residual block by Winograd F(3x3, 3x3) with bf16 products: 25 products per 3x3 tile and channel pair instead
// of 81.
//
// Points +-2/5, +-5/4, infinity: of all choices for this size they lose least to operands of 8 bits (README.md). Sums,
// transforms, bias and skip are fp32; the transformed pixels and weights are rounded to bf16. Weights come transformed
// (packing.pack_bf16_winograd); here are B^T d B and A^T m A.
//
// Both convolutions of a block run together down a band of the image; the tensor between them, in bf16, lives in a ring
// of a few rows. Tiles lie on a grid that starts at the image's corner, and every tile sees the same arithmetic:
// results do not depend on threads, bands or batch.
#pragma once

#include <omp.h>

#include "bf16.h"
#include "direct.h"

namespace memnet::MEMNET_ISA {

constexpr i64 kTile = 3;         // output pixels of a tile, per direction
constexpr i64 kSpan = kTile + 2; // input pixels of a tile
constexpr i64 kPoints = kSpan * kSpan;
constexpr i64 kRun = 8; // tiles that are transformed together, one vector of channels at a time: their pixels fit L1

// The geometry of one run. A stage is what one step of a band computes: `tall` rows of tiles.
struct Tiling {
  i64 down, across; // tiles of an image
  i64 group;        // tiles that are multiplied together
  i64 tall;         // tile rows per stage
  i64 stages;       // per image
  i64 bands;        // per image
};

// 30 tiles of 64 channels: 96 KB of transformed pixels and 192 KB of sums share L2 with 205 KB of weights.
constexpr i64 tiles_per_group(i64 cp) {
  const i64 fit = 1920 / cp / kPairRows * kPairRows;
  return fit < kPairRows ? kPairRows : fit > 48 ? 48 : fit;
}

// Not a multiple of 4 KB, or the 25 matrices would fall on the same cache sets.
constexpr i64 values_per_point(i64 cp) { return tiles_per_group(cp) * cp + 32; }

MEMNET_INLINE Tiling tiling(const Shape &shape, i64 threads) {
  Tiling t;
  t.down = ceil_div(shape.h, kTile);
  t.across = ceil_div(shape.w, kTile);
  t.group = tiles_per_group(shape.cp);
  t.tall = t.across >= t.group ? 1 : smaller(t.down, t.group / t.across);
  t.stages = ceil_div(t.down, t.tall);
  // Few bands repeat little (each computes a stage more of the first convolution at either inner end); many bands
  // balance the threads. Pick the cheapest in units of one stage of one convolution.
  t.bands = 1;
  i64 best = 0;
  for (i64 bands = 1; bands <= smaller(threads, t.stages); ++bands) {
    const i64 repeated = bands == 1 ? 0 : bands == 2 ? 1 : 2;
    const i64 cost = ceil_div(shape.n * bands, threads) * (2 * ceil_div(t.stages, bands) + repeated);
    if (bands == 1 || cost < best) {
      best = cost;
      t.bands = bands;
    }
  }
  return t;
}

MEMNET_INLINE i64 ring_rows(const Tiling &t) { return 3 * t.tall * kTile; }

MEMNET_INLINE i64 bf16_winograd_scratch(const Shape &shape, i64 threads) {
  const i64 ring = ring_rows(tiling(shape, threads)) * shape.w * shape.cp;
  return kPoints * values_per_point(shape.cp) * 3 / 2 + ring / 2;
}

// Rows of [rows][W][Cp] that stand for the rows of an image, which wrap around.
template <typename T> struct Rows {
  T *data;
  i64 rows;
};

template <typename T> MEMNET_INLINE T *row_at(const Rows<T> &rows, i64 y, i64 pitch) {
  return rows.data + y % rows.rows * pitch;
}

// t = B^T d, scaled by what packing.pack_bf16_winograd takes out of the weights again.
MEMNET_INLINE void input_points(const vec (&d)[kSpan], vec (&t)[kSpan]) {
  constexpr float a = 0.4f, b = 1.25f;
  const vec p = fnma(broadcast(b * b), d[1], d[3]), q = fnma(broadcast(b * b), d[0], d[2]);
  const vec u = fnma(broadcast(a * a), d[1], d[3]), v = fnma(broadcast(a * a), d[0], d[2]);
  t[0] = fma(broadcast(a), q, p);
  t[1] = fnma(broadcast(a), q, p);
  t[2] = fma(broadcast(b), v, u);
  t[3] = fnma(broadcast(b), v, u);
  t[4] = fma(broadcast(a * a * b * b), d[0], fnma(broadcast(a * a + b * b), d[2], d[4]));
}

// y = A^T m
MEMNET_INLINE void output_points(const vec (&m)[kSpan], vec (&y)[kTile]) {
  constexpr float a = 0.4f, b = 1.25f;
  const vec p = m[0] + m[1], q = m[0] - m[1], r = m[2] + m[3], s = m[2] - m[3];
  y[0] = p + r;
  y[1] = fma(broadcast(b), s, broadcast(a) * q);
  y[2] = fma(broadcast(b * b), r, fma(broadcast(a * a), p, m[4]));
}

// One vector of channels of `count` tiles side by side. rows: six rows at the image's left edge and this vector, null
// outside the image; x: the first pixel of the first tile, which may lie outside; points: [25] matrices point_stride
// apart, at the first tile's row. A tile takes over the two columns that it shares with the one before.
template <bool kActivate, bool kAllRows, typename T>
MEMNET_INLINE void transform_run(const T *const (&rows)[kSpan], i64 x, i64 width, i64 count, i64 cp, vec scale,
                                 vec shift, bf16 *points, i64 point_stride) {
  vec columns[kSpan][kSpan]; // [x][y]
  for (i64 i = 0; i < count; ++i, x += kTile, points += cp) {
#pragma GCC unroll 5
    for (int k = 0; k < kSpan; ++k) {
      if (k < kSpan - kTile && i > 0) {
#pragma GCC unroll 5
        for (int y = 0; y < kSpan; ++y)
          columns[k][y] = columns[k + kTile][y];
        continue;
      }
      vec d[kSpan];
      const bool inside = x + k >= 0 && x + k < width;
#pragma GCC unroll 5
      for (int y = 0; y < kSpan; ++y) {
        d[y] = zero();
        if (inside && (kAllRows || rows[y] != nullptr)) {
          d[y] = load(rows[y] + (x + k) * cp);
          if constexpr (kActivate)
            d[y] = relu(fma(d[y], scale, shift));
        }
      }
      input_points(d, columns[k]);
    }
#pragma GCC unroll 5
    for (int y = 0; y < kSpan; ++y) {
      vec d[kSpan], u[kSpan];
#pragma GCC unroll 5
      for (int k = 0; k < kSpan; ++k)
        d[k] = columns[k][y];
      input_points(d, u);
#pragma GCC unroll 5
      for (int k = 0; k < kSpan; ++k)
        store(points + (y * kSpan + k) * point_stride, u[k]);
    }
  }
}

// height, width: pixels of the tile inside the image.
template <Stage kStage, typename T>
MEMNET_INLINE void transform_output(const float *points, i64 point_stride, i64 cp, const float *bias,
                                    T *const (&rows)[kTile], const T *const (&skips)[kTile], i64 height, i64 width) {
  for (i64 c = 0; c < cp; c += kLanes) {
    vec columns[kTile][kSpan];
#pragma GCC unroll 5
    for (int x = 0; x < kSpan; ++x) {
      vec m[kSpan], u[kTile];
#pragma GCC unroll 5
      for (int y = 0; y < kSpan; ++y)
        m[y] = load(points + (y * kSpan + x) * point_stride + c);
      output_points(m, u);
#pragma GCC unroll 3
      for (int y = 0; y < kTile; ++y)
        columns[y][x] = u[y];
    }
    const vec b = load(bias + c);
#pragma GCC unroll 3
    for (int y = 0; y < kTile; ++y) {
      if (y >= height)
        break;
      vec u[kTile];
      output_points(columns[y], u);
#pragma GCC unroll 3
      for (int x = 0; x < kTile; ++x) {
        if (x >= width)
          break;
        const vec value = u[x] + b;
        store(rows[y] + x * cp + c, kStage == Stage::kFirst ? relu(value) : value + load(skips[y] + x * cp + c));
      }
    }
  }
}

// Computes tile rows [stage * tall, ...) of one image. kCp: the padded channels where they are known beforehand, or 0.
template <Stage kStage, int kCp, typename Src, typename Dst>
void winograd_stage(const Shape &shape, const Tiling &t, i64 stage, const Rows<Src> &src, const Rows<Dst> &dst,
                    const Rows<Dst> &skip, const float *scale, const float *shift, const bf16 *weight,
                    const float *bias, float *scratch, Laps &laps) {
  constexpr bool kActivate = kStage == Stage::kFirst;
  const i64 cp = kCp != 0 ? kCp : shape.cp, pitch = shape.w * cp, stride = values_per_point(cp);
  float *sums = scratch;
  bf16 *points = reinterpret_cast<bf16 *>(sums + kPoints * stride);
  const i64 first = stage * t.tall * t.across;
  const i64 last = smaller(t.down, (stage + 1) * t.tall) * t.across;
  for (i64 start = first; start < last; start += t.group) {
    const i64 count = smaller(t.group, last - start);
    for (i64 i = 0, run; i < count; i += run) {
      const i64 row = (start + i) / t.across, column = (start + i) % t.across;
      run = smaller(smaller(kRun, count - i), t.across - column);
      const i64 y0 = row * kTile - 1, x0 = column * kTile - 1;
      const bool all_rows = y0 >= 0 && y0 + kSpan <= shape.h;
      for (i64 c = 0; c < cp; c += kLanes) {
        const Src *rows[kSpan];
        for (i64 y = 0; y < kSpan; ++y)
          rows[y] = y0 + y >= 0 && y0 + y < shape.h ? row_at(src, y0 + y, pitch) + c : nullptr;
        const vec s = kActivate ? load(scale + c) : zero(), h = kActivate ? load(shift + c) : zero();
        bf16 *tile = points + i * cp + c;
        if (all_rows)
          transform_run<kActivate, true>(rows, x0, shape.w, run, cp, s, h, tile, stride);
        else
          transform_run<kActivate, false>(rows, x0, shape.w, run, cp, s, h, tile, stride);
      }
    }
    laps.end_of(kInput);
    for (i64 k = 0; k < kPoints; ++k)
      dot_product<false>(points + k * stride, cp, kOneTap, weight + k * cp * cp, cp, cp, sums + k * stride, cp, count);
    laps.end_of(kProduct, 2 * kPoints * count * cp * cp);
    for (i64 i = 0; i < count; ++i) {
      const i64 y0 = (start + i) / t.across * kTile, x0 = (start + i) % t.across * kTile;
      const i64 height = smaller(kTile, shape.h - y0), width = smaller(kTile, shape.w - x0);
      Dst *rows[kTile];
      const Dst *skips[kTile];
      for (i64 y = 0; y < height; ++y) {
        rows[y] = row_at(dst, y0 + y, pitch) + x0 * cp;
        skips[y] = kStage == Stage::kFirst ? nullptr : row_at(skip, y0 + y, pitch) + x0 * cp;
      }
      if (height == kTile && width == kTile)
        transform_output<kStage>(sums + i * cp, stride, cp, bias, rows, skips, kTile, kTile);
      else
        transform_output<kStage>(sums + i * cp, stride, cp, bias, rows, skips, height, width);
    }
    laps.end_of(kOutput);
  }
}

template <int kCp> void winograd_bands(const Op &op, const Frame &frame) {
  const Shape &shape = frame.shape;
  const Tiling t = tiling(shape, frame.threads);
  const i64 plane = shape.h * shape.w * shape.cp;
  float *src = slot_at(frame, op.src), *dst = slot_at(frame, op.dst);
  const float *scale = floats(op.scale), *shift = floats(op.shift);
  const bf16 *weight_a = bf16s(op.weight_a), *weight_b = bf16s(op.weight_b);
  const float *bias_a = floats(op.bias_a), *bias_b = floats(op.bias_b);
#pragma omp parallel num_threads(frame.threads)
  {
    Laps laps(frame);
    float *scratch = frame.scratch + omp_get_thread_num() * frame.scratch_floats;
    bf16 *ring = reinterpret_cast<bf16 *>(scratch + kPoints * values_per_point(shape.cp) * 3 / 2);
    const Rows<bf16> mid{ring, ring_rows(t)};
#pragma omp for schedule(static)
    for (i64 i = 0; i < shape.n * t.bands; ++i) {
      const i64 at = i / t.bands * plane, band = i % t.bands;
      const i64 first = t.stages * band / t.bands, last = t.stages * (band + 1) / t.bands;
      const Rows<float> from{src + at, shape.h}, to{dst + at, shape.h};
      // The second convolution follows one stage behind: it needs the first row of the stage below it.
      for (i64 stage = first - 1; stage <= last; ++stage) {
        if (stage >= 0 && stage < t.stages)
          winograd_stage<Stage::kFirst, kCp>(shape, t, stage, from, mid, {}, scale, shift, weight_a, bias_a, scratch,
                                             laps);
        if (stage - 1 >= first)
          winograd_stage<Stage::kSecond, kCp>(shape, t, stage - 1, mid, to, from, nullptr, nullptr, weight_b, bias_b,
                                              scratch, laps);
      }
    }
    laps.end_of(kWait);
  }
}

inline void bf16_winograd_block(const Op &op, const Frame &frame) {
  if (frame.shape.cp == 64)
    winograd_bands<64>(op, frame);
  else
    winograd_bands<0>(op, frame);
}

} // namespace memnet::MEMNET_ISA

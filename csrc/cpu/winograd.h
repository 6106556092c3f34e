// The residual block by Winograd F(4x4, 3x3): 36 products per 4x4 tile and channel pair instead of 144.
//
// Points 0, +-sqrt(1/2), +-sqrt(2), infinity. In fp32 they lose about half as much as 0, +-1, +-2: the transforms'
// entries stay closer to one. Weights come transformed (packing.pack_winograd); here are B^T d B and A^T m A.
//
// Both convolutions of a block run together down a band of the image. The tensor between them lives in a ring of a few
// rows, so it never travels to memory. Where bands would be too thin for that, they run one after the other through
// frame.mid. Every tile sees the same arithmetic either way: results do not depend on threads, bands or batch.
#pragma once

#include <omp.h>

#include "direct.h"

namespace memnet::MEMNET_ISA {

constexpr i64 kTile = 4;         // output pixels of a tile, per direction
constexpr i64 kSpan = kTile + 2; // input pixels of a tile
constexpr i64 kPoints = kSpan * kSpan;
constexpr i64 kMinStagesPerBand = 4;
constexpr float kSqrtHalf = 0.70710678118654752440f;
constexpr float kSqrtTwo = 1.41421356237309504880f;

// The geometry of one run. A stage is what one step of a band computes: `tall` rows of tiles.
struct Tiling {
  i64 down, across; // tiles of an image
  i64 group;        // tiles that are transformed and multiplied together
  i64 tall;         // tile rows per stage
  i64 stages;       // per image
  i64 bands;        // per image; 0: the convolutions run one after the other
};

// 24 tiles of 64 channels: 221 KB of transformed tiles share L2 with 590 KB of weights.
constexpr i64 tiles_per_group(i64 cp) {
  const i64 fit = 1536 / cp / kRows * kRows;
  return fit < kRows ? kRows : fit > 48 ? 48 : fit;
}

// Not a multiple of 4 KB, or the 36 matrices would fall on the same cache sets.
constexpr i64 floats_per_point(i64 cp) { return tiles_per_group(cp) * cp + 16; }

MEMNET_INLINE Tiling tiling(const Shape &shape, i64 threads) {
  Tiling t;
  t.down = ceil_div(shape.h, kTile);
  t.across = ceil_div(shape.w, kTile);
  t.group = tiles_per_group(shape.cp);
  t.tall = t.across >= t.group ? 1 : smaller(t.down, t.group / t.across);
  t.stages = ceil_div(t.down, t.tall);
  // Few bands repeat little (each computes a stage more of the first convolution at either inner end); many bands
  // balance the threads. Pick the cheapest in units of one stage of one convolution.
  t.bands = 0;
  i64 best = 2 * ceil_div(shape.n * t.stages, threads);
  for (i64 bands = 1; bands <= threads; ++bands) {
    const i64 height = ceil_div(t.stages, bands);
    if (height < kMinStagesPerBand && bands > 1)
      break;
    const i64 repeated = bands == 1 ? 0 : bands == 2 ? 1 : 2;
    const i64 cost = ceil_div(shape.n * bands, threads) * (2 * height + repeated);
    // The ring saves about an eighth of the time (README.md).
    if (t.bands == 0 ? cost * 7 <= best * 8 : cost < best) {
      best = cost;
      t.bands = bands;
    }
  }
  return t;
}

MEMNET_INLINE i64 ring_rows(const Tiling &t) { return 3 * t.tall * kTile; }

MEMNET_INLINE i64 winograd_scratch(const Shape &shape, i64 threads) {
  const Tiling t = tiling(shape, threads);
  const i64 ring = t.bands == 0 ? 0 : ring_rows(t) * shape.w * shape.cp;
  return kPoints * floats_per_point(shape.cp) + (kPoints + t.group) * shape.cp + ring;
}

// t = B^T d
MEMNET_INLINE void input_points(const vec (&d)[kSpan], vec (&t)[kSpan]) {
  const vec half = broadcast(0.5f), two = broadcast(2.0f), both = broadcast(2.5f);
  t[0] = fnma(both, d[2], d[0] + d[4]);
  const vec a = fnma(two, d[2], d[4]), b = fnma(two, d[1], d[3]);
  t[1] = fma(broadcast(kSqrtHalf), b, a);
  t[2] = fnma(broadcast(kSqrtHalf), b, a);
  const vec e = fnma(half, d[2], d[4]), f = fnma(half, d[1], d[3]);
  t[3] = fma(broadcast(kSqrtTwo), f, e);
  t[4] = fnma(broadcast(kSqrtTwo), f, e);
  t[5] = fnma(both, d[3], d[1] + d[5]);
}

// y = A^T m
MEMNET_INLINE void output_points(const vec (&m)[kSpan], vec (&y)[kTile]) {
  const vec p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
  y[0] = m[0] + (p + r);
  y[1] = fma(broadcast(kSqrtTwo), s, broadcast(kSqrtHalf) * q);
  y[2] = fma(broadcast(2.0f), r, broadcast(0.5f) * p);
  y[3] = fma(broadcast(2.0f * kSqrtTwo), s, fma(broadcast(0.5f * kSqrtHalf), q, m[5]));
}

// tile: six pixels from each of six rows, column offset already added; points: [36] matrices point_stride apart, at
// this tile's row.
template <bool kActivate>
MEMNET_INLINE void transform_input(const float *const (&rows)[kSpan], i64 cp, const float *scale, const float *shift,
                                   float *points, i64 point_stride) {
  for (i64 c = 0; c < cp; c += kLanes) {
    vec columns[kSpan][kSpan];
    vec s = zero(), t = zero();
    if constexpr (kActivate) {
      s = load(scale + c);
      t = load(shift + c);
    }
#pragma GCC unroll 6
    for (int x = 0; x < kSpan; ++x) {
      vec d[kSpan], u[kSpan];
#pragma GCC unroll 6
      for (int y = 0; y < kSpan; ++y) {
        d[y] = load(rows[y] + x * cp + c);
        if constexpr (kActivate)
          d[y] = relu(fma(d[y], s, t));
      }
      input_points(d, u);
#pragma GCC unroll 6
      for (int y = 0; y < kSpan; ++y)
        columns[y][x] = u[y];
    }
#pragma GCC unroll 6
    for (int y = 0; y < kSpan; ++y) {
      vec u[kSpan];
      input_points(columns[y], u);
#pragma GCC unroll 6
      for (int x = 0; x < kSpan; ++x)
        store(points + (y * kSpan + x) * point_stride + c, u[x]);
    }
  }
}

// The same for a tile that crosses the edge: its activated pixels with their zero padding are laid out in edge [36][Cp]
// first. rows may be null.
template <bool kActivate>
void transform_edge(const float *const (&rows)[kSpan], i64 x0, i64 w, i64 cp, const float *scale, const float *shift,
                    float *edge, float *points, i64 point_stride) {
  const float *edge_rows[kSpan];
  for (i64 y = 0; y < kSpan; ++y) {
    edge_rows[y] = edge + y * kSpan * cp;
    for (i64 x = 0; x < kSpan; ++x) {
      const bool inside = rows[y] != nullptr && x0 + x >= 0 && x0 + x < w;
      for (i64 c = 0; c < cp; c += kLanes) {
        vec value = zero();
        if (inside) {
          value = load(rows[y] + (x0 + x) * cp + c);
          if constexpr (kActivate)
            value = relu(fma(value, load(scale + c), load(shift + c)));
        }
        store(edge + (y * kSpan + x) * cp + c, value);
      }
    }
  }
  transform_input<false>(edge_rows, cp, scale, shift, points, point_stride);
}

template <Stage kStage>
MEMNET_INLINE void transform_output(const float *points, i64 point_stride, i64 cp, const float *bias,
                                    float *const (&rows)[kTile], const float *const (&skips)[kTile], i64 height,
                                    i64 width) {
  for (i64 c = 0; c < cp; c += kLanes) {
    vec columns[kTile][kSpan];
#pragma GCC unroll 6
    for (int x = 0; x < kSpan; ++x) {
      vec m[kSpan], u[kTile];
#pragma GCC unroll 6
      for (int y = 0; y < kSpan; ++y)
        m[y] = load(points + (y * kSpan + x) * point_stride + c);
      output_points(m, u);
#pragma GCC unroll 4
      for (int y = 0; y < kTile; ++y)
        columns[y][x] = u[y];
    }
    const vec b = load(bias + c);
#pragma GCC unroll 4
    for (int y = 0; y < kTile; ++y) {
      if (y >= height)
        break;
      vec u[kTile];
      output_points(columns[y], u);
#pragma GCC unroll 4
      for (int x = 0; x < kTile; ++x) {
        if (x >= width)
          break;
        const vec value = u[x] + b;
        store(rows[y] + x * cp + c, kStage == Stage::kFirst ? relu(value) : value + load(skips[y] + x * cp + c));
      }
    }
  }
}

// One convolution of a residual block, seen by one thread. A tensor row y lies at base + y % ring * pitch.
struct Rows {
  float *base;
  i64 ring;
};

MEMNET_INLINE float *row_at(const Rows &rows, i64 y, i64 pitch) { return rows.base + y % rows.ring * pitch; }

// What to prefetch during the product of point k, so that the transforms do not wait for memory: the 36 products of a
// group share its rows out evenly, and each register block takes its part. Only for groups within one row of tiles. A
// prefetch may run past a row or the image; it never faults.
//
// Six rows of the next group's input, six points each.
MEMNET_INLINE Ahead upcoming_input(i64 k, i64 next, const Tiling &t, i64 h, const Rows &src, i64 cp, i64 pitch) {
  const i64 y = next / t.across * kTile - 1 + k / 6;
  if (t.tall > 1 || y < 0 || y >= h)
    return {};
  const i64 part = 4 * cp; // 6 rows * 4 group pixels * cp / (36 points * group / 6 blocks)
  const i64 offset = next % t.across * kTile * cp + k % 6 * (t.group / kRows) * part;
  return {row_at(src, y, pitch) + offset, nullptr, part};
}

// Four rows of this group's skip and destination, nine points each.
MEMNET_INLINE Ahead upcoming_output(i64 k, i64 start, const Tiling &t, i64 h, const Rows &skip, const Rows &dst, i64 cp,
                                    i64 pitch) {
  const i64 y = start / t.across * kTile + k / 9;
  if (t.tall > 1 || y >= h)
    return {};
  const i64 part =
      ceil_div(8 * cp, 48) * 16; // 4 rows * 4 group pixels * cp / (36 points * group / 6 blocks), whole lines
  const i64 offset = start % t.across * kTile * cp + k % 9 * (t.group / kRows) * part;
  return {row_at(skip, y, pitch) + offset, row_at(dst, y, pitch) + offset, part};
}

// Computes tile rows [stage * tall, ...) of one image. src, dst, skip: rows of [H, W, Cp].
// kCp: the padded channels where they are known beforehand, which leaves no address to compute in the transforms; or 0.
template <Stage kStage, int kCp>
void winograd_stage(const Shape &shape, const Tiling &t, i64 stage, const Rows &src, const Rows &dst, const Rows &skip,
                    const float *scale, const float *shift, const float *weight, const float *bias, float *scratch) {
  const i64 cp = kCp != 0 ? kCp : shape.cp, pitch = shape.w * cp, point_stride = floats_per_point(cp);
  float *points = scratch, *edge = points + kPoints * point_stride, *copy = edge + kPoints * cp;
  const i64 first = stage * t.tall * t.across;
  const i64 last = smaller(t.down, (stage + 1) * t.tall) * t.across;
  for (i64 start = first; start < last; start += t.group) {
    const i64 count = smaller(t.group, last - start);
    for (i64 i = 0; i < count; ++i) {
      const i64 y0 = (start + i) / t.across * kTile - 1, x0 = (start + i) % t.across * kTile - 1;
      const float *rows[kSpan];
      bool inside = x0 >= 0 && x0 + kSpan <= shape.w;
      for (i64 y = 0; y < kSpan; ++y) {
        const bool exists = y0 + y >= 0 && y0 + y < shape.h;
        rows[y] = exists ? row_at(src, y0 + y, pitch) : nullptr;
        inside = inside && exists;
      }
      float *tile = points + i * cp;
      if (!inside) {
        transform_edge<kStage == Stage::kFirst>(rows, x0, shape.w, cp, scale, shift, edge, tile, point_stride);
        continue;
      }
      for (i64 y = 0; y < kSpan; ++y)
        rows[y] += x0 * cp;
      transform_input<kStage == Stage::kFirst>(rows, cp, scale, shift, tile, point_stride);
    }
    for (i64 k = 0; k < kPoints; ++k) {
      float *matrix = points + k * point_stride;
      const float *input = matrix;
      if (!covers_in_one_group(cp)) {
        // The product overwrites its input, and the second group of output channels still needs it.
        for (i64 i = 0; i < count * cp; i += kLanes)
          store(copy + i, load(matrix + i));
        input = copy;
      }
      Ahead ahead;
      if constexpr (kStage == Stage::kSecond)
        ahead = upcoming_output(k, start, t, shape.h, skip, dst, cp, pitch);
      else
        ahead = upcoming_input(k, start + count, t, shape.h, src, cp, pitch);
      matmul<false>(input, cp, weight + k * cp * cp, cp, cp, matrix, cp, count, ahead);
    }
    for (i64 i = 0; i < count; ++i) {
      const i64 y0 = (start + i) / t.across * kTile, x0 = (start + i) % t.across * kTile;
      const i64 height = smaller(kTile, shape.h - y0), width = smaller(kTile, shape.w - x0);
      float *rows[kTile];
      const float *skips[kTile];
      for (i64 y = 0; y < height; ++y) {
        rows[y] = row_at(dst, y0 + y, pitch) + x0 * cp;
        skips[y] = kStage == Stage::kFirst ? nullptr : row_at(skip, y0 + y, pitch) + x0 * cp;
      }
      if (height == kTile && width == kTile)
        transform_output<kStage>(points + i * cp, point_stride, cp, bias, rows, skips, kTile, kTile);
      else
        transform_output<kStage>(points + i * cp, point_stride, cp, bias, rows, skips, height, width);
    }
  }
}

template <int kCp> void winograd_bands(const Op &op, const Frame &frame) {
  const Shape &shape = frame.shape;
  const Tiling t = tiling(shape, frame.threads);
  const i64 plane = shape.h * shape.w * shape.cp;
  float *src = slot_at(frame, op.src), *dst = slot_at(frame, op.dst);
  const float *scale = floats(op.scale), *shift = floats(op.shift);
  const float *weight_a = floats(op.weight_a), *bias_a = floats(op.bias_a);
  const float *weight_b = floats(op.weight_b), *bias_b = floats(op.bias_b);
#pragma omp parallel num_threads(frame.threads)
  {
    float *scratch = frame.scratch + omp_get_thread_num() * frame.scratch_floats;
    if (t.bands == 0) {
#pragma omp for schedule(static)
      for (i64 i = 0; i < shape.n * t.stages; ++i) {
        const i64 at = i / t.stages * plane;
        winograd_stage<Stage::kFirst, kCp>(shape, t, i % t.stages, {src + at, shape.h}, {frame.mid + at, shape.h}, {},
                                           scale, shift, weight_a, bias_a, scratch);
      }
#pragma omp for schedule(static)
      for (i64 i = 0; i < shape.n * t.stages; ++i) {
        const i64 at = i / t.stages * plane;
        winograd_stage<Stage::kSecond, kCp>(shape, t, i % t.stages, {frame.mid + at, shape.h}, {dst + at, shape.h},
                                            {src + at, shape.h}, nullptr, nullptr, weight_b, bias_b, scratch);
      }
    } else {
      const Rows mid{scratch + kPoints * floats_per_point(shape.cp) + (kPoints + t.group) * shape.cp, ring_rows(t)};
#pragma omp for schedule(static)
      for (i64 i = 0; i < shape.n * t.bands; ++i) {
        const i64 at = i / t.bands * plane, band = i % t.bands;
        const i64 first = t.stages * band / t.bands, last = t.stages * (band + 1) / t.bands;
        const Rows from{src + at, shape.h}, to{dst + at, shape.h};
        // The second convolution follows one stage behind: it needs the first row of the stage below it.
        for (i64 stage = first - 1; stage <= last; ++stage) {
          if (stage >= 0 && stage < t.stages)
            winograd_stage<Stage::kFirst, kCp>(shape, t, stage, from, mid, {}, scale, shift, weight_a, bias_a, scratch);
          if (stage - 1 >= first)
            winograd_stage<Stage::kSecond, kCp>(shape, t, stage - 1, mid, to, from, nullptr, nullptr, weight_b, bias_b,
                                                scratch);
        }
      }
    }
  }
}

inline void winograd_block(const Op &op, const Frame &frame) {
  if (frame.shape.cp == 64)
    winograd_bands<64>(op, frame);
  else
    winograd_bands<0>(op, frame);
}

} // namespace memnet::MEMNET_ISA

// The residual block by Winograd F(6x6, 3x3): which tiles are computed when, by whom, and where they lie.
//
// An image is cut into bands of rows, one for each thread, and a band into panels of columns. Both convolutions of a
// block run together up a panel. The tensor between them lives in a ring of a few rows, so it never travels to memory;
// a panel is so narrow that the ring stays in the cache. At the seam of two bands, the upper one leaves the last rows
// of that tensor, which it computes first, for the lower one, which needs them last: nothing is computed twice but the
// tiles beside a panel. Where bands would be too thin for that, the convolutions run one after the other through
// frame.mid. Tiles lie on a grid that starts at the image's corner, and every tile sees the same arithmetic either way:
// results do not depend on threads, bands, panels or batch.
#pragma once

#include <omp.h>
#include <sched.h>

#include "winograd_tile.h"

namespace memnet::MEMNET_ISA {

constexpr i64 kMinStagesPerBand = 2; // those that a seam takes its rows from
constexpr i64 kMaxPanel = 48; // tiles across; each inner edge repeats two columns of tiles of the first convolution

// The geometry of one run. A stage is what one step of a band computes: `tall` rows of tiles.
struct Tiling {
  i64 down, across; // tiles of an image
  i64 group;        // most tiles that are transformed and multiplied together
  i64 tall;         // tile rows per stage
  i64 stages;       // per image
  i64 panels;       // per band
  i64 bands;        // per image; 0: the convolutions run one after the other
};

// 24 tiles of 64 channels: 393 KB of transformed tiles stay in L2, and the weights, 1 MB, stream through it.
constexpr i64 tiles_per_group(i64 cp) {
  const i64 fit = 24 * 64 / cp / kRows * kRows;
  return fit < kRows ? kRows : fit > 48 ? 48 : fit;
}

// Not a multiple of 4 KB, or the matrices of all points would fall on the same cache sets.
constexpr i64 floats_per_point(i64 cp) { return tiles_per_group(cp) * cp + 16; }

MEMNET_INLINE Tiling tiling(const Shape &shape, i64 threads) {
  Tiling t;
  t.down = ceil_div(shape.h, kTile);
  t.across = ceil_div(shape.w, kTile);
  t.group = tiles_per_group(shape.cp);
  t.tall = t.across >= t.group ? 1 : smaller(t.down, t.group / t.across);
  t.stages = ceil_div(t.down, t.tall);
  t.panels = ceil_div(t.across, kMaxPanel);
  // Pick the cheapest in units of one stage of one convolution.
  t.bands = 0;
  i64 best = 2 * ceil_div(shape.n * t.stages, threads);
  for (i64 bands = 1; bands <= threads; ++bands) {
    const i64 height = ceil_div(t.stages, bands);
    if (t.stages / bands < kMinStagesPerBand && bands > 1)
      break;
    const i64 cost = ceil_div(shape.n * bands, threads) * 2 * height;
    // The ring saves about an eighth of the time (README.md).
    if (t.bands == 0 ? cost * 7 <= best * 8 : cost < best) {
      best = cost;
      t.bands = bands;
    }
  }
  return t;
}

// The lowest stage and the one behind the last of a band. The last band computes one stage more of the second
// convolution than of the first, and the first band one less, so bands that cannot be equal are higher at the top.
MEMNET_INLINE i64 first_stage(const Tiling &t, i64 band) { return ceil_div(t.stages * band, t.bands); }

// When the first convolution has written stage s - 1, the second still needs stage s and a row on either side of it;
// at a seam, it needs one row more above stage s - 1.
MEMNET_INLINE i64 ring_rows(const Tiling &t) { return 2 * t.tall * kTile + 2; }

// With a column of tiles of either neighbour.
MEMNET_INLINE i64 ring_columns(const Tiling &t, i64 w) {
  return smaller(w, (ceil_div(t.across, t.panels) + 2) * kTile);
}

// The rows of a stage and the row above it.
MEMNET_INLINE i64 seam_rows(const Tiling &t) { return t.tall * kTile + 1; }

// Transformed tiles [kPoints][floats_per_point], a copy of one matrix.
MEMNET_INLINE i64 group_scratch(const Tiling &t, i64 cp) { return kPoints * floats_per_point(cp) + t.group * cp; }

MEMNET_INLINE i64 winograd_scratch(const Shape &shape, i64 threads) {
  const Tiling t = tiling(shape, threads);
  const i64 ring = t.bands == 0 ? 0 : ring_rows(t) * ring_columns(t, shape.w) * shape.cp;
  return group_scratch(t, shape.cp) + ring;
}

// What one band leaves for the one below it: a cache line that counts the panels which are there, and the panels.
MEMNET_INLINE i64 seam_floats(const Tiling &t, const Shape &shape) {
  return 16 + t.panels * seam_rows(t) * ring_columns(t, shape.w) * shape.cp;
}

// frame.mid: the whole tensor between the convolutions, or the seams of all bands.
MEMNET_INLINE i64 winograd_mid(const Shape &shape, i64 threads) {
  const Tiling t = tiling(shape, threads);
  if (t.bands == 0)
    return shape.n * shape.h * shape.w * shape.cp;
  return t.bands == 1 ? 0 : shape.n * t.bands * seam_floats(t, shape);
}

// Tiles of one stage that are computed together: count tiles from the start-th on, row by row, of tile rows [row, ...)
// and tile columns [first, first + width).
struct Group {
  i64 row, first, width, start, count;

  MEMNET_INLINE i64 y(i64 i) const { return (row + (start + i) / width) * kTile; } // output pixel
  MEMNET_INLINE i64 x(i64 i) const { return (first + (start + i) % width) * kTile; }
};

// What to prefetch during the product of point k, so that the transforms do not wait for memory: `rows` rows from pixel
// (y, x) on, `floats` of each, shared out evenly over the points and the rows of their products, in whole cache lines.
// A prefetch may run past a row or the image; it never faults.
struct Share {
  i64 y, x, floats;
};

MEMNET_INLINE Share share_of(i64 k, i64 count, i64 y, i64 x, i64 rows, i64 floats, i64 h, i64 cp) {
  const i64 points = kPoints / rows, row = k / points;
  if (row >= rows || y + row < 0 || y + row >= h)
    return {0, 0, 0};
  const i64 step = ceil_div(floats, points * count * 16) * 16;
  return {y + row, x + k % points * count * step / cp, step};
}

// The input of the group behind this one: stages follow one another upwards. Where a stage is one group (tall > 1), its
// rows lie one behind the other.
MEMNET_INLINE Ahead upcoming_input(i64 k, const Tiling &t, const Group &group, const Shape &shape, const Plane &src) {
  const i64 cp = shape.cp;
  Share share;
  if (t.tall > 1) {
    share = share_of(k, group.count, (group.row - t.tall) * kTile, 0, 1, t.tall * kTile * src.pitch, shape.h, cp);
  } else {
    const i64 start = group.start + group.count;
    const bool above = start >= group.width;
    const Group next{group.row - above, group.first, group.width, above ? 0 : start, group.count};
    share = share_of(k, group.count, next.y(0) - 1, next.x(0), kSpan, kTile * group.count * cp, shape.h, cp);
  }
  return {share.floats == 0 ? nullptr : pixel_at(src, share.y, share.x, cp), nullptr, share.floats};
}

// Where this group's output goes, and the skip that is added to it.
MEMNET_INLINE Ahead upcoming_output(i64 k, const Tiling &t, const Group &group, const Shape &shape, const Plane &skip,
                                    const Plane &dst) {
  const i64 cp = shape.cp, y = group.row * kTile;
  const Share share =
      t.tall > 1 ? share_of(k, group.count, y, 0, 1, smaller(t.tall * kTile, shape.h - y) * dst.pitch, shape.h, cp)
                 : share_of(k, group.count, y, group.x(0), kTile, kTile * group.count * cp, shape.h, cp);
  if (share.floats == 0)
    return {};
  return {pixel_at(skip, share.y, share.x, cp), pixel_at(dst, share.y, share.x, cp), share.floats};
}

struct Conv {
  const float *scale, *shift, *weight, *bias;
};

// One convolution of a residual block, by one thread, for one group.
// kCp: the padded channels where they are known beforehand, which leaves no address to compute in the transforms; or 0.
template <Stage kStage, int kCp>
void winograd_group(const Shape &shape, const Tiling &t, const Group &group, const Plane &src, const Plane &dst,
                    const Plane &skip, const Conv &conv, float *scratch, Laps &laps) {
  const i64 cp = kCp != 0 ? kCp : shape.cp, point_stride = floats_per_point(cp);
  float *points = scratch, *copy = points + kPoints * point_stride;
  for (i64 i = 0; i < group.count; ++i)
    transform_input<activates(kStage)>(src, group.y(i) - 1, group.x(i) - 1, shape.h, shape.w, cp, conv.scale,
                                       conv.shift, points + i * cp, point_stride);
  laps.end_of(kInput);
  for (i64 k = 0; k < kPoints; ++k) {
    float *matrix = points + k * point_stride;
    const float *input = matrix;
    if (!covers_in_one_group(cp)) {
      // The product overwrites its input, and the second group of output channels still needs it.
      for (i64 i = 0; i < group.count * cp; i += kLanes)
        store(copy + i, load(matrix + i));
      input = copy;
    }
    const Ahead ahead =
        skips(kStage) ? upcoming_output(k, t, group, shape, skip, dst) : upcoming_input(k, t, group, shape, src);
    matmul<false>(input, cp, conv.weight + k * cp * cp, cp, cp, nullptr, 0, matrix, cp, group.count, ahead);
  }
  laps.end_of(kProduct, 2 * kPoints * group.count * cp * cp);
  for (i64 i = 0; i < group.count; ++i) {
    const i64 y0 = group.y(i), x0 = group.x(i);
    const i64 height = smaller(kTile, shape.h - y0), width = smaller(kTile, shape.w - x0);
    float *rows[kTile];
    const float *skip_rows[kTile];
    for (i64 y = 0; y < height; ++y) {
      rows[y] = pixel_at(dst, y0 + y, x0, cp);
      skip_rows[y] = skips(kStage) ? pixel_at(skip, y0 + y, x0, cp) : nullptr;
    }
    if (height == kTile && width == kTile)
      transform_output<kStage>(points + i * cp, point_stride, cp, conv.bias, rows, skip_rows, kTile, kTile);
    else
      transform_output<kStage>(points + i * cp, point_stride, cp, conv.bias, rows, skip_rows, height, width);
  }
  laps.end_of(kOutput);
}

// Tile rows [stage * tall, ...) and tile columns [first, last) of one image, in groups of nearly equal size.
template <Stage kStage, int kCp>
void winograd_stage(const Shape &shape, const Tiling &t, i64 stage, i64 first, i64 last, const Plane &src,
                    const Plane &dst, const Plane &skip, const Conv &conv, float *scratch, Laps &laps) {
  const i64 row = stage * t.tall, width = last - first;
  const i64 tiles = smaller(t.tall, t.down - row) * width, groups = ceil_div(tiles, t.group);
  for (i64 g = 0; g < groups; ++g) {
    const i64 start = tiles * g / groups;
    const Group group{row, first, width, start, tiles * (g + 1) / groups - start};
    winograd_group<kStage, kCp>(shape, t, group, src, dst, skip, conv, scratch, laps);
  }
}

// The seam below one band, for the columns of the ring.
struct Seam {
  float *floats; // as seam_floats says

  // Panels that are there. Only for the threads of one operation; begins at zero.
  MEMNET_INLINE i64 *count() const { return reinterpret_cast<i64 *>(floats); }
  MEMNET_INLINE float *panel(i64 index, i64 rows, i64 pitch) const { return floats + 16 + index * rows * pitch; }
};

// Rows [first, first + rows) of a ring to or from a panel of a seam.
template <bool kSave> MEMNET_INLINE void copy_rows(const Plane &ring, i64 first, i64 rows, float *panel) {
  for (i64 y = 0; y < rows; ++y) {
    float *row = ring.base + (first + y) % ring.ring * ring.pitch, *kept = panel + y * ring.pitch;
    for (i64 i = 0; i < ring.pitch; i += kLanes)
      kSave ? store(kept + i, load(row + i)) : store(row + i, load(kept + i));
  }
}

// Both convolutions of one band of one image. above, below: the seams at its ends.
template <int kCp>
void winograd_band(const Shape &shape, const Tiling &t, i64 band, const Plane &src, const Plane &dst, const Conv &a,
                   const Conv &b, Seam above, Seam below, float *scratch, Laps &laps) {
  const i64 top = first_stage(t, band), bottom = first_stage(t, band + 1), rows = seam_rows(t);
  const bool lowest = band == t.bands - 1;
  Plane mid{scratch + group_scratch(t, shape.cp), ring_rows(t), ring_columns(t, shape.w) * shape.cp, 0};
  for (i64 panel = 0; panel < t.panels; ++panel) {
    const i64 first = t.across * panel / t.panels, last = t.across * (panel + 1) / t.panels;
    const i64 before = first == 0 ? 0 : first - 1, behind = smaller(t.across, last + 1);
    mid.left = before * kTile;
    const auto second = [&](i64 stage) {
      winograd_stage<Stage::kSecond, kCp>(shape, t, stage, first, last, mid, dst, src, b, scratch, laps);
    };
    // The second convolution follows one stage behind: it needs the last row of the stage above.
    for (i64 stage = bottom - 1; stage >= top; --stage) {
      winograd_stage<Stage::kFirst, kCp>(shape, t, stage, before, behind, src, mid, {}, a, scratch, laps);
      if (!lowest && stage == bottom - 2) {
        copy_rows<true>(mid, (bottom - 1) * t.tall * kTile - 1, rows, below.panel(panel, rows, mid.pitch));
        __atomic_store_n(below.count(), panel + 1, __ATOMIC_RELEASE);
        laps.end_of(kOutput);
      }
      if (stage + 1 < bottom - (lowest ? 0 : 1))
        second(stage + 1);
    }
    if (band == 0) {
      second(0);
      continue;
    }
    // The band above has left its panel long ago, unless its thread was held up.
    while (__atomic_load_n(above.count(), __ATOMIC_ACQUIRE) <= panel)
      sched_yield();
    laps.end_of(kWait);
    copy_rows<false>(mid, (top - 1) * t.tall * kTile - 1, rows, above.panel(panel, rows, mid.pitch));
    laps.end_of(kInput);
    second(top);
    second(top - 1);
  }
}

template <int kCp> void winograd_convs(const Op &op, const Frame &frame) {
  const Shape &shape = frame.shape;
  const Tiling t = tiling(shape, frame.threads);
  const i64 pitch = shape.w * shape.cp, units = shape.n * (t.bands == 0 ? t.stages : t.bands);
  float *src = slot_at(frame, op.src), *dst = slot_at(frame, op.dst);
  const Conv a{floats(op.scale), floats(op.shift), floats(op.weight_a), floats(op.bias_a)};
  const Conv b{nullptr, nullptr, floats(op.weight_b), floats(op.bias_b)};
  const auto plane = [&](float *slot, i64 image) { return Plane{slot + image * shape.h * pitch, shape.h, pitch, 0}; };
  // Below band `unit`; not looked at where there is no such band.
  const auto seam = [&](i64 unit) { return Seam{frame.mid + (unit < 0 ? 0 : unit) * seam_floats(t, shape)}; };
  if (t.bands > 1)
    for (i64 unit = 0; unit < units; ++unit)
      *seam(unit).count() = 0;
#pragma omp parallel num_threads(frame.threads)
  {
    Laps laps(frame);
    float *scratch = frame.scratch + omp_get_thread_num() * frame.scratch_floats;
    if (t.bands == 0) {
      const auto stage_of = [&](i64 unit) { return t.stages - 1 - unit % t.stages; };
#pragma omp for schedule(static)
      for (i64 i = 0; i < units; ++i)
        winograd_stage<Stage::kFirst, kCp>(shape, t, stage_of(i), 0, t.across, plane(src, i / t.stages),
                                           plane(frame.mid, i / t.stages), {}, a, scratch, laps);
      laps.end_of(kWait);
#pragma omp for schedule(static)
      for (i64 i = 0; i < units; ++i)
        winograd_stage<Stage::kSecond, kCp>(shape, t, stage_of(i), 0, t.across, plane(frame.mid, i / t.stages),
                                            plane(dst, i / t.stages), plane(src, i / t.stages), b, scratch, laps);
    } else {
      // A band waits for the one before it alone. Each thread takes its bands in ascending order, so whatever the
      // number of threads, the first band that is not finished can go on; and in turn, so neighbours run at the same
      // time.
#pragma omp for schedule(static, 1)
      for (i64 i = 0; i < units; ++i)
        winograd_band<kCp>(shape, t, i % t.bands, plane(src, i / t.bands), plane(dst, i / t.bands), a, b, seam(i - 1),
                           seam(i), scratch, laps);
    }
    laps.end_of(kWait);
  }
}

inline void winograd_block(const Op &op, const Frame &frame) {
  if (frame.shape.cp == 64)
    winograd_convs<64>(op, frame);
  else
    winograd_convs<0>(op, frame);
}

} // namespace memnet::MEMNET_ISA

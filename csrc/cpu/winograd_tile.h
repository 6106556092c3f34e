// One tile of Winograd F(6x6, 3x3): 64 products per 6x6 outputs and channel pair instead of 324.
//
// Points 0, +-1, +-2, +-1/2, infinity: of all triples of symmetric points that were tried, these lose least in fp32.
// Weights come transformed (packing.pack_winograd); here are B^T d B and A^T m A.
#pragma once

#include "direct.h"

namespace memnet::MEMNET_ISA {

constexpr i64 kTile = 6;         // output pixels of a tile, per direction
constexpr i64 kSpan = kTile + 2; // input pixels of a tile
constexpr i64 kPoints = kSpan * kSpan;

// A tensor [H, W, Cp] of one image, or a ring of rows of some of its columns: pixel (y, x) lies at pixel_at().
struct Plane {
  float *base;
  i64 ring;  // rows
  i64 pitch; // floats of a row
  i64 left;  // the first column
};

MEMNET_INLINE float *pixel_at(const Plane &plane, i64 y, i64 x, i64 cp) {
  return plane.base + y % plane.ring * plane.pitch + (x - plane.left) * cp;
}

// t = B^T d. A row of B^T holds the coefficients of the polynomial that is zero at all points but one; the points p and
// -p share their even and their odd powers.
MEMNET_INLINE void input_points(const vec (&d)[kSpan], vec (&t)[kSpan]) {
  t[0] = fma(broadcast(5.25f), d[2] - d[4], d[6] - d[0]);
  vec even = fnma(broadcast(4.25f), d[4], d[2] + d[6]), odd = fnma(broadcast(4.25f), d[3], d[1] + d[5]);
  t[1] = even + odd;
  t[2] = even - odd;
  even = fnma(broadcast(1.25f), d[4], fma(broadcast(0.25f), d[2], d[6]));
  odd = fnma(broadcast(1.25f), d[3], fma(broadcast(0.25f), d[1], d[5]));
  t[3] = fma(broadcast(2.0f), odd, even);
  t[4] = fnma(broadcast(2.0f), odd, even);
  even = fnma(broadcast(5.0f), d[4], fma(broadcast(4.0f), d[2], d[6]));
  odd = fnma(broadcast(5.0f), d[3], fma(broadcast(4.0f), d[1], d[5]));
  t[5] = fma(broadcast(0.5f), odd, even);
  t[6] = fnma(broadcast(0.5f), odd, even);
  t[7] = fma(broadcast(5.25f), d[3] - d[5], d[7] - d[1]);
}

// y = A^T m. Row i of A^T holds the i-th powers of the points.
MEMNET_INLINE void output_points(const vec (&m)[kSpan], vec (&y)[kTile]) {
  const vec p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4], u = m[5] + m[6], v = m[5] - m[6];
  y[0] = m[0] + (p + (r + u));
  y[1] = fma(broadcast(0.5f), v, fma(broadcast(2.0f), s, q));
  y[2] = fma(broadcast(0.25f), u, fma(broadcast(4.0f), r, p));
  y[3] = fma(broadcast(0.125f), v, fma(broadcast(8.0f), s, q));
  y[4] = fma(broadcast(0.0625f), u, fma(broadcast(16.0f), r, p));
  y[5] = fma(broadcast(0.03125f), v, fma(broadcast(32.0f), s, q)) + m[7];
}

// Which of a tile's kSpan x kSpan input pixels lie in the image.
struct Inside {
  i64 top, bottom, left, right;
};

MEMNET_INLINE Inside inside_of(i64 y0, i64 x0, i64 h, i64 w) {
  return {y0 < 0 ? -y0 : 0, smaller(kSpan, h - y0), x0 < 0 ? -x0 : 0, smaller(kSpan, w - x0)};
}

MEMNET_INLINE bool is_whole(const Inside &inside) {
  return inside.top == 0 && inside.left == 0 && inside.bottom == kSpan && inside.right == kSpan;
}

// points: [kPoints] matrices point_stride apart, at this tile's row. (y0, x0): the tile's first input pixel. Pixels
// outside the image are zero after the activation; kWhole: there are none.
template <bool kActivate, bool kWhole>
MEMNET_INLINE void transform_pixels(const Plane &src, i64 y0, i64 x0, const Inside &inside, i64 cp, const float *scale,
                                    const float *shift, float *points, i64 point_stride) {
  const float *rows[kSpan];
  for (i64 y = 0; y < kSpan; ++y)
    rows[y] = kWhole || (y >= inside.top && y < inside.bottom) ? pixel_at(src, y0 + y, x0, cp) : nullptr;
  for (i64 c = 0; c < cp; c += kLanes) {
    vec columns[kSpan][kSpan];
    vec s = zero(), t = zero();
    if constexpr (kActivate) {
      s = load(scale + c);
      t = load(shift + c);
    }
#pragma GCC unroll 8
    for (int x = 0; x < kSpan; ++x) {
      const bool column = kWhole || (x >= inside.left && x < inside.right);
      vec d[kSpan], u[kSpan];
#pragma GCC unroll 8
      for (int y = 0; y < kSpan; ++y) {
        d[y] = zero();
        if (kWhole || (column && rows[y] != nullptr)) {
          d[y] = load(rows[y] + x * cp + c);
          if constexpr (kActivate)
            d[y] = relu(fma(d[y], s, t));
        }
      }
      input_points(d, u);
#pragma GCC unroll 8
      for (int y = 0; y < kSpan; ++y)
        columns[y][x] = u[y];
    }
#pragma GCC unroll 8
    for (int y = 0; y < kSpan; ++y) {
      vec u[kSpan];
      input_points(columns[y], u);
#pragma GCC unroll 8
      for (int x = 0; x < kSpan; ++x)
        store(points + (y * kSpan + x) * point_stride + c, u[x]);
    }
  }
}

// B^T d B of one tile of an image of h x w.
template <bool kActivate>
MEMNET_INLINE void transform_input(const Plane &src, i64 y0, i64 x0, i64 h, i64 w, i64 cp, const float *scale,
                                   const float *shift, float *points, i64 point_stride) {
  const Inside inside = inside_of(y0, x0, h, w);
  if (is_whole(inside))
    transform_pixels<kActivate, true>(src, y0, x0, inside, cp, scale, shift, points, point_stride);
  else
    transform_pixels<kActivate, false>(src, y0, x0, inside, cp, scale, shift, points, point_stride);
}

// Writes height x width of the tile's outputs, with bias and what else the stage ends with.
template <Stage kStage>
MEMNET_INLINE void transform_output(const float *points, i64 point_stride, i64 cp, const float *bias,
                                    float *const (&rows)[kTile], const float *const (&skip)[kTile], i64 height,
                                    i64 width) {
  for (i64 c = 0; c < cp; c += kLanes) {
    vec columns[kTile][kSpan];
#pragma GCC unroll 8
    for (int x = 0; x < kSpan; ++x) {
      vec m[kSpan], u[kTile];
#pragma GCC unroll 8
      for (int y = 0; y < kSpan; ++y)
        m[y] = load(points + (y * kSpan + x) * point_stride + c);
      output_points(m, u);
#pragma GCC unroll 6
      for (int y = 0; y < kTile; ++y)
        columns[y][x] = u[y];
    }
    const vec b = load(bias + c);
#pragma GCC unroll 6
    for (int y = 0; y < kTile; ++y) {
      if (y >= height)
        break;
      vec u[kTile];
      output_points(columns[y], u);
#pragma GCC unroll 6
      for (int x = 0; x < kTile; ++x) {
        if (x >= width)
          break;
        const vec value = u[x] + b;
        if constexpr (skips(kStage))
          store(rows[y] + x * cp + c, value + load(skip[y] + x * cp + c));
        else
          store(rows[y] + x * cp + c, rectifies(kStage) ? relu(value) : value);
      }
    }
  }
}

} // namespace memnet::MEMNET_ISA

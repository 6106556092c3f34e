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

// rows: kSpan pixels from each of kSpan rows; points: [kPoints] matrices point_stride apart, at this tile's row.
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
#pragma GCC unroll 8
    for (int x = 0; x < kSpan; ++x) {
      vec d[kSpan], u[kSpan];
#pragma GCC unroll 8
      for (int y = 0; y < kSpan; ++y) {
        d[y] = load(rows[y] + x * cp + c);
        if constexpr (kActivate)
          d[y] = relu(fma(d[y], s, t));
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

// The same for a tile that crosses the edge of an image of h x w: its activated pixels with their zero padding are laid
// out in edge [kPoints][Cp] first. (y0, x0): the tile's first input pixel.
template <bool kActivate>
void transform_edge(const Plane &src, i64 y0, i64 x0, i64 h, i64 w, i64 cp, const float *scale, const float *shift,
                    float *edge, float *points, i64 point_stride) {
  const float *rows[kSpan];
  for (i64 y = 0; y < kSpan; ++y) {
    float *row = edge + y * kSpan * cp;
    rows[y] = row;
    for (i64 x = 0; x < kSpan; ++x) {
      const bool inside = y0 + y >= 0 && y0 + y < h && x0 + x >= 0 && x0 + x < w;
      const float *pixel = inside ? pixel_at(src, y0 + y, x0 + x, cp) : nullptr;
      for (i64 c = 0; c < cp; c += kLanes) {
        vec value = zero();
        if (inside) {
          value = load(pixel + c);
          if constexpr (kActivate)
            value = relu(fma(value, load(scale + c), load(shift + c)));
        }
        store(row + x * cp + c, value);
      }
    }
  }
  transform_input<false>(rows, cp, scale, shift, points, point_stride);
}

// Writes height x width of the tile's outputs, with bias and what else the stage ends with.
template <Stage kStage>
MEMNET_INLINE void transform_output(const float *points, i64 point_stride, i64 cp, const float *bias,
                                    float *const (&rows)[kTile], const float *const (&skips)[kTile], i64 height,
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
        store(rows[y] + x * cp + c, kStage == Stage::kFirst ? relu(value) : value + load(skips[y] + x * cp + c));
      }
    }
  }
}

} // namespace memnet::MEMNET_ISA

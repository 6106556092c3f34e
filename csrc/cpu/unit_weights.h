// The weights of the units of a training step as the products want them, and the gradient of transformed weights as
// PyTorch wants it.
#pragma once

#include "training.h"
#include "winograd_tile.h"

namespace memnet::MEMNET_ISA {

// u = G w: the values of a polynomial with three coefficients at the points, each divided by the product of its
// distances from the others.
MEMNET_INLINE void weight_points(const vec (&w)[3], vec (&u)[kSpan]) {
  const auto pair = [&](float point, float distances, vec &plus, vec &minus) {
    const vec even = broadcast(1.0f / distances) * fma(broadcast(point * point), w[2], w[0]);
    const vec odd = broadcast(point / distances) * w[1];
    plus = even + odd;
    minus = even - odd;
  };
  u[0] = zero() - w[0];
  pair(1.0f, -4.5f, u[1], u[2]);
  pair(2.0f, 90.0f, u[3], u[4]);
  pair(0.5f, 1.40625f, u[5], u[6]);
  u[7] = w[2];
}

// w = G^T u.
MEMNET_INLINE void weight_sums(const vec (&u)[kSpan], vec (&w)[3]) {
  w[0] = zero() - u[0];
  w[1] = zero();
  w[2] = u[7];
  const auto pair = [&](float point, float distances, vec plus, vec minus) {
    const vec even = broadcast(1.0f / distances) * (plus + minus);
    w[0] = w[0] + even;
    w[1] = fma(broadcast(point / distances), plus - minus, w[1]);
    w[2] = fma(broadcast(point * point), even, w[2]);
  };
  pair(1.0f, -4.5f, u[1], u[2]);
  pair(2.0f, 90.0f, u[3], u[4]);
  pair(0.5f, 1.40625f, u[5], u[6]);
}

// [64][C][C] from a weight [out][in][3][3]: rows are inputs, or, for the gradient of the inputs, outputs, of flipped
// taps.
template <bool kTranspose> void transform_weights(const Unit &unit, float *packed) {
  const i64 c = unit.c;
#pragma omp parallel for num_threads(unit.threads) schedule(static)
  for (i64 row = 0; row < c; ++row)
    for (i64 v = 0; v < c; v += kLanes) {
      alignas(64) float taps[9][kLanes];
      for (i64 lane = 0; lane < kLanes; ++lane) {
        const float *at = unit.weight + (kTranspose ? row * c + v + lane : (v + lane) * c + row) * 9;
        for (i64 tap = 0; tap < 9; ++tap)
          taps[kTranspose ? 8 - tap : tap][lane] = at[tap];
      }
      vec columns[kSpan][3];
      for (int x = 0; x < 3; ++x) {
        const vec w[3] = {load(taps[x]), load(taps[3 + x]), load(taps[6 + x])};
        vec u[kSpan];
        weight_points(w, u);
        for (int y = 0; y < kSpan; ++y)
          columns[y][x] = u[y];
      }
      for (int y = 0; y < kSpan; ++y) {
        vec u[kSpan];
        weight_points(columns[y], u);
        for (int x = 0; x < kSpan; ++x)
          store(packed + ((y * kSpan + x) * c + row) * c + v, u[x]);
      }
    }
}

// unit.grad_weight from the sums [64][in][out] of all points.
inline void transform_weight_sums(const Unit &unit, const float *sums) {
  const i64 c = unit.c;
#pragma omp parallel for num_threads(unit.threads) schedule(static)
  for (i64 row = 0; row < c; ++row)
    for (i64 v = 0; v < c; v += kLanes) {
      vec columns[3][kSpan];
      for (int x = 0; x < kSpan; ++x) {
        vec u[kSpan], w[3];
        for (int y = 0; y < kSpan; ++y)
          u[y] = load(sums + ((y * kSpan + x) * c + row) * c + v);
        weight_sums(u, w);
        for (int y = 0; y < 3; ++y)
          columns[y][x] = w[y];
      }
      alignas(64) float taps[9][kLanes];
      for (int y = 0; y < 3; ++y) {
        vec w[3];
        weight_sums(columns[y], w);
        for (int x = 0; x < 3; ++x)
          store(taps[y * 3 + x], w[x]);
      }
      for (i64 lane = 0; lane < kLanes; ++lane)
        for (i64 tap = 0; tap < 9; ++tap)
          unit.grad_weight[((v + lane) * c + row) * 9 + tap] = taps[tap][lane];
    }
}

// [sources][C][C] of a weight [out][sources * C]: rows are inputs or outputs.
template <bool kTranspose> void gather_weights(const Unit &unit, float *packed) {
  const i64 c = unit.c;
  for (i64 j = 0; j < unit.sources; ++j)
    for (i64 row = 0; row < c; ++row)
      for (i64 column = 0; column < c; ++column) {
        const i64 out = kTranspose ? row : column, in = kTranspose ? column : row;
        packed[(j * c + row) * c + column] = unit.weight[(out * unit.sources + j) * c + in];
      }
}

// [taps][outputs][C] of a weight [outputs][C][taps].
inline void gather_taps(const Unit &unit, float *packed) {
  const i64 taps = unit.kernel * unit.kernel;
  for (i64 tap = 0; tap < taps; ++tap)
    for (i64 o = 0; o < unit.outputs; ++o)
      for (i64 i = 0; i < unit.c; ++i)
        packed[(tap * unit.outputs + o) * unit.c + i] = unit.weight[(o * unit.c + i) * taps + tap];
}

} // namespace memnet::MEMNET_ISA

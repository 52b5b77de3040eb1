// attention.cuh -- what forward and backward of attention share. Contract: src/ops/attention.rs.
//
// A block has four warps. A head's columns are `head_dim` (a multiple of 8) of D = 32, 64 or 128;
// the tiles' other columns are zero.
#pragma once
#include "dropout.cuh"
#include "tile.cuh"

namespace {
constexpr int kProblems = 4;
constexpr int kThreads = 128;
constexpr int kOwn = 64;       // rows that a block owns: queries, or keys
constexpr float kLog2e = 1.4426950408889634f, kLog2eLow = 1.925963e-8f, kLn2 = 0.6931471805599453f;

// What scores are multiplied by, 1 / sqrt(head_dim), and the same for an exponential to the base 2.
// One expression for both passes, so that backward scales scores as forward did.
GPU_FN float score_scale(int head_dim) { return 1.f / sqrtf(float(head_dim)); }
GPU_FN float score_scale2(int head_dim) { return score_scale(head_dim) * kLog2e; }

// exp(scale s - lse) with scale2 = log2(e) scale. A log-sum-exp of a few hundred leaves f32 few
// digits behind the point: for its sake the product with log2(e) keeps what it rounds off.
GPU_FN float probability(float s, float scale2, float lse) {
  const float high = lse * kLog2e;
  if constexpr (kIsBf16) return fast_exp2(fmaf(s, scale2, -high));
  const float low = fmaf(lse, kLog2e, -high) + lse * kLog2eLow;
  return fast_exp2(fmaf(s, scale2, -high) - low);
}

// f32 elements are twice as large: shorter tiles keep a block under the 99 KiB that every GPU since
// Ampere has.
template <int D> constexpr int kKeys = kIsBf16 ? 64 : 32;

// Columns of one head.
template <class T> GPU_FN Matrix<T> head_of(const Matrix<T>& m, int head, int head_dim) {
  return {m.data + int64_t(head) * head_dim, m.stride, m.rows, head_dim};
}

// A block's place in a table of problems: which one, which head, which part of it.
struct Place { int problem, head, part; };
template <class T> GPU_FN Place place_of(const T& table, int block) {
  int i = 0;
  while (i + 1 < table.count && block >= table.problem[i + 1].first_block) i++;
  const int index = block - table.problem[i].first_block;
  return {i, index % table.problem[i].heads, index / table.problem[i].heads};
}

// Two neighbouring elements of a row.
GPU_FN void store_pair(real* to, float a, float b) {
  Pack<real, 2> pair = {{real(a), real(b)}};
  store<2>(to, pair);
}

// c[16][8 N8] += rows of a tile [m][D] times rows of a tile [n][D], over D.
template <int D, int N8> GPU_FN void scores(float (&c)[N8][4], const real* a, int a_row, const real* b, int b_row) {
#pragma unroll kIsBf16 ? 8 : 1  // f32's three products a step take their registers
  for (int k = 0; k < D; k += kStep) {
    Fragment as;
    load_a<D>(as, a, a_row, k);
#pragma unroll
    for (int j = 0; j < N8 / 2; j++) {
      Fragment bs;
      load_b<D>(bs, b, b_row + 16 * j, k);
      multiply_add(c[2 * j], as, bs[0], bs[1]);
      multiply_add(c[2 * j + 1], as, bs[2], bs[3]);
    }
  }
}

// out[16][COLUMNS] += weights [16][8 N8] (accumulators of a product) times columns first .. first +
// COLUMNS of a tile [8 N8][D].
template <int D, int COLUMNS, int N8>
GPU_FN void weigh(float (&out)[COLUMNS / 8][4], const float (&weights)[N8][4], const real* tile, int first = 0) {
  constexpr int kSteps = 8 * N8 / kStep, kInside = kSteps < 2 ? kSteps : 2;  // steps of a `Sum`
#pragma unroll
  for (int begin = 0; begin < kSteps; begin += kInside)
#pragma unroll
    for (int j = 0; j < COLUMNS / 16; j++) {
      Sum left{out[2 * j]}, right{out[2 * j + 1]};
#pragma unroll
      for (int step = begin; step < begin + kInside; step++) {
        Fragment as, bs;
        accumulator_to_a(as, weights, step);
        load_b_t<D>(bs, tile, first + 16 * j, step * kStep);
        left.add(as, bs[0], bs[1]);
        right.add(as, bs[2], bs[3]);
      }
      left.finish();
      right.finish();
    }
}

template <int N8> GPU_FN void clear(float (&c)[N8][4]) {
#pragma unroll
  for (int j = 0; j < N8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) c[j][e] = 0.f;
}
}  // namespace

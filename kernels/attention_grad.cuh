// attention_grad.cuh -- what the kernels of attention's backward share.
#pragma once
#include "attention.cuh"

namespace {
struct AttentionGrad {
  Matrix<const real> q, k, v, out, dout;
  Matrix<real> dq, dk, dv;
  const float* lse;
  float* delta;
  real* ds;  // dS^T [heads][m][ds_stride(n)] for attention_dq_product, or null
  Dropout dropout;
  int32_t heads, first_block;
};
struct AttentionGrads {
  AttentionGrad problem[kProblems];
  int32_t count, padding;
};

// Elements from one row of dS^T to the next: the queries, in whole chunks of 16 bytes.
GPU_FN int ds_stride(int n) { return (n + kChunk - 1) / kChunk * kChunk; }

// Columns of this thread in a 16 x COLUMNS accumulator, times a factor, to rows row0 + {g, g + 8}
// of a head, from column `first` on.
template <int COLUMNS>
GPU_FN void store_rows(const Matrix<real>& to, int row0, int first, const float (&c)[COLUMNS / 8][4], float factor) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = row0 + g + 8 * h;
    if (row >= to.rows) continue;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      const int column = first + 8 * j + 2 * t;
      if (column < to.cols) store_pair(to.row(row) + column, c[j][2 * h] * factor, c[j][2 * h + 1] * factor);
    }
  }
}
}  // namespace

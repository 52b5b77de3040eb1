// matmul.cuh -- what the kernels of matmul.cu and matmul_wgmma.cu share: their tables of problems,
// and what becomes of a product.
//
// forward          out [m, n] = epilogue(a [m, k] b^T),   b [n, k]
// backward_input   out [m, n] = epilogue(a [m, k] b),     b [k, n]
// backward_weight  dw [n, k] (f32) += dy^T x, db [n] (f32) += column sums of dy;   dy [m, n], x [m, k]
//
// Epilogue (src/ops/matmul.rs), in this order: + what out held, + bias, pre = it and GELU, *
// GELU'(pre), dropout, + residual.
//
// A block computes a tile of one of several problems, over slices of 128 bytes of the depth that
// cp.async brings in kStages deep. For the epilogue a quad's threads exchange their accumulators,
// so that each has eight neighbouring columns: 16 bytes of bf16 at a time. backward_weight sums
// over m, which is long: `splits` blocks share a tile, each writes its sum to scratch, and a second
// kernel adds those in order. The same bits on every run.
#pragma once
#include "dropout.cuh"
#include "eight.cuh"
#include "product.cuh"

namespace {
constexpr int kProblems = 8, kWeightProblems = 12;

struct Problem {
  Matrix<const real> a, b;
  Matrix<real> out, pre, residual;  // null: absent
  const real* bias;
  Dropout dropout;
  int32_t accumulate, gelu, gelu_grad;
  int32_t first_tile;  // of this problem in the grid
};
struct Problems {
  Problem problem[kProblems];
  int32_t count, padding;
};

struct WeightProblem {
  Matrix<const real> dy, x;
  Matrix<float> dw;
  float* db;
  float* partial;  // [splits][out * in + out], unless there is one split
  int32_t splits, first_tile;
};
struct WeightProblems {
  WeightProblem problem[kWeightProblems];
  int32_t count, padding;
};

// The problem that a block works on.
template <class T> GPU_FN int find_problem(const T& table, int tile) {
  int i = 0;
  while (i + 1 < table.count && tile >= table.problem[i + 1].first_tile) i++;
  return i;
}

// Of a warp's accumulators c[n8][4] of 16 rows x 32 columns, the quad's of row 8 h + lane / 4,
// transposed: this thread's eight columns, 8 t ...
GPU_FN void exchange(const float (*c)[4], int h, float (&v)[8]) {
  const int t = int(threadIdx.x) % 4;
  // step 1: with t ^ 2, tiles 2, 3 against 0, 1; step 2: with t ^ 1, the odd tile against the even
  float half[2][2], kept[2][2];
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float low = c[j][2 * h + e], high = c[j + 2][2 * h + e];
      kept[j][e] = t & 2 ? high : low;
      half[j][e] = __shfl_xor_sync(0xffffffffu, t & 2 ? low : high, 2);
    }
  // of tile 2 (t / 2) + j: own pair, and that of thread t ^ 2
  float own[2], other[2], given[2], got[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    own[e] = t & 1 ? kept[1][e] : kept[0][e];
    other[e] = t & 1 ? half[1][e] : half[0][e];
    given[e] = __shfl_xor_sync(0xffffffffu, t & 1 ? kept[0][e] : kept[1][e], 1);
    got[e] = __shfl_xor_sync(0xffffffffu, t & 1 ? half[0][e] : half[1][e], 1);
  }
  // pair s of the tile came from thread s
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float same_even = t & 1 ? given[e] : own[e], same_odd = t & 1 ? own[e] : given[e];
    const float far_even = t & 1 ? got[e] : other[e], far_odd = t & 1 ? other[e] : got[e];
    v[0 + e] = t & 2 ? far_even : same_even;
    v[2 + e] = t & 2 ? far_odd : same_odd;
    v[4 + e] = t & 2 ? same_even : far_even;
    v[6 + e] = t & 2 ? same_odd : far_odd;
  }
}

// What becomes of a warp's accumulators c[n8][4] of rows row0 .. + 16 and columns column0 .. + 32.
GPU_FN void finish(const Problem& p, const float (*c)[4], int row0, int column0) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4, column = column0 + 8 * t;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = row0 + 8 * h + g;
    float v[8];
    exchange(c, h, v);
    const uint32_t keep = p.dropout.threshold ? dropout_kept_eight(drawn(p.dropout), uint32_t(row), uint32_t(column0 / 32)) : 0xffu;
    if (row >= p.out.rows || column >= p.out.cols) continue;
    float x[8];
    if (p.accumulate) {
      load_eight(p.out.row(row) + column, x);
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] += x[e];
    }
    if (p.bias) {
      load_eight(p.bias + column, x);
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] += x[e];
    }
    if (p.gelu) {
      store_eight(p.pre.row(row) + column, v);
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] *= normal_cdf(v[e]);
    }
    if (p.gelu_grad) {
      load_eight(p.pre.row(row) + column, x);
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] *= gelu_derivative(x[e]);
    }
    if (p.dropout.threshold) {
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] *= keep >> e & 1u ? p.dropout.scale : 0.f;
    }
    if (p.residual.data) {
      load_eight(p.residual.row(row) + column, x);
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] += x[e];
    }
    store_eight(p.out.row(row) + column, v);
  }
}

// A block's part of a weight gradient: of the tile at (m0, n0) of dw, the sum over rows begin ..
// end of dy and x.
struct WeightPart {
  const WeightProblem& p;
  int m0, n0, begin, end;
  bool alone;      // it is the whole sum, and goes straight to dw and db
  float* partial;  // else here
};
template <int BM, int BN> GPU_FN WeightPart weight_part(const WeightProblems& table) {
  const WeightProblem& p = table.problem[find_problem(table, int(blockIdx.x))];
  const int across = (p.dw.cols + BN - 1) / BN, tiles = across * ((p.dw.rows + BM - 1) / BM);
  const int index = int(blockIdx.x) - p.first_tile, split = index / tiles, tile = index % tiles;
  // a split takes whole stages
  const int stages = (p.dy.rows + kDepth - 1) / kDepth, each = (stages + p.splits - 1) / p.splits * kDepth;
  const int begin = min(split * each, p.dy.rows), end = min(begin + each, p.dy.rows);
  float* partial = p.partial + int64_t(split) * (int64_t(p.dw.rows) * p.dw.cols + p.dw.rows);
  return {p, tile / across * BM, tile % across * BN, begin, end, p.splits == 1, partial};
}

// The sum of column `row` of dy.
GPU_FN void finish_bias(const WeightPart& part, int row, float column_sum) {
  const WeightProblem& p = part.p;
  if (part.alone) p.db[row] += column_sum;
  else part.partial[int64_t(p.dw.rows) * p.dw.cols + row] = column_sum;
}

// A warp's accumulators c[n8][4] of rows row0 .. + 16 and columns column0 .. + 32.
GPU_FN void finish_weight(const WeightPart& part, const float (*c)[4], int row0, int column0) {
  const WeightProblem& p = part.p;
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4, column = column0 + 8 * t;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = row0 + 8 * h + g;
    float v[8];
    exchange(c, h, v);
    if (row >= p.dw.rows || column >= p.dw.cols) continue;
    float* to = part.alone ? p.dw.row(row) + column : part.partial + int64_t(row) * p.dw.cols + column;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Pack<float, 4> x = {{v[4 * half], v[4 * half + 1], v[4 * half + 2], v[4 * half + 3]}};
      if (part.alone) {
        const auto old = load<4>(to + 4 * half);
#pragma unroll
        for (int e = 0; e < 4; e++) x.v[e] += old.v[e];
      }
      store<4>(to + 4 * half, x);
    }
  }
}
}  // namespace

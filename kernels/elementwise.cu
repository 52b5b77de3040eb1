// elementwise.cu -- sums, dropout and GELU of matrices whose width is a multiple of eight. A thread
// takes eight columns of a row, the four threads of a quad 32, which is one call of the dropout
// generator each.
#include "dropout.cuh"
#include "eight.cuh"

namespace {
constexpr int kThreads = 256, kTerms = 4, kProblems = 8;

// A thread's row and first column among `cols`, in quads that do not cross rows.
struct Piece { int64_t row; int column; };
GPU_FN Piece piece_of(int cols) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int per_row = (cols + 31) / 32 * 4;
  return {i / per_row, int(i % per_row) * 8};
}

struct Sum {
  Matrix<const real> term[kTerms];
  Matrix<real> out;  // may be one of the terms
  int32_t terms, padding;
};

struct Map {
  Matrix<const real> x;
  Matrix<real> out;
  Dropout dropout;
  int32_t gelu, padding;
};
struct Maps { Map problem[kProblems]; };
}  // namespace

// out = dropout(x), or dropout(GELU(x))
KERNEL(elementwise_map, kThreads, const Maps maps) {
  const Map& p = maps.problem[blockIdx.y];
  const Piece piece = piece_of(p.out.cols);
  const uint32_t kept =
      p.dropout.threshold ? dropout_kept_eight(drawn(p.dropout), uint32_t(piece.row), uint32_t(piece.column / 32)) : 0xffu;
  if (piece.row >= p.out.rows || piece.column >= p.out.cols) return;
  float v[8];
  load_eight(p.x.row(int(piece.row)) + piece.column, v);
#pragma unroll
  for (int e = 0; e < 8; e++) {
    if (p.gelu) v[e] *= normal_cdf(v[e]);
    if (p.dropout.threshold) v[e] *= kept >> e & 1u ? p.dropout.scale : 0.f;
  }
  store_eight(p.out.row(int(piece.row)) + piece.column, v);
}

KERNEL(elementwise_sum, kThreads, const Sum p) {
  const Piece piece = piece_of(p.out.cols);
  if (piece.row >= p.out.rows || piece.column >= p.out.cols) return;
  float sum[8] = {}, x[8];
#pragma unroll
  for (int i = 0; i < kTerms; i++) {
    if (i >= p.terms) break;
    load_eight(p.term[i].row(int(piece.row)) + piece.column, x);
#pragma unroll
    for (int e = 0; e < 8; e++) sum[e] += x[e];
  }
  store_eight(p.out.row(int(piece.row)) + piece.column, sum);
}

// sums += x
KERNEL(elementwise_accumulate, kThreads, const Matrix<const real> x, const Matrix<float> sums) {
  const Piece piece = piece_of(x.cols);
  if (piece.row >= x.rows || piece.column >= x.cols) return;
  float v[8];
  load_eight(x.row(int(piece.row)) + piece.column, v);
  float* to = sums.row(int(piece.row)) + piece.column;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    auto sum = load<4>(to + 4 * half);
#pragma unroll
    for (int e = 0; e < 4; e++) sum.v[e] += v[4 * half + e];
    store<4>(to + 4 * half, sum);
  }
}

// out = sums
KERNEL(elementwise_round, kThreads, const Matrix<const float> sums, const Matrix<real> out) {
  const Piece piece = piece_of(out.cols);
  if (piece.row >= out.rows || piece.column >= out.cols) return;
  const float* from = sums.row(int(piece.row)) + piece.column;
  float v[8];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const auto sum = load<4>(from + 4 * half);
#pragma unroll
    for (int e = 0; e < 4; e++) v[4 * half + e] = sum.v[e];
  }
  store_eight(out.row(int(piece.row)) + piece.column, v);
}

KERNEL(elementwise_zero, kThreads, const Matrix<float> sums) {
  const Piece piece = piece_of(sums.cols);
  if (piece.row >= sums.rows || piece.column >= sums.cols) return;
  float* to = sums.row(int(piece.row)) + piece.column;
  store<4>(to, Pack<float, 4>{});
  store<4>(to + 4, Pack<float, 4>{});
}

// layer_norm.cu -- layer normalisation over rows, y = (x - mean) / sqrt(var + 1e-5) * weight + bias
// (Ba et al. 2016).
//
// forward   x [n0, d], weight [d], bias [d] -> y [n, d], stats [n0, 2] f32 = (mean, 1 / sqrt(var + 1e-5))
// apply     the same y from x and saved stats
//           n0 <= n <= 2 n0: row n0 + i of y repeats row i, the model's padding to a square
// backward  dy [n, d] -> dx [n0, d] =, and partial [blocks, 2 d] = each block's sums for dweight
// and dbias
//           dx may be dy's first n0 rows; g = dy[i] + dy[n0 + i]
//             dx = rstd (g w - mean(g w) - x_hat mean(g w x_hat)),  dweight = sum g x_hat,  dbias = sum g
// reduce    partial -> dweight [d] +=, dbias [d] += (f32), in the order of the blocks: the same bits on every run
//
// A warp takes a row and its lanes packs of V columns; it reads the row again for each sum, which
// is in L1 by then. blockIdx.y is the problem. "_scalar": V = 1, for rows that do not split into 16
// bytes. Backward goes over tiles of 32 V columns, so that a block's shared memory does not grow
// with d.
#include "gpu.cuh"

namespace {
constexpr float kEpsilon = 1e-5f;
// Launches know these too.
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRowsPerWarp = 4, kRowsPerBlock = kRowsPerWarp * kWarps;  // in backward
constexpr int kProblems = 4;

struct Norm {
  Matrix<const real> x;
  Matrix<real> y;
  float* stats;
  const real *weight, *bias;
};
struct Norms { Norm problem[kProblems]; };

template <bool HAVE_STATS, int V> GPU_FN void normalise(const Norm p) {
  const int lane = int(threadIdx.x) % 32, row = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  const int n0 = p.x.rows, d = p.x.cols;
  if (row >= n0) return;
  const real* x = p.x.row(row);
  float mean, rstd;
  if (HAVE_STATS) {
    mean = p.stats[2 * row];
    rstd = p.stats[2 * row + 1];
  } else {
    float sum = 0.f;
    for (int c = lane * V; c < d; c += 32 * V) {
      const auto xs = load<V>(x + c);
      for (int e = 0; e < V; e++) sum += float(xs.v[e]);
    }
    mean = warp_sum(sum) / float(d);
    float squares = 0.f;
    for (int c = lane * V; c < d; c += 32 * V) {
      const auto xs = load<V>(x + c);
      for (int e = 0; e < V; e++) {
        const float centred = float(xs.v[e]) - mean;
        squares += centred * centred;
      }
    }
    rstd = 1.f / sqrtf(warp_sum(squares) / float(d) + kEpsilon);
    if (lane == 0) {
      p.stats[2 * row] = mean;
      p.stats[2 * row + 1] = rstd;
    }
  }
  for (int c = lane * V; c < d; c += 32 * V) {
    const auto xs = load<V>(x + c), weight = load<V>(p.weight + c), bias = load<V>(p.bias + c);
    Pack<real, V> y;
    for (int e = 0; e < V; e++) y.v[e] = real((float(xs.v[e]) - mean) * rstd * float(weight.v[e]) + float(bias.v[e]));
    store<V>(p.y.row(row) + c, y);
    if (row + n0 < p.y.rows) store<V>(p.y.row(row + n0) + c, y);
  }
}

struct NormGrad {
  Matrix<const real> x, dy;
  Matrix<real> dx;
  const float* stats;
  const real* weight;
  float *partial, *dweight, *dbias;
};
struct NormGrads { NormGrad problem[kProblems]; };

template <int V> struct Floats { float v[V]; };

// The gradient of columns c .. c + V of x_hat * weight + bias: dy, and the repeated row's if there
// is one.
template <int V> GPU_FN Floats<V> gradient(const real* dy, const real* repeated, int c) {
  Floats<V> g;
  const auto a = load<V>(dy + c);
  for (int e = 0; e < V; e++) g.v[e] = float(a.v[e]);
  if (repeated) {
    const auto b = load<V>(repeated + c);
    for (int e = 0; e < V; e++) g.v[e] += float(b.v[e]);
  }
  return g;
}

template <int V> GPU_FN void backward(const NormGrad p) {
  // Column c of a tile at c % V * kStride + c / V: lanes that write, and threads that read, fall
  // into different banks.
  constexpr int kTile = 32 * V, kStride = 32 + 32 / V;
  SHARED_ARRAY(float, sums, [kWarps][2][V * kStride]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int n0 = p.x.rows, d = p.x.cols, first = int(blockIdx.x) * kRowsPerBlock + warp;
  if (int(blockIdx.x) * kRowsPerBlock >= n0) return;

  float mean[kRowsPerWarp], rstd[kRowsPerWarp], mean_g[kRowsPerWarp], mean_gx[kRowsPerWarp];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; r++) {
    const int row = first + r * kWarps;
    mean[r] = rstd[r] = mean_g[r] = mean_gx[r] = 0.f;
    if (row >= n0) continue;
    const real *x = p.x.row(row), *dy = p.dy.row(row);
    const real* repeated = row + n0 < p.dy.rows ? p.dy.row(row + n0) : nullptr;
    mean[r] = p.stats[2 * row];
    rstd[r] = p.stats[2 * row + 1];
#pragma unroll 1  // of four rows at a time: more would take half again as many registers
    for (int c = lane * V; c < d; c += kTile) {
      const auto xs = load<V>(x + c), weight = load<V>(p.weight + c);
      const auto g = gradient<V>(dy, repeated, c);
      for (int e = 0; e < V; e++) {
        const float gw = g.v[e] * float(weight.v[e]);
        mean_g[r] += gw;
        mean_gx[r] += gw * ((float(xs.v[e]) - mean[r]) * rstd[r]);
      }
    }
    mean_g[r] = warp_sum(mean_g[r]) / float(d);
    mean_gx[r] = warp_sum(mean_gx[r]) / float(d);
  }

  for (int tile = 0; tile < d; tile += kTile) {
    const int c = tile + lane * V;
    float dweight[V] = {}, dbias[V] = {};
    if (c < d) {
      const auto weight = load<V>(p.weight + c);
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; r++) {
        const int row = first + r * kWarps;
        if (row >= n0) break;
        const auto xs = load<V>(p.x.row(row) + c);
        const auto g = gradient<V>(p.dy.row(row), row + n0 < p.dy.rows ? p.dy.row(row + n0) : nullptr, c);
        Pack<real, V> dx;
        for (int e = 0; e < V; e++) {
          const float x_hat = (float(xs.v[e]) - mean[r]) * rstd[r];
          dweight[e] += g.v[e] * x_hat;
          dbias[e] += g.v[e];
          dx.v[e] = real(rstd[r] * (g.v[e] * float(weight.v[e]) - mean_g[r] - x_hat * mean_gx[r]));
        }
        store<V>(p.dx.row(row) + c, dx);
      }
    }
    for (int e = 0; e < V; e++) {
      sums[warp][0][e * kStride + lane] = dweight[e];
      sums[warp][1][e * kStride + lane] = dbias[e];
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < 2 * kTile; i += kThreads) {
      const int half = i / kTile, column = i % kTile;
      if (tile + column >= d) continue;
      float total = 0.f;
      for (int w = 0; w < kWarps; w++) total += sums[w][half][column % V * kStride + column / V];
      p.partial[int64_t(blockIdx.x) * (2 * d) + half * d + tile + column] = total;
    }
    __syncthreads();  // the sums are free again
  }
}
}  // namespace

KERNEL(layer_norm_forward, kThreads, const Norms norms) { normalise<false, kRealsPerPack>(norms.problem[blockIdx.y]); }
KERNEL(layer_norm_forward_scalar, kThreads, const Norms norms) { normalise<false, 1>(norms.problem[blockIdx.y]); }
KERNEL(layer_norm_apply, kThreads, const Norms norms) { normalise<true, kRealsPerPack>(norms.problem[blockIdx.y]); }
KERNEL(layer_norm_apply_scalar, kThreads, const Norms norms) { normalise<true, 1>(norms.problem[blockIdx.y]); }
KERNEL_BLOCKS(layer_norm_backward, kThreads, 3, const NormGrads grads) { backward<kRealsPerPack>(grads.problem[blockIdx.y]); }
KERNEL(layer_norm_backward_scalar, kThreads, const NormGrads grads) { backward<1>(grads.problem[blockIdx.y]); }

// A block takes 32 of the 2 d columns, each warp every kWarps-th row of partial.
KERNEL(layer_norm_reduce, kThreads, const NormGrads grads) {
  const NormGrad p = grads.problem[blockIdx.y];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int d = p.x.cols, c = int(blockIdx.x) * 32 + lane, blocks = (p.x.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  SHARED_ARRAY(float, sums, [kWarps][32]);
  float sum = 0.f;
  if (c < 2 * d)
    for (int b = warp; b < blocks; b += kWarps) sum += p.partial[int64_t(b) * (2 * d) + c];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= 2 * d) return;
  float total = 0.f;
  for (int w = 0; w < kWarps; w++) total += sums[w][lane];
  if (c < d) p.dweight[c] += total;
  else p.dbias[c - d] += total;
}

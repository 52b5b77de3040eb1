// scale_embedding.cu -- a scale embedding e folded into a projection's bias
// (src/ops/scale_embedding.rs), W [out, d].
//
// forward   folded [out] = bias + W e
// backward  dweight [out, d] += dfolded e^T,  dbias [out] += dfolded,  dembedding [d] += dfolded W
//           A block owns 32 columns of all problems and takes them in turn: several may share an embedding.
#include "gpu.cuh"

namespace {
constexpr int kProblems = 4, kWarps = 8, kThreads = 32 * kWarps;

struct Fold {
  Matrix<const real> weight;
  const real *bias, *embedding;
  real* folded;
};
struct Folds { Fold problem[kProblems]; };

struct FoldGrad {
  Matrix<const real> weight;
  const real* embedding;
  const float* dfolded;
  Matrix<float> dweight;
  float *dbias, *dembedding;
};
struct FoldGrads {
  FoldGrad problem[kProblems];
  int32_t count, padding;
};
}  // namespace

// A warp takes a row.
KERNEL(scale_embedding_forward, kThreads, const Folds folds) {
  const Fold& p = folds.problem[blockIdx.y];
  const int lane = int(threadIdx.x) % 32, row = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  if (row >= p.weight.rows) return;
  float sum = 0.f;
  for (int c = lane * kRealsPerPack; c < p.weight.cols; c += 32 * kRealsPerPack) {
    const auto w = load<kRealsPerPack>(p.weight.row(row) + c), e = load<kRealsPerPack>(p.embedding + c);
#pragma unroll
    for (int i = 0; i < kRealsPerPack; i++) sum += float(w.v[i]) * float(e.v[i]);
  }
  sum = warp_sum(sum);
  if (lane == 0) p.folded[row] = real(float(p.bias[row]) + sum);
}

// A thread's column, every kWarps-th row.
KERNEL(scale_embedding_backward, kThreads, const FoldGrads grads) {
  SHARED_ARRAY(float, sums, [kWarps][32]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, column = int(blockIdx.x) * 32 + lane;
  for (int i = 0; i < grads.count; i++) {
    const FoldGrad& p = grads.problem[i];
    const int out = p.weight.rows;
    if (int(blockIdx.x) * 32 >= p.weight.cols) continue;
    const bool inside = column < p.weight.cols;
    const float e = inside ? float(p.embedding[column]) : 0.f;
    float sum = 0.f;
    for (int row = warp; row < out; row += kWarps) {
      const float g = p.dfolded[row];
      if (inside) {
        sum += g * float(p.weight.row(row)[column]);
        p.dweight.row(row)[column] += g * e;
      }
      if (blockIdx.x == 0 && lane == 0) p.dbias[row] += g;
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && inside) {
      float total = 0.f;
      for (int w = 0; w < kWarps; w++) total += sums[w][lane];
      p.dembedding[column] += total;
    }
    __syncthreads();  // the sums are free again
  }
}

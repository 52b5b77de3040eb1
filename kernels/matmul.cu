// matmul.cu -- the three products of a linear layer y = x W^T + b, W [out, in], with what stands
// next to them (matmul.cuh).
//
// A block computes a BM x BN tile with tensor cores. A warp holds 64 or 32 rows x 32 columns, the
// columns of one call of the dropout generator.
#include "matmul.cuh"

namespace {
template <Layout LAYOUT, int BM, int BN, int WARPS_M, int WARPS_N> struct Product {
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N;
  // 16-row and 8-column accumulators of a warp
  static constexpr int kM = BM / WARPS_M / 16, kN8 = 4;
  static_assert(BN == 32 * WARPS_N && BM % (16 * WARPS_M) == 0);
  static constexpr int kA = BM * kDepth, kB = BN * kDepth;  // elements of a stage
  static constexpr int kSharedElements = kStages * (kA + kB);

  const Matrix<const real>&a, &b;
  int m0, n0;
  float c[kM][kN8][4];

  GPU_FN void load(real* stage, int k0) const {
    if constexpr (LAYOUT == kWeight) load_tile<kDepth, BM, kThreads, kUnroll>(stage, a, k0, m0);
    else load_tile<BM, kDepth, kThreads, kUnroll>(stage, a, m0, k0);
    if constexpr (LAYOUT == kForward) load_tile<BN, kDepth, kThreads, kUnroll>(stage + kA, b, n0, k0);
    else load_tile<kDepth, BN, kThreads, kUnroll>(stage + kA, b, k0, n0);
  }

  GPU_FN void multiply(const real* stage) {
    const int warp = int(threadIdx.x) / 32, m = warp / WARPS_N * (16 * kM), n = warp % WARPS_N * 32;
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
      Fragment bs[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        if constexpr (LAYOUT == kForward) load_b<kDepth>(bs[j], stage + kA, n + 16 * j, k);
        else if constexpr (LAYOUT == kInput) load_b_columns<BN>(bs[j], stage + kA, n + 16 * j, k);
        else load_b_t<BN>(bs[j], stage + kA, n + 16 * j, k);
      }
#pragma unroll
      for (int i = 0; i < kM; i++) {
        Fragment as;
        if constexpr (LAYOUT == kWeight) load_a_t<BM>(as, stage, m + 16 * i, k);
        else load_a<kDepth>(as, stage, m + 16 * i, k);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          multiply_add(c[i][2 * j], as, bs[j][0], bs[j][1]);
          multiply_add(c[i][2 * j + 1], as, bs[j][2], bs[j][3]);
        }
      }
    }
  }

  // c = the sum over depth begin .. end; `each` sees every stage after it has landed.
  template <class Each> GPU_FN void sum(real* shared, int begin, int end, Each each) {
#pragma unroll
    for (int i = 0; i < kM; i++)
#pragma unroll
      for (int j = 0; j < kN8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) c[i][j][e] = 0.f;
    const int stages = (end - begin + kDepth - 1) / kDepth;
    for (int s = 0; s < kStages - 1; s++) {
      if (s < stages) load(shared + s * (kA + kB), begin + s * kDepth);
      cp_async_commit();
    }
    int at = 0;  // s % kStages
    for (int s = 0; s < stages; s++) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // stage s has landed for everyone, and everyone has finished with stage s - 1
      const int next = at == 0 ? kStages - 1 : at - 1;
      if (s + kStages - 1 < stages) load(shared + next * (kA + kB), begin + (s + kStages - 1) * kDepth);
      cp_async_commit();
      multiply(shared + at * (kA + kB));
      each(shared + at * (kA + kB));
      at = at == kStages - 1 ? 0 : at + 1;
    }
  }

  // Calls each(accumulators, row, column) for the warp's pieces of 16 x 32.
  template <class Each> GPU_FN void pieces(Each each) const {
    const int warp = int(threadIdx.x) / 32;
#pragma unroll
    for (int i = 0; i < kM; i++) each(c[i], m0 + warp / WARPS_N * (16 * kM) + 16 * i, n0 + warp % WARPS_N * 32);
  }
};

template <Layout LAYOUT, int BM, int BN, int WARPS_M, int WARPS_N> GPU_FN void multiply(const Problems& table) {
  using P = Product<LAYOUT, BM, BN, WARPS_M, WARPS_N>;
  const Problem& p = table.problem[find_problem(table, int(blockIdx.x))];
  const int tile = int(blockIdx.x) - p.first_tile, across = (p.out.cols + BN - 1) / BN;
  P product{p.a, p.b, tile / across * BM, tile % across * BN, {}};
  SharedMemory shared;
  real* stages = shared.take<real>(P::kSharedElements);
  product.sum(stages, 0, p.a.cols, [](const real*) {});
  product.pieces([&](const float (*c)[4], int row, int column) { finish(p, c, row, column); });
}

template <int BM, int BN, int WARPS_M, int WARPS_N> GPU_FN void multiply_weight(const WeightProblems& table) {
  using P = Product<kWeight, BM, BN, WARPS_M, WARPS_N>;
  const WeightPart part = weight_part<BM, BN>(table);
  P product{part.p.dy, part.p.x, part.m0, part.n0, {}};
  SharedMemory shared;
  real* memory = shared.take<real>(P::kSharedElements);
  const int thread = int(threadIdx.x);
  const bool sums_columns = product.n0 == 0 && thread < BM && product.m0 + thread < part.p.dw.rows;
  float column_sum = 0.f;
  product.sum(memory, part.begin, part.end, [&](const real* stage) {
    if (!sums_columns) return;
    float sum = 0.f;
    for (int k = 0; k < kDepth; k++) sum += float(stage[swizzle<BM>(k, thread)]);
    column_sum += sum;
  });
  if (sums_columns) finish_bias(part, product.m0 + thread, column_sum);
  product.pieces([&](const float (*c)[4], int row, int column) { finish_weight(part, c, row, column); });
}
}  // namespace

KERNEL(matmul_forward, 256, const Problems table) { multiply<kForward, 128, 128, 2, 4>(table); }
KERNEL(matmul_forward_small, 128, const Problems table) { multiply<kForward, 64, 64, 2, 2>(table); }
KERNEL(matmul_backward_input, 256, const Problems table) { multiply<kInput, 128, 128, 2, 4>(table); }
KERNEL(matmul_backward_input_small, 128, const Problems table) { multiply<kInput, 64, 64, 2, 2>(table); }
KERNEL(matmul_backward_weight, 256, const WeightProblems table) { multiply_weight<128, 128, 2, 4>(table); }
KERNEL(matmul_backward_weight_small, 128, const WeightProblems table) { multiply_weight<64, 64, 2, 2>(table); }

// dw and db += the splits' sums, in order. blockIdx.y is the problem; a thread takes four elements.
KERNEL(matmul_backward_weight_reduce, 256, const WeightProblems table) {
  const WeightProblem& p = table.problem[blockIdx.y];
  if (p.splits == 1) return;
  const int weights = p.dw.rows * p.dw.cols, each = weights + p.dw.rows, at = int(blockIdx.x * 256 + threadIdx.x) * 4;
  if (at >= each) return;
  Pack<float, 4> sum = {{0.f, 0.f, 0.f, 0.f}};
  for (int s = 0; s < p.splits; s++) {
    const auto x = load<4>(p.partial + int64_t(s) * each + at);
    for (int e = 0; e < 4; e++) sum.v[e] += x.v[e];
  }
  float* to = at < weights ? p.dw.row(at / p.dw.cols) + at % p.dw.cols : p.db + (at - weights);
  const auto old = load<4>(to);
  for (int e = 0; e < 4; e++) sum.v[e] += old.v[e];
  store<4>(to, sum);
}

// matmul.cu -- the three products of a linear layer y = x W^T + b, W [out, in], with what stands next to them.
//
// forward          out [m, n] = epilogue(a [m, k] b^T),   b [n, k]
// backward_input   out [m, n] = epilogue(a [m, k] b),     b [k, n]
// backward_weight  dw [n, k] (f32) += dy^T x, db [n] (f32) += column sums of dy;   dy [m, n], x [m, k]
//
// Epilogue (src/ops/matmul.rs), in this order: + what out held, + bias, pre = it and GELU, * GELU'(pre), dropout, + residual.
//
// A block computes a BM x BN tile of one of several problems, with tensor cores over slices of 128 bytes of the depth that
// cp.async brings in kStages deep. A warp holds 64 or 32 rows x 32 columns, the columns of one call of the dropout generator. For the
// epilogue a quad's threads exchange their accumulators, so that each has eight neighbouring columns: 16 bytes of bf16 at a time.
// backward_weight sums over m, which is long: `splits` blocks share a tile, each writes its sum to scratch, and a second
// kernel adds those in order. The same bits on every run.
#include "dropout.cuh"
#include "eight.cuh"
#include "tile.cuh"

namespace {
constexpr int kProblems = 8, kWeightProblems = 12, kStages = 3;  // as in src/ops/matmul/kernel.rs
constexpr int kDepth = 8 * kChunk;         // elements of the depth in a stage: 128 bytes
constexpr int kUnroll = kIsBf16 ? 2 : 1;   // leaves registers for two blocks on a multiprocessor

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

enum Layout { kForward, kInput, kWeight };

template <Layout LAYOUT, int BM, int BN, int WARPS_M, int WARPS_N> struct Product {
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N, kWarpsN = WARPS_N;
  static constexpr int kM = BM / WARPS_M / 16, kN8 = 4;  // 16-row and 8-column accumulators of a warp
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

  // The quad's accumulators of row 16 i + 8 h + lane / 4 of the warp, transposed: this thread's eight columns, 8 t ...
  GPU_FN void exchange(int i, int h, float (&v)[8]) const {
    const int t = int(threadIdx.x) % 4;
    // step 1: with t ^ 2, tiles 2, 3 against 0, 1; step 2: with t ^ 1, the odd tile against the even
    float half[2][2], kept[2][2];
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float low = c[i][j][2 * h + e], high = c[i][j + 2][2 * h + e];
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
};

template <class P> GPU_FN void finish(const P& product, const Problem& p) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int column0 = product.n0 + warp % P::kWarpsN * 32, column = column0 + 8 * t;
#pragma unroll
  for (int i = 0; i < P::kM; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = product.m0 + warp / P::kWarpsN * (16 * P::kM) + 16 * i + 8 * h + g;
      float v[8];
      product.exchange(i, h, v);
      const uint32_t keep = p.dropout.threshold ? dropout_kept_eight(p.dropout, uint32_t(row), uint32_t(column0 / 32)) : 0xffu;
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

template <Layout LAYOUT, int BM, int BN, int WARPS_M, int WARPS_N> GPU_FN void multiply(const Problems& table) {
  using P = Product<LAYOUT, BM, BN, WARPS_M, WARPS_N>;
  const Problem& p = table.problem[find_problem(table, int(blockIdx.x))];
  const int tile = int(blockIdx.x) - p.first_tile, across = (p.out.cols + BN - 1) / BN;
  P product{p.a, p.b, tile / across * BM, tile % across * BN, {}};
  SharedMemory shared;
  real* stages = shared.take<real>(P::kSharedElements);
  product.sum(stages, 0, p.a.cols, [](const real*) {});
  finish(product, p);
}

template <int BM, int BN, int WARPS_M, int WARPS_N> GPU_FN void multiply_weight(const WeightProblems& table) {
  using P = Product<kWeight, BM, BN, WARPS_M, WARPS_N>;
  const WeightProblem& p = table.problem[find_problem(table, int(blockIdx.x))];
  const int across = (p.dw.cols + BN - 1) / BN, tiles = across * ((p.dw.rows + BM - 1) / BM);
  const int index = int(blockIdx.x) - p.first_tile, split = index / tiles, tile = index % tiles;
  P product{p.dy, p.x, tile / across * BM, tile % across * BN, {}};
  // a split takes whole stages
  const int stages = (p.dy.rows + kDepth - 1) / kDepth, each = (stages + p.splits - 1) / p.splits * kDepth;
  const int begin = min(split * each, p.dy.rows), end = min(begin + each, p.dy.rows);
  SharedMemory shared;
  real* memory = shared.take<real>(P::kSharedElements);
  const int thread = int(threadIdx.x);
  const bool sums_columns = product.n0 == 0 && thread < BM && product.m0 + thread < p.dw.rows;
  float column_sum = 0.f;
  product.sum(memory, begin, end, [&](const real* stage) {
    if (!sums_columns) return;
    float sum = 0.f;
    for (int k = 0; k < kDepth; k++) sum += float(stage[swizzle<BM>(k, thread)]);
    column_sum += sum;
  });
  const bool alone = p.splits == 1;
  float* partial = p.partial + int64_t(split) * (int64_t(p.dw.rows) * p.dw.cols + p.dw.rows);
  if (sums_columns) {
    const int row = product.m0 + thread;
    if (alone) p.db[row] += column_sum;
    else partial[int64_t(p.dw.rows) * p.dw.cols + row] = column_sum;
  }
  const int lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int column = product.n0 + warp % P::kWarpsN * 32 + 8 * t;
#pragma unroll
  for (int i = 0; i < P::kM; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = product.m0 + warp / P::kWarpsN * (16 * P::kM) + 16 * i + 8 * h + g;
      float v[8];
      product.exchange(i, h, v);
      if (row >= p.dw.rows || column >= p.dw.cols) continue;
      float* to = alone ? p.dw.row(row) + column : partial + int64_t(row) * p.dw.cols + column;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        Pack<float, 4> x = {{v[4 * half], v[4 * half + 1], v[4 * half + 2], v[4 * half + 3]}};
        if (alone) {
          const auto old = ::load<4>(to + 4 * half);
#pragma unroll
          for (int e = 0; e < 4; e++) x.v[e] += old.v[e];
        }
        ::store<4>(to + 4 * half, x);
      }
    }
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

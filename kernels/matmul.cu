// matmul.cu -- the three products of a linear layer y = x W^T + b, W [out, in], with what stands
// next to them (matmul.cuh).
//
// A block computes a BM x BN tile with tensor cores.
#include "matmul.cuh"

namespace {
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

constexpr int kBlocks = kIsBf16 ? 2 : 1;  // of the large tiles that a multiprocessor shall hold
}  // namespace

KERNEL_BLOCKS(matmul_forward, 256, kBlocks, const Problems table) { multiply<kForward, 128, 128, 2, 4>(table); }
KERNEL_BLOCKS(matmul_forward_small, 128, 4, const Problems table) { multiply<kForward, 64, 64, 2, 2>(table); }
KERNEL_BLOCKS(matmul_backward_input, 256, kBlocks, const Problems table) { multiply<kInput, 128, 128, 2, 4>(table); }
KERNEL_BLOCKS(matmul_backward_input_small, 128, 4, const Problems table) { multiply<kInput, 64, 64, 2, 2>(table); }
KERNEL_BLOCKS(matmul_backward_weight, 256, kBlocks, const WeightProblems table) { multiply_weight<128, 128, 2, 4>(table); }
KERNEL_BLOCKS(matmul_backward_weight_small, 128, 4, const WeightProblems table) { multiply_weight<64, 64, 2, 2>(table); }

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

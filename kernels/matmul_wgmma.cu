// matmul_wgmma.cu -- the products of matmul.cu in bf16 by Hopper's wgmma. NOT YET RUN ON A GPU.
//
// A block of two warpgroups computes 128 x 128, each warpgroup 64 of the rows; two blocks share a
// multiprocessor, so that one multiplies while the other waits, or finishes its tile. Loads are
// matmul.cu's cp.async by all threads: ragged edges and strides cost nothing there, where TMA would
// want a tensor map for each matrix of a table.
#include "matmul.cuh"
#include "product_wgmma.cuh"

#if REAL_IS_BF16
namespace {
template <Layout LAYOUT> GPU_FN void multiply(const Problems& table) {
  const Problem& p = table.problem[find_problem(table, int(blockIdx.x))];
  const int tile = int(blockIdx.x) - p.first_tile, across = (p.out.cols + kSide - 1) / kSide;
  WarpgroupProduct<LAYOUT> product{p.a, p.b, tile / across * kSide, tile % across * kSide, {}};
  SharedMemory shared;
  real* stages = shared.take<real>(kProductElements, 1024);
  product.sum(stages, 0, p.a.cols, [](const real*) {});
  product.pieces([&](const float (*c)[4], int row, int column) { finish(p, c, row, column); });
}

GPU_FN void multiply_weight(const WeightProblems& table) {
  const WeightPart part = weight_part<kSide, kSide>(table);
  WarpgroupProduct<kWeight> product{part.p.dy, part.p.x, part.m0, part.n0, {}};
  SharedMemory shared;
  real* stages = shared.take<real>(kProductElements, 1024);
  const int thread = int(threadIdx.x);
  const bool sums_columns = product.n0 == 0 && thread < kSide && product.m0 + thread < part.p.dw.rows;
  float column_sum = 0.f;
  product.sum(stages, part.begin, part.end, [&](const real* stage) {
    if (!sums_columns) return;
    float sum = 0.f;
    for (int k = 0; k < kDepth; k++) sum += float(stage[panel_element<kDepth>(k, thread)]);
    column_sum += sum;
  });
  if (sums_columns) finish_bias(part, product.m0 + thread, column_sum);
  product.pieces([&](const float (*c)[4], int row, int column) { finish_weight(part, c, row, column); });
}
}  // namespace

KERNEL_BLOCKS(matmul_forward_wgmma, kProductThreads, 2, const Problems table) {
  if constexpr (kHasWgmma) multiply<kForward>(table);
  else __trap();
}
KERNEL_BLOCKS(matmul_backward_input_wgmma, kProductThreads, 2, const Problems table) {
  if constexpr (kHasWgmma) multiply<kInput>(table);
  else __trap();
}
KERNEL_BLOCKS(matmul_backward_weight_wgmma, kProductThreads, 2, const WeightProblems table) {
  if constexpr (kHasWgmma) multiply_weight(table);
  else __trap();
}
#endif

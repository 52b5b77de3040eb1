// matmul_wgmma.cu -- the products of matmul.cu in bf16 by Hopper's wgmma. NOT YET RUN ON A GPU.
//
// A block of two warpgroups computes 128 x 128, each warpgroup 64 of the rows; two blocks share a
// multiprocessor, so that one multiplies while the other waits, or finishes its tile. Loads are
// matmul.cu's cp.async by all threads: ragged edges and strides cost nothing there, where TMA would
// want a tensor map for each matrix of a table.
#include "matmul.cuh"
#include "wgmma.cuh"

#if REAL_IS_BF16
namespace {
constexpr int kSide = 128, kThreads = 256;
constexpr int kTile = kSide * kDepth;  // elements of a, and of b, in a stage

template <Layout LAYOUT> struct WarpgroupProduct {
  const Matrix<const real>&a, &b;
  int m0, n0;
  float c[16][4];  // 16 rows a warp, 128 columns

  GPU_FN void load(real* stage, int k0) const {
    if constexpr (LAYOUT == kWeight) load_panels<kDepth, kSide, kThreads>(stage, a, k0, m0);
    else load_panels<kSide, kDepth, kThreads>(stage, a, m0, k0);
    if constexpr (LAYOUT == kForward) load_panels<kSide, kDepth, kThreads>(stage + kTile, b, n0, k0);
    else load_panels<kDepth, kSide, kThreads>(stage + kTile, b, k0, n0);
  }

  // Starts c += the stage's product.
  GPU_FN void multiply(const real* stage) {
    const int m = int(threadIdx.x) / 128 * 64;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      const uint64_t as = LAYOUT == kWeight ? mn_major<kDepth>(stage, m, k) : k_major<kSide>(stage, m, k);
      const uint64_t bs = LAYOUT == kForward ? k_major<kSide>(stage + kTile, 0, k) : mn_major<kDepth>(stage + kTile, 0, k);
      wgmma<LAYOUT == kWeight ? kMnMajor : kKMajor, LAYOUT == kForward ? kKMajor : kMnMajor>(c, as, bs, true);
    }
    wgmma_commit();
  }

  // c = the sum over depth begin .. end; `each` sees every stage after it has landed.
  template <class Each> GPU_FN void sum(real* shared, int begin, int end, Each each) {
#pragma unroll
    for (int i = 0; i < 64; i++) c[i / 4][i % 4] = 0.f;
    const int stages = (end - begin + kDepth - 1) / kDepth;
    for (int s = 0; s < kStages - 1; s++) {
      if (s < stages) load(shared + s * 2 * kTile, begin + s * kDepth);
      cp_async_commit();
    }
    int at = 0;  // s % kStages
    for (int s = 0; s < stages; s++) {
      cp_async_wait<kStages - 2>();
      fence_proxy_async();
      __syncthreads();  // stage s has landed and is shown to wgmma, and everyone's products of stage s - 1 have ended
      multiply(shared + at * 2 * kTile);
      const int next = at == 0 ? kStages - 1 : at - 1;
      if (s + kStages - 1 < stages) load(shared + next * 2 * kTile, begin + (s + kStages - 1) * kDepth);
      cp_async_commit();
      each(shared + at * 2 * kTile);
      at = at == kStages - 1 ? 0 : at + 1;
      wgmma_wait<0>(c);
    }
  }

  // Calls each(accumulators, row, column) for the warp's pieces of 16 x 32.
  template <class Each> GPU_FN void pieces(Each each) const {
#pragma unroll
    for (int j = 0; j < 4; j++) each(c + 4 * j, m0 + int(threadIdx.x) / 32 * 16, n0 + 32 * j);
  }
};

template <Layout LAYOUT> GPU_FN void multiply(const Problems& table) {
  const Problem& p = table.problem[find_problem(table, int(blockIdx.x))];
  const int tile = int(blockIdx.x) - p.first_tile, across = (p.out.cols + kSide - 1) / kSide;
  WarpgroupProduct<LAYOUT> product{p.a, p.b, tile / across * kSide, tile % across * kSide, {}};
  SharedMemory shared;
  real* stages = shared.take<real>(kStages * 2 * kTile, 1024);
  product.sum(stages, 0, p.a.cols, [](const real*) {});
  product.pieces([&](const float (*c)[4], int row, int column) { finish(p, c, row, column); });
}

GPU_FN void multiply_weight(const WeightProblems& table) {
  const WeightPart part = weight_part<kSide, kSide>(table);
  WarpgroupProduct<kWeight> product{part.p.dy, part.p.x, part.m0, part.n0, {}};
  SharedMemory shared;
  real* stages = shared.take<real>(kStages * 2 * kTile, 1024);
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

KERNEL_BLOCKS(matmul_forward_wgmma, kThreads, 2, const Problems table) {
  if constexpr (kHasWgmma) multiply<kForward>(table);
  else __trap();
}
KERNEL_BLOCKS(matmul_backward_input_wgmma, kThreads, 2, const Problems table) {
  if constexpr (kHasWgmma) multiply<kInput>(table);
  else __trap();
}
KERNEL_BLOCKS(matmul_backward_weight_wgmma, kThreads, 2, const WeightProblems table) {
  if constexpr (kHasWgmma) multiply_weight(table);
  else __trap();
}
#endif

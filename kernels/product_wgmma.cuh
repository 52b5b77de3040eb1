// product_wgmma.cuh -- a tile of a product in bf16 by Hopper's wgmma: product.cuh's twin. matmul.cuh
// has the layouts.
#pragma once
#include "product.cuh"
#include "wgmma.cuh"

#if REAL_IS_BF16
namespace {
constexpr int kSide = 128, kProductThreads = 256;
constexpr int kHalf = kSide * kDepth;  // elements of a, and of b, in a stage
constexpr int kProductElements = kStages * 2 * kHalf;

// A block's 128 x 128 tile, each of two warpgroups 64 of the rows.
template <Layout LAYOUT> struct WarpgroupProduct {
  const Matrix<const real>&a, &b;
  int m0, n0;
  float c[16][4];  // 16 rows a warp, 128 columns

  GPU_FN void load(real* stage, int k0) const {
    if constexpr (LAYOUT == kWeight) load_panels<kDepth, kSide, kProductThreads>(stage, a, k0, m0);
    else load_panels<kSide, kDepth, kProductThreads>(stage, a, m0, k0);
    if constexpr (LAYOUT == kForward) load_panels<kSide, kDepth, kProductThreads>(stage + kHalf, b, n0, k0);
    else load_panels<kDepth, kSide, kProductThreads>(stage + kHalf, b, k0, n0);
  }

  // Starts c += the stage's product.
  GPU_FN void multiply(const real* stage) {
    const int m = 64 * warpgroup();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      const uint64_t as = LAYOUT == kWeight ? mn_major<kDepth>(stage, m, k) : k_major<kSide>(stage, m, k);
      const uint64_t bs = LAYOUT == kForward ? k_major<kSide>(stage + kHalf, 0, k) : mn_major<kDepth>(stage + kHalf, 0, k);
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
      if (s < stages) load(shared + s * 2 * kHalf, begin + s * kDepth);
      cp_async_commit();
    }
    int at = 0;  // s % kStages
    for (int s = 0; s < stages; s++) {
      cp_async_wait<kStages - 2>();
      fence_proxy_async();
      __syncthreads();  // stage s has landed and is shown to wgmma, and everyone's products of stage s - 1 have ended
      multiply(shared + at * 2 * kHalf);
      const int next = at == 0 ? kStages - 1 : at - 1;
      if (s + kStages - 1 < stages) load(shared + next * 2 * kHalf, begin + (s + kStages - 1) * kDepth);
      cp_async_commit();
      each(shared + at * 2 * kHalf);
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
}  // namespace
#endif

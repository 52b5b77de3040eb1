// product.cuh -- a tile of a product by tensor cores, with mma.sync. matmul.cuh has the layouts.
#pragma once
#include "tile.cuh"

namespace {
constexpr int kStages = 3;
constexpr int kDepth = 8 * kChunk;  // elements of the depth in a stage: 128 bytes

enum Layout { kForward, kInput, kWeight };

// A block's BM x BN tile. A warp holds 64 or 32 rows x 32 columns, the columns of one call of the
// dropout generator.
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
    if constexpr (LAYOUT == kWeight) load_tile<kDepth, BM, kThreads>(stage, a, k0, m0);
    else load_tile<BM, kDepth, kThreads>(stage, a, m0, k0);
    if constexpr (LAYOUT == kForward) load_tile<BN, kDepth, kThreads>(stage + kA, b, n0, k0);
    else load_tile<kDepth, BN, kThreads>(stage + kA, b, k0, n0);
  }

  GPU_FN void multiply(const real* stage) {
    const int warp = int(threadIdx.x) / 32, m = warp / WARPS_N * (16 * kM), n = warp % WARPS_N * 32;
#pragma unroll kIsBf16 ? 2 : 1  // f32's three products a step take their registers
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
}  // namespace

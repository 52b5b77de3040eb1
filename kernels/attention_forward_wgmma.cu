// attention_forward_wgmma.cu -- attention_forward.cu in bf16 by Hopper's wgmma, for heads of 65 to
// 128 columns. NOT YET RUN ON A GPU.
//
// A block of two warpgroups owns 128 queries of a head, 16 a warp; keys and values stream in tiles
// of 128 through two stages each. While a tile's weights multiply its values, the next tile's
// scores, started before, become weights (the pipeline within a warpgroup of FlashAttention-3, Shah
// et al. 2024, section 3.2): scores, weights and sums are 64, 32 and 64 registers.
#include "attention_forward.cuh"
#include "wgmma.cuh"

#if REAL_IS_BF16
namespace {
constexpr int kD = 128, kQueries = 128, kTileKeys = 128, kBlock = 256;
constexpr int kTile = kTileKeys * kD;  // elements of a stage of keys, and of values

// Starts s = the warpgroup's queries times a tile of keys.
GPU_FN void start_scores(float (&s)[16][4], const real* queries, const real* keys) {
  const int first = 64 * warpgroup();
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kD; k += 16)
    wgmma<kKMajor, kKMajor>(s, k_major<kQueries>(queries, first, k), k_major<kTileKeys>(keys, 0, k), k > 0);
  wgmma_commit();
}

// Starts out += weights times a tile of values.
GPU_FN void start_sums(float (&out)[16][4], Fragment (&weights)[8], const real* values) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 8; step++) wgmma<kMnMajor>(out, weights[step], mn_major<kTileKeys>(values, 0, 16 * step), true);
  wgmma_commit();
}

GPU_FN void load_tiles(real* stages, const Matrix<const real>& from, int stage, int tile) {
  load_panels<kTileKeys, kD, kBlock>(stages + stage * kTile, from, tile * kTileKeys, 0);
}

GPU_FN void attend(const Attentions& table) {
  const Work work = work_of<kQueries, kTileKeys>(table);
  const int m = work.k.rows, begin = work.begin, end = work.end;
  const int row = work.q0 + int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4;

  SharedMemory shared;
  real* queries = shared.take<real>(kQueries * kD, 1024);
  real* keys = shared.take<real>(2 * kTile, 1024);  // two stages
  real* values = shared.take<real>(2 * kTile, 1024);

  float out[16][4], s[16][4], shrink[2];
  clear(out);
  Fragment weights[8];
  Softmax softmax{score_scale2(work.q.cols)};
  // s, the scores of tile j, become weights
  auto weigh_tile = [&](int j) {
    if ((j + 1) * kTileKeys > m) mask(s, m - j * kTileKeys);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      shrink[h] = softmax.weights(s, h);
      if (work.dropout.threshold) drop(s, work.dropout, row, h, j * (kTileKeys / 32));
    }
  };
  auto take_weights = [&] {
#pragma unroll
    for (int step = 0; step < 8; step++) accumulator_to_a(weights[step], s, step);
  };

  if (begin < end) {
    load_panels<kQueries, kD, kBlock>(queries, work.q, work.q0, 0);
    load_tiles(keys, work.k, 0, begin);
    cp_async_commit();
    load_tiles(values, work.v, 0, begin);
    if (begin + 1 < end) load_tiles(keys, work.k, 1, begin + 1);
    cp_async_commit();

    cp_async_wait<1>();
    fence_proxy_async();
    __syncthreads();  // queries and the first keys have landed and are shown to wgmma
    start_scores(s, queries, keys);
    wgmma_wait<0>(s);
    weigh_tile(begin);
    take_weights();

    for (int j = begin; j + 1 < end; j++) {
      const int stage = (j - begin) & 1;
      cp_async_wait<0>();
      fence_proxy_async();
      __syncthreads();  // values of tile j and keys of j + 1 have landed; everyone has finished with values of j - 1 and keys of j
      start_scores(s, queries, keys + (stage ^ 1) * kTile);
      start_sums(out, weights, values + stage * kTile);
      load_tiles(values, work.v, stage ^ 1, j + 1);
      if (j + 2 < end) load_tiles(keys, work.k, stage, j + 2);
      cp_async_commit();
      wgmma_wait<1>(s);
      weigh_tile(j + 1);
      wgmma_wait<0>(out);
#pragma unroll
      for (int h = 0; h < 2; h++) scale_row(out, h, shrink[h]);
      take_weights();
    }

    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();  // the last values
    start_sums(out, weights, values + ((end - 1 - begin) & 1) * kTile);
    wgmma_wait<0>(out);
  }
  finish(work, softmax, out, row);
}
}  // namespace

KERNEL_BLOCKS(attention_forward_wgmma_128, kBlock, 1, const Attentions table) {
  if constexpr (kHasWgmma) attend(table);
  else __trap();
}
#endif

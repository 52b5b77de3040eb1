// attention_backward_wgmma.cu -- attention_dkv of attention_backward.cu and attention_dq_product of
// attention_dq.cu in bf16 by Hopper's wgmma, for heads of 65 to 128 columns. NOT YET RUN ON A GPU.
//
// A block of two warpgroups owns 128 keys of a head, 64 a warpgroup, and streams queries in tiles of
// 64 through two stages. Scores and dP are products of shared memory, 64 x 64; they become P^T and
// dS^T in registers, the left operands of dv's and dk's sums, 64 x 128 each. While the scores of a
// tile are on their way, dropout's bits of the next one are drawn.
#include "attention_grad.cuh"
#include "product_wgmma.cuh"

#if REAL_IS_BF16
namespace {
constexpr int kD = 128, kOwnKeys = 128, kQueries = 64, kBlock = 256;
constexpr int kTile = kQueries * kD;  // elements of a stage of queries, and of their gradients
// Words of dropout's bits of a tile, one that each thread draws. Word [key / 32][key / 2 % 4][t][i]
// has a byte for each of the queries 16 i + {0, 1, 8, 9} + 2 t, which thread t of a quad holds: its
// bit 2 w + e is key 8 w + e of the 32.
constexpr int kKept = kBlock;
static_assert(kKept == kOwnKeys / 32 * 4 * kQueries / 4);

// Starts s = the warpgroup's own rows times a tile of queries, or of their gradients.
GPU_FN void start_scores(float (&s)[8][4], const real* own, const real* tile) {
  const int first = 64 * warpgroup();
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kD; k += 16)
    wgmma<kKMajor, kKMajor>(s, k_major<kOwnKeys>(own, first, k), k_major<kQueries>(tile, 0, k), k > 0);
  wgmma_commit();
}

// Starts sums += weights times the tile's rows.
GPU_FN void start_sums(float (&sums)[16][4], Fragment (&weights)[4], const real* tile) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++) wgmma<kMnMajor>(sums, weights[step], mn_major<kQueries>(tile, 0, 16 * step), true);
  wgmma_commit();
}

GPU_FN void keys_and_values(const AttentionGrads& table) {
  const Place place = place_of(table, int(blockIdx.x));
  const AttentionGrad& p = table.problem[place.problem];
  const int n = p.q.rows, head_dim = p.q.cols / p.heads, k0 = place.part * kOwnKeys;
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const float scale = score_scale(head_dim), scale2 = score_scale2(head_dim);
  const auto q = head_of(p.q, place.head, head_dim), dout = head_of(p.dout, place.head, head_dim);
  const int64_t rows_of_head = int64_t(place.head) * n;

  SharedMemory shared;
  real* keys = shared.take<real>(kOwnKeys * kD, 1024);
  real* values = shared.take<real>(kOwnKeys * kD, 1024);
  real* queries = shared.take<real>(2 * kTile, 1024);  // two stages
  real* douts = shared.take<real>(2 * kTile, 1024);
  float* lses = shared.take<float>(2 * kQueries);
  float* deltas = shared.take<float>(2 * kQueries);
  uint32_t* kept = shared.take<uint32_t>(2 * kKept);

  const auto load = [&](int tile, int stage) {
    load_panels<kQueries, kD, kBlock>(queries + stage * kTile, q, tile * kQueries, 0);
    load_panels<kQueries, kD, kBlock>(douts + stage * kTile, dout, tile * kQueries, 0);
    if (thread < 2 * kQueries) {
      const int row = tile * kQueries + thread % kQueries;
      const float* from = thread < kQueries ? p.lse : p.delta;
      float* to = (thread < kQueries ? lses : deltas) + stage * kQueries + thread % kQueries;
      cp_async4(to, from + rows_of_head + (row < n ? row : 0), row < n);
    }
    cp_async_commit();
  };
  const auto draw = [&](int tile) {
    if (!p.dropout.threshold) return;
    Dropout dropout = drawn(p.dropout);  // here, tile by tile: no register holds it in between
    dropout.site += uint32_t(place.head);
    uint32_t bits = 0;
#pragma unroll 2
    for (int i = 0; i < 4; i++) {
      const int query = thread % 4 * 16 + i / 2 * 8 + thread / 4 % 4 * 2 + i % 2;
      const PhiloxWords draws = philox(dropout, uint32_t(tile * kQueries + query), uint32_t(k0 / 32 * 4 + thread / 16));
#pragma unroll
      for (int w = 0; w < 4; w++) {
        bits |= uint32_t((draws.word[w] & 0xffffu) >= dropout.threshold) << (8 * i + 2 * w);
        bits |= uint32_t((draws.word[w] >> 16) >= dropout.threshold) << (8 * i + 2 * w + 1);
      }
    }
    kept[(tile & 1) * kKept + thread] = bits;
  };

  const float kept_factor = p.dropout.threshold ? p.dropout.scale : 1.f;
  const int tiles = (n + kQueries - 1) / kQueries;
  load_panels<kOwnKeys, kD, kBlock>(keys, head_of(p.k, place.head, head_dim), k0, 0);
  load_panels<kOwnKeys, kD, kBlock>(values, head_of(p.v, place.head, head_dim), k0, 0);
  cp_async_commit();
  if (tiles > 0) {
    load(0, 0);
    draw(0);
  }
  float dk[16][4], dv[16][4];
  clear(dk);
  clear(dv);
  for (int i = 0; i < tiles; i++) {
    const int stage = i & 1;
    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();  // tile i has landed and is shown to wgmma, and everyone has finished with tile i - 1
    const real *queries_here = queries + stage * kTile, *douts_here = douts + stage * kTile;
    // [key][query]; queries past the end are zeros, with a log-sum-exp of zero, and add nothing
    float s[8][4], dp[8][4];
    start_scores(s, keys, queries_here);
    start_scores(dp, values, douts_here);
    if (i + 1 < tiles) {
      load(i + 1, stage ^ 1);
      draw(i + 1);
    }
    wgmma_wait<0>(s);
    wgmma_wait<0>(dp);
    Pack<uint32_t, 4> bits = {{~0u, ~0u, ~0u, ~0u}};
    if (p.dropout.threshold) bits = ::load<4>(kept + stage * kKept + ((warp / 2 * 4 + g / 2) * 4 + t) * 4);
    Fragment weights[4], slopes[4];
#pragma unroll
    for (int step = 0; step < 4; step++) {
#pragma unroll
      for (int c = 2 * step; c < 2 * step + 2; c++) {
        const int query = 8 * c + 2 * t;
        const auto lse = ::load<2>(lses + stage * kQueries + query), delta = ::load<2>(deltas + stage * kQueries + query);
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float probability = ::probability(s[c][2 * h + e], scale2, lse.v[e]);
            // key = 16 warp + 8 h + g of the block's: word 2 (warp % 2) + h, half g % 2
            const bool keep = bits.v[step] >> (8 * (2 * (c % 2) + e) + 2 * (2 * (warp % 2) + h) + g % 2) & 1u;
            const float factor = keep ? kept_factor : 0.f;
            s[c][2 * h + e] = probability * factor;
            dp[c][2 * h + e] = probability * (dp[c][2 * h + e] * factor - delta.v[e]);
          }
      }
      accumulator_to_a(weights[step], s, step);
      accumulator_to_a(slopes[step], dp, step);
    }
    start_sums(dv, weights, douts_here);
    if (p.ds) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int key = k0 + warp * 16 + 8 * h + g;
        if (key >= p.k.rows) continue;
        const int stride = ds_stride(n), left = stride - i * kQueries;
        real* to = p.ds + int64_t(place.head * p.k.rows + key) * stride + i * kQueries + 2 * t;
#pragma unroll
        for (int c = 0; c < 8; c++)
          if (8 * c < left) *reinterpret_cast<uint32_t*>(to + 8 * c) = slopes[c / 2][c % 2 * 2 + h];
      }
    }
    start_sums(dk, slopes, queries_here);
    wgmma_wait<0>(dv);
    wgmma_wait<0>(dk);
  }
  cp_async_wait<0>();
  store_rows<kD>(head_of(p.dk, place.head, head_dim), k0 + warp * 16, 0, dk, scale);
  store_rows<kD>(head_of(p.dv, place.head, head_dim), k0 + warp * 16, 0, dv, 1.f);
}

// A block's 128 queries of a head: dS of attention_dkv, transposed, times the keys.
GPU_FN void queries_of_slopes(const AttentionGrads& table) {
  const Place place = place_of(table, int(blockIdx.x));
  const AttentionGrad& p = table.problem[place.problem];
  const int n = p.q.rows, m = p.k.rows, head_dim = p.q.cols / p.heads, stride = ds_stride(n);
  const Matrix<const real> ds = {p.ds + int64_t(place.head) * m * stride, stride, m, stride};
  const auto k = head_of(p.k, place.head, head_dim);
  const auto dq = head_of(p.dq, place.head, head_dim);
  SharedMemory shared;
  WarpgroupProduct<kWeight> product{ds, k, place.part * kSide, 0, {}};
  product.sum(shared.take<real>(kProductElements, 1024), 0, m, [](const real*) {});
  product.pieces([&](const float (*c)[4], int row, int column) {
    store_rows<32>(dq, row, column, *reinterpret_cast<const float (*)[4][4]>(c), score_scale(head_dim));
  });
}
}  // namespace

KERNEL_BLOCKS(attention_dkv_wgmma_128, kBlock, 1, const AttentionGrads table) {
  if constexpr (kHasWgmma) keys_and_values(table);
  else __trap();
}
KERNEL_BLOCKS(attention_dq_product_wgmma_128, kProductThreads, 2, const AttentionGrads table) {
  if constexpr (kHasWgmma) queries_of_slopes(table);
  else __trap();
}
#endif

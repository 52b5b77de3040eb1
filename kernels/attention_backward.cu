// attention_backward.cu -- FlashAttention-2's backward (Dao 2023, algorithm 2). With P = exp(scale
// q k^T - lse), F dropout's factors, delta [heads][n] = rowsum(dout out), dS = P (F (dout v^T) -
// delta):
//
//   attention_delta       a warp owns a query:  delta
//   attention_dkv         a block owns 64 keys, 16 a warp, and streams queries:
//                         dv = (P F)^T dout,  dk = scale dS^T q
//   attention_dq_product  attention_dq.cu:  dq = scale dS k,  from attention_dkv's dS^T
//
// or, where dS does not find room, with 7 products instead of 5:
//
//   attention_dq          a block owns 64 queries, 16 a warp, and streams keys:  delta, dq = scale dS k
//   attention_dkv
//
// attention_dkv computes the transposes: k q^T has a warp's keys as rows, so that P^T and dS^T are,
// in registers, the left operands of the next products.
#include "attention_grad.cuh"

namespace {
// Rows of a streamed tile, and stages of the stream.
template <int D> constexpr int kQueries = 32;
// Of a tile a warp has the scores of so many rows at a time: f32's three products a step take their
// registers.
constexpr int kAtATime = kIsBf16 ? 32 : 16;
template <int D> constexpr int kStages = kIsBf16 || D < 128 ? 2 : 1;
// Columns of dk and dv at a time: in f32, 128 of both are more than a thread's registers, so the
// queries stream by twice.
template <int D> constexpr int kColumns = kIsBf16 || D < 128 ? D : D / 2;

template <int D> GPU_FN void keys_and_values(const AttentionGrads& table) {
  constexpr int kM = kQueries<D>, kAt8 = kAtATime / 8;
  const Place place = place_of(table, int(blockIdx.x));
  const AttentionGrad& p = table.problem[place.problem];
  const int n = p.q.rows, head_dim = p.q.cols / p.heads, k0 = place.part * kOwn;
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const float scale = score_scale(head_dim), scale2 = score_scale2(head_dim);
  const auto q = head_of(p.q, place.head, head_dim), dout = head_of(p.dout, place.head, head_dim);
  const int64_t rows_of_head = int64_t(place.head) * n;
  Dropout dropout = drawn(p.dropout);
  dropout.site += uint32_t(place.head);

  SharedMemory shared;
  real* keys = shared.take<real>(kOwn * D);
  real* values = shared.take<real>(kOwn * D);
  real* queries = shared.take<real>(kStages<D> * kM * D);
  real* douts = shared.take<real>(kStages<D> * kM * D);
  float* lses = shared.take<float>(kStages<D> * kM);
  float* deltas = shared.take<float>(kStages<D> * kM);
  // which elements of a tile are kept: bit 2 w + e of word [key / 32][key / 2 % 4][query] is key 8
  // w + e of it; two stages, and lines 8 words longer than a tile, so that the quads of a warp read
  // from different banks
  constexpr int kLine = kM + 8, kKept = 2 * 4 * kLine;
  uint32_t* kept = shared.take<uint32_t>(2 * kKept);

  const auto load = [&](int tile, int stage) {
    load_tile<kM, D, kThreads>(queries + stage * kM * D, q, tile * kM, 0);
    load_tile<kM, D, kThreads>(douts + stage * kM * D, dout, tile * kM, 0);
    if (thread < 2 * kM) {
      const int row = tile * kM + thread % kM;
      const bool inside = row < n;
      const float* from = thread < kM ? p.lse : p.delta;
      cp_async4((thread < kM ? lses : deltas) + stage * kM + thread % kM, from + rows_of_head + (inside ? row : 0), inside);
    }
    cp_async_commit();
  };
  const auto draw = [&](int tile) {
    if (!dropout.threshold) return;
    uint32_t* to = kept + (tile & 1) * kKept;
#pragma unroll
    for (int i = 0; i < 2 * 4 * kM / kThreads; i++) {
      const int at = i * kThreads + thread, query = at % kM, call = at / kM;
      const PhiloxWords draws = philox(dropout, uint32_t(tile * kM + query), uint32_t(k0 / 32 * 4 + call));
      uint32_t bits = 0;
#pragma unroll
      for (int w = 0; w < 4; w++) {
        bits |= uint32_t((draws.word[w] & 0xffffu) >= dropout.threshold) << (2 * w);
        bits |= uint32_t((draws.word[w] >> 16) >= dropout.threshold) << (2 * w + 1);
      }
      to[call * kLine + query] = bits;
    }
  };

  const int tiles = (n + kM - 1) / kM;
  load_tile<kOwn, D, kThreads>(keys, head_of(p.k, place.head, head_dim), k0, 0);
  load_tile<kOwn, D, kThreads>(values, head_of(p.v, place.head, head_dim), k0, 0);
  cp_async_commit();
  for (int first = 0; first < D; first += kColumns<D>) {
    if (tiles > 0) {
      load(0, 0);
      draw(0);
    }
    float dk[kColumns<D> / 8][4], dv[kColumns<D> / 8][4];
    clear(dk);
    clear(dv);
    for (int i = 0; i < tiles; i++) {
      const int stage = kStages<D> == 2 ? i & 1 : 0;
      cp_async_wait<0>();
      __syncthreads();  // tile i has landed for everyone, and everyone has finished with tile i - 1
      if (kStages<D> == 2 && i + 1 < tiles) load(i + 1, (i + 1) & 1);
      if (i + 1 < tiles) draw(i + 1);
      const real *queries_here = queries + stage * kM * D, *douts_here = douts + stage * kM * D;

#pragma unroll 1
      for (int from = 0; from < kM; from += kAtATime) {
        // [key][query]; queries past the end are zeros, with a log-sum-exp of zero, and add nothing
        float s[kAt8][4], dp[kAt8][4];
        clear(s);
        clear(dp);
        scores<D, kAt8>(s, keys, warp * 16, queries_here, from);
        scores<D, kAt8>(dp, values, warp * 16, douts_here, from);
#pragma unroll
        for (int c = 0; c < kAt8; c++) {
          const int query = from + 8 * c + 2 * t;
          const auto lse = ::load<2>(lses + stage * kM + query), delta = ::load<2>(deltas + stage * kM + query);
#pragma unroll
          for (int e = 0; e < 2; e++) {
            uint32_t bits = 0xff;
            if (dropout.threshold) bits = kept[(i & 1) * kKept + (warp * 16 / 32 * 4 + g / 2) * kLine + query + e];
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const float probability = ::probability(s[c][2 * h + e], scale2, lse.v[e]);
              // key = k0 + 16 warp + 8 h + g: word 2 (warp % 2) + h, half g % 2
              const bool keep = bits >> (2 * (2 * (warp % 2) + h) + g % 2) & 1u;
              const float factor = !dropout.threshold ? 1.f : keep ? dropout.scale : 0.f;
              s[c][2 * h + e] = probability * factor;
              dp[c][2 * h + e] = probability * (dp[c][2 * h + e] * factor - delta.v[e]);
            }
          }
        }
        weigh<D, kColumns<D>>(dv, s, douts_here + from * D, first);
        if (p.ds && first == 0) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int key = k0 + warp * 16 + 8 * h + g;
            if (key >= p.k.rows) continue;
            real* to = p.ds + int64_t(place.head * p.k.rows + key) * ds_stride(n);
#pragma unroll
            for (int c = 0; c < kAt8; c++)
              if (const int query = i * kM + from + 8 * c + 2 * t; query < ds_stride(n)) store_pair(to + query, dp[c][2 * h], dp[c][2 * h + 1]);
          }
        }
        weigh<D, kColumns<D>>(dk, dp, queries_here + from * D, first);
      }
      if (kStages<D> == 1) {
        __syncthreads();  // everyone has finished with the only stage
        if (i + 1 < tiles) load(i + 1, 0);
      }
    }
    cp_async_wait<0>();
    store_rows<kColumns<D>>(head_of(p.dk, place.head, head_dim), k0 + warp * 16, first, dk, scale);
    store_rows<kColumns<D>>(head_of(p.dv, place.head, head_dim), k0 + warp * 16, first, dv, 1.f);
  }
}

template <int D> GPU_FN void queries(const AttentionGrads& table) {
  constexpr int kN = 32, kAt8 = kAtATime / 8;
  const Place place = place_of(table, int(blockIdx.x));
  const AttentionGrad& p = table.problem[place.problem];
  const int n = p.q.rows, m = p.k.rows, head_dim = p.q.cols / p.heads, q0 = place.part * kOwn;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const float scale = score_scale(head_dim), scale2 = score_scale2(head_dim);
  const auto k = head_of(p.k, place.head, head_dim), v = head_of(p.v, place.head, head_dim);
  Dropout dropout = drawn(p.dropout);
  dropout.site += uint32_t(place.head);

  SharedMemory shared;
  real* own_queries = shared.take<real>(kOwn * D);
  real* own_douts = shared.take<real>(kOwn * D);
  real* keys = shared.take<real>(kStages<D> * kN * D);
  real* values = shared.take<real>(kStages<D> * kN * D);
  const auto load = [&](int tile, int stage) {
    load_tile<kN, D, kThreads>(keys + stage * kN * D, k, tile * kN, 0);
    load_tile<kN, D, kThreads>(values + stage * kN * D, v, tile * kN, 0);
    cp_async_commit();
  };
  const int tiles = (m + kN - 1) / kN, row = q0 + warp * 16 + g;
  load_tile<kOwn, D, kThreads>(own_queries, head_of(p.q, place.head, head_dim), q0, 0);
  load_tile<kOwn, D, kThreads>(own_douts, head_of(p.dout, place.head, head_dim), q0, 0);
  cp_async_commit();
  if (tiles > 0) load(0, 0);
  float lse[2] = {0.f, 0.f}, delta[2] = {0.f, 0.f};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int own = row + 8 * h, offset = place.head * head_dim;
    const int64_t at = int64_t(place.head) * n + own;
    if (own < n) {
      lse[h] = p.lse[at];
      for (int column = 4 * t; column < head_dim; column += 16) {
        const auto a = ::load<4>(p.out.row(own) + offset + column), b = ::load<4>(p.dout.row(own) + offset + column);
#pragma unroll
        for (int e = 0; e < 4; e++) delta[h] = fmaf(float(a.v[e]), float(b.v[e]), delta[h]);
      }
    }
    delta[h] += __shfl_xor_sync(0xffffffffu, delta[h], 1);
    delta[h] += __shfl_xor_sync(0xffffffffu, delta[h], 2);
    if (own < n && t == 0) p.delta[at] = delta[h];
  }
  float dq[D / 8][4];
  clear(dq);

  for (int j = 0; j < tiles; j++) {
    const int stage = kStages<D> == 2 ? j & 1 : 0;
    cp_async_wait<0>();
    __syncthreads();  // tile j has landed for everyone, and everyone has finished with tile j - 1
    if (kStages<D> == 2 && j + 1 < tiles) load(j + 1, (j + 1) & 1);
    const real *keys_here = keys + stage * kN * D, *values_here = values + stage * kN * D;
#pragma unroll
    for (int from = 0; from < kN; from += kAtATime) {
      float s[kAt8][4], dp[kAt8][4];
      clear(s);
      clear(dp);
      scores<D, kAt8>(s, own_queries, warp * 16, keys_here, from);
      scores<D, kAt8>(dp, own_douts, warp * 16, values_here, from);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float factors[4][2];
        if (dropout.threshold) dropout_fragment(dropout, uint32_t(row + 8 * h), uint32_t(j), t, factors);
#pragma unroll
        for (int c = 0; c < kAt8; c++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const bool outside = j * kN + from + 8 * c + 2 * t + e >= m;
            const float probability = outside ? 0.f : ::probability(s[c][2 * h + e], scale2, lse[h]);
            const float factor = dropout.threshold ? factors[from / 8 + c][e] : 1.f;
            s[c][2 * h + e] = probability * (dp[c][2 * h + e] * factor - delta[h]);
          }
      }
      weigh<D, D>(dq, s, keys_here + from * D);
    }
    if (kStages<D> == 1) {
      __syncthreads();  // everyone has finished with the only stage
      if (j + 1 < tiles) load(j + 1, 0);
    }
  }
  cp_async_wait<0>();
  store_rows<D>(head_of(p.dq, place.head, head_dim), q0 + warp * 16, 0, dq, scale);
}
}  // namespace

KERNEL_BLOCKS(attention_dkv_32, kThreads, 2, const AttentionGrads table) { keys_and_values<32>(table); }
KERNEL_BLOCKS(attention_dkv_64, kThreads, 2, const AttentionGrads table) { keys_and_values<64>(table); }
KERNEL_BLOCKS(attention_dkv_128, kThreads, 2, const AttentionGrads table) { keys_and_values<128>(table); }
KERNEL_BLOCKS(attention_dq_32, kThreads, 2, const AttentionGrads table) { queries<32>(table); }
KERNEL_BLOCKS(attention_dq_64, kThreads, 2, const AttentionGrads table) { queries<64>(table); }
KERNEL_BLOCKS(attention_dq_128, kThreads, 2, const AttentionGrads table) { queries<128>(table); }

// Grids of [queries / 4, problems].
KERNEL(attention_delta, kThreads, const AttentionGrads table) {
  const AttentionGrad& p = table.problem[blockIdx.y];
  const int row = int(blockIdx.x) * (kThreads / 32) + int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int n = p.q.rows, d = p.q.cols, head_dim = d / p.heads;
  if (row >= n) return;
  for (int head = 0; head < p.heads; head++) {
    float delta = 0.f;
    if (const int column = 4 * lane; column < head_dim) {
      const int64_t at = head * head_dim + column;
      const auto a = load<4>(p.out.row(row) + at), b = load<4>(p.dout.row(row) + at);
#pragma unroll
      for (int e = 0; e < 4; e++) delta = fmaf(float(a.v[e]), float(b.v[e]), delta);
    }
    delta = warp_sum(delta);
    if (lane == 0) p.delta[int64_t(head) * n + row] = delta;
  }
}

// attention_backward.cu -- FlashAttention-2's backward (Dao 2023, algorithm 2). With P = exp(scale
// q k^T - lse), F dropout's factors, delta [heads][n] = rowsum(dout out), dS = P (F (dout v^T) -
// delta):
//
//   attention_dq       a block owns 64 queries, 16 a warp, and streams keys:  delta, dq = scale dS k
//   attention_dkv      a block owns 64 keys, 16 a warp, and streams queries:  dv = (P F)^T dout,  dk = scale dS^T q
//
// or, with 5 products instead of 7, and dq's sum over the blocks in another order on every run:
//
//   attention_delta    a warp owns a query:  delta, sums = 0
//   attention_dqkv     as attention_dkv, and  sums += dS k  by atomics
//   attention_round    a warp owns a query:  dq = scale sums
//
// attention_dkv computes the transposes: k q^T has a warp's keys as rows, so that P^T and dS^T are,
// in registers, the left operands of the next products.
#include "attention.cuh"

namespace {
constexpr int kUnroll = kIsBf16 ? 8 : 1;

struct AttentionGrad {
  Matrix<const real> q, k, v, out, dout;
  Matrix<real> dq, dk, dv;
  const float* lse;
  float* delta;
  float* sums;  // [n][d], of attention_dqkv
  Dropout dropout;
  int32_t heads, first_block;
};
struct AttentionGrads {
  AttentionGrad problem[kProblems];
  int32_t count, padding;
};

// Rows of a streamed tile, and stages of the stream.
template <int D> constexpr int kQueries = 32;
template <int D> constexpr int kStages = kIsBf16 || D < 128 ? 2 : 1;
// Columns of dk and dv at a time: in f32, 128 of both are more than a thread's registers, so the
// queries stream by twice.
template <int D> constexpr int kColumns = kIsBf16 || D < 128 ? D : D / 2;

// Columns of this thread in a 16 x COLUMNS accumulator, times a factor, to rows row0 + {g, g + 8}
// of a head, from column `first` on.
template <int COLUMNS>
GPU_FN void store_rows(const Matrix<real>& to, int row0, int first, const float (&c)[COLUMNS / 8][4], float factor) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = row0 + g + 8 * h;
    if (row >= to.rows) continue;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      const int column = first + 8 * j + 2 * t;
      if (column < to.cols) store_pair(to.row(row) + column, c[j][2 * h] * factor, c[j][2 * h + 1] * factor);
    }
  }
}

// sums [n][d] of a head's columns and 32 queries += dS k over a block's 64 keys. A warp has 16
// queries and half of the columns, few at a time: dk and dv are in the registers.
template <int D>
GPU_FN void add_dq(float* sums, int n, int d, int head_dim, int query0, const real* ds, const real* keys) {
  constexpr int kM = kQueries<D>, kHalf = D / 2, kAtATime = kHalf < 32 ? kHalf : 32;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int row0 = warp % 2 * 16;
#pragma unroll 1
  for (int column0 = warp / 2 * kHalf; column0 < (warp / 2 + 1) * kHalf; column0 += kAtATime) {
    float dq[kAtATime / 8][4];
    clear(dq);
#pragma unroll kIsBf16 ? 2 : 1
    for (int k = 0; k < kOwn; k += kStep) {
      Fragment as;
      load_a_t<kM>(as, ds, row0, k);
#pragma unroll
      for (int j = 0; j < kAtATime / 16; j++) {
        Fragment bs;
        load_b_t<D>(bs, keys, column0 + 16 * j, k);
        multiply_add(dq[2 * j], as, bs[0], bs[1]);
        multiply_add(dq[2 * j + 1], as, bs[2], bs[3]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int query = query0 + row0 + g + 8 * h;
      if (query >= n) continue;
#pragma unroll
      for (int j = 0; j < kAtATime / 8; j++) {
        const int column = column0 + 8 * j + 2 * t;
        if (column < head_dim) atomic_add_pair(sums + int64_t(query) * d + column, dq[j][2 * h], dq[j][2 * h + 1]);
      }
    }
  }
}

template <int D, bool ADD_DQ> GPU_FN void keys_and_values(const AttentionGrads& table) {
  constexpr int kM = kQueries<D>, kM8 = kM / 8;
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
  // dS^T [key][query]; with one stage, over the tile of dout that has been used
  real* ds = douts;
  if (ADD_DQ && kStages<D> == 2) ds = shared.take<real>(kOwn * kM);

  const auto load = [&](int tile, int stage) {
    load_tile<kM, D, kThreads, kUnroll>(queries + stage * kM * D, q, tile * kM, 0);
    load_tile<kM, D, kThreads, kUnroll>(douts + stage * kM * D, dout, tile * kM, 0);
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
  load_tile<kOwn, D, kThreads, kUnroll>(keys, head_of(p.k, place.head, head_dim), k0, 0);
  load_tile<kOwn, D, kThreads, kUnroll>(values, head_of(p.v, place.head, head_dim), k0, 0);
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

      // [key][query]; queries past the end are zeros, with a log-sum-exp of zero, and add nothing
      float s[kM8][4], dp[kM8][4];
      clear(s);
      clear(dp);
      scores<D, kM8>(s, keys, warp * 16, queries_here, 0);
      scores<D, kM8>(dp, values, warp * 16, douts_here, 0);
#pragma unroll
      for (int c = 0; c < kM8; c++) {
        const auto lse = ::load<2>(lses + stage * kM + 8 * c + 2 * t), delta = ::load<2>(deltas + stage * kM + 8 * c + 2 * t);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          uint32_t bits = 0xff;
          if (dropout.threshold) bits = kept[(i & 1) * kKept + (warp * 16 / 32 * 4 + g / 2) * kLine + 8 * c + 2 * t + e];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float probability = fast_exp2(s[c][2 * h + e] * scale2 - lse.v[e] * kLog2e);
            // key = k0 + 16 warp + 8 h + g: word 2 (warp % 2) + h, half g % 2
            const bool keep = bits >> (2 * (2 * (warp % 2) + h) + g % 2) & 1u;
            const float factor = !dropout.threshold ? 1.f : keep ? dropout.scale : 0.f;
            s[c][2 * h + e] = probability * factor;
            dp[c][2 * h + e] = probability * (dp[c][2 * h + e] * factor - delta.v[e]);
          }
        }
      }
      weigh<D, kColumns<D>>(dv, s, douts_here, first);
      weigh<D, kColumns<D>>(dk, dp, queries_here, first);
      if (ADD_DQ && first == 0) {
        if (kStages<D> == 1) __syncthreads();  // everyone has finished with the tile of dout
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int key = warp * 16 + g + 8 * h;
          // or exp(0 - lse) may be infinite, times a key of zeros
          const bool inside = k0 + key < p.k.rows;
#pragma unroll
          for (int c = 0; c < kM8; c++)
            store_pair(ds + swizzle<kM>(key, 8 * c + 2 * t), inside ? dp[c][2 * h] : 0.f, inside ? dp[c][2 * h + 1] : 0.f);
        }
        __syncthreads();  // dS is complete
        add_dq<D>(p.sums + place.head * head_dim, n, p.q.cols, head_dim, i * kM, ds, keys);
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
  constexpr int kN = 32, kN8 = kN / 8;
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
    load_tile<kN, D, kThreads, kUnroll>(keys + stage * kN * D, k, tile * kN, 0);
    load_tile<kN, D, kThreads, kUnroll>(values + stage * kN * D, v, tile * kN, 0);
    cp_async_commit();
  };
  const int tiles = (m + kN - 1) / kN, row = q0 + warp * 16 + g;
  load_tile<kOwn, D, kThreads, kUnroll>(own_queries, head_of(p.q, place.head, head_dim), q0, 0);
  load_tile<kOwn, D, kThreads, kUnroll>(own_douts, head_of(p.dout, place.head, head_dim), q0, 0);
  cp_async_commit();
  if (tiles > 0) load(0, 0);
  float lse2[2] = {0.f, 0.f}, delta[2] = {0.f, 0.f};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int own = row + 8 * h, offset = place.head * head_dim;
    const int64_t at = int64_t(place.head) * n + own;
    if (own < n) {
      lse2[h] = p.lse[at] * kLog2e;
      for (int column = 4 * t; column < head_dim; column += 16) {
        const auto a = ::load<4>(p.out.row(own) + offset + column), b = ::load<4>(p.dout.row(own) + offset + column);
#pragma unroll
        for (int e = 0; e < 4; e++) delta[h] += float(a.v[e]) * float(b.v[e]);
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
    float s[kN8][4], dp[kN8][4];
    clear(s);
    clear(dp);
    scores<D, kN8>(s, own_queries, warp * 16, keys_here, 0);
    scores<D, kN8>(dp, own_douts, warp * 16, values_here, 0);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float factors[4][2];
      if (dropout.threshold) dropout_fragment(dropout, uint32_t(row + 8 * h), uint32_t(j), t, factors);
#pragma unroll
      for (int c = 0; c < kN8; c++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const bool outside = j * kN + 8 * c + 2 * t + e >= m;
          const float probability = outside ? 0.f : fast_exp2(s[c][2 * h + e] * scale2 - lse2[h]);
          const float factor = dropout.threshold ? factors[c][e] : 1.f;
          s[c][2 * h + e] = probability * (dp[c][2 * h + e] * factor - delta[h]);
        }
    }
    weigh<D, D>(dq, s, keys_here);
    if (kStages<D> == 1) {
      __syncthreads();  // everyone has finished with the only stage
      if (j + 1 < tiles) load(j + 1, 0);
    }
  }
  cp_async_wait<0>();
  store_rows<D>(head_of(p.dq, place.head, head_dim), q0 + warp * 16, 0, dq, scale);
}
}  // namespace

KERNEL_BLOCKS(attention_dkv_32, kThreads, 2, const AttentionGrads table) { keys_and_values<32, false>(table); }
KERNEL_BLOCKS(attention_dkv_64, kThreads, 2, const AttentionGrads table) { keys_and_values<64, false>(table); }
KERNEL_BLOCKS(attention_dkv_128, kThreads, 2, const AttentionGrads table) { keys_and_values<128, false>(table); }
KERNEL_BLOCKS(attention_dqkv_32, kThreads, 2, const AttentionGrads table) { keys_and_values<32, true>(table); }
KERNEL_BLOCKS(attention_dqkv_64, kThreads, 2, const AttentionGrads table) { keys_and_values<64, true>(table); }
KERNEL_BLOCKS(attention_dqkv_128, kThreads, 2, const AttentionGrads table) { keys_and_values<128, true>(table); }
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
      for (int e = 0; e < 4; e++) delta += float(a.v[e]) * float(b.v[e]);
      store<4>(p.sums + int64_t(row) * d + at, Pack<float, 4>{});
    }
    delta = warp_sum(delta);
    if (lane == 0) p.delta[int64_t(head) * n + row] = delta;
  }
}

KERNEL(attention_round, kThreads, const AttentionGrads table) {
  const AttentionGrad& p = table.problem[blockIdx.y];
  const int row = int(blockIdx.x) * (kThreads / 32) + int(threadIdx.x) / 32, d = p.q.cols;
  if (row >= p.q.rows) return;
  const float scale = score_scale(d / p.heads);
  for (int column = 4 * (int(threadIdx.x) % 32); column < d; column += 4 * 32) {
    const auto sums = load<4>(p.sums + int64_t(row) * d + column);
    Pack<real, 4> dq;
#pragma unroll
    for (int e = 0; e < 4; e++) dq.v[e] = real(scale * sums.v[e]);
    store<4>(p.dq.row(row) + column, dq);
  }
}

// attention_forward.cu -- out = dropout(softmax(q k^T / sqrt(head_dim))) v of each head, by the online softmax of FlashAttention-2
// (Dao 2023, algorithm 1). One launch for all heads of up to four problems of any lengths.
//
// A block owns 64 queries of a head, 16 a warp; keys and values stream through two stages of cp.async. Where there are few
// queries the keys are split over several blocks, which write f32 outputs and log-sum-exps of their own; attention_join_splits
// joins them: with lse = log sum_s e^lse_s,  out = sum_s e^(lse_s - lse) out_s  (Dao 2023, section 3.1).
#include "attention.cuh"

namespace {
constexpr int kUnroll = kIsBf16 ? 2 : 1;

struct Attention {
  Matrix<const real> q, k, v;
  Matrix<real> out;
  float* lse;            // [heads][n]
  float *parts, *part_lse;  // [splits][n][heads head_dim], [splits][heads][n]
  Dropout dropout;
  int32_t heads, splits, first_block, padding;
};
struct Attentions {
  Attention problem[kProblems];
  int32_t count, padding;
};

template <int D> GPU_FN void attend(const Attentions& table) {
  constexpr int kN = kKeys<D>, kN8 = kN / 8;
  const Place place = place_of(table, int(blockIdx.x));
  const Attention& p = table.problem[place.problem];
  const int n = p.q.rows, m = p.k.rows, head_dim = p.q.cols / p.heads;
  const int split = place.part % p.splits, q0 = place.part / p.splits * kOwn;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const float scale2 = kLog2e / sqrtf(float(head_dim));
  const auto q = head_of(p.q, place.head, head_dim), k = head_of(p.k, place.head, head_dim), v = head_of(p.v, place.head, head_dim);

  SharedMemory shared;
  real* queries = shared.take<real>(kOwn * D);
  real* keys = shared.take<real>(2 * kN * D);  // two stages
  real* values = shared.take<real>(2 * kN * D);

  // a split takes whole tiles
  const int all = (m + kN - 1) / kN, each = (all + p.splits - 1) / p.splits;
  const int begin = min(split * each, all), end = min(begin + each, all);
  load_tile<kOwn, D, kThreads, kUnroll>(queries, q, q0, 0);
  if (begin < end) {
    load_tile<kN, D, kThreads, kUnroll>(keys, k, begin * kN, 0);
    load_tile<kN, D, kThreads, kUnroll>(values, v, begin * kN, 0);
  }
  cp_async_commit();

  float out[D / 8][4], highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
  clear(out);
  Dropout dropout = p.dropout;
  dropout.site += uint32_t(place.head);
  const int row = q0 + warp * 16 + g;

  for (int j = begin; j < end; j++) {
    const int stage = (j - begin) & 1;
    cp_async_wait<0>();
    __syncthreads();  // tile j has landed for everyone, and everyone has finished with tile j - 1
    if (j + 1 < end) {
      load_tile<kN, D, kThreads, kUnroll>(keys + (stage ^ 1) * kN * D, k, (j + 1) * kN, 0);
      load_tile<kN, D, kThreads, kUnroll>(values + (stage ^ 1) * kN * D, v, (j + 1) * kN, 0);
      cp_async_commit();
    }
    float s[kN8][4];
    clear(s);
    scores<D, kN8>(s, queries, warp * 16, keys + stage * kN * D, 0);
    if ((j + 1) * kN > m) {
#pragma unroll
      for (int c = 0; c < kN8; c++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (j * kN + 8 * c + 2 * t + e % 2 >= m) s[c][e] = -INFINITY;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {  // rows g and g + 8
      float high = highest[h];
#pragma unroll
      for (int c = 0; c < kN8; c++) high = fmaxf(high, fmaxf(s[c][2 * h], s[c][2 * h + 1]));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
      const float base = high * scale2, shrink = fast_exp2(highest[h] * scale2 - base);
      float part = 0.f;
#pragma unroll
      for (int c = 0; c < kN8; c++)
#pragma unroll
        for (int e = 0; e < 2; e++) part += s[c][2 * h + e] = fast_exp2(s[c][2 * h + e] * scale2 - base);
      sum[h] = sum[h] * shrink + part;
      highest[h] = high;
#pragma unroll
      for (int c = 0; c < D / 8; c++) {
        out[c][2 * h] *= shrink;
        out[c][2 * h + 1] *= shrink;
      }
      if (dropout.threshold) {
#pragma unroll
        for (int block = 0; block < kN / 32; block++) {
          float factors[4][2];
          dropout_fragment(dropout, uint32_t(row + 8 * h), uint32_t(j * (kN / 32) + block), t, factors);
#pragma unroll
          for (int w = 0; w < 4; w++)
#pragma unroll
            for (int e = 0; e < 2; e++) s[4 * block + w][2 * h + e] *= factors[w][e];
        }
      }
    }
    weigh<D, D>(out, s, values + stage * kN * D);
  }
  cp_async_wait<0>();  // where there are no keys, the queries are still on their way

#pragma unroll
  for (int h = 0; h < 2; h++) {
    float total = sum[h];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int i = row + 8 * h;
    if (i >= n) continue;
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    const float lse = (highest[h] * scale2) * kLn2 + logf(total);  // no keys: -infinity
    const int64_t at = int64_t(place.head) * n + i;
    if (t == 0) (p.splits > 1 ? p.part_lse + int64_t(split) * p.heads * n : p.lse)[at] = lse;
#pragma unroll
    for (int c = 0; c < D / 8; c++) {
      const int column = 8 * c + 2 * t;
      if (column >= head_dim) break;
      const float a = out[c][2 * h] * inverse, b = out[c][2 * h + 1] * inverse;
      const int64_t to = int64_t(place.head) * head_dim + column;
      if (p.splits > 1) {
        Pack<float, 2> pair = {{a, b}};
        store<2>(p.parts + (int64_t(split) * n + i) * p.q.cols + to, pair);
      } else {
        store_pair(p.out.row(i) + to, a, b);
      }
    }
  }
}
}  // namespace

KERNEL(attention_forward_32, kThreads, const Attentions table) { attend<32>(table); }
KERNEL(attention_forward_64, kThreads, const Attentions table) { attend<64>(table); }
KERNEL(attention_forward_128, kThreads, const Attentions table) { attend<128>(table); }

// Joins the splits of problem blockIdx.y: a warp takes a row.
KERNEL(attention_join_splits, kThreads, const Attentions table) {
  const Attention& p = table.problem[blockIdx.y];
  const int n = p.q.rows, head_dim = p.q.cols / p.heads, lane = int(threadIdx.x) % 32;
  const int row = int(blockIdx.x) * (kThreads / 32) + int(threadIdx.x) / 32;
  if (p.splits == 1 || row >= n) return;
  for (int column = 2 * lane; column < p.q.cols; column += 64) {
    const int head = column / head_dim;
    const int64_t at = int64_t(head) * n + row, each = int64_t(p.heads) * n;
    float highest = -INFINITY;
    for (int s = 0; s < p.splits; s++) highest = fmaxf(highest, p.part_lse[s * each + at]);
    float total = 0.f, a = 0.f, b = 0.f;
    for (int s = 0; s < p.splits; s++) {
      const float weight = expf(p.part_lse[s * each + at] - highest);
      const auto part = load<2>(p.parts + (int64_t(s) * n + row) * p.q.cols + column);
      total += weight;
      a += weight * part.v[0];
      b += weight * part.v[1];
    }
    store_pair(p.out.row(row) + column, a / total, b / total);
    if (column % head_dim == 0) p.lse[at] = highest + logf(total);
  }
}

namespace {
// `KernelMerge` of src/ops/attention/kernel.rs.
struct Merge {
  Matrix<const real> part;
  Matrix<float> out;
  const float* part_lse;
  float* lse;
  int32_t heads, first;
};
struct Merges {
  Merge problem[kProblems];
  int32_t count, padding;
};
}  // namespace

// out, lse of the parts of a context so far, together with one more part's: a warp takes a row.
KERNEL(attention_merge_parts, kThreads, const Merges table) {
  const Merge& p = table.problem[blockIdx.y];
  const int n = p.part.rows, head_dim = p.part.cols / p.heads, lane = int(threadIdx.x) % 32;
  const int row = int(blockIdx.x) * (kThreads / 32) + int(threadIdx.x) / 32;
  if (row >= n) return;
  const real* part_row = p.part.row(row);
  float* out_row = p.out.row(row);
  for (int head = 0; head < p.heads; head++) {
    const int64_t at = int64_t(head) * n + row;
    const float before = p.first ? -INFINITY : p.lse[at], part_lse = p.part_lse[at];
    const float highest = fmaxf(before, part_lse);
    const float shift = highest == -INFINITY ? 0.f : highest;  // no keys yet: both weights are 0
    const float a = expf(before - shift), b = expf(part_lse - shift), total = a + b;
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    for (int c = 2 * lane; c < head_dim; c += 64) {
      const int column = head * head_dim + c;
      const auto part = load<2>(part_row + column);
      Pack<float, 2> out = {};
      if (a > 0.f) out = load<2>(out_row + column);  // else it may hold anything
#pragma unroll
      for (int e = 0; e < 2; e++) out.v[e] = (a * out.v[e] + b * float(part.v[e])) * inverse;
      store<2>(out_row + column, out);
    }
    __syncwarp();  // all lanes have read lse
    if (lane == 0) p.lse[at] = shift + logf(total);
  }
}

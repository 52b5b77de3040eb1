// attention_forward.cu -- out = dropout(softmax(q k^T / sqrt(head_dim))) v of each head, by the
// online softmax of FlashAttention-2 (Dao 2023, algorithm 1). One launch for all heads of up to
// four problems of any lengths.
//
// A block owns 64 queries of a head, 16 a warp; keys and values stream through two stages of
// cp.async. Where there are few queries the keys are split over several blocks, which write f32
// outputs and log-sum-exps of their own; attention_join_splits joins them: with lse = log sum_s
// e^lse_s,  out = sum_s e^(lse_s - lse) out_s  (Dao 2023, section 3.1).
#include "attention_forward.cuh"

namespace {

template <int D> GPU_FN void attend(const Attentions& table) {
  constexpr int kN = kKeys<D>, kN8 = kN / 8;
  const Work work = work_of<kOwn, kN>(table);
  const int warp = int(threadIdx.x) / 32, m = work.k.rows, begin = work.begin, end = work.end;
  const int row = work.q0 + warp * 16 + int(threadIdx.x) % 32 / 4;

  SharedMemory shared;
  real* queries = shared.take<real>(kOwn * D);
  real* keys = shared.take<real>(2 * kN * D);  // two stages
  real* values = shared.take<real>(2 * kN * D);

  load_tile<kOwn, D, kThreads>(queries, work.q, work.q0, 0);
  if (begin < end) {
    load_tile<kN, D, kThreads>(keys, work.k, begin * kN, 0);
    load_tile<kN, D, kThreads>(values, work.v, begin * kN, 0);
  }
  cp_async_commit();

  float out[D / 8][4];
  clear(out);
  Softmax softmax{score_scale2(work.q.cols)};

  for (int j = begin; j < end; j++) {
    const int stage = (j - begin) & 1;
    cp_async_wait<0>();
    __syncthreads();  // tile j has landed for everyone, and everyone has finished with tile j - 1
    if (j + 1 < end) {
      load_tile<kN, D, kThreads>(keys + (stage ^ 1) * kN * D, work.k, (j + 1) * kN, 0);
      load_tile<kN, D, kThreads>(values + (stage ^ 1) * kN * D, work.v, (j + 1) * kN, 0);
      cp_async_commit();
    }
    float s[kN8][4];
    clear(s);
    scores<D, kN8>(s, queries, warp * 16, keys + stage * kN * D, 0);
    if ((j + 1) * kN > m) mask(s, m - j * kN);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      scale_row(out, h, softmax.weights(s, h));
      if (work.dropout.threshold) drop(s, work.dropout, row, h, j * (kN / 32));
    }
    weigh<D, D>(out, s, values + stage * kN * D);
  }
  cp_async_wait<0>();  // where there are no keys, the queries are still on their way
  finish(work, softmax, out, row);
}

constexpr int kBlocks = kIsBf16 ? 3 : 2;  // of narrow heads that a multiprocessor shall hold
}  // namespace

KERNEL_BLOCKS(attention_forward_32, kThreads, kBlocks, const Attentions table) { attend<32>(table); }
KERNEL_BLOCKS(attention_forward_64, kThreads, kBlocks, const Attentions table) { attend<64>(table); }
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

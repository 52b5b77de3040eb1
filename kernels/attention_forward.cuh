// attention_forward.cuh -- what attention_forward.cu and attention_forward_wgmma.cu share: the
// table of problems, the online softmax of FlashAttention-2 (Dao 2023, algorithm 1), and what
// becomes of its sums.
#pragma once
#include "attention.cuh"

namespace {
struct Attention {
  Matrix<const real> q, k, v;
  Matrix<real> out;
  float* lse;       // [heads][n]
  float* parts;     // [splits][n][heads head_dim]
  float* part_lse;  // [splits][heads][n]
  Dropout dropout;
  int32_t heads, splits, first_block, padding;
};
struct Attentions {
  Attention problem[kProblems];
  int32_t count, padding;
};

// A block's work: OWN queries of a head from q0 on, and tiles begin .. end of KEYS keys.
struct Work {
  const Attention& p;
  Matrix<const real> q, k, v;  // the head's columns
  int head, split, q0, begin, end;
  Dropout dropout;
};
template <int OWN, int KEYS> GPU_FN Work work_of(const Attentions& table) {
  const Place place = place_of(table, int(blockIdx.x));
  const Attention& p = table.problem[place.problem];
  const int head_dim = p.q.cols / p.heads, split = place.part % p.splits, q0 = place.part / p.splits * OWN;
  // a split takes whole tiles
  const int all = (p.k.rows + KEYS - 1) / KEYS, each = (all + p.splits - 1) / p.splits;
  const int begin = min(split * each, all), end = min(begin + each, all);
  Dropout dropout = p.dropout;
  dropout.site += uint32_t(place.head);
  const auto q = head_of(p.q, place.head, head_dim), k = head_of(p.k, place.head, head_dim), v = head_of(p.v, place.head, head_dim);
  return {p, q, k, v, place.head, split, q0, begin, end, dropout};
}

// Of a tile's scores only those of the first `left` keys count.
template <int N8> GPU_FN void mask(float (&s)[N8][4], int left) {
  const int t = int(threadIdx.x) % 4;
#pragma unroll
  for (int c = 0; c < N8; c++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (8 * c + 2 * t + e % 2 >= left) s[c][e] = -INFINITY;
}

// The online softmax of a thread's two rows, g and g + 8 of its warp's 16; a quad's threads share
// them.
struct Softmax {
  float scale2;  // log2(e) / sqrt(head_dim)
  float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

  // Row h: scores become weights. The factor that earlier weights shrink by.
  template <int N8> GPU_FN float weights(float (&s)[N8][4], int h) {
    float high = highest[h];
#pragma unroll
    for (int c = 0; c < N8; c++) high = fmaxf(high, fmaxf(s[c][2 * h], s[c][2 * h + 1]));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
    const float base = high * scale2, shrink = fast_exp2(fmaf(highest[h], scale2, -base));
    float part = 0.f;
#pragma unroll
    for (int c = 0; c < N8; c++)
#pragma unroll
      for (int e = 0; e < 2; e++) part += s[c][2 * h + e] = fast_exp2(fmaf(s[c][2 * h + e], scale2, -base));
    sum[h] = sum[h] * shrink + part;
    highest[h] = high;
    return shrink;
  }
};

// Row h of a thread's sums, times a factor.
template <int D8> GPU_FN void scale_row(float (&out)[D8][4], int h, float factor) {
#pragma unroll
  for (int c = 0; c < D8; c++) {
    out[c][2 * h] *= factor;
    out[c][2 * h + 1] *= factor;
  }
}

// Dropout of row h of a tile's weights, whose first keys are those of the generator's `first` block
// of 32.
template <int N8> GPU_FN void drop(float (&s)[N8][4], const Dropout& dropout, int row, int h, int first) {
  const Dropout now = drawn(dropout);  // here, tile by tile: no register holds it in between
#pragma unroll
  for (int block = 0; block < N8 / 4; block++) {
    float factors[4][2];
    dropout_fragment(now, uint32_t(row + 8 * h), uint32_t(first + block), int(threadIdx.x) % 4, factors);
#pragma unroll
    for (int w = 0; w < 4; w++)
#pragma unroll
      for (int e = 0; e < 2; e++) s[4 * block + w][2 * h + e] *= factors[w][e];
  }
}

// The sums of rows `row` and row + 8, divided and stored with their log-sum-exp, or as a split's.
template <int D8> GPU_FN void finish(const Work& work, const Softmax& softmax, const float (&out)[D8][4], int row) {
  const Attention& p = work.p;
  const int n = p.q.rows, head_dim = work.q.cols, t = int(threadIdx.x) % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float total = softmax.sum[h];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int i = row + 8 * h;
    if (i >= n) continue;
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    // no keys: -infinity
    const float lse = fmaf(softmax.highest[h] * softmax.scale2, kLn2, logf(total));
    const int64_t at = int64_t(work.head) * n + i;
    if (t == 0) (p.splits > 1 ? p.part_lse + int64_t(work.split) * p.heads * n : p.lse)[at] = lse;
#pragma unroll
    for (int c = 0; c < D8; c++) {
      const int column = 8 * c + 2 * t;
      if (column >= head_dim) break;
      const float a = out[c][2 * h] * inverse, b = out[c][2 * h + 1] * inverse;
      const int64_t to = int64_t(work.head) * head_dim + column;
      if (p.splits > 1) {
        Pack<float, 2> pair = {{a, b}};
        store<2>(p.parts + (int64_t(work.split) * n + i) * p.q.cols + to, pair);
      } else {
        store_pair(p.out.row(i) + to, a, b);
      }
    }
  }
}
}  // namespace

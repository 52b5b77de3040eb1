// cox.cu -- the Cox partial likelihood and its gradient in the risks (formula:
// src/survival/cox.rs), n patients in order of (stratum, time). All sums are f64, of weight *
// e^(risk - highest risk): risks may differ by up to 700.
//
// The place of a patient in that order is p. Two segmented scans give everything, whatever the
// ties:
//   backward in time   sets[p] = of the patients of p's stratum from p on: sum of w e^r (the risk set, at the first place of a tie);
//                      of the events of p's tie from p on: sum of w e^r, of w, and their number
//   forward in time    an event is the l-th of the d of its tie (l = its number in `sets` less 1), its weight W/d:
//                        term = W/d / (at_risk - c of_events),  c = l/d (Efron) or 0 (Breslow)
//                      hazards[p] = sum of term in the stratum up to p, and of c term in the tie
//   gradient = event w - w e^r (hazard - [event] c-part), both read at the last place of the tie
//
// Each scan is two kernels: the blocks' totals, then the scan with the totals of the blocks before.
// A block takes `span` places.
#include "gpu.cuh"

namespace {
constexpr int kThreads = 256, kRows = 4, kTile = kThreads * kRows;
constexpr uint32_t kEvent = 1, kTieFirst = 2, kTieLast = 4, kStratumFirst = 8, kStratumLast = 16;

struct Cox {
  const float* risk;       // by row
  float* gradient;         // by row
  const uint32_t* rows;    // the row at each place; null: the place itself
  const uint8_t* flags;    // by place
  const uint32_t *first, *last;  // of each place's tie
  const float* weights;    // by place; null: all 1
  float* highest;          // [blocks]
  double* totals;          // [blocks][5], the scan's at work
  double* sets;            // [n][4]
  double* hazards;         // [n][2]
  double* loglik;          // [1 + blocks]; the first receives the sum
  int32_t n, span, efron;

  GPU_FN int row(int place) const { return rows ? int(rows[place]) : place; }
  GPU_FN double weight(int place) const { return weights ? double(weights[place]) : 1.0; }
};

// Sums over a run of places; sum k belongs to the stratum (k = 0) or to the tie (k > 0), and starts
// anew where that starts.
template <int N> struct Sums {
  double v[N];
  uint32_t starts;  // bit 0: a stratum starts in the run, bit 1: a tie does
};
template <int N> GPU_FN Sums<N> none() {
  Sums<N> s;
#pragma unroll
  for (int k = 0; k < N; k++) s.v[k] = 0.0;
  s.starts = 0;
  return s;
}
// Of a run and the run after it.
template <int N> GPU_FN Sums<N> join(const Sums<N>& before, const Sums<N>& after) {
  Sums<N> s;
#pragma unroll
  for (int k = 0; k < N; k++) s.v[k] = after.v[k] + (after.starts & (k == 0 ? 1u : 2u) ? 0.0 : before.v[k]);
  s.starts = before.starts | after.starts;
  return s;
}

template <int N> struct SharedSums { Sums<N> warp[kThreads / 32]; };

// Joins the threads' runs in order: what came before this thread's run in the block, and in `total`
// the whole block.
template <int N> GPU_FN Sums<N> scan_block(Sums<N> mine, Sums<N>& total, SharedSums<N>& shared) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    Sums<N> before;
#pragma unroll
    for (int k = 0; k < N; k++) before.v[k] = __shfl_up_sync(0xffffffffu, mine.v[k], d);
    before.starts = __shfl_up_sync(0xffffffffu, mine.starts, d);
    if (lane >= d) mine = join(before, mine);
  }
  if (lane == 31) shared.warp[warp] = mine;
  Sums<N> before;
#pragma unroll
  for (int k = 0; k < N; k++) before.v[k] = __shfl_up_sync(0xffffffffu, mine.v[k], 1);
  before.starts = __shfl_up_sync(0xffffffffu, mine.starts, 1);
  if (lane == 0) before = none<N>();
  __syncthreads();
  Sums<N> earlier = none<N>();
  for (int w = 0; w < warp; w++) earlier = join(earlier, shared.warp[w]);
  total = earlier;
  for (int w = warp; w < kThreads / 32; w++) total = join(total, shared.warp[w]);
  __syncthreads();  // `shared` may be used again
  return join(earlier, before);
}

template <int N> GPU_FN void write_total(const Cox& p, const Sums<N>& total) {
  double* to = p.totals + int64_t(blockIdx.x) * 5;
  for (int k = 0; k < N; k++) to[k] = total.v[k];
  to[4] = double(total.starts);
}
// Of all blocks before this one.
template <int N> GPU_FN Sums<N> blocks_before(const Cox& p, SharedSums<N>& shared) {
  const int blocks = int(blockIdx.x), each = (blocks + kThreads - 1) / kThreads;
  Sums<N> mine = none<N>(), total;
  for (int i = int(threadIdx.x) * each; i < min((int(threadIdx.x) + 1) * each, blocks); i++) {
    Sums<N> s;
    for (int k = 0; k < N; k++) s.v[k] = p.totals[int64_t(i) * 5 + k];
    s.starts = uint32_t(p.totals[int64_t(i) * 5 + 4]);
    mine = join(mine, s);
  }
  scan_block(mine, total, shared);
  return total;
}

// The highest risk, from the blocks'.
GPU_FN float highest_risk(const Cox& p, float (&shared)[kThreads / 32]) {
  const int blocks = int(gridDim.x), lane = int(threadIdx.x) % 32;
  float highest = -INFINITY;
  for (int i = int(threadIdx.x); i < blocks; i += kThreads) highest = fmaxf(highest, p.highest[i]);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, d));
  if (lane == 0) shared[threadIdx.x / 32] = highest;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; w++) highest = fmaxf(highest, shared[w]);
  return highest;
}

GPU_FN double exp_risk(const Cox& p, int place, float highest) {
  return p.weight(place) * exp(double(p.risk[p.row(place)]) - double(highest));
}

// Backward in time: step i of the scan is place n - 1 - i.
GPU_FN Sums<4> risk_set_of(const Cox& p, int place, float highest) {
  const uint32_t flags = p.flags[place];
  const double e = exp_risk(p, place, highest), event = flags & kEvent ? 1.0 : 0.0;
  return {{e, e * event, p.weight(place) * event, event}, (flags & kStratumLast ? 1u : 0u) | (flags & kTieLast ? 2u : 0u)};
}

// Forward in time.
struct Term { double loglik; Sums<2> sums; };
GPU_FN Term term_of(const Cox& p, int place, float highest) {
  const uint32_t flags = p.flags[place];
  Term term = {0.0, none<2>()};
  term.sums.starts = (flags & kStratumFirst ? 1u : 0u) | (flags & kTieFirst ? 2u : 0u);
  if (!(flags & kEvent)) return term;
  const double* set = p.sets + int64_t(p.first[place]) * 4;
  const double at_risk = set[0], of_events = set[1], weight = set[2] / set[3];
  const double gone = p.efron ? (p.sets[int64_t(place) * 4 + 3] - 1.0) / set[3] : 0.0;
  const double denominator = at_risk - gone * of_events;
  term.sums.v[0] = weight / denominator;
  term.sums.v[1] = gone * term.sums.v[0];
  term.loglik = p.weight(place) * (double(p.risk[p.row(place)]) - double(highest)) - weight * log(denominator);
  return term;
}

template <int N, class Of> GPU_FN Sums<N> sum_of_rows(int begin, int end, Of of) {
  Sums<N> sums = none<N>();
  for (int i = begin; i < end; i++) sums = join(sums, of(i));
  return sums;
}
}  // namespace

KERNEL(cox_highest, kThreads, const Cox p) {
  SHARED_ARRAY(float, shared, [kThreads / 32]);
  const int begin = int(blockIdx.x) * p.span, end = min(begin + p.span, p.n), lane = int(threadIdx.x) % 32;
  float highest = -INFINITY;
  for (int place = begin + int(threadIdx.x); place < end; place += kThreads) highest = fmaxf(highest, p.risk[p.row(place)]);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, d));
  if (lane == 0) shared[threadIdx.x / 32] = highest;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kThreads / 32; w++) highest = fmaxf(highest, shared[w]);
  p.highest[blockIdx.x] = highest;
}

KERNEL(cox_risk_set_totals, kThreads, const Cox p) {
  SHARED_ARRAY(float, highest_shared, [kThreads / 32]);
  SHARED_ARRAY(SharedSums<4>, shared, [1]);
  const float highest = highest_risk(p, highest_shared);
  const int begin = int(blockIdx.x) * p.span, end = min(begin + p.span, p.n);
  Sums<4> all = none<4>(), total;
  for (int tile = begin; tile < end; tile += kTile) {
    const int i = tile + int(threadIdx.x) * kRows;
    const auto of = [&](int step) { return risk_set_of(p, p.n - 1 - step, highest); };
    scan_block(sum_of_rows<4>(i, min(i + kRows, end), of), total, shared[0]);
    all = join(all, total);
  }
  if (threadIdx.x == 0) write_total(p, all);
}

KERNEL(cox_risk_sets, kThreads, const Cox p) {
  SHARED_ARRAY(float, highest_shared, [kThreads / 32]);
  SHARED_ARRAY(SharedSums<4>, shared, [1]);
  const float highest = highest_risk(p, highest_shared);
  const int begin = int(blockIdx.x) * p.span, end = min(begin + p.span, p.n);
  Sums<4> before = blocks_before(p, shared[0]), total;
  for (int tile = begin; tile < end; tile += kTile) {
    const int i = tile + int(threadIdx.x) * kRows;
    const auto of = [&](int step) { return risk_set_of(p, p.n - 1 - step, highest); };
    Sums<4> sums = join(before, scan_block(sum_of_rows<4>(i, min(i + kRows, end), of), total, shared[0]));
    for (int step = i; step < min(i + kRows, end); step++) {
      sums = join(sums, of(step));
      double* set = p.sets + int64_t(p.n - 1 - step) * 4;
      for (int k = 0; k < 4; k++) set[k] = sums.v[k];
    }
    before = join(before, total);
  }
}

KERNEL(cox_hazard_totals, kThreads, const Cox p) {
  SHARED_ARRAY(float, highest_shared, [kThreads / 32]);
  SHARED_ARRAY(SharedSums<2>, shared, [1]);
  SHARED_ARRAY(double, logliks, [kThreads]);
  const float highest = highest_risk(p, highest_shared);
  const int begin = int(blockIdx.x) * p.span, end = min(begin + p.span, p.n);
  Sums<2> all = none<2>(), total;
  double loglik = 0.0;
  for (int tile = begin; tile < end; tile += kTile) {
    const int i = tile + int(threadIdx.x) * kRows;
    const auto of = [&](int place) {
      const Term term = term_of(p, place, highest);
      loglik += term.loglik;
      return term.sums;
    };
    scan_block(sum_of_rows<2>(i, min(i + kRows, end), of), total, shared[0]);
    all = join(all, total);
  }
  logliks[threadIdx.x] = loglik;
  __syncthreads();
  if (threadIdx.x > 0) return;
  write_total(p, all);
  for (int i = 1; i < kThreads; i++) loglik += logliks[i];
  p.loglik[1 + blockIdx.x] = loglik;
}

KERNEL(cox_hazards, kThreads, const Cox p) {
  SHARED_ARRAY(float, highest_shared, [kThreads / 32]);
  SHARED_ARRAY(SharedSums<2>, shared, [1]);
  const float highest = highest_risk(p, highest_shared);
  const int begin = int(blockIdx.x) * p.span, end = min(begin + p.span, p.n);
  Sums<2> before = blocks_before(p, shared[0]), total;
  for (int tile = begin; tile < end; tile += kTile) {
    const int i = tile + int(threadIdx.x) * kRows;
    const auto of = [&](int place) { return term_of(p, place, highest).sums; };
    Sums<2> sums = join(before, scan_block(sum_of_rows<2>(i, min(i + kRows, end), of), total, shared[0]));
    for (int place = i; place < min(i + kRows, end); place++) {
      sums = join(sums, of(place));
      p.hazards[int64_t(place) * 2] = sums.v[0];
      p.hazards[int64_t(place) * 2 + 1] = sums.v[1];
    }
    before = join(before, total);
  }
}

KERNEL(cox_gradient, kThreads, const Cox p) {
  SHARED_ARRAY(float, highest_shared, [kThreads / 32]);
  const float highest = highest_risk(p, highest_shared);
  const int begin = int(blockIdx.x) * p.span, end = min(begin + p.span, p.n);
  for (int place = begin + int(threadIdx.x); place < end; place += kThreads) {
    const double* hazard = p.hazards + int64_t(p.last[place]) * 2;
    const bool event = p.flags[place] & kEvent;
    const double own = event ? hazard[0] - hazard[1] : hazard[0];
    p.gradient[p.row(place)] = float((event ? p.weight(place) : 0.0) - exp_risk(p, place, highest) * own);
  }
  if (blockIdx.x > 0 || threadIdx.x > 0) return;
  double loglik = 0.0;
  for (int i = 0; i < int(gridDim.x); i++) loglik += p.loglik[1 + i];
  p.loglik[0] = loglik;
}

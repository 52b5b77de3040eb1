// head.cu -- the class token's final norm, logits, survival loss, and the way back
// (src/ops/head.rs). One block each.
//
// forward   normed [d] = LayerNorm(x [d]), stats (mean, rstd),  logits [classes] f32 = W normed + b,  W [classes, d]
// backward  dW += dlogits normed^T,  db += dlogits,  dnormed = dlogits W,  then LayerNorm's gradients (layer_norm.cu)
// train     both, and between them hazards, survival, risk and loss of the logits and the loss's gradient in them, in f64
//           (src/loss/mod.rs); of what lies between it writes loss and risk alone
#include "gpu.cuh"

namespace {
constexpr int kWarps = 8, kThreads = 32 * kWarps, kMostClasses = 32;
constexpr float kEpsilon = 1e-5f;

struct Head {
  const real *x, *norm_weight, *norm_bias;
  float* stats;
  real* normed;
  Matrix<const real> weight;
  const real* bias;
  float* logits;
};
struct HeadGrad {
  Head head;
  const float* dlogits;
  real* dx;
  float *dnorm_weight, *dnorm_bias;
  Matrix<float> dweight;
  float* dbias;
};
struct Loss {
  double* result;       // loss, risk
  double alpha, share;  // the gradient is that of share * loss
  int32_t label, censored, cross_entropy, padding;
};

struct Stats { float mean, rstd; };

// A column of the norm's output, not rounded.
GPU_FN float normed(const Head& p, int c, Stats stats) {
  return (float(p.x[c]) - stats.mean) * stats.rstd * float(p.norm_weight[c]) + float(p.norm_bias[c]);
}

// The sum over the block, in every thread.
GPU_FN float block_sum(float x, float (&shared)[kWarps]) {
  x = warp_sum(x);
  __syncthreads();  // `shared` may still be in use
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < kWarps; w++) sum += shared[w];
  return sum;
}

GPU_FN Stats statistics(const Head& p, float (&shared)[kWarps]) {
  const int thread = int(threadIdx.x), d = p.weight.cols;
  float sum = 0.f;
  for (int c = thread; c < d; c += kThreads) sum += float(p.x[c]);
  const float mean = block_sum(sum, shared) / float(d);
  float squares = 0.f;
  for (int c = thread; c < d; c += kThreads) {
    const float centred = float(p.x[c]) - mean;
    squares += centred * centred;
  }
  return {mean, 1.f / sqrtf(block_sum(squares, shared) / float(d) + kEpsilon)};
}

// A warp's share of the logits.
GPU_FN void find_logits(const Head& p, Stats stats, float* logits) {
  const int lane = int(threadIdx.x) % 32, d = p.weight.cols;
  for (int i = int(threadIdx.x) / 32; i < p.weight.rows; i += kWarps) {
    float logit = 0.f;
    for (int c = lane; c < d; c += 32) logit += normed(p, c, stats) * float(p.weight.row(i)[c]);
    logit = warp_sum(logit);
    if (lane == 0) logits[i] = logit + float(p.bias[i]);
  }
}

constexpr double kLeast = 1e-7;  // probabilities below are taken for it, and no gradient flows
GPU_FN double log_clamped(double p) { return log(p < kLeast ? kLeast : p); }
GPU_FN double inverse(double p) { return p < kLeast ? 0.0 : 1.0 / p; }

// dlogits of a slide's loss, and `result`, by one thread.
GPU_FN void find_loss(const Loss& p, int classes, const float* logits, float* dlogits, double* hazards, double* survival) {
  double s = 1.0, sum = 0.0;
  for (int t = 0; t < classes; t++) {
    hazards[t] = 1.0 / (1.0 + exp(-double(logits[t])));
    survival[t] = s *= 1.0 - hazards[t];
    sum += s;
  }
  const int y = p.label;
  const double alpha = p.alpha, before = y == 0 ? 1.0 : survival[y - 1];
  double value, dhazard = 0.0, dsurvival = 0.0, dbefore = 0.0;  // gradients in h_y, S_y, S_{y-1}
  if (p.censored) {
    value = (alpha - 1.0) * log_clamped(survival[y]);
    dsurvival = (alpha - 1.0) * inverse(survival[y]);
  } else if (!p.cross_entropy) {
    value = -log_clamped(before) - log_clamped(hazards[y]);
    dhazard = -inverse(hazards[y]);
    dbefore = -inverse(before);
  } else {
    value = (1.0 - alpha) * -log_clamped(1.0 - survival[y]) + alpha * (-log(before + kLeast) - log_clamped(hazards[y]));
    dsurvival = (1.0 - alpha) * inverse(1.0 - survival[y]);
    dhazard = -alpha * inverse(hazards[y]);
    dbefore = -alpha / (before + kLeast);
  }
  p.result[0] = value;
  p.result[1] = classes == 1 ? double(logits[0]) : -sum;
  // back through S_t = S_{t-1} (1 - h_t) and the sigmoid
  double carried = 0.0;
  for (int t = classes - 1; t >= 0; t--) {
    carried += (t == y ? dsurvival : 0.0) + (t + 1 == y ? dbefore : 0.0);
    const double dh = (t == y ? dhazard : 0.0) - carried * (t == 0 ? 1.0 : survival[t - 1]);
    carried *= 1.0 - hazards[t];
    dlogits[t] = float(p.share * dh * hazards[t] * (1.0 - hazards[t]));
  }
}

// From dlogits in shared memory to all gradients.
GPU_FN void go_back(const HeadGrad& p, Stats stats, const float* dlogits, float (&shared)[kWarps]) {
  const Head& head = p.head;
  const int thread = int(threadIdx.x), d = head.weight.cols, classes = head.weight.rows;
  if (thread < classes) p.dbias[thread] += dlogits[thread];
  const auto dnormed = [&](int c) {
    float sum = 0.f;
    for (int i = 0; i < classes; i++) sum += dlogits[i] * float(head.weight.row(i)[c]);
    return sum;
  };
  float sum_g = 0.f, sum_gx = 0.f;
  for (int c = thread; c < d; c += kThreads) {
    const float g = dnormed(c), x_hat = (float(head.x[c]) - stats.mean) * stats.rstd, gw = g * float(head.norm_weight[c]);
    p.dnorm_weight[c] += g * x_hat;
    p.dnorm_bias[c] += g;
    for (int i = 0; i < classes; i++) p.dweight.row(i)[c] += dlogits[i] * normed(head, c, stats);
    sum_g += gw;
    sum_gx += gw * x_hat;
  }
  const float mean_g = block_sum(sum_g, shared) / float(d), mean_gx = block_sum(sum_gx, shared) / float(d);
  for (int c = thread; c < d; c += kThreads) {
    const float x_hat = (float(head.x[c]) - stats.mean) * stats.rstd;
    p.dx[c] = real(stats.rstd * (dnormed(c) * float(head.norm_weight[c]) - mean_g - x_hat * mean_gx));
  }
}
}  // namespace

KERNEL(head_forward, kThreads, const Head p) {
  SHARED_ARRAY(float, shared, [kWarps]);
  const Stats stats = statistics(p, shared);
  if (threadIdx.x == 0) {
    p.stats[0] = stats.mean;
    p.stats[1] = stats.rstd;
  }
  for (int c = int(threadIdx.x); c < p.weight.cols; c += kThreads) p.normed[c] = real(normed(p, c, stats));
  find_logits(p, stats, p.logits);
}

KERNEL(head_backward, kThreads, const HeadGrad p) {
  SHARED_ARRAY(float, shared, [kWarps]);
  SHARED_ARRAY(float, dlogits, [kMostClasses]);
  if (int(threadIdx.x) < p.head.weight.rows) dlogits[threadIdx.x] = p.dlogits[threadIdx.x];
  __syncthreads();
  go_back(p, {p.head.stats[0], p.head.stats[1]}, dlogits, shared);
}

KERNEL(head_train, kThreads, const HeadGrad p, const Loss loss) {
  SHARED_ARRAY(float, shared, [kWarps]);
  SHARED_ARRAY(float, logits, [kMostClasses]);
  SHARED_ARRAY(float, dlogits, [kMostClasses]);
  SHARED_ARRAY(double, hazards, [kMostClasses]);
  SHARED_ARRAY(double, survival, [kMostClasses]);
  const Stats stats = statistics(p.head, shared);
  find_logits(p.head, stats, logits);
  __syncthreads();
  if (threadIdx.x == 0) find_loss(loss, p.head.weight.rows, logits, dlogits, hazards, survival);
  __syncthreads();
  go_back(p, stats, dlogits, shared);
}

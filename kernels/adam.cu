// adam.cu -- Adam with L2 weight decay over a whole arena (src/ops/adam.rs), one launch:
//   g = gradient + decay p,  m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  p -= rate m / (sqrt(v) unbias + epsilon)
// It also rounds p to the weights that the ops read, and clears the gradient. A thread takes four
// elements.
#include "gpu.cuh"

namespace {
constexpr int kThreads = 256;

struct Adam {
  float *params, *grads, *m, *v;
  real* weights;  // in f32 the same memory as params
  int64_t n;      // a multiple of four
  float rate, unbias, beta1, beta2, decay, epsilon;
};
}  // namespace

KERNEL(adam_step, kThreads, const Adam a) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (at >= a.n) return;
  auto p = load<4>(a.params + at), m = load<4>(a.m + at), v = load<4>(a.v + at);
  const auto grads = load<4>(a.grads + at);
  Pack<real, 4> weights;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const float g = grads.v[e] + a.decay * p.v[e];
    m.v[e] = a.beta1 * m.v[e] + (1.f - a.beta1) * g;
    v.v[e] = a.beta2 * v.v[e] + (1.f - a.beta2) * g * g;
    p.v[e] -= a.rate * m.v[e] / (sqrtf(v.v[e]) * a.unbias + a.epsilon);
    weights.v[e] = real(p.v[e]);
  }
  store<4>(a.params + at, p);
  store<4>(a.m + at, m);
  store<4>(a.v + at, v);
  store<4>(a.grads + at, Pack<float, 4>{});
  if (sizeof(real) < 4) store<4>(a.weights + at, weights);
}

// eight.cuh -- rows in pieces of eight columns, which is what a thread of an elementwise kernel or
// epilogue holds; and GELU.
#pragma once
#include "gpu.cuh"

GPU_FN void load_eight(const real* from, float (&v)[8]) {
#pragma unroll
  for (int p = 0; p < 8 / kRealsPerPack; p++) {
    const auto pack = load<kRealsPerPack>(from + p * kRealsPerPack);
#pragma unroll
    for (int e = 0; e < kRealsPerPack; e++) v[p * kRealsPerPack + e] = float(pack.v[e]);
  }
}
GPU_FN void store_eight(real* to, const float (&v)[8]) {
#pragma unroll
  for (int p = 0; p < 8 / kRealsPerPack; p++) {
    Pack<real, kRealsPerPack> pack;
#pragma unroll
    for (int e = 0; e < kRealsPerPack; e++) pack.v[e] = real(v[p * kRealsPerPack + e]);
    store<kRealsPerPack>(to + p * kRealsPerPack, pack);
  }
}

GPU_FN float normal_cdf(float x) { return 0.5f + 0.5f * erff(x * 0.70710678118654752f); }
GPU_FN float gelu_derivative(float x) { return normal_cdf(x) + x * 0.39894228040143268f * expf(-0.5f * x * x); }

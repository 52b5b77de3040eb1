// tensor_core.hpp -- how tensor cores add: not as IEEE 754 does, in the emulator either.
//
// They align a few products and the accumulator to the largest exponent, cut what lies more than
// kBits bits below it, add, and cut the sum to f32 (Xie et al. 2025, "MMA-Sim",
// arXiv 2511.10909; Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"). Cutting goes
// towards zero, so that errors of a long sum add up instead of cancelling each other.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>

namespace simt {

// Hopper's: all the products of an instruction at once. (Ampere and Ada take half of them, and a bit
// less.)
constexpr int kBits = 25;

// 2 to the exponent of x; tensor cores give subnormal numbers the exponent of the smallest normal.
inline double power_of(float x) {
  if (x == 0) return 0;
  const uint64_t exponent = std::bit_cast<uint32_t>(x) >> 23 & 255;
  return std::bit_cast<double>((exponent ? exponent + 896 : 897) << 52);
}

// Both operands of a product, exact in f32, and the powers of their elements.
template <int M, int N, int K> struct Operands {
  float a[K][M], b[K][N];
  double a_power[K][M], b_power[K][N];
  bool finite;

  // To be called once a and b are filled.
  void prepare() {
    float check = 0;  // NaN once it meets an infinity or a NaN
    for (int k = 0; k < K; k++) {
      for (int i = 0; i < M; i++) a_power[k][i] = power_of(a[k][i]), check += a[k][i] * 0.f;
      for (int j = 0; j < N; j++) b_power[k][j] = power_of(b[k][j]), check += b[k][j] * 0.f;
    }
    finite = check == 0;
  }
};

// c[N] += row i of A[M][K] times B[K][N].
template <int M, int N, int K>
void multiply_row(float (&c)[N], const Operands<M, N, K>& x, int i) {
  float check = 0;
  for (int j = 0; j < N; j++) check += c[j] * 0.f;
  if (!x.finite || check != 0) {  // as IEEE 754 has it
    for (int j = 0; j < N; j++) {
      double sum = c[j];
      for (int k = 0; k < K; k++) sum += double(x.a[k][i]) * double(x.b[k][j]);
      c[j] = float(sum);
    }
    return;
  }
  double top[N], scale[N], sum[N];
  for (int j = 0; j < N; j++) top[j] = std::max(power_of(c[j]), 0x1p-400);
  for (int k = 0; k < K; k++)
    for (int j = 0; j < N; j++) top[j] = std::max(top[j], x.a_power[k][i] * x.b_power[k][j]);
  for (int j = 0; j < N; j++) {
    scale[j] = double(1 << kBits) / top[j];  // powers of two: exact
    sum[j] = double(int32_t(double(c[j]) * scale[j]));
  }
  for (int k = 0; k < K; k++)
    for (int j = 0; j < N; j++) sum[j] += double(int32_t(double(x.a[k][i]) * double(x.b[k][j]) * scale[j]));
  for (int j = 0; j < N; j++) {
    const uint64_t bits = std::bit_cast<uint64_t>(sum[j] / scale[j]);
    c[j] = float(std::bit_cast<double>(bits & ~((uint64_t(1) << 29) - 1)));  // f32 has 29 bits less
  }
}

}  // namespace simt

// tile.cuh -- tiles in shared memory and tensor-core fragments, one code for both storage types.
//
// bf16 goes through mma.m16n8k16. f32 goes through mma.m16n8k8 in TF32 three times (big x big, big
// x small, small x big), which keeps f32's accuracy ("3xTF32", NVIDIA CUTLASS example 27).
// Everything is told in chunks of 16 bytes, which hold kChunk elements; an mma takes kStep = 2
// kChunk of the dimension that is summed over ("k").
#pragma once
#include "gpu.cuh"

constexpr int kChunk = 16 / int(sizeof(real));
constexpr int kStep = 2 * kChunk;
constexpr bool kIsBf16 = sizeof(real) == 2;

// Where element (row, col) of a tile with C columns lies: 16-byte chunks are XORed with the row
// within 128-byte lines, so that eight rows of one column of chunks fall into different banks.
template <int C> GPU_FN int swizzle(int row, int col) {
  constexpr int kChunks = C / kChunk, kLine = kChunks < 8 ? kChunks : 8, kShift = kChunks >= 8 ? 0 : kChunks == 4 ? 1 : 2;
  static_assert(C % kChunk == 0 && (kLine & (kLine - 1)) == 0 && kChunks % kLine == 0);
  const int chunk = col / kChunk;
  return row * C + ((chunk & ~(kLine - 1)) | ((chunk ^ (row >> kShift)) & (kLine - 1))) * kChunk + col % kChunk;
}

// Starts copying rows row0 .. row0 + ROWS and columns col0 .. col0 + C of `from` into a tile; what
// lies outside becomes zero. The matrix splits into 16-byte chunks (`Matrix::splits_into` of
// src/device/launch.rs). A thread copies every kRows-th row of one column of chunks: both its
// addresses move on by constants.
template <int ROWS, int C, int THREADS> GPU_FN void load_tile(real* tile, const Matrix<const real>& from, int row0, int col0) {
  constexpr int kChunks = C / kChunk, kRows = THREADS / kChunks;
  constexpr int kPeriod = kRows < 8 ? 8 / kRows : 1;  // copies after which the swizzle repeats itself
  static_assert(THREADS % kChunks == 0 && kRows * kPeriod % 8 == 0);
  const int row = int(threadIdx.x) / kChunks, col = int(threadIdx.x) % kChunks * kChunk;
  const int rows = col0 + col < from.cols ? from.rows - row0 - row : 0;  // from this thread's first on
  const real* source = from.data + int64_t(row0) * from.stride + (row * int(from.stride) + col0 + col);
  real* to[kPeriod];
#pragma unroll
  for (int i = 0; i < kPeriod; i++) to[i] = tile + swizzle<C>(row + i * kRows, col);
#pragma unroll 2
  for (int i = 0; i < (ROWS + kRows - 1) / kRows; i++) {
    if (ROWS % kRows != 0 && row + i * kRows >= ROWS) break;
    cp_async16(to[i % kPeriod] + i / kPeriod * kPeriod * kRows * C, source, i * kRows < rows);
    source += kRows * from.stride;
  }
}

// Addresses of fragments. The chunks of a fragment differ from a lane's first by XOR with a
// constant and by whole lines: one register a lane serves a whole tile, where the general form
// would keep one for every fragment.
template <int C> struct Swizzle {
  static constexpr int kChunks = C / kChunk, kLine = kChunks < 8 ? kChunks : 8, kShift = kChunks >= 8 ? 0 : kChunks == 4 ? 1 : 2;
  // Bytes to element 0 of chunk `chunk` (less than the lanes' share of a fragment) of row `row`.
  static GPU_FN uint32_t lane(int row, int chunk) {
    return uint32_t(row * C * int(sizeof(real)) + ((chunk ^ (row >> kShift)) & (kLine - 1)) * 16);
  }
  // The same `first` chunks on; bits of `first` and of the lane's chunk do not overlap.
  static GPU_FN const real* at(const real* tile, uint32_t lane, int first) {
    const uint32_t bytes = (lane ^ uint32_t((first & (kLine - 1)) * 16)) + uint32_t((first & ~(kLine - 1)) * 16);
    return reinterpret_cast<const real*>(reinterpret_cast<const char*>(tile) + bytes);
  }
};

// A warp's operand fragments. A: 16 rows (m) by kStep; B: 16 columns (n) by kStep, as two 8-column
// halves b[0..1], b[2..3]. m0, n0 and k0 are multiples of 16.
using Fragment = uint32_t[4];

// From tile[m][k].
template <int C> GPU_FN void load_a(Fragment& f, const real* tile, int m0, int k0) {
  const int l = int(threadIdx.x) % 32;
  ldmatrix_x4(f, Swizzle<C>::at(tile + m0 * C, Swizzle<C>::lane(l % 16, l / 16), k0 / kChunk));
}
// From tile[n][k].
template <int C> GPU_FN void load_b(Fragment& f, const real* tile, int n0, int k0) {
  const int l = int(threadIdx.x) % 32;
  ldmatrix_x4(f, Swizzle<C>::at(tile + n0 * C, Swizzle<C>::lane(l / 16 * 8 + l % 8, l / 8 % 2), k0 / kChunk));
}
// Element [row][column0 + g + 8 i] of an f32 tile; column0 is a multiple of 16, row of the tile.
template <int C> GPU_FN uint32_t element(const real* tile, int row, int column0, int i) {
  const int g = int(threadIdx.x) % 32 / 4;
  const real* chunk = Swizzle<C>::at(tile, Swizzle<C>::lane(row, g / kChunk), (column0 + 8 * i) / kChunk);
  return __float_as_uint(float(chunk[g % kChunk]));
}
// From tile[k][m]. For f32, thread t of a quad takes k0 + 2t and k0 + 2t + 1 instead of k0 + t and
// k0 + t + 4: the order of an accumulator's columns (accumulator_to_a). A sum has no order, but
// both operands must agree: pair load_a_t with load_b_t.
template <int C> GPU_FN void load_a_t(Fragment& f, const real* tile, int m0, int k0) {
  const int l = int(threadIdx.x) % 32;
  if constexpr (kIsBf16) {
    ldmatrix_x4_trans(f, Swizzle<C>::at(tile + k0 * C, Swizzle<C>::lane(l / 16 * 8 + l % 8, l / 8 % 2), m0 / kChunk));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = element<C>(tile + k0 * C, 2 * (l % 4) + i / 2, m0, i % 2);
  }
}
// From tile[k][n], in the same order.
template <int C> GPU_FN void load_b_t(Fragment& f, const real* tile, int n0, int k0) {
  const int l = int(threadIdx.x) % 32;
  if constexpr (kIsBf16) {
    ldmatrix_x4_trans(f, Swizzle<C>::at(tile + k0 * C, Swizzle<C>::lane(l % 16, l / 16), n0 / kChunk));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = element<C>(tile + k0 * C, 2 * (l % 4) + i % 2, n0, i / 2);
  }
}
// From tile[k][n] in ascending order of k, to go with load_a.
template <int C> GPU_FN void load_b_columns(Fragment& f, const real* tile, int n0, int k0) {
  const int l = int(threadIdx.x) % 32;
  if constexpr (kIsBf16) {
    load_b_t<C>(f, tile, n0, k0);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = element<C>(tile + k0 * C, l % 4 + i % 2 * 4, n0, i / 2);
  }
}

// The A operand of columns k0 .. k0 + kStep of a product's accumulators c[n8][4] (n8 counts
// 8-column tiles), to be used with load_b_t. bf16: two neighbouring accumulator tiles, rounded;
// f32: one.
template <int N8> GPU_FN void accumulator_to_a(Fragment& f, const float (&c)[N8][4], int step) {
  if constexpr (kIsBf16) {
    f[0] = pack_bf16(c[2 * step][0], c[2 * step][1]);
    f[1] = pack_bf16(c[2 * step][2], c[2 * step][3]);
    f[2] = pack_bf16(c[2 * step + 1][0], c[2 * step + 1][1]);
    f[3] = pack_bf16(c[2 * step + 1][2], c[2 * step + 1][3]);
  } else {
    f[0] = __float_as_uint(c[step][0]);
    f[1] = __float_as_uint(c[step][2]);
    f[2] = __float_as_uint(c[step][1]);
    f[3] = __float_as_uint(c[step][3]);
  }
}

// A few steps of a product on their way to c[16][8]. Tensor cores cut what they add
// (emulator/tensor_core.hpp), so that a long sum inside them loses f32's accuracy: for f32 they sum
// a few steps from zero, and c is added to outside.
struct Sum {
  float (&c)[4];
  float inside[4] = {};

  // += a b over kStep.
  GPU_FN void add(const Fragment& a, uint32_t b0, uint32_t b1) {
    if constexpr (kIsBf16) {
      mma_bf16(c, a, b0, b1);
    } else {
      Fragment big, small;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        big[i] = to_tf32(__uint_as_float(a[i]));
        small[i] = to_tf32(__uint_as_float(a[i]) - __uint_as_float(big[i]));
      }
      const uint32_t big0 = to_tf32(__uint_as_float(b0)), small0 = to_tf32(__uint_as_float(b0) - __uint_as_float(big0));
      const uint32_t big1 = to_tf32(__uint_as_float(b1)), small1 = to_tf32(__uint_as_float(b1) - __uint_as_float(big1));
      mma_tf32(inside, small, big0, big1);
      mma_tf32(inside, big, small0, small1);
      mma_tf32(inside, big, big0, big1);
    }
  }
  GPU_FN void finish() {
    if constexpr (!kIsBf16) {
#pragma unroll
      for (int i = 0; i < 4; i++) c[i] += inside[i];
    }
  }
};
// c[16][8] += a b over kStep.
GPU_FN void multiply_add(float (&c)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  Sum sum{c};
  sum.add(a, b0, b1);
  sum.finish();
}

// wgmma.cuh -- bf16 tiles in shared memory for Hopper's wgmma (gpu.cuh).
//
// A tile is cut into panels of 64 columns, one after another: in a panel a row is a line of 128
// bytes, swizzled as tile.cuh does and as wgmma undoes. Tiles and stages begin at multiples of 1024
// bytes.
#pragma once
#include "tile.cuh"

namespace {
constexpr int kPanel = 64;

// load_tile into panels [C / 64][ROWS][64].
template <int ROWS, int C, int THREADS> GPU_FN void load_panels(real* tile, const Matrix<const real>& from, int row0, int col0) {
#pragma unroll
  for (int c = 0; c < C; c += kPanel) load_tile<ROWS, kPanel, THREADS>(tile + ROWS * c, from, row0, col0 + c);
}

// Element (row, col) of a tile of ROWS rows in panels.
template <int ROWS> GPU_FN int panel_element(int row, int col) {
  return col / kPanel * (ROWS * kPanel) + swizzle<kPanel>(row, col % kPanel);
}

// An operand so many elements on: only the address moves, which the descriptor's lower half holds.
GPU_FN uint64_t moved(uint64_t descriptor, int elements) {
  return descriptor >> 32 << 32 | (uint32_t(descriptor) + uint32_t(elements) * 2 / 16);
}
// The operand from a tile [m or n][k]: from row `first` (a multiple of 8) and column k (of 16) on.
template <int ROWS> GPU_FN uint64_t k_major(const real* tile, int first, int k) {
  return moved(wgmma_descriptor(tile + first * kPanel, 16, 1024), k / kPanel * (ROWS * kPanel) + k % kPanel);
}
// The operand from a tile [k][m or n]: from row k (a multiple of 8) and column `first` (of 64) on.
template <int ROWS> GPU_FN uint64_t mn_major(const real* tile, int first, int k) {
  return moved(wgmma_descriptor(tile + first * ROWS, ROWS * kPanel * 2, 1024), k * kPanel);
}
// Which warpgroup this is, told so that the compiler knows that a warp has one.
GPU_FN int warpgroup() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0); }
}  // namespace

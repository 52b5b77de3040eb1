// ppeg.cu -- y = x + conv7(x) + conv5(x) + conv3(x) + biases on the tokens' square grid (TransMIL,
// Shao et al. 2021, sec. 3.3).
//
// forward   x [first + side^2, c], kernels [c, 49], [c, 25], [c, 9], biases [c] -> y; rows before the grid are copied
// backward  x, dy -> dx =, and partial [parts, 50, c] = sums of the merged kernel's and the biases' gradients
// reduce    partial -> the small kernels' and the biases' gradients (f32) +=
//
// blockIdx = (tile, or part of the tiles in backward; 32 channels; problem). c is a multiple of 16
// bytes; dx is not dy.
#include "depthwise.cuh"

namespace {
constexpr int kTall = 7, kPieces = kChannels / kRealsPerPack;

struct Ppeg {
  Matrix<const real> x;
  Matrix<real> y;
  SmallKernels<const real> kernels;
  const real* biases[3];
  int64_t side;
};
struct Ppegs { Ppeg problem[kProblems]; };

struct PpegGrad {
  Matrix<const real> x, dy;
  Matrix<real> dx;
  SmallKernels<const real> kernels;
  SmallKernels<float> dkernels;
  float* dbiases[3];
  float* partial;
  int64_t side;
};
struct PpegGrads { PpegGrad problem[kProblems]; };

// Starts copying the tile of x, rows of the grid from `grid` on, into shared memory.
GPU_FN void load_window(real* window, const Tile<kTall>& tile, const Matrix<const real>& x, int first, int channel0) {
  tile.each<kPieces, 4>([&](int at, int piece, int token) {
    const int channel = channel0 + piece * kRealsPerPack;
    const bool inside = token >= 0 && channel < x.cols;
    cp_async16(window + at * kChannels + piece * kRealsPerPack, inside ? x.row(first + token) + channel : x.data, inside);
  });
  cp_async_commit();
}

// The rows before the grid, by the blocks of the first tile.
GPU_FN void copy_first(const Matrix<real>& to, const Matrix<const real>& from, int first, int channel) {
  if (blockIdx.x > 0 || channel >= from.cols) return;
  for (int row = int(threadIdx.x) / 32; row < first; row += kWarps) to.row(row)[channel] = from.row(row)[channel];
}
}  // namespace

KERNEL(ppeg_forward, kThreads, const Ppegs ppegs) {
  const Ppeg& p = ppegs.problem[blockIdx.z];
  const int side = int(p.side), channel0 = int(blockIdx.y) * kChannels, first = p.x.rows - side * side;
  if (int(blockIdx.x) >= Tile<kTall>::count(side, side) || channel0 >= p.x.cols) return;
  const Tile<kTall> tile(side, side, int(blockIdx.x));
  SharedMemory shared;
  real* window = shared.take<real>(Tiling<kTall>::kWindow * kChannels);
  float* merged = shared.take<float>(Tiling<kTall>::kTaps * kMergedStride);
  load_window(window, tile, p.x, first, channel0);
  merge<kTall, false>(merged, p.kernels, channel0, p.x.cols);
  const int lane = int(threadIdx.x) % 32, channel = channel0 + lane;
  copy_first(p.y, p.x, first, channel);
  cp_async_wait<0>();
  __syncthreads();
  if (channel >= p.x.cols) return;
  const float bias = float(p.biases[0][channel]) + float(p.biases[1][channel]) + float(p.biases[2][channel]);
  for (int patch = int(threadIdx.x) / 32; patch < Tiling<kTall>::kPatches; patch += kWarps) {
    const int row = tile.patch_row(patch), col = tile.patch_col(patch);
    if (!tile.has(row, col)) continue;
    Patch<kTall> sums = {};
    convolve<kTall, kChannels>(sums, window + tile.window(patch) * kChannels + lane, merged + lane);
#pragma unroll
    for (int r = 0; r < Tiling<kTall>::kPatchRows; r++) {
#pragma unroll
      for (int c = 0; c < Tiling<kTall>::kPatchCols; c++)
        if (tile.has(row + r, col + c)) p.y.row(first + tile.token(row + r, col + c))[channel] = real(sums[r][c] + bias);
    }
  }
}

KERNEL(ppeg_backward, kThreads, const PpegGrads grads) {
  const PpegGrad& p = grads.problem[blockIdx.z];
  const int side = int(p.side), channel0 = int(blockIdx.y) * kChannels, first = p.x.rows - side * side;
  const int tiles = Tile<kTall>::count(side, side), part = int(blockIdx.x), step = parts<kTall>(side, side);
  if (part >= step || channel0 >= p.x.cols) return;
  SharedMemory shared;
  unsigned char* memory = shared.take<unsigned char>(TileBytes<kTall, kChannels * int(sizeof(real))>::value);
  real* window = reinterpret_cast<real*>(memory);
  float* merged = shared.take<float>(Tiling<kTall>::kTaps * kMergedStride);
  merge<kTall, true>(merged, p.kernels, channel0, p.x.cols);
  const int lane = int(threadIdx.x) % 32, channel = channel0 + lane;
  copy_first(p.dx, p.dy, first, channel);

  Gradient<kTall> gradient;
  for (int t = part; t < tiles; t += step) {
    const Tile<kTall> tile(side, side, t);
    load_window(window, tile, p.dy, first, channel0);
    cp_async_wait<0>();
    __syncthreads();
    for (int patch = int(threadIdx.x) / 32; patch < Tiling<kTall>::kPatches; patch += kWarps) {
      const int row = tile.patch_row(patch), col = tile.patch_col(patch);
      if (!tile.has(row, col) || channel >= p.x.cols) continue;
      Patch<kTall> x, dx = {};
#pragma unroll
      for (int r = 0; r < Tiling<kTall>::kPatchRows; r++) {
#pragma unroll
        for (int c = 0; c < Tiling<kTall>::kPatchCols; c++)
          x[r][c] = tile.has(row + r, col + c) ? float(p.x.row(first + tile.token(row + r, col + c))[channel]) : 0.f;
      }
      convolve_back<kTall, kChannels>(dx, gradient, x, window + tile.window(patch) * kChannels + lane, merged + lane);
#pragma unroll
      for (int r = 0; r < Tiling<kTall>::kPatchRows; r++) {
#pragma unroll
        for (int c = 0; c < Tiling<kTall>::kPatchCols; c++)
          if (tile.has(row + r, col + c)) p.dx.row(first + tile.token(row + r, col + c))[channel] = real(dx[r][c]);
      }
    }
    __syncthreads();  // the window is free again
  }
  store_partial<kTall>(gradient, reinterpret_cast<float*>(memory), p.partial, part, channel0, p.x.cols);
}

KERNEL(ppeg_reduce, kThreads, const PpegGrads grads) {
  const PpegGrad& p = grads.problem[blockIdx.z];
  const int side = int(p.side), channels = p.x.cols, i = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (i >= (Tiling<kTall>::kTaps + 1) * channels) return;
  const int tap = i / channels, channel = i % channels;
  const float total = sum_parts<kTall>(p.partial, parts<kTall>(side, side), channels, i);
  if (tap < Tiling<kTall>::kTaps) {
    unmerge<kTall>(p.dkernels, channel, tap, total);
  } else {
    for (int b = 0; b < 3; b++) p.dbiases[b][channel] += total;
  }
}

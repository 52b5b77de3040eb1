// depthwise.cuh -- depthwise convolution of tokens on a grid, channels last: what ppeg.cu and
// conv_fusion.cu share.
//
// A sum of convolutions with 7, 5, 3 and 1 taps a side is one with the merged kernel, TALL x 7
// taps: TALL = 7 on square grids, 1 on sequences (grid height 1). Each small kernel's gradient is
// the centre crop of the merged one's. CPU twin: src/ops/depthwise.rs.
//
// A block takes 32 channels, one a lane, and a tile of tokens, which it holds in shared memory with
// a border of 3 (zero outside the grid). A warp takes patches of 2 x 8 (or 1 x 8) tokens: a row of
// the window is read once into registers and serves the patch's rows, 112 multiply-adds for 14
// reads of inputs and 7 of weights, which is what shared memory can feed.
#pragma once
#include "gpu.cuh"

namespace {
// Launches know these too.
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kChannels = 32;  // of a block
constexpr int kProblems = 4;
constexpr int kMaxParts = 32;  // blocks that share out a problem's tiles in backward
constexpr int kWide = 7;
// Rows of the merged kernel in shared memory: odd, so that neither taps nor channels in sequence
// fall into one bank.
constexpr int kMergedStride = kChannels + 1;

template <int TALL> struct Tiling {
  static constexpr int kTaps = TALL * kWide;
  static constexpr int kPatchRows = TALL == 1 ? 1 : 2, kPatchCols = 8;
  static constexpr int kRows = TALL == 1 ? 1 : 16, kCols = TALL == 1 ? 128 : 16;  // of a tile
  static constexpr int kWindowRows = kRows + TALL - 1, kWindowCols = kCols + kWide - 1, kWindow = kWindowRows * kWindowCols;
  static constexpr int kPatchesAcross = kCols / kPatchCols, kPatches = kRows / kPatchRows * kPatchesAcross;
};

// A value for each token of a patch.
template <int TALL> using Patch = float[Tiling<TALL>::kPatchRows][Tiling<TALL>::kPatchCols];

// A tile's first token, and the grid that it is cut from.
template <int TALL> struct Tile {
  using T = Tiling<TALL>;
  int height, width, row0, col0;

  static GPU_FN int across(int width) { return (width + T::kCols - 1) / T::kCols; }
  static GPU_FN int count(int height, int width) { return (height + T::kRows - 1) / T::kRows * across(width); }
  GPU_FN Tile(int height, int width, int tile)
      : height(height), width(width), row0(tile / across(width) * T::kRows), col0(tile % across(width) * T::kCols) {}

  GPU_FN bool has(int row, int col) const { return row >= 0 && row < height && col >= 0 && col < width; }
  GPU_FN int token(int row, int col) const { return row * width + col; }
  GPU_FN int patch_row(int patch) const { return row0 + patch / T::kPatchesAcross * T::kPatchRows; }
  GPU_FN int patch_col(int patch) const { return col0 + patch % T::kPatchesAcross * T::kPatchCols; }
  // Where a patch's window starts in the tile with its border.
  static GPU_FN int window(int patch) {
    return patch / T::kPatchesAcross * T::kPatchRows * T::kWindowCols + patch % T::kPatchesAcross * T::kPatchCols;
  }

  // visit(position in the window, piece, token), each position split into PIECES; the token is -1
  // outside the grid. UNROLL of them are read at a time, as far as registers reach.
  template <int PIECES, int UNROLL, class Visit> GPU_FN void each(Visit visit) const {
#pragma unroll UNROLL
    for (int i = int(threadIdx.x); i < T::kWindow * PIECES; i += kThreads) {
      const int at = i / PIECES, row = row0 - TALL / 2 + at / T::kWindowCols, col = col0 - kWide / 2 + at % T::kWindowCols;
      visit(at, i % PIECES, has(row, col) ? token(row, col) : -1);
    }
  }
};

// The small kernels [channels, taps], sides 7, 5, 3, 1; null in the last place stands for the
// identity in `merge`.
template <class P> struct SmallKernels { P* side[4]; };

// Where tap `tap` of the merged kernel lies in the small one of side K; -1: nowhere.
template <int TALL, int K> GPU_FN int small_tap(int tap) {
  constexpr int kTall = TALL < K ? TALL : K;
  const int y = tap / kWide - (TALL - kTall) / 2, x = tap % kWide - (kWide - K) / 2;
  return y >= 0 && y < kTall && x >= 0 && x < K ? y * K + x : -1;
}
template <int TALL, int K> GPU_FN float small_weight(const real* kernel, int channel, int tap) {
  const int t = small_tap<TALL, K>(tap);
  return t < 0 ? 0.f : float(kernel[int64_t(channel) * ((TALL < K ? TALL : K) * K) + t]);
}
template <int TALL, int K> GPU_FN void add_small(float* dkernel, int channel, int tap, float value) {
  const int t = small_tap<TALL, K>(tap);
  if (t >= 0) dkernel[int64_t(channel) * ((TALL < K ? TALL : K) * K) + t] += value;
}

// merged[tap][channel] for channels first .. first + 32, zero past the last; FLIP: taps in reverse,
// to carry gradients back.
template <int TALL, bool FLIP>
GPU_FN void merge(float* merged, const SmallKernels<const real>& kernels, int first, int channels) {
  constexpr int kTaps = Tiling<TALL>::kTaps;
  for (int i = int(threadIdx.x); i < kTaps * kChannels; i += kThreads) {
    const int tap = i % kTaps, channel = first + i / kTaps;
    float sum = 0.f;
    if (channel < channels) {
      sum = small_weight<TALL, 7>(kernels.side[0], channel, tap) + small_weight<TALL, 5>(kernels.side[1], channel, tap) +
            small_weight<TALL, 3>(kernels.side[2], channel, tap);
      if (kernels.side[3]) sum += small_weight<TALL, 1>(kernels.side[3], channel, tap);
      else if (tap == kTaps / 2) sum += 1.f;
    }
    merged[(FLIP ? kTaps - 1 - tap : tap) * kMergedStride + i / kTaps] = sum;
  }
}

// Each small kernel's gradient += one tap of the merged one's.
template <int TALL> GPU_FN void unmerge(const SmallKernels<float>& dkernels, int channel, int tap, float value) {
  add_small<TALL, 7>(dkernels.side[0], channel, tap, value);
  add_small<TALL, 5>(dkernels.side[1], channel, tap, value);
  add_small<TALL, 3>(dkernels.side[2], channel, tap, value);
  if (dkernels.side[3]) add_small<TALL, 1>(dkernels.side[3], channel, tap, value);
}

// sums += the convolution of a patch. `window`: its first input, of this thread's channel, STEP
// elements from token to token; `merged`: this thread's channel.
template <int TALL, int STEP, class E> GPU_FN void convolve(Patch<TALL>& sums, const E* window, const float* merged) {
  using T = Tiling<TALL>;
#pragma unroll
  for (int y = 0; y < T::kPatchRows + TALL - 1; y++) {
    float in[T::kPatchCols + kWide - 1];
#pragma unroll
    for (int x = 0; x < T::kPatchCols + kWide - 1; x++) in[x] = float(window[(y * T::kWindowCols + x) * STEP]);
#pragma unroll
    for (int r = 0; r < T::kPatchRows; r++) {
      if (y - r < 0 || y - r >= TALL) continue;
#pragma unroll
      for (int x = 0; x < kWide; x++) {
        const float weight = merged[((y - r) * kWide + x) * kMergedStride];
#pragma unroll
        for (int c = 0; c < T::kPatchCols; c++) sums[r][c] += weight * in[c + x];
      }
    }
  }
}

// The parameters' gradients that a thread gathers over its patches: the merged kernel's, taps in
// reverse, and the bias's.
template <int TALL> struct Gradient {
  float taps[Tiling<TALL>::kTaps] = {};
  float bias = 0.f;
};

// From the window of dy, with `merged` flipped: dx += the convolution, and the gradients += what
// the patch's own x contributes, since sum over t of dy[t] x[t + offset] is the sum over s = t +
// offset of x[s] dy[s - offset]. x is zero outside the grid.
template <int TALL, int STEP, class E>
GPU_FN void convolve_back(Patch<TALL>& dx, Gradient<TALL>& gradient, const Patch<TALL>& x, const E* window, const float* merged) {
  using T = Tiling<TALL>;
#pragma unroll
  for (int y = 0; y < T::kPatchRows + TALL - 1; y++) {
    float dy[T::kPatchCols + kWide - 1];
#pragma unroll
    for (int i = 0; i < T::kPatchCols + kWide - 1; i++) dy[i] = float(window[(y * T::kWindowCols + i) * STEP]);
#pragma unroll
    for (int r = 0; r < T::kPatchRows; r++) {
      if (y - r < 0 || y - r >= TALL) continue;
#pragma unroll
      for (int i = 0; i < kWide; i++) {
        const int tap = (y - r) * kWide + i;
        const float weight = merged[tap * kMergedStride];
#pragma unroll
        for (int c = 0; c < T::kPatchCols; c++) {
          dx[r][c] += weight * dy[c + i];
          gradient.taps[tap] += x[r][c] * dy[c + i];
        }
      }
      if (y - r == TALL / 2) {
#pragma unroll
        for (int c = 0; c < T::kPatchCols; c++) gradient.bias += dy[c + kWide / 2];
      }
    }
  }
}

// The blocks' sums of a problem's gradients: partial[part][tap, and the bias as the last][channel].
template <int TALL> GPU_FN int parts(int height, int width) { return min(Tile<TALL>::count(height, width), kMaxParts); }

// The block's sum of its threads' gradients, by way of `sums`, kWarps * (kTaps + 1) * 32 floats of
// shared memory.
template <int TALL>
GPU_FN void store_partial(const Gradient<TALL>& gradient, float* sums, float* partial, int part, int first, int channels) {
  constexpr int kTaps = Tiling<TALL>::kTaps, kSums = (kTaps + 1) * kChannels;
  const int lane = int(threadIdx.x) % 32;
  float* mine = sums + int(threadIdx.x) / 32 * kSums + lane;
#pragma unroll
  for (int tap = 0; tap < kTaps; tap++) mine[tap * kChannels] = gradient.taps[kTaps - 1 - tap];
  mine[kTaps * kChannels] = gradient.bias;
  __syncthreads();
  if (first + lane >= channels) return;
  for (int i = int(threadIdx.x); i < kSums; i += kThreads) {
    float total = 0.f;
    for (int w = 0; w < kWarps; w++) total += sums[w * kSums + i];
    partial[(int64_t(part) * (kTaps + 1) + i / kChannels) * channels + first + lane] = total;
  }
}

// The sum of element i = tap * channels + channel over the parts, in their order: the same bits on
// every run.
template <int TALL> GPU_FN float sum_parts(const float* partial, int parts, int channels, int i) {
  float total = 0.f;
#pragma unroll 4
  for (int part = 0; part < parts; part++) total += partial[int64_t(part) * (Tiling<TALL>::kTaps + 1) * channels + i];
  return total;
}

// The larger of a tile's inputs, POSITION bytes a token, and the warps' sums, which take their
// place. As in src/ops/depthwise.rs.
template <int TALL, int POSITION> struct TileBytes {
  static constexpr int kTile = Tiling<TALL>::kWindow * POSITION, kSums = kWarps * (Tiling<TALL>::kTaps + 1) * kChannels * 4;
  static constexpr int value = kTile > kSums ? kTile : kSums;
};
}  // namespace

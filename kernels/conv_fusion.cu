// conv_fusion.cu -- the multi-scale fusion block (Soraki et al. 2026): out = F relu(bias + grouped
// convolution of sum_s w_s x_s + w_0).
//
// forward   3 streams [n, d], kernels [d / 2, 2 taps] of sides 7, 5, 3, 1, biases [d / 2], mix weight [3] and bias [1] -> out [n, d / 2]
// backward  streams, out, dout -> dstreams =, and sums of the merged kernel's and the bias's gradients, partial [parts, taps + 1, d],
//           and of the mix's, mix_partial [parts, groups of 32 channels, 4]
// reduce    partial, mix_partial -> the parameters' gradients (f32) +=
//
// Channels 2j and 2j + 1 make output j, so that a group's kernel is two depthwise ones. F_j is the
// factor of column j in row 0. "_single": one stream and no mix, so that mixed is the stream.
// "_sequence": grid height 1, kernels of 7, 5, 3, 1 taps. blockIdx = (tile, or part of the tiles in
// backward; 32 channels). d / 2 is a multiple of 16 bytes. The streams are mixed as they are loaded
// and kept in f32: that rounds nothing and what shared memory costs is not what limits the kernel.
#include "depthwise.cuh"
#include "dropout.cuh"

namespace {
constexpr int kStreams = 3, kOutputs = kChannels / 2;

struct Fusion {
  Matrix<const real> streams[kStreams];
  Matrix<real> out;
  SmallKernels<const real> kernels;
  const real* biases[4];
  const real *mix_weight, *mix_bias;
  Dropout dropout;
  int32_t height, width;
};

struct FusionGrad {
  Fusion forward;
  Matrix<const real> dout;
  Matrix<real> dstreams[kStreams];
  SmallKernels<float> dkernels;
  float* dbiases[4];
  float *dmix_weight, *dmix_bias;
  float *partial, *mix_partial;
};

// What the streams are weighed by: for a single one nothing.
template <int STREAMS> struct Mix {
  float weight[STREAMS], offset = 0.f;
  GPU_FN explicit Mix(const Fusion& p) {
    for (int s = 0; s < STREAMS; s++) weight[s] = STREAMS == kStreams ? float(p.mix_weight[s]) : 1.f;
    if (STREAMS == kStreams) offset = float(p.mix_bias[0]);
  }
};

GPU_FN float channel_factor(const Dropout& dropout, int j) {
  return dropout.threshold == 0 ? 1.f : dropout_factor(drawn(dropout), 0, uint32_t(j));
}

template <int TALL, int STREAMS> GPU_FN void forward(const Fusion& p) {
  using T = Tiling<TALL>;
  constexpr int kPieces = kChannels / kRealsPerPack;
  const int d = p.streams[0].cols, channel0 = int(blockIdx.y) * kChannels;
  const Tile<TALL> tile(p.height, p.width, int(blockIdx.x));
  SharedMemory shared;
  float* window = shared.take<float>(T::kWindow * kChannels);
  float* merged = shared.take<float>(T::kTaps * kMergedStride);
  const Mix<STREAMS> mix(p);
  // outside the grid is zero and not w_0
  tile.template each<kPieces, 4>([&](int at, int piece, int token) {
    const int channel = channel0 + piece * kRealsPerPack;
    float mixed[kRealsPerPack] = {};
    if (token >= 0 && channel < d) {
      for (int e = 0; e < kRealsPerPack; e++) mixed[e] = mix.offset;
      for (int s = 0; s < STREAMS; s++) {
        const auto x = load<kRealsPerPack>(p.streams[s].row(token) + channel);
        for (int e = 0; e < kRealsPerPack; e++) mixed[e] += mix.weight[s] * float(x.v[e]);
      }
    }
    for (int e = 0; e < kRealsPerPack; e += 4)
      store<4>(window + at * kChannels + piece * kRealsPerPack + e, Pack<float, 4>{{mixed[e], mixed[e + 1], mixed[e + 2], mixed[e + 3]}});
  });
  merge<TALL, false>(merged, p.kernels, channel0, d);
  __syncthreads();
  const int lane = int(threadIdx.x) % 32, channel = channel0 + lane, j = channel / 2;
  float bias = 0.f, factor = 0.f;
  if (channel < d) {
    bias = float(p.biases[0][j]) + float(p.biases[1][j]) + float(p.biases[2][j]) + float(p.biases[3][j]);
    factor = channel_factor(p.dropout, j);
  }
  for (int patch = int(threadIdx.x) / 32; patch < T::kPatches; patch += kWarps) {
    const int row = tile.patch_row(patch), col = tile.patch_col(patch);
    if (!tile.has(row, col)) continue;
    Patch<TALL> sums = {};
    convolve<TALL, kChannels>(sums, window + tile.window(patch) * kChannels + lane, merged + lane);
#pragma unroll
    for (int r = 0; r < T::kPatchRows; r++) {
#pragma unroll
      for (int c = 0; c < T::kPatchCols; c++) {
        const float sum = sums[r][c] + __shfl_xor_sync(0xffffffffu, sums[r][c], 1) + bias;
        // written so that NaN passes
        if (lane % 2 == 0 && channel < d && tile.has(row + r, col + c))
          p.out.row(tile.token(row + r, col + c))[j] = real(sum < 0.f ? 0.f : sum * factor);
      }
    }
  }
}

template <int TALL, int STREAMS> GPU_FN void backward(const FusionGrad& grad) {
  using T = Tiling<TALL>;
  constexpr int kPieces = kOutputs / kRealsPerPack;
  const Fusion& p = grad.forward;
  const int d = p.streams[0].cols, channel0 = int(blockIdx.y) * kChannels, part = int(blockIdx.x);
  const int tiles = Tile<TALL>::count(p.height, p.width), step = parts<TALL>(p.height, p.width);
  SharedMemory shared;
  // the gradient of the sums under the ReLU, 16 outputs a token; then the warps' sums
  float* window = shared.take<float>(TileBytes<TALL, kOutputs * 4>::value / 4);
  float* merged = shared.take<float>(T::kTaps * kMergedStride);
  float* factors = shared.take<float>(kOutputs);
  float* mix_sums = shared.take<float>(kWarps * (kStreams + 1));
  if (int(threadIdx.x) < kOutputs) factors[threadIdx.x] = channel_factor(p.dropout, channel0 / 2 + int(threadIdx.x));
  merge<TALL, true>(merged, p.kernels, channel0, d);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, channel = channel0 + lane;
  const Mix<STREAMS> mix(p);

  Gradient<TALL> gradient;
  float dmix[STREAMS + 1] = {};
  for (int t = part; t < tiles; t += step) {
    const Tile<TALL> tile(p.height, p.width, t);
    __syncthreads();  // the factors are there, the window is free
    tile.template each<kPieces, TALL == 1 ? 1 : 4>([&](int at, int piece, int token) {
      const int j = channel0 / 2 + piece * kRealsPerPack;
      float dsum[kRealsPerPack] = {};
      if (token >= 0 && j < p.out.cols) {
        const auto out = load<kRealsPerPack>(p.out.row(token) + j);
        const auto dout = load<kRealsPerPack>(grad.dout.row(token) + j);
        for (int e = 0; e < kRealsPerPack; e++)
          dsum[e] = float(out.v[e]) > 0.f ? float(dout.v[e]) * factors[piece * kRealsPerPack + e] : 0.f;
      }
      for (int e = 0; e < kRealsPerPack; e += 4)
        store<4>(window + at * kOutputs + piece * kRealsPerPack + e, Pack<float, 4>{{dsum[e], dsum[e + 1], dsum[e + 2], dsum[e + 3]}});
    });
    __syncthreads();
#pragma unroll 1
    for (int patch = warp; patch < T::kPatches; patch += kWarps) {
      const int row = tile.patch_row(patch), col = tile.patch_col(patch);
      if (!tile.has(row, col) || channel >= d) continue;
      Patch<TALL> mixed, dmixed = {};
#pragma unroll
      for (int r = 0; r < T::kPatchRows; r++) {
#pragma unroll
        for (int c = 0; c < T::kPatchCols; c++) {
          mixed[r][c] = 0.f;
          if (!tile.has(row + r, col + c)) continue;
          mixed[r][c] = mix.offset;
#pragma unroll
          for (int s = 0; s < STREAMS; s++)
            mixed[r][c] += mix.weight[s] * float(p.streams[s].row(tile.token(row + r, col + c))[channel]);
        }
      }
      convolve_back<TALL, kOutputs>(dmixed, gradient, mixed, window + tile.window(patch) * kOutputs + lane / 2, merged + lane);
#pragma unroll
      for (int r = 0; r < T::kPatchRows; r++) {
#pragma unroll
        for (int c = 0; c < T::kPatchCols; c++) {
          if (!tile.has(row + r, col + c)) continue;
          const int token = tile.token(row + r, col + c);
#pragma unroll
          for (int s = 0; s < STREAMS; s++) {
            // read again, from L1
            dmix[s] += dmixed[r][c] * float(p.streams[s].row(token)[channel]);
            grad.dstreams[s].row(token)[channel] = real(mix.weight[s] * dmixed[r][c]);
          }
          dmix[STREAMS] += dmixed[r][c];
        }
      }
    }
  }
  if constexpr (STREAMS == kStreams) {
#pragma unroll
    for (int s = 0; s <= kStreams; s++) {
      const float sum = warp_sum(dmix[s]);
      if (lane == 0) mix_sums[warp * (kStreams + 1) + s] = sum;
    }
  }
  __syncthreads();  // also: the window is free for the sums
  if (STREAMS == kStreams && int(threadIdx.x) <= kStreams) {
    float total = 0.f;
    for (int w = 0; w < kWarps; w++) total += mix_sums[w * (kStreams + 1) + int(threadIdx.x)];
    grad.mix_partial[(int64_t(part) * gridDim.y + blockIdx.y) * (kStreams + 1) + threadIdx.x] = total;
  }
  store_partial<TALL>(gradient, window, grad.partial, part, channel0, d);
}

// The last block sums the mix's gradients, where there is one, a warp each: kWarps = kStreams + 1.
template <int TALL, int STREAMS> GPU_FN void reduce(const FusionGrad& grad) {
  static_assert(kWarps == kStreams + 1);
  using T = Tiling<TALL>;
  const Fusion& p = grad.forward;
  const int d = p.streams[0].cols, i = int(blockIdx.x) * kThreads + int(threadIdx.x);
  const int count = parts<TALL>(p.height, p.width);
  if (STREAMS == kStreams && blockIdx.x == gridDim.x - 1) {
    const int lane = int(threadIdx.x) % 32, s = int(threadIdx.x) / 32, blocks = count * ((d + kChannels - 1) / kChannels);
    float sum = 0.f;
    for (int b = lane; b < blocks; b += 32) sum += grad.mix_partial[int64_t(b) * (kStreams + 1) + s];
    sum = warp_sum(sum);
    if (lane == 0) *(s < kStreams ? grad.dmix_weight + s : grad.dmix_bias) += sum;
    return;
  }
  if (i >= (T::kTaps + 1) * d) return;
  const int tap = i / d, channel = i % d;
  const float total = sum_parts<TALL>(grad.partial, count, d, i);
  if (tap < T::kTaps) {
    unmerge<TALL>(grad.dkernels, channel, tap, total);
  } else if (channel % 2 == 0) {  // the other channel of the pair has the same sum
    for (int b = 0; b < 4; b++) grad.dbiases[b][channel / 2] += total;
  }
}
}  // namespace

KERNEL(conv_fusion_forward, kThreads, const Fusion p) { forward<7, kStreams>(p); }
KERNEL(conv_fusion_forward_sequence, kThreads, const Fusion p) { forward<1, kStreams>(p); }
KERNEL(conv_fusion_forward_single, kThreads, const Fusion p) { forward<7, 1>(p); }
KERNEL(conv_fusion_forward_single_sequence, kThreads, const Fusion p) { forward<1, 1>(p); }
KERNEL(conv_fusion_backward, kThreads, const FusionGrad p) { backward<7, kStreams>(p); }
KERNEL(conv_fusion_backward_sequence, kThreads, const FusionGrad p) { backward<1, kStreams>(p); }
KERNEL(conv_fusion_backward_single, kThreads, const FusionGrad p) { backward<7, 1>(p); }
KERNEL(conv_fusion_backward_single_sequence, kThreads, const FusionGrad p) { backward<1, 1>(p); }
KERNEL(conv_fusion_reduce, kThreads, const FusionGrad p) { reduce<7, kStreams>(p); }
KERNEL(conv_fusion_reduce_sequence, kThreads, const FusionGrad p) { reduce<1, kStreams>(p); }
KERNEL(conv_fusion_reduce_single, kThreads, const FusionGrad p) { reduce<7, 1>(p); }
KERNEL(conv_fusion_reduce_single_sequence, kThreads, const FusionGrad p) { reduce<1, 1>(p); }

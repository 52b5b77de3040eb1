// dropout.cuh -- the draws of src/ops/dropout.rs, where the law is stated: an element's fate is a
// pure function of (seed, step, site, row, column).
#pragma once
#include "gpu.cuh"

// `KernelDropout` of src/ops/dropout.rs.
struct Dropout {
  uint64_t seed;
  uint32_t step, site;
  uint32_t threshold;  // an element whose 16-bit draw is below is dropped; 0: none is
  float scale;         // of the others
  uint32_t first_row;  // of the whole tensor, where the tensor at hand is a part of its rows
  uint32_t padding;
  const uint64_t* draw;  // [2], the seed and the step that hold instead; null: those above
};

// The seed and the step of this launch: a captured graph reads new ones whenever it is launched.
GPU_FN Dropout drawn(Dropout dropout) {
  if (dropout.threshold && dropout.draw) {
    dropout.seed = dropout.draw[0];
    dropout.step = uint32_t(dropout.draw[1]);
  }
  return dropout;
}

struct PhiloxWords { uint32_t word[4]; };

// Philox4x32 with 7 rounds: eight 16-bit draws.
GPU_FN PhiloxWords philox(const Dropout& dropout, uint32_t row, uint32_t call) {
  uint32_t c0 = call, c1 = dropout.first_row + row, c2 = dropout.site, c3 = dropout.step;
  uint32_t k0 = uint32_t(dropout.seed), k1 = uint32_t(dropout.seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; round++) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The factors of columns 32 block + 8 w + 2 t + {0, 1}, w < 4, as factors[w][.]: what thread t of a
// quad holds of a row of a tensor-core accumulator, four 8-column tiles wide. One call of the
// generator.
GPU_FN void dropout_fragment(const Dropout& dropout, uint32_t row, uint32_t block, int t, float (&factors)[4][2]) {
  const PhiloxWords draws = philox(dropout, row, block * 4 + uint32_t(t));
#pragma unroll
  for (int w = 0; w < 4; w++) {
    factors[w][0] = (draws.word[w] & 0xffffu) < dropout.threshold ? 0.f : dropout.scale;
    factors[w][1] = (draws.word[w] >> 16) < dropout.threshold ? 0.f : dropout.scale;
  }
}

// Which of columns 32 block + 8 t .. + 8 of a row are kept, bit by bit, for thread t of a quad.
// Each thread of the quad draws once, as a fragment holds the columns, and the quad exchanges what
// it drew: the whole warp must call.
GPU_FN uint32_t dropout_kept_eight(const Dropout& dropout, uint32_t row, uint32_t block) {
  const int lane = int(threadIdx.x) % 32, t = lane % 4;
  const PhiloxWords draws = philox(dropout, row, block * 4 + uint32_t(t));
  uint32_t mine = 0, kept = 0;
#pragma unroll
  for (int w = 0; w < 4; w++) {
    mine |= uint32_t((draws.word[w] & 0xffffu) >= dropout.threshold) << (2 * w);
    mine |= uint32_t((draws.word[w] >> 16) >= dropout.threshold) << (2 * w + 1);
  }
#pragma unroll
  for (int s = 0; s < 4; s++) kept |= (__shfl_sync(0xffffffffu, mine, (lane & ~3) + s) >> (2 * t) & 3u) << (2 * s);
  return kept;
}

// One element's factor, for kernels that are not made of such fragments.
GPU_FN float dropout_factor(const Dropout& dropout, uint32_t row, uint32_t col) {
  const PhiloxWords draws = philox(dropout, row, col / 32 * 4 + col / 2 % 4);
  const uint32_t word = col / 8 % 4, pair = word == 0 ? draws.word[0] : word == 1 ? draws.word[1] : word == 2 ? draws.word[2] : draws.word[3];
  return (col % 2 ? pair >> 16 : pair & 0xffffu) < dropout.threshold ? 0.f : dropout.scale;
}

// probes.cu -- small kernels that each show one feature: tests run them on the emulator, and on a
// GPU where there is one.
#include "dropout.cuh"

// ---- fragment layouts ---------------------------------------------------------------------------
// Registers come straight from arrays [lane][register]; the test scatters matrices into them by layouts stated
// elsewhere, so that kernel and test do not share one reading of the PTX manual.
template <bool TF32> GPU_FN void probe_mma(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = int(threadIdx.x);
  uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; i++) ra[i] = a[lane * 4 + i], rd[i] = d[lane * 4 + i];
  for (int i = 0; i < 2; i++) rb[i] = b[lane * 2 + i];
  if (TF32) mma_tf32(rd, ra, rb[0], rb[1]);
  else mma_bf16(rd, ra, rb[0], rb[1]);
  for (int i = 0; i < 4; i++) d[lane * 4 + i] = rd[i];
}
KERNEL(probe_mma_bf16, 32, const uint32_t* a, const uint32_t* b, float* d) { probe_mma<false>(a, b, d); }
KERNEL(probe_mma_tf32, 32, const uint32_t* a, const uint32_t* b, float* d) { probe_mma<true>(a, b, d); }

// in: 32 rows of 8
template <bool TRANS> GPU_FN void probe_ldmatrix_any(const uint16_t* in, uint32_t* out) {
  SharedMemory shared;
  uint16_t* s = shared.take<uint16_t>(256);
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 8; i++) s[lane * 8 + i] = in[lane * 8 + i];
  __syncwarp();
  uint32_t r[4];
  if (TRANS) ldmatrix_x4_trans(r, s + lane * 8);
  else ldmatrix_x4(r, s + lane * 8);
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = r[i];
}
KERNEL(probe_ldmatrix, 32, const uint16_t* in, uint32_t* out) { probe_ldmatrix_any<false>(in, out); }
KERNEL(probe_ldmatrix_trans, 32, const uint16_t* in, uint32_t* out) { probe_ldmatrix_any<true>(in, out); }

// One wgmma on images of shared memory, 16 KiB each; d [thread][64]. Bytes of the descriptors of a
// and b.
struct WgmmaPlaces { uint32_t a_start, a_leading, a_stride, b_start, b_leading, b_stride; };
constexpr int kImage = 4096;  // words

template <bool A_MN, bool B_MN, bool FROM_REGISTERS = false>
GPU_FN void probe_wgmma_any(const uint32_t* a, const uint32_t* b, float* d, const WgmmaPlaces& p) {
  if constexpr (kHasWgmma) {
    SharedMemory shared;
    uint32_t* images = shared.take<uint32_t>(2 * kImage, 1024);
    const char *image_a = reinterpret_cast<const char*>(images), *image_b = image_a + 4 * kImage;
    const int t = int(threadIdx.x);
    for (int i = t; i < kImage; i += 128) {
      images[i] = a[i];
      images[kImage + i] = b[i];
    }
    fence_proxy_async();
    __syncthreads();
    float rd[16][4];
#pragma unroll
    for (int i = 0; i < 64; i++) rd[i / 4][i % 4] = d[t * 64 + i];
    uint32_t ra[4];
#pragma unroll
    for (int i = 0; i < 4; i++) ra[i] = a[t * 4 + i];
    const uint64_t db = wgmma_descriptor(image_b + p.b_start, p.b_leading, p.b_stride);
    wgmma_fence();
    if constexpr (FROM_REGISTERS) wgmma<B_MN>(rd, ra, db, true);
    else wgmma<A_MN, B_MN>(rd, wgmma_descriptor(image_a + p.a_start, p.a_leading, p.a_stride), db, true);
    wgmma_commit();
    wgmma_wait<0>(rd);
#pragma unroll
    for (int i = 0; i < 64; i++) d[t * 64 + i] = rd[i / 4][i % 4];
  } else {
    __trap();
  }
}
KERNEL(probe_wgmma, 128, const uint32_t* a, const uint32_t* b, float* d, const WgmmaPlaces p) {
  probe_wgmma_any<kKMajor, kKMajor>(a, b, d, p);
}
KERNEL(probe_wgmma_b_mn, 128, const uint32_t* a, const uint32_t* b, float* d, const WgmmaPlaces p) {
  probe_wgmma_any<kKMajor, kMnMajor>(a, b, d, p);
}
KERNEL(probe_wgmma_both_mn, 128, const uint32_t* a, const uint32_t* b, float* d, const WgmmaPlaces p) {
  probe_wgmma_any<kMnMajor, kMnMajor>(a, b, d, p);
}
// a [thread][4]
KERNEL(probe_wgmma_registers, 128, const uint32_t* a, const uint32_t* b, float* d, const WgmmaPlaces p) {
  probe_wgmma_any<kKMajor, kMnMajor, true>(a, b, d, p);
}

// ---- arithmetic ---------------------------------------------------------------------------------
KERNEL(probe_convert, 256, const float* x, uint32_t* bf16_bits, uint32_t* tf32_bits, float* exp2, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  bf16_bits[i] = pack_bf16(x[i], -x[i]);
  tf32_bits[i] = to_tf32(x[i]);
  exp2[i] = fast_exp2(x[i]);
}

// ---- bugs: each kernel is right with BUG = 0; the detectors must object to every other one ------
// out[0] = sum of in + sum of in^2 over the block's 256 threads, out[1] = sum of the first 64 elements.
// BUG: 1 no barrier after the partial sums, 2 none before the second pass reuses them, 3 a warp-synchronous tail without
// __syncwarp, 4 a barrier that half of the threads reach elsewhere, 5 a shuffle whose mask lacks the caller.
template <int BUG> GPU_FN void probe_block_sum(const float* in, float* out, int n) {
  SHARED_ARRAY(float, partial, [8]);
  SHARED_ARRAY(float, tree, [64]);
  const int t = int(threadIdx.x);
  float total = 0.f;
  for (int pass = 0; pass < 2; pass++) {
    float s = 0.f;
    for (int i = t; i < n; i += 256) s += pass ? in[i] * in[i] : in[i];
    for (int d = 16; d > 0; d /= 2) s += __shfl_down_sync(BUG == 5 ? 0xffffu : 0xffffffffu, s, unsigned(d));
    if (t % 32 == 0) partial[t / 32] = s;
    if (BUG == 4 && t < 128) __syncthreads();
    else if (BUG != 1) __syncthreads();
    for (int w = 0; w < 8; w++) total += partial[w];
    if (BUG != 2) __syncthreads();
  }
  if (t < 64) tree[t] = in[t];
  __syncthreads();
  if (t < 32) {
    for (int d = 32; d > 0; d /= 2) {
      const float x = t < d ? tree[t] + tree[t + d] : 0.f;
      if (BUG != 3) __syncwarp();
      if (t < d) tree[t] = x;
      if (BUG != 3) __syncwarp();
    }
    if (t == 0) out[0] = total, out[1] = tree[0];
  }
}
KERNEL(probe_sum, 256, const float* in, float* out, int n) { probe_block_sum<0>(in, out, n); }
KERNEL(probe_sum_bug1, 256, const float* in, float* out, int n) { probe_block_sum<1>(in, out, n); }
KERNEL(probe_sum_bug2, 256, const float* in, float* out, int n) { probe_block_sum<2>(in, out, n); }
KERNEL(probe_sum_bug3, 256, const float* in, float* out, int n) { probe_block_sum<3>(in, out, n); }
KERNEL(probe_sum_bug4, 256, const float* in, float* out, int n) { probe_block_sum<4>(in, out, n); }
KERNEL(probe_sum_bug5, 256, const float* in, float* out, int n) { probe_block_sum<5>(in, out, n); }

// out = each block's 64 elements reversed, through cp.async. BUG: 1 no wait, 2 no barrier after it,
// 3 reads what nobody wrote, 4 past the array, 5 writes past out, 6 a misaligned copy, 7 a copy
// that nobody waits for.
template <int BUG> GPU_FN void probe_reverse_any(const float* in, float* out, int n) {
  SharedMemory shared;
  float* s = shared.take<float>(64);
  const int t = int(threadIdx.x), i = int(blockIdx.x) * 64 + t;
  if (BUG == 6) cp_async16(s + t / 4 * 4, in + 1);
  if (BUG != 3) cp_async4(s + t, i < n ? in + i : in, i < n);
  cp_async_commit();
  if (BUG != 1) cp_async_wait<0>();
  if (BUG != 2) __syncthreads();
  if (i < n || BUG == 5) out[i] = s[BUG == 4 ? 64 - t : 63 - t];
  if (BUG == 7) cp_async4(s + t, in);
}
KERNEL(probe_reverse, 64, const float* in, float* out, int n) { probe_reverse_any<0>(in, out, n); }
KERNEL(probe_reverse_bug1, 64, const float* in, float* out, int n) { probe_reverse_any<1>(in, out, n); }
KERNEL(probe_reverse_bug2, 64, const float* in, float* out, int n) { probe_reverse_any<2>(in, out, n); }
KERNEL(probe_reverse_bug3, 64, const float* in, float* out, int n) { probe_reverse_any<3>(in, out, n); }
KERNEL(probe_reverse_bug4, 64, const float* in, float* out, int n) { probe_reverse_any<4>(in, out, n); }
KERNEL(probe_reverse_bug5, 64, const float* in, float* out, int n) { probe_reverse_any<5>(in, out, n); }
KERNEL(probe_reverse_bug6, 64, const float* in, float* out, int n) { probe_reverse_any<6>(in, out, n); }
KERNEL(probe_reverse_bug7, 64, const float* in, float* out, int n) { probe_reverse_any<7>(in, out, n); }

// Warp 0 produces, warp 1 consumes and reverses 32 elements at a time: one slot, named barriers 1
// (full) and 2 (empty). BUG: 1 the consumer says that the slot is empty before it has read it, 2
// the producer never says that it is full.
template <int BUG> GPU_FN void probe_handoff_any(const float* in, float* out, int n) {
  SHARED_ARRAY(float, slot, [32]);
  const int lane = int(threadIdx.x) % 32;
  for (int i = 0; i < n; i++) {
    if (threadIdx.x < 32) {
      named_barrier_sync(2, 64);
      slot[lane] = in[i * 32 + lane];
      if (BUG != 2) named_barrier_arrive(1, 64);
    } else {
      if (BUG != 1 || i == 0) named_barrier_arrive(2, 64);
      named_barrier_sync(1, 64);
      if (BUG == 1 && i + 1 < n) named_barrier_arrive(2, 64);
      out[i * 32 + lane] = slot[31 - lane];
      __syncwarp();
    }
  }
}
KERNEL(probe_handoff, 64, const float* in, float* out, int n) { probe_handoff_any<0>(in, out, n); }
KERNEL(probe_handoff_bug1, 64, const float* in, float* out, int n) { probe_handoff_any<1>(in, out, n); }
KERNEL(probe_handoff_bug2, 64, const float* in, float* out, int n) { probe_handoff_any<2>(in, out, n); }

// out [thread][64] = the sum over n images x [128][64] of x[.. 64, .. 16] x[.., .. 16]^T: one stage
// of cp.async, one wgmma each. BUG: 1 fence.proxy.async before the copy has landed, 2 no
// wgmma.fence, 3 a wait for the last product only, 4 no barrier behind the wait, 5 no wait for the
// last product.
template <int BUG> GPU_FN void probe_wgmma_stream_any(const float* in, float* out, int n) {
  if constexpr (kHasWgmma) {
    SharedMemory shared;
    float* image = shared.take<float>(kImage, 1024);
    const int t = int(threadIdx.x);
    float d[16][4] = {};
    for (int i = 0; i < n; i++) {
      for (int e = 4 * t; e < kImage; e += 4 * 128) cp_async16(image + e, in + i * kImage + e);
      cp_async_commit();
      if (BUG == 1) fence_proxy_async();
      cp_async_wait<0>();
      if (BUG != 1) fence_proxy_async();
      __syncthreads();
      const uint64_t x = wgmma_descriptor(image, 16, 1024);
      if (BUG != 2) wgmma_fence();
      wgmma<kKMajor, kKMajor>(d, x, x, true);
      wgmma_commit();
      const bool last = i + 1 == n;
      if (BUG == 3 ? last : BUG == 5 ? !last : true) wgmma_wait<0>(d);
      if (BUG != 4) __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 64; i++) out[t * 64 + i] = d[i / 4][i % 4];
  } else {
    __trap();
  }
}
KERNEL(probe_wgmma_stream, 128, const float* in, float* out, int n) { probe_wgmma_stream_any<0>(in, out, n); }
KERNEL(probe_wgmma_stream_bug1, 128, const float* in, float* out, int n) { probe_wgmma_stream_any<1>(in, out, n); }
KERNEL(probe_wgmma_stream_bug2, 128, const float* in, float* out, int n) { probe_wgmma_stream_any<2>(in, out, n); }
KERNEL(probe_wgmma_stream_bug3, 128, const float* in, float* out, int n) { probe_wgmma_stream_any<3>(in, out, n); }
KERNEL(probe_wgmma_stream_bug4, 128, const float* in, float* out, int n) { probe_wgmma_stream_any<4>(in, out, n); }
KERNEL(probe_wgmma_stream_bug5, 128, const float* in, float* out, int n) { probe_wgmma_stream_any<5>(in, out, n); }

// counts[0] = how many of the n threads there are, counts[1] = the set bits of their numbers; the
// threads past n leave before the barrier. BUG: 1 added without atomics.
template <int BUG> GPU_FN void probe_count_any(int* counts, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  __syncthreads();
  if (BUG == 1) counts[0] += 1;
  else atomicAdd(counts, 1);
  atomicAdd(counts + 1, __popc(uint32_t(i)));
}
KERNEL(probe_count, 64, int* counts, int n) { probe_count_any<0>(counts, n); }
KERNEL(probe_count_bug1, 64, int* counts, int n) { probe_count_any<1>(counts, n); }

// Dropout's factors of rows first + blockIdx.x, `cols` of them (a multiple of 256), as each of the
// header's functions tells them.
KERNEL(probe_dropout, 32, const Dropout dropout, int first, int cols, float* by_fragment, float* by_eight, float* singly) {
  const int lane = int(threadIdx.x), t = lane % 4;
  const uint32_t row = uint32_t(first) + blockIdx.x;
  const int64_t start = int64_t(blockIdx.x) * cols;
  for (int c = lane / 4 * 32; c < cols; c += 256) {
    float factors[4][2];
    dropout_fragment(dropout, row, uint32_t(c / 32), t, factors);
    const uint32_t kept = dropout_kept_eight(dropout, row, uint32_t(c / 32));
    for (int e = 0; e < 8; e++) {
      by_fragment[start + c + e / 2 * 8 + 2 * t + e % 2] = factors[e / 2][e % 2];
      by_eight[start + c + 8 * t + e] = kept >> e & 1u ? dropout.scale : 0.f;
      singly[start + c + 8 * t + e] = dropout_factor(dropout, row, uint32_t(c + 8 * t + e));
    }
  }
}

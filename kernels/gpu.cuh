// gpu.cuh -- the one header that kernels include.
//
// Every name below exists twice with one signature: for nvcc as CUDA and inline PTX (sm_80 and
// later), for a host compiler on top of the emulator (emulator/simt.hpp), which needs nothing but
// C++20.
//
// A file is compiled once for each storage type: -DREAL=f32 or -DREAL=bf16. `real` is how
// activations and weights are stored; arithmetic is in float: float(x) loads, real(y) rounds.
//
//   KERNEL(scale, 256, const Matrix<real> x, float factor) { ... }      // launched by Rust as "scale_f32", "scale_bf16"
#pragma once

#include <cstddef>
#include <cstdint>

// Of the kernels' names, grids and parameters, for engines that launch them on their own:
// docs/launching.md. Raised whenever one of those changes; scripts/kernel-layouts.py sees it of names
// and parameters.
constexpr int kAbiVersion = 3;

#define GPU_PASTE_(a, b) a##_##b
#define GPU_PASTE(a, b) GPU_PASTE_(a, b)
#define GPU_STRING_(x) #x
#define GPU_STRING(x) GPU_STRING_(x)
// For #if: whether `real` is bf16.
#define GPU_IS_f32 0
#define GPU_IS_bf16 1
#define REAL_IS_BF16 GPU_PASTE(GPU_IS, REAL)

// How an operand of wgmma lies in shared memory, and what its descriptor's bytes are (CUTLASS, mma_traits_sm90_gmma.hpp, B128):
// kKMajor   a line is 64 neighbours in k; `stride` from 8 lines (rows of m or n) to the next 8, `leading` unused
// kMnMajor  a line is 64 neighbours in m or n; `stride` from 8 lines (of k) to the next 8, `leading` to the next 64 of m or n
constexpr bool kKMajor = false, kMnMajor = true;

// ---- CUDA ---------------------------------------------------------------------------------------
#if defined(__CUDACC__)
#include <cuda_bf16.h>

using f32 = float;
using bf16 = __nv_bfloat16;

#define GPU_FN __device__ __forceinline__
// An entry point, its largest block, its parameters.
#define KERNEL(name, threads, ...) extern "C" __global__ void __launch_bounds__(threads) GPU_PASTE(name, REAL)(__VA_ARGS__)
// The same, where a multiprocessor shall hold at least so many blocks: without it the compiler
// spills registers to hold more.
#define KERNEL_BLOCKS(name, threads, blocks, ...) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) GPU_PASTE(name, REAL)(__VA_ARGS__)
// A static array in shared memory: SHARED_ARRAY(float, partial, [8]);
#define SHARED_ARRAY(type, name, dims) __shared__ type name dims

extern __shared__ __align__(1024) unsigned char gpu_dynamic_shared[];

// Cuts arrays out of the launch's dynamic shared memory, in the same order in every thread.
struct SharedMemory {
  uint32_t used = 0;
  template <class T> GPU_FN T* take(int n, uint32_t align = 128) {
    used = (used + align - 1) & ~(align - 1);
    T* p = reinterpret_cast<T*>(gpu_dynamic_shared + used);
    used += uint32_t(n) * uint32_t(sizeof(T));
    return p;
  }
};

GPU_FN uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Asynchronous copy of 16 bytes, global to shared; zeros where !valid, and src is not read (it must
// be aligned all the same).
GPU_FN void cp_async16(void* dst, const void* src, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
               "r"(valid ? 16 : 0) : "memory");
}
// The same for 4 bytes.
GPU_FN void cp_async4(void* dst, const void* src, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(dst)), "l"(src),
               "r"(valid ? 4 : 0) : "memory");
}
GPU_FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are in flight.
template <int N> GPU_FN void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
GPU_FN void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
GPU_FN void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// D[16][8] += A[16][16] B[16][8], fragments as in the PTX manual.
GPU_FN void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// D[16][8] += A[16][8] B[8][8] in TF32.
GPU_FN void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Barriers 1..15 between `threads` threads of the block; arrive does not wait.
GPU_FN void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
GPU_FN void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- Hopper's own: wgmma, products of a warpgroup -----------------------------------------------
// A warpgroup is four warps, of which the first one's number is divisible by four.
// Only code for sm_90a has them. A kernel that takes them asks kHasWgmma, and traps where it is false.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// Shows what this thread stored to shared memory, or waited for of cp.async, to wgmma ("the async
// proxy"); then comes a barrier.
GPU_FN void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// An operand in shared memory that is swizzled in lines of 128 bytes, 8 lines to 1024 bytes
// (kKMajor and kMnMajor tell the bytes' meaning).
GPU_FN uint64_t wgmma_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  return uint64_t(shared_address(start) >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
// Before the first of a group of products: registers written so far are seen by them.
GPU_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GPU_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define GPU_FOUR(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define GPU_32(d) \
  GPU_FOUR(d, 0), GPU_FOUR(d, 1), GPU_FOUR(d, 2), GPU_FOUR(d, 3), GPU_FOUR(d, 4), GPU_FOUR(d, 5), GPU_FOUR(d, 6), GPU_FOUR(d, 7)
#define GPU_64(d)                                                                                                       \
  GPU_32(d), GPU_FOUR(d, 8), GPU_FOUR(d, 9), GPU_FOUR(d, 10), GPU_FOUR(d, 11), GPU_FOUR(d, 12), GPU_FOUR(d, 13), GPU_FOUR(d, 14), \
      GPU_FOUR(d, 15)
#define GPU_WGMMA_64                                                                                                    \
  "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "                                                               \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
#define GPU_WGMMA_128                                                                                                   \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "                                                              \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"       \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "

// Waits until at most N of the warp's groups are in flight. Names the accumulators, lest the
// compiler read them earlier.
template <int N> GPU_FN void wgmma_wait(float (&d)[16][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : GPU_64(d) : "n"(N) : "memory");
}
template <int N> GPU_FN void wgmma_wait(float (&d)[8][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;" : GPU_32(d) : "n"(N) : "memory");
}
// D[64][128 or 64] (+)= A[64][16] B[16][128 or 64], started: until waited for, d and the operands
// are the tensor cores'. Warp w of the warpgroup has rows 16 w .. + 16, as 16 or 8 accumulators of
// mma_bf16 side by side.
template <bool A, bool B> GPU_FN void wgmma(float (&d)[16][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" GPU_WGMMA_128 "%64, %65, p, 1, 1, %67, %68;\n}"
               : GPU_64(d) : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(A)), "n"(int(B)) : "memory");
}
template <bool A, bool B> GPU_FN void wgmma(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" GPU_WGMMA_64 "%32, %33, p, 1, 1, %35, %36;\n}"
               : GPU_32(d) : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(A)), "n"(int(B)) : "memory");
}
// A from registers, the warp's 16 rows as mma_bf16 takes them.
template <bool B> GPU_FN void wgmma(float (&d)[16][4], uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n" GPU_WGMMA_128 "{%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}"
               : GPU_64(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(B)) : "memory");
}
#undef GPU_FOUR
#undef GPU_32
#undef GPU_64
#undef GPU_WGMMA_64
#undef GPU_WGMMA_128

// 2^x, two ulp.
GPU_FN float fast_exp2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// The nearest TF32, in a float's bits.
GPU_FN uint32_t to_tf32(float x) { uint32_t u; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(x)); return u; }
// Two bf16 in a register, `lo` in the lower half.
GPU_FN uint32_t pack_bf16(float lo, float hi) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&v);
}

// ---- host: the emulator
// ---------------------------------------------------------------------------------
#else
#include "emulator/simt.hpp"
#endif

// ---- both ---------------------------------------------------------------------------------------
using real = REAL;

// A row-major matrix in device memory (`Matrix` of src/device/launch.rs). Rows start `stride`
// elements apart.
template <class T> struct Matrix {
  T* data;
  int64_t stride;
  int32_t rows, cols;
  GPU_FN T* row(int i) const { return data + int64_t(i) * stride; }
};

// V neighbouring elements, moved as one load or store; 16 bytes is the widest.
template <class T, int V> struct alignas(sizeof(T) * V) Pack {
  static_assert(V * sizeof(T) <= 16 && (V & (V - 1)) == 0);
  T v[V];
};
template <int V, class T> GPU_FN Pack<T, V> load(const T* p) { return *reinterpret_cast<const Pack<T, V>*>(p); }
template <int V, class T> GPU_FN void store(T* p, const Pack<T, V>& x) { *reinterpret_cast<Pack<T, V>*>(p) = x; }
// Elements of storage type in 16 bytes.
constexpr int kRealsPerPack = 16 / int(sizeof(real));

// The sum over the warp, the same bits in every lane.
GPU_FN float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

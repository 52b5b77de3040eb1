// gpu.cuh -- the one header that kernels include.
//
// Every name below exists twice with one signature: for nvcc as CUDA and inline PTX (sm_80 and later), for a host
// compiler on top of the emulator (emulator/simt.hpp), which needs nothing but C++20.
//
// A file is compiled once for each storage type: -DREAL=f32 or -DREAL=bf16. `real` is how activations and weights are
// stored; arithmetic is in float: float(x) loads, real(y) rounds.
//
//   KERNEL(scale, 256, const Matrix<real> x, float factor) { ... }      // launched by Rust as "scale_f32", "scale_bf16"
#pragma once

#include <cstddef>
#include <cstdint>

#define GPU_PASTE_(a, b) a##_##b
#define GPU_PASTE(a, b) GPU_PASTE_(a, b)
#define GPU_STRING_(x) #x
#define GPU_STRING(x) GPU_STRING_(x)

#if defined(__CUDACC__)  // ---- CUDA -----------------------------------------------------------------------------
#include <cuda_bf16.h>

using f32 = float;
using bf16 = __nv_bfloat16;

#define GPU_FN __device__ __forceinline__
// An entry point, its largest block, its parameters.
#define KERNEL(name, threads, ...) extern "C" __global__ void __launch_bounds__(threads) GPU_PASTE(name, REAL)(__VA_ARGS__)
// The same, where a multiprocessor shall hold at least so many blocks: without it the compiler spills registers to hold more.
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

// Asynchronous copy of 16 bytes, global to shared; zeros where !valid (src must still be a valid pointer).
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

// 2^x, two ulp.
GPU_FN float fast_exp2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// The nearest TF32, in a float's bits.
GPU_FN uint32_t to_tf32(float x) { uint32_t u; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(x)); return u; }
// Two bf16 in a register, `lo` in the lower half.
GPU_FN uint32_t pack_bf16(float lo, float hi) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&v);
}

#else  // ---- host: the emulator ---------------------------------------------------------------------------------
#include "emulator/simt.hpp"
#endif

// ---- both -------------------------------------------------------------------------------------------------------
using real = REAL;

// A row-major matrix in device memory (`Matrix` of src/device/launch.rs). Rows start `stride` elements apart.
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

// Adds to two neighbouring floats in device memory, each atomically.
GPU_FN void atomic_add_pair(float* to, float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float2*>(to), make_float2(a, b));
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
#endif
}

// The sum over the warp, the same bits in every lane.
GPU_FN float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

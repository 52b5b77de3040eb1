// simt.hpp -- lets CUDA source compile as host C++20 and run on the CPU. Kernels include gpu.cuh,
// whose host half this is.
//
// Every CUDA thread is a fiber. A host thread runs one block at a time; a fiber runs until it
// reaches a barrier or a warp collective, and the scheduler picks another: in order, at random, or
// "skewed", one warp as far ahead as it can get. Collectives (shuffles, ldmatrix, mma.sync ...)
// park a lane until every lane of the mask has arrived; the last one computes the result for all.
//
// Kernel files call nothing of std:: -- in race mode (check.hpp) they are compiled with other flags
// than the runtime, and an inline function of both would be one or the other at the linker's whim.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>
#include <source_location>
#include <type_traits>
#include <utility>

#include "types.hpp"

// the emulator's own accesses, not the kernel's
#define SIMT_RAW __attribute__((no_sanitize("thread")))
#define SIMT_LOC const std::source_location loc = std::source_location::current()

namespace simt {
using Location = std::source_location;

// ---- the thread that runs -----------------------------------------------------------------------
struct BlockInfo { uint3 index; dim3 size, grid; };
struct ThreadInfo { uint3 index; unsigned linear; int lane; BlockInfo* block; };
extern constinit thread_local ThreadInfo* self;

// ---- kernels by name ----------------------------------------------------------------------------
struct Kernel {
  const char* name;
  unsigned max_threads;
  void (*run)(const void* const* args);  // calls the kernel with *args[0], *args[1] ...
  const size_t* sizes;                   // of the parameters
  size_t count;
};
struct Registered { explicit Registered(const Kernel& kernel); };

template <auto F> struct Entry;
template <class... P, void (*F)(P...)> struct Entry<F> {
  static constexpr size_t sizes[] = {sizeof(P)..., 0};
  template <size_t... I> SIMT_RAW static void call(const void* const* args, std::index_sequence<I...>) {
    F(*static_cast<const P*>(args[I])...);
  }
  SIMT_RAW static void run(const void* const* args) { call(args, std::index_sequence_for<P...>{}); }
  static Kernel kernel(const char* name, unsigned max_threads) { return {name, max_threads, run, sizes, sizeof...(P)}; }
};

// ---- the runtime (scheduler.cpp, instructions.cpp) ----------------------------------------------
using Op = void (*)(void* const* lane_arg, uint32_t mask);
// whole_warp: every lane must call from the same place (ldmatrix, mma), not only with the same mask
void collective(uint32_t mask, void* arg, Op op, bool whole_warp, const Location& loc);
void barrier(int id, int count, bool wait, const Location& loc);  // count 0: the whole block
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// `offset`: where the array lies on a GPU; `position`: where it lies here, red zones included,
// moved on
void* take_dynamic(size_t offset, size_t bytes, size_t align, size_t* position);
void* take_static(const void* key, size_t bytes, size_t align);

void cp_async(void* dst, const void* src, int bytes, int src_bytes, const Location& loc);
void cp_async_commit();
void cp_async_wait(int groups_left, const Location& loc);
uint64_t atomic_load(void* p, size_t size, const Location& loc);
bool atomic_cas(void* p, size_t size, uint64_t* old, uint64_t next);

struct ShuffleArg { uint64_t in, out; int source; };
struct VoteArg { int in; uint32_t out; };
struct LdmatrixArg { uint32_t* r; const void* row; bool trans; };
struct MmaArg { float* d; const uint32_t* a; uint32_t b0, b1; };
void op_shuffle(void* const* arg, uint32_t mask);
void op_ballot(void* const* arg, uint32_t mask);
void op_syncwarp(void* const* arg, uint32_t mask);
void op_ldmatrix(void* const* arg, uint32_t mask);
void op_mma_bf16(void* const* arg, uint32_t mask);
void op_mma_tf32(void* const* arg, uint32_t mask);

// wgmma.cpp
struct WgmmaArg {
  float* d;  // of `columns` / 2 numbers
  int columns;
  uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool a_mn_major, b_mn_major, accumulate;
  Location loc;
};
void fence_proxy_async();
uint64_t wgmma_descriptor(const void* start, uint32_t leading, uint32_t stride);
void op_wgmma(void* const* arg, uint32_t mask);
void op_wgmma_fence(void* const* arg, uint32_t mask);
void op_wgmma_commit(void* const* arg, uint32_t mask);
void op_wgmma_wait(void* const* arg, uint32_t mask);

template <class T> T shuffle(uint32_t mask, T v, int source, const Location& loc) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  ShuffleArg a{0, 0, source};
  std::memcpy(&a.in, &v, sizeof v);
  collective(mask, &a, op_shuffle, false, loc);
  std::memcpy(&v, &a.out, sizeof v);
  return v;
}
// Atomic read-modify-write of 4 or 8 bytes; the old value.
template <class T, class F> T atomic_update(T* p, const Location& loc, F next_of) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T old, next;
  uint64_t old_bits = atomic_load(p, sizeof(T), loc), next_bits = 0;
  do {
    std::memcpy(&old, &old_bits, sizeof old);
    next = next_of(old);
    std::memcpy(&next_bits, &next, sizeof next);
  } while (!atomic_cas(p, sizeof(T), &old_bits, next_bits));
  return old;
}
}  // namespace simt

// ---- CUDA's names: only those that kernels use, add lines as needed -----------------------------
#define threadIdx (::simt::self->index)
#define blockIdx (::simt::self->block->index)
#define blockDim (::simt::self->block->size)
#define gridDim (::simt::self->block->grid)

inline void __syncthreads(SIMT_LOC) { simt::barrier(0, 0, true, loc); }
inline void __syncwarp(uint32_t mask = ~0u, SIMT_LOC) { simt::collective(mask, nullptr, simt::op_syncwarp, false, loc); }

template <class T> T __shfl_sync(uint32_t mask, T v, int source, SIMT_LOC) {
  return simt::shuffle(mask, v, source & 31, loc);
}
template <class T> T __shfl_xor_sync(uint32_t mask, T v, int x, SIMT_LOC) {
  return simt::shuffle(mask, v, simt::self->lane ^ x, loc);
}
template <class T> T __shfl_up_sync(uint32_t mask, T v, unsigned d, SIMT_LOC) {
  int lane = simt::self->lane, source = lane - int(d);
  return simt::shuffle(mask, v, source < 0 ? lane : source, loc);
}
template <class T> T __shfl_down_sync(uint32_t mask, T v, unsigned d, SIMT_LOC) {
  int lane = simt::self->lane, source = lane + int(d);
  return simt::shuffle(mask, v, source > 31 ? lane : source, loc);
}
inline uint32_t __ballot_sync(uint32_t mask, int vote, SIMT_LOC) {
  simt::VoteArg a{vote, 0};
  simt::collective(mask, &a, simt::op_ballot, false, loc);
  return a.out;
}

template <class T> T atomicAdd(T* p, std::type_identity_t<T> v, SIMT_LOC) {
  return simt::atomic_update(p, loc, [=](T old) { return old + v; });
}

[[noreturn]] inline void __trap() { simt::fail("trap"); }
template <class T> T max(T a, std::type_identity_t<T> b) { return a < b ? b : a; }
template <class T> T min(T a, std::type_identity_t<T> b) { return b < a ? b : a; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint32_t __float_as_uint(float f) { return __builtin_bit_cast(uint32_t, f); }
inline float __uint_as_float(uint32_t u) { return __builtin_bit_cast(float, u); }

// ---- the wrappers of gpu.cuh --------------------------------------------------------------------
#define GPU_FN inline
#define KERNEL(name, threads, ...)                                                                              \
  static void name(__VA_ARGS__);                                                                                \
  static const ::simt::Registered name##_registered(                                                            \
      ::simt::Entry<name>::kernel(GPU_STRING(name) "_" GPU_STRING(REAL), threads));                             \
  static void name(__VA_ARGS__)
#define KERNEL_BLOCKS(name, threads, blocks, ...) KERNEL(name, threads, __VA_ARGS__)
#define SHARED_ARRAY(type, name, dims)  \
  static const char name##_key = 0;     \
  using name##_type = type dims;        \
  auto& name = *static_cast<name##_type*>(::simt::take_static(&name##_key, sizeof(name##_type), alignof(name##_type)))

struct SharedMemory {
  size_t used = 0, position = 0;
  template <class T> T* take(int n, size_t align = 128) {
    used = (used + align - 1) & ~(align - 1);
    void* p = simt::take_dynamic(used, size_t(n) * sizeof(T), align, &position);
    used += size_t(n) * sizeof(T);
    return static_cast<T*>(p);
  }
};

inline void cp_async16(void* dst, const void* src, bool valid = true, SIMT_LOC) { simt::cp_async(dst, src, 16, valid ? 16 : 0, loc); }
inline void cp_async4(void* dst, const void* src, bool valid = true, SIMT_LOC) { simt::cp_async(dst, src, 4, valid ? 4 : 0, loc); }
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int N> void cp_async_wait(SIMT_LOC) { simt::cp_async_wait(N, loc); }

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_LOC) {
  simt::LdmatrixArg a{r, row, false};
  simt::collective(~0u, &a, simt::op_ldmatrix, true, loc);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_LOC) {
  simt::LdmatrixArg a{r, row, true};
  simt::collective(~0u, &a, simt::op_ldmatrix, true, loc);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_LOC) {
  simt::MmaArg x{d, a, b0, b1};
  simt::collective(~0u, &x, simt::op_mma_bf16, true, loc);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_LOC) {
  simt::MmaArg x{d, a, b0, b1};
  simt::collective(~0u, &x, simt::op_mma_tf32, true, loc);
}
inline void named_barrier_sync(int id, int threads, SIMT_LOC) { simt::barrier(id, threads, true, loc); }
inline void named_barrier_arrive(int id, int threads, SIMT_LOC) { simt::barrier(id, threads, false, loc); }

constexpr bool kHasWgmma = true;
inline void fence_proxy_async() { simt::fence_proxy_async(); }
inline uint64_t wgmma_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  return simt::wgmma_descriptor(start, leading, stride);
}
inline void wgmma_fence(SIMT_LOC) { simt::collective(~0u, nullptr, simt::op_wgmma_fence, true, loc); }
inline void wgmma_commit(SIMT_LOC) { simt::collective(~0u, nullptr, simt::op_wgmma_commit, true, loc); }
template <int N, int N8> void wgmma_wait(float (&)[N8][4], SIMT_LOC) {
  int left = N;
  simt::collective(~0u, &left, simt::op_wgmma_wait, true, loc);
}
template <bool A, bool B, int N8>
void wgmma(float (&d)[N8][4], uint64_t a, uint64_t b, bool accumulate, SIMT_LOC) {
  static_assert(N8 == 8 || N8 == 16);
  simt::WgmmaArg x{&d[0][0], 8 * N8, nullptr, a, b, A, B, accumulate, loc};
  simt::collective(~0u, &x, simt::op_wgmma, true, loc);
}
template <bool B> void wgmma(float (&d)[16][4], uint32_t (&a)[4], uint64_t b, bool accumulate, SIMT_LOC) {
  simt::WgmmaArg x{&d[0][0], 128, a, 0, b, false, B, accumulate, loc};
  simt::collective(~0u, &x, simt::op_wgmma, true, loc);
}

inline float fast_exp2(float x) { return exp2f(x); }
inline uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }
inline uint32_t pack_bf16(float lo, float hi) { return uint32_t(bf16(lo).bits) | uint32_t(bf16(hi).bits) << 16; }

// check.hpp -- race, bounds and initialisation checks ("compute-sanitizer on the CPU").
//
// In race mode (-DSIMT_RACE) kernel files are compiled with -fsanitize=thread,undefined, so that
// the compiler calls __tsan_readN / __tsan_writeN before every load and store. check.cpp defines
// those symbols itself, no sanitizer runtime is linked, and checks each access. Without SIMT_RACE
// everything here is empty.
#pragma once
#include <cstddef>
#include <cstdint>

#include "simt.hpp"

namespace simt::check {
enum Access { Read, Write, Atomic, CopyIssued, WgmmaIssued, WgmmaDone };  // the last two: reads
#if defined(SIMT_RACE)
inline constexpr bool enabled = true;
void launch_begin();
void block_begin(int threads, const void* shared, size_t bytes);
void shared_valid(size_t offset, size_t bytes);  // an array lies here
// the running thread tells the barrier what it knows ...
void arrive(int barrier);
void leave(int barrier, unsigned thread);        // ... this one learns what all arrivals knew ...
void forget(int barrier);                        // ... and the barrier is free again
void join_lanes(unsigned warp, uint32_t mask);   // __syncwarp
void proxy_fence();                              // the running thread's writes so far, to wgmma
// where the running thread makes the accesses that follow
void at(const Location& loc);
void access(const void* p, size_t bytes, Access kind);
#else
inline constexpr bool enabled = false;
inline void launch_begin() {}
inline void block_begin(int, const void*, size_t) {}
inline void shared_valid(size_t, size_t) {}
inline void arrive(int) {}
inline void leave(int, unsigned) {}
inline void forget(int) {}
inline void join_lanes(unsigned, uint32_t) {}
inline void proxy_fence() {}
inline void at(const Location&) {}
inline void access(const void*, size_t, Access) {}
#endif
}  // namespace simt::check

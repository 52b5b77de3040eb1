// banks.hpp -- counts bank conflicts in shared memory; empty outside race mode.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt::banks {
#if defined(SIMT_RACE)
// of shared memory, by the running thread
void access(const void* p, size_t bytes, uintptr_t place);
void block_end();
#else
inline void access(const void*, size_t, uintptr_t) {}
inline void block_end() {}
#endif
}  // namespace simt::banks

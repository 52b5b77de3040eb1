// instructions.cpp -- shared memory, cp.async, atomics, shuffles, ldmatrix and mma.sync.
#include <algorithm>
#include <bit>

#include "banks.hpp"
#include "runtime.hpp"
#include "tensor_core.hpp"

namespace simt {

// ---- shared memory ------------------------------------------------------------------------------
void* take_dynamic(size_t offset, size_t bytes, size_t align, size_t* position) {
  Worker& w = *worker;
  if (offset + bytes > w.launch->call.shared_bytes)
    fail("shared arrays need %zu bytes, the launch gives %u", offset + bytes, w.launch->call.shared_bytes);
  const size_t at = (*position + align - 1) / align * align;
  *position = (at + bytes + kRedZone + 127) / 128 * 128;
  if (*position > w.static_begin) fail("too many arrays in shared memory for the emulator's red zones");
  if (at >= w.dynamic_end) {  // the first thread to get here
    w.dynamic_end = at + bytes;
    check::shared_valid(at, bytes);
  }
  return w.shared + at;
}
void* take_static(const void* key, size_t bytes, size_t align) {
  Worker& w = *worker;
  for (auto& [k, p] : w.statics) if (k == key) return p;
  align = std::max<size_t>(align, 16);
  const size_t at = (w.static_end + align - 1) / align * align;
  w.static_end = (at + bytes + kRedZone + 127) / 128 * 128;
  if (w.static_end > w.shared_bytes) fail("static shared arrays exceed %zu bytes", kStaticLimit);
  check::shared_valid(at, bytes);
  w.statics.emplace_back(key, w.shared + at);
  return w.shared + at;
}

// ---- cp.async: from issue until the thread's own wait the destination reads as NaN --------------
void cp_async(void* dst, const void* src, int bytes, int src_bytes, const Location& loc) {
  auto misaligned = [&](const void* p) { return uintptr_t(p) % unsigned(bytes) != 0; };
  if (misaligned(dst) || misaligned(src) || !worker->in_shared(dst))
    fail("%s:%u: cp.async of %d bytes from %p to %p, which must be aligned and in shared memory", loc.file_name(), loc.line(),
         bytes, src, dst);
  check::at(loc);
  check::access(dst, size_t(bytes), check::CopyIssued);
  banks::access(dst, size_t(bytes), std::bit_cast<uintptr_t>(loc));
  if (src_bytes) check::access(src, size_t(src_bytes), check::Read);
  std::memset(dst, 0xff, size_t(bytes));
  worker->running().copies.back().push_back({dst, src, bytes, src_bytes, loc});
  worker->stats.copies++;
}
void cp_async_commit() { worker->running().copies.emplace_back(); }
void cp_async_wait(int groups_left, const Location& loc) {
  check::at(loc);
  auto& groups = worker->running().copies;
  while (int(groups.size()) - 1 > groups_left) {
    for (const Copy& c : groups.front()) {
      check::access(c.dst, size_t(c.bytes), check::Write);
      std::memcpy(c.dst, c.src, size_t(c.src_bytes));
      std::memset(static_cast<char*>(c.dst) + c.src_bytes, 0, size_t(c.bytes - c.src_bytes));
    }
    groups.erase(groups.begin());
  }
}

// ---- atomics ------------------------------------------------------------------------------------
uint64_t atomic_load(void* p, size_t size, const Location& loc) {
  if (uintptr_t(p) % size) fail("%s:%u: misaligned atomic on %p", loc.file_name(), loc.line(), p);
  check::at(loc);
  check::access(p, size, check::Atomic);
  worker->stats.atomics++;
  return size == 4 ? __atomic_load_n(static_cast<uint32_t*>(p), __ATOMIC_RELAXED)
                   : __atomic_load_n(static_cast<uint64_t*>(p), __ATOMIC_RELAXED);
}
bool atomic_cas(void* p, size_t size, uint64_t* old, uint64_t next) {
  if (size == 8)
    return __atomic_compare_exchange_n(static_cast<uint64_t*>(p), old, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  uint32_t old32 = uint32_t(*old);
  bool done = __atomic_compare_exchange_n(static_cast<uint32_t*>(p), &old32, uint32_t(next), false, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED);
  *old = old32;
  return done;
}

// ---- shuffles and votes -------------------------------------------------------------------------
void op_shuffle(void* const* arg, uint32_t mask) {
  for (int l = 0; l < 32; l++) if (mask >> l & 1) {
    auto& a = *static_cast<ShuffleArg*>(arg[l]);
    if (!(mask >> a.source & 1)) fail("shuffle: lane %d reads lane %d, which is not in mask %08x", l, a.source, mask);
    a.out = static_cast<ShuffleArg*>(arg[a.source])->in;
  }
}
void op_ballot(void* const* arg, uint32_t mask) {
  uint32_t votes = 0;
  for (int l = 0; l < 32; l++) if (mask >> l & 1) votes |= uint32_t(static_cast<VoteArg*>(arg[l])->in != 0) << l;
  for (int l = 0; l < 32; l++) if (mask >> l & 1) static_cast<VoteArg*>(arg[l])->out = votes;
}
void op_syncwarp(void* const*, uint32_t) {}  // the race checker knows it by its address

// ---- ldmatrix and mma.sync ----------------------------------------------------------------------
void op_ldmatrix(void* const* arg, uint32_t) {
  auto lane = [&](int l) -> LdmatrixArg& { return *static_cast<LdmatrixArg*>(arg[l]); };
  ThreadInfo* const caller = self;
  const unsigned warp = caller->linear / 32 * 32;
  for (int m = 0; m < 4; m++) {
    uint16_t e[8][8];
    int uses[8] = {};  // of each group of four banks
    for (int r = 0; r < 8; r++) {
      const void* p = lane(m * 8 + r).row;
      if (uintptr_t(p) % 16 || !worker->in_shared(p))
        fail("ldmatrix: the row of lane %d at %p is not 16-byte aligned in shared memory", m * 8 + r, p);
      self = &worker->threads[warp + unsigned(m * 8 + r)];  // who reads, for the race checker
      check::access(p, 16, check::Read);
      self = caller;
      std::memcpy(e[r], p, 16);
      uses[uintptr_t(p) / 16 % 8]++;
    }
    worker->stats.ldmatrix_conflicts += uint64_t(*std::max_element(uses, uses + 8) - 1);
    for (int l = 0; l < 32; l++) {
      const int r = l / 4, c = l % 4 * 2;
      lane(l).r[m] = lane(0).trans ? uint32_t(e[c][r]) | uint32_t(e[c + 1][r]) << 16
                                   : uint32_t(e[r][c]) | uint32_t(e[r][c + 1]) << 16;
    }
  }
  worker->stats.ldmatrix++;
}

// D += A[16][K] B[K][8]; decode(register, e) is the e-th element of a register.
template <int K, class Decode> static void mma_16x8(void* const* arg, Decode decode) {
  constexpr int E = K == 16 ? 2 : 1;
  Operands<16, 8, K> x;
  float c[16][8];
  auto lane = [&](int l) -> MmaArg& { return *static_cast<MmaArg*>(arg[l]); };
  for (int l = 0; l < 32; l++) {
    const int g = l / 4, t = l % 4;
    const MmaArg& own = lane(l);
    for (int e = 0; e < E; e++)
      for (int half = 0; half < 2; half++) {  // of k
        const int k = t * E + e + half * K / 2;
        x.a[k][g] = decode(own.a[half * 2], e);
        x.a[k][g + 8] = decode(own.a[half * 2 + 1], e);
        x.b[k][g] = decode(half ? own.b1 : own.b0, e);
      }
    for (int i = 0; i < 4; i++) c[g + i / 2 * 8][t * 2 + i % 2] = own.d[i];
  }
  x.prepare();
  for (int i = 0; i < 16; i++) multiply_row(c[i], x, i);
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) lane(l).d[i] = c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  worker->stats.mma++;
}
void op_mma_bf16(void* const* arg, uint32_t) {
  mma_16x8<16>(arg, [](uint32_t r, int e) { return std::bit_cast<float>(e ? r & 0xffff0000u : r << 16); });
}
void op_mma_tf32(void* const* arg, uint32_t) {  // the tensor core reads the top 19 bits
  mma_16x8<8>(arg, [](uint32_t r, int) { return std::bit_cast<float>(r & 0xffffe000u); });
}

}  // namespace simt

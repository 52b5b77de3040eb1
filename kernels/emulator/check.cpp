// check.cpp -- see check.hpp. Happens-before by vector clocks, as in FastTrack (Flanagan and Freund
// 2009): each thread has a clock; a barrier or __syncwarp joins the clocks of those who took part.
// Each pair of bytes of shared memory and of registered memory remembers its last write and its
// last two readers.
#include "check.hpp"

#include "banks.hpp"
#include "runtime.hpp"

#if !defined(SIMT_RACE)

extern "C" void simt_register(const void*, size_t) {}
extern "C" void simt_unregister(const void*) {}

#else

#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <map>
#include <memory>

// this library, by the linker
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;

namespace simt::check {
namespace {

constexpr size_t kGranule = 2;  // bytes to a cell: the smallest element
enum : uint8_t { Untouched, Written, InFlight };
struct Cell {
  uint32_t write_block = 0, write_clock = 0, read_block = 0, read_clock[2] = {0, 0};
  uint16_t writer = 0, reader[2] = {0, 0};
  uint16_t wgmma = 0;  // in flight that read it
  bool atomic = false, valid = false;
  uint8_t state = Untouched;
  uintptr_t write_place = 0, read_place = 0;
};
// A place in the source is an instruction's address, or with the top bit set a
// std::source_location, which is a pointer.
static_assert(sizeof(Location) == sizeof(uintptr_t));
constexpr uintptr_t kIsLocation = uintptr_t(1) << 63;
struct Memory { size_t bytes; std::vector<Cell> cells; };
using Map = std::map<uintptr_t, std::shared_ptr<Memory>>;  // by first address
Map registered;
std::mutex registered_mutex;
std::atomic<uint32_t> block_serial{0};  // blocks that ever ran

// The books of the launch that this host thread runs.
struct Books {
  Map memory;
  uint32_t before_launch = 0, block = 0;  // serials
  size_t threads = 0;
  uintptr_t shared = 0;
  std::vector<Cell> cells;                // of shared memory
  // one vector for each thread, each barrier, and __syncwarp
  std::vector<uint32_t> clocks;
  std::vector<std::vector<uint32_t>> fences;  // of each thread: its clock at each fence.proxy.async
  uintptr_t place = 0;                    // of the access under check
  uint32_t* clock(size_t i) { return clocks.data() + i * threads; }
  uint32_t* barrier_clock(int id) { return clock(threads + size_t(id)); }
};
constinit thread_local Books* books = nullptr;
Books& own_books() {
  static thread_local Books own;
  return own;
}
constexpr int kSyncwarp = 16;
const char* const kAccessNames[] = {"read", "write", "atomic", "cp.async", "read by wgmma", "read by wgmma"};

// file:line; of an instruction, that of the innermost inlined frame that is not the emulator's.
std::string where(uintptr_t place) {
  if (place & kIsLocation) {
    const Location loc = std::bit_cast<Location>(place & ~kIsLocation);
    return std::string(loc.file_name()) + ":" + std::to_string(loc.line());
  }
  Dl_info info;
  if (!place || !dladdr(&__ehdr_start, &info)) return "?";
  char command[1200], line[1000];
  std::snprintf(command, sizeof command, "addr2line -ie '%s' 0x%zx 2>/dev/null", info.dli_fname,
                size_t(place - uintptr_t(&__ehdr_start) - 1));
  std::string found = "?";
  if (FILE* f = popen(command, "r")) {
    while (std::fgets(line, sizeof line, f)) {
      found = line;
      found.erase(std::min(found.find_first_of(" \n"), found.size()));  // " (discriminator 2)"
      if (size_t at = found.rfind("kernels/"); at != std::string::npos) found.erase(0, at);
      if (found.find("kernels/emulator/") == std::string::npos && found.find("gpu.cuh") == std::string::npos) break;
    }
    while (std::fgets(line, sizeof line, f)) {}
    pclose(f);
  }
  return found;
}

bool is_read(Access kind) { return kind == Read || kind == WgmmaIssued || kind == WgmmaDone; }

void touch(Cell& c, Access kind, const void* p, const char* space) {
  Books& b = *books;
  const unsigned t = self->linear;
  const uint32_t* known = b.clock(t);
  auto race = [&](const char* what, unsigned other, uint32_t block, uintptr_t place) {
    if (block != b.block)
      fail("RACE between blocks: %s of %s memory %p at %s conflicts with a %s at %s", kAccessNames[kind], space, p,
           where(b.place).c_str(), what, where(place).c_str());
    fail("RACE: %s of %s memory %p at %s is not ordered after a %s by thread %u at %s", kAccessNames[kind], space, p,
         where(b.place).c_str(), what, other, where(place).c_str());
  };
  if (c.write_block > b.before_launch && !(kind == Atomic && c.atomic) &&
      (c.write_block != b.block || (c.writer != t && known[c.writer] < c.write_clock)))
    race(c.atomic ? "atomic" : "write", c.writer, c.write_block, c.write_place);
  if (is_read(kind)) {
    if (c.read_block != b.block) { c.read_block = b.block; c.read_clock[0] = c.read_clock[1] = 0; }
    const int slot = c.read_clock[0] && c.reader[0] != t && known[c.reader[0]] < c.read_clock[0];
    c.reader[slot] = uint16_t(t);
    c.read_clock[slot] = known[t];
    c.read_place = b.place;
    return;
  }
  if (c.read_block > b.before_launch) {
    if (c.read_block != b.block) race("read", 0, c.read_block, c.read_place);
    for (int s = 0; s < 2; s++)
      if (c.read_clock[s] && c.reader[s] != t && known[c.reader[s]] < c.read_clock[s])
        race("read", c.reader[s], c.read_block, c.read_place);
  }
  c.write_block = b.block;
  c.writer = uint16_t(t);
  c.write_clock = known[t];
  c.atomic = kind == Atomic;
  c.state = kind == CopyIssued ? InFlight : Written;
  c.write_place = b.place;
}
// wgmma sees a write only if its thread has a fence.proxy.async between it and what made the reader
// know of it.
bool shown_to_wgmma(const Cell& c) {
  const auto& fences = books->fences[c.writer];
  const auto after = std::lower_bound(fences.begin(), fences.end(), c.write_clock);
  return after != fences.end() && *after <= books->clock(self->linear)[c.writer];
}
void merge(uint32_t* to, const uint32_t* from) {
  for (size_t i = 0; i < books->threads; i++) to[i] = std::max(to[i], from[i]);
}
}  // namespace

void launch_begin() {
  books = &own_books();
  books->before_launch = block_serial;
  std::lock_guard guard(registered_mutex);
  books->memory = registered;
}
void block_begin(int threads, const void* shared, size_t bytes) {
  Books& b = *books;
  b.block = ++block_serial;
  b.threads = size_t(threads);
  b.shared = uintptr_t(shared);
  b.cells.assign(bytes / kGranule, Cell{});
  b.clocks.assign((b.threads + kSyncwarp + 1) * b.threads, 0);
  for (size_t i = 0; i < b.threads; i++) b.clock(i)[i] = 1;
  b.fences.assign(b.threads, {});
}
void shared_valid(size_t offset, size_t bytes) {
  for (size_t i = offset / kGranule; i < (offset + bytes + kGranule - 1) / kGranule; i++) books->cells[i].valid = true;
}
void arrive(int barrier) {
  const unsigned t = self->linear;
  merge(books->barrier_clock(barrier), books->clock(t));
  books->clock(t)[t]++;
}
void leave(int barrier, unsigned thread) { merge(books->clock(thread), books->barrier_clock(barrier)); }
void forget(int barrier) { std::fill_n(books->barrier_clock(barrier), books->threads, 0u); }
void join_lanes(unsigned warp, uint32_t mask) {
  auto each = [&](auto f) { for (unsigned l = 0; l < 32; l++) if (mask >> l & 1) f(warp * 32 + l); };
  each([&](unsigned t) { merge(books->barrier_clock(kSyncwarp), books->clock(t)); });
  each([&](unsigned t) { leave(kSyncwarp, t); books->clock(t)[t]++; });
  forget(kSyncwarp);
}
void proxy_fence() {
  const unsigned t = self->linear;
  books->fences[t].push_back(books->clock(t)[t]++);  // later writes are not of its time
}

void at(const Location& loc) { books->place = std::bit_cast<uintptr_t>(loc) | kIsLocation; }
void access(const void* ptr, size_t bytes, Access kind) {
  if (!self || worker->in_private(ptr)) return;
  Books& b = *books;
  const uintptr_t p = uintptr_t(ptr);
  if (worker->in_shared(ptr)) {
    for (size_t at = p - b.shared, end = at + bytes; at < end; at += kGranule) {
      if (at / kGranule >= b.cells.size() || !b.cells[at / kGranule].valid)
        fail("%s outside every shared array at offset %zu (%s)", kAccessNames[kind], at, where(b.place).c_str());
      Cell& c = b.cells[at / kGranule];
      if (is_read(kind) && c.state == InFlight)
        fail("read of shared memory that a cp.async is still writing, offset %zu (%s)", at, where(b.place).c_str());
      if ((is_read(kind) || kind == Atomic) && c.state == Untouched)
        fail("read of shared memory that nobody wrote, offset %zu (%s)", at, where(b.place).c_str());
      if (!is_read(kind) && c.wgmma)
        fail("%s of shared memory that a wgmma is still reading, offset %zu (%s)", kAccessNames[kind], at, where(b.place).c_str());
      touch(c, kind, ptr, "shared");
      if (kind == WgmmaIssued && !shown_to_wgmma(c))
        fail("wgmma reads shared memory without a fence.proxy.async since the write by thread %u at %s, offset %zu (%s)", c.writer,
             where(c.write_place).c_str(), at, where(b.place).c_str());
      if (kind == WgmmaIssued) c.wgmma++;
      if (kind == WgmmaDone) c.wgmma--;
    }
    return;
  }
  if (p >= uintptr_t(&__ehdr_start) && p < uintptr_t(&_end)) return;  // constants
  auto it = b.memory.upper_bound(p);
  if (it == b.memory.begin() || p + bytes > (--it)->first + it->second->bytes)
    fail("%s of %zu bytes at %p is outside every buffer (%s)", kAccessNames[kind], bytes, ptr, where(b.place).c_str());
  for (size_t at = p - it->first, end = at + bytes; at < end; at += kGranule)
    touch(it->second->cells[at / kGranule], kind, ptr, "global");
}

static void hook(const void* p, size_t bytes, Access kind, bool aligned, void* pc) {
  if (!self || worker->in_private(p)) return;  // on a stack the compiler joins copies as it likes
  books->place = uintptr_t(pc);
  if (aligned && uintptr_t(p) % bytes) fail("misaligned %s of %zu bytes at %p (%s)", kAccessNames[kind], bytes, p, where(uintptr_t(pc)).c_str());
  access(p, bytes, kind);
  if (worker->in_shared(p)) banks::access(p, bytes, uintptr_t(pc));
}
static void undefined(const char* what, const void* data) {
  struct Place { const char* file; uint32_t line, column; };
  auto* place = static_cast<const Place*>(data);
  if (self) fail("undefined behaviour: %s at %s:%u:%u", what, place->file, place->line, place->column);
}

}  // namespace simt::check

extern "C" {
void simt_register(const void* p, size_t bytes) {
  using namespace simt::check;
  auto memory = std::make_shared<Memory>(Memory{bytes, std::vector<Cell>(bytes / kGranule + 1)});
  std::lock_guard guard(registered_mutex);
  registered[uintptr_t(p)] = std::move(memory);
}
void simt_unregister(const void* p) {
  std::lock_guard guard(simt::check::registered_mutex);
  simt::check::registered.erase(uintptr_t(p));
}

// The compiler's calls for -fsanitize=thread.
#define HOOK(name, bytes, kind, aligned) \
  void __tsan_##name(void* p) { simt::check::hook(p, bytes, simt::check::kind, aligned, __builtin_return_address(0)); }
HOOK(read1, 1, Read, true) HOOK(read2, 2, Read, true) HOOK(read4, 4, Read, true) HOOK(read8, 8, Read, true)
HOOK(read16, 16, Read, true)
HOOK(write1, 1, Write, true) HOOK(write2, 2, Write, true) HOOK(write4, 4, Write, true) HOOK(write8, 8, Write, true)
HOOK(write16, 16, Write, true)
HOOK(unaligned_read2, 2, Read, false) HOOK(unaligned_read4, 4, Read, false) HOOK(unaligned_read8, 8, Read, false)
HOOK(unaligned_read16, 16, Read, false)
HOOK(unaligned_write2, 2, Write, false) HOOK(unaligned_write4, 4, Write, false) HOOK(unaligned_write8, 8, Write, false)
HOOK(unaligned_write16, 16, Write, false)
void __tsan_read_range(void* p, size_t n) { simt::check::hook(p, n, simt::check::Read, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { simt::check::hook(p, n, simt::check::Write, false, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// The compiler's calls for -fsanitize=undefined -fno-sanitize-recover; every handler's data begins
// with the place.
#define UNDEFINED(name) void __ubsan_handle_##name##_abort(const void* data) { simt::check::undefined(#name, data); }
UNDEFINED(type_mismatch_v1) UNDEFINED(out_of_bounds) UNDEFINED(shift_out_of_bounds) UNDEFINED(divrem_overflow)
UNDEFINED(add_overflow) UNDEFINED(sub_overflow) UNDEFINED(mul_overflow) UNDEFINED(negate_overflow)
UNDEFINED(pointer_overflow) UNDEFINED(load_invalid_value) UNDEFINED(float_cast_overflow) UNDEFINED(nonnull_arg)
UNDEFINED(invalid_builtin)
void __ubsan_handle_builtin_unreachable(const void* data) { simt::check::undefined("unreachable code", data); }
void __ubsan_handle_missing_return(const void* data) { simt::check::undefined("missing return", data); }
}
#endif

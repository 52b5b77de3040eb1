// wgmma.cpp -- Hopper's asynchronous products of a warpgroup: m64n128k16 and m64n64k16 in bf16,
// 128-byte swizzle.
//
// Each warp computes its 16 rows on its own. A product runs at some moment between issue and wait,
// in order of issue: until the wait the accumulators read as NaN in the lanes, and shared memory
// that is written meanwhile is read as it then is. In race mode a write to what a product in flight
// reads is an error, and so is reading what was not shown by fence.proxy.async.
#include <algorithm>
#include <bit>
#include <cmath>

#include "runtime.hpp"
#include "tensor_core.hpp"

namespace simt {

void fence_proxy_async() { check::proxy_fence(); }

uint64_t wgmma_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  const uint64_t at = uint64_t(static_cast<const unsigned char*>(start) - worker->shared);
  if (!worker->in_shared(start) || at % 16 || at >> 18 || leading % 16 || stride % 16)
    fail("wgmma descriptor: %p, %u, %u: not 16-byte aligned in shared memory", start, leading, stride);
  return at >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// Calls each(address, i, k) for the 16-byte chunks of rows (or columns) first .. first + count of
// an operand: eight elements from (i, k) on, along k or along i. The layouts are CUTLASS's
// canonical ones; then bits 7 to 9 of the address go into bits 4 to 6.
template <class Each> static void each_chunk(uint64_t descriptor, bool mn_major, int first, int count, Each each) {
  const auto field = [&](int bit) { return size_t(descriptor >> bit & 0x3fff) << 4; };
  const size_t start = field(0), leading = field(16), stride = field(32);
  auto chunk = [&](size_t offset, int i, int k) {
    const size_t at = start + offset;
    each(worker->shared + (at ^ (at >> 7 & 7) << 4), i, k);
  };
  if (!mn_major) {
    for (int i = first; i < first + count; i++)
      for (int k = 0; k < 16; k += 8) chunk(size_t(i / 8) * stride + size_t(i % 8) * 128 + size_t(k) * 2, i - first, k);
  } else {
    for (int k = 0; k < 16; k++)
      for (int i = first; i < first + count; i += 8)
        chunk(size_t(i / 64) * leading + size_t(k / 8) * stride + size_t(k % 8) * 128 + size_t(i % 64) * 2, i - first, k);
  }
}
template <int MOST> static void read(float (&to)[16][MOST], uint64_t descriptor, bool mn_major, int first, int count) {
  each_chunk(descriptor, mn_major, first, count, [&](const void* p, int i, int k) {
    uint16_t e[8];
    std::memcpy(e, p, 16);
    for (int x = 0; x < 8; x++) {
      const float value = std::bit_cast<float>(uint32_t(e[x]) << 16);
      (mn_major ? to[k][i + x] : to[k + x][i]) = value;
    }
  });
}
static int rows_of(unsigned thread) { return int(thread / 32 % 4) * 16; }

// Tells the race checker, for the warp's first lane, that a product begins or has ended to read.
static void tell(const Wgmma& p, check::Access kind) {
  if (!check::enabled) return;
  ThreadInfo* const caller = std::exchange(self, &worker->threads[self->linear / 32 * 32]);
  check::at(p.arg.loc);
  auto access = [&](const void* at, int, int) { check::access(at, 16, kind); };
  if (!p.arg.a) each_chunk(p.arg.a_descriptor, p.arg.a_mn_major, rows_of(self->linear), 16, access);
  each_chunk(p.arg.b_descriptor, p.arg.b_mn_major, 0, p.arg.columns, access);
  self = caller;
}

// Row and column of a warp's i-th accumulator, or of element i of its A registers.
static int row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
static int column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

static void run(Wgmma& p, Accumulators& c) {
  Operands<16, 128, 16> x{};  // what lies past the columns is zero
  if (p.arg.a) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 8; i++)
        x.a[column(l, i)][row(l, i)] = std::bit_cast<float>(i % 2 ? p.a[l][i / 2] & 0xffff0000u : p.a[l][i / 2] << 16);
  } else {
    read(x.a, p.arg.a_descriptor, p.arg.a_mn_major, rows_of(self->linear), 16);
  }
  read(x.b, p.arg.b_descriptor, p.arg.b_mn_major, 0, p.arg.columns);
  x.prepare();
  for (int i = 0; i < 16; i++) {
    if (!p.arg.accumulate) std::fill_n(c.value[i], 128, 0.f);
    multiply_row(c.value[i], x, i);
  }
  p.done = true;
  worker->stats.mma += unsigned(p.arg.columns) / 8;
}
static Accumulators* find(Wgmmas& w, const float* lane0) {
  for (Accumulators& c : w.accumulators) if (c.lane[0] == lane0) return &c;
  return nullptr;
}

void op_wgmma(void* const* arg, uint32_t) {
  auto lane = [&](int l) -> const WgmmaArg& { return *static_cast<const WgmmaArg*>(arg[l]); };
  const WgmmaArg& x = lane(0);
  const unsigned warp = self->linear / 32;
  Wgmmas& w = worker->warps[warp].wgmma;
  if (worker->count < int(warp / 4 + 1) * 128) fail("wgmma: warp %u has no whole warpgroup", warp);
  if (!w.fenced) fail("%s:%u: the first wgmma of a group without a wgmma.fence", x.loc.file_name(), x.loc.line());
  auto same = [](const WgmmaArg& p, const WgmmaArg& q) { return p.a_descriptor == q.a_descriptor && p.b_descriptor == q.b_descriptor; };
  for (int l = 1; l < 32; l++) if (!same(lane(l), x)) fail("wgmma: lanes of a warp give different descriptors");
  auto& issued = worker->issued[warp / 4];
  if (w.issued == issued.size()) issued.push_back(x);
  if (!same(issued[w.issued++], x)) fail("wgmma: warps of a warpgroup give different descriptors");
  if (x.b_descriptor >> 62 != 1 || (!x.a && x.a_descriptor >> 62 != 1)) fail("wgmma: not a descriptor");

  Accumulators* c = find(w, x.d);
  if (!c) {
    c = &w.accumulators.emplace_back();
    c->columns = x.columns;
    for (int l = 0; l < 32; l++) {
      c->lane[l] = lane(l).d;
      for (int i = 0; i < x.columns / 2; i++) c->value[row(l, i)][column(l, i)] = std::exchange(lane(l).d[i], NAN);
    }
  }
  c->group = w.group;
  Wgmma p{x, {}, w.group, false};
  for (int l = 0; x.a && l < 32; l++)
    for (int i = 0; i < 4; i++) p.a[l][i] = std::exchange(lane(l).a[i], ~0u);
  tell(p, check::WgmmaIssued);
  w.products.push_back(p);
  for (Wgmma& q : w.products)
    if (!q.done) {
      if (worker->random() & 1) break;
      run(q, *find(w, q.arg.d));
    }
}
void op_wgmma_fence(void* const*, uint32_t) { worker->warps[self->linear / 32].wgmma.fenced = true; }
void op_wgmma_commit(void* const*, uint32_t) {
  Wgmmas& w = worker->warps[self->linear / 32].wgmma;
  w.group++;
  w.fenced = false;
}
void op_wgmma_wait(void* const* arg, uint32_t) {
  Wgmmas& w = worker->warps[self->linear / 32].wgmma;
  // groups from this one on may be in flight
  const int open = w.group - *static_cast<const int*>(arg[0]);
  while (!w.products.empty() && w.products.front().group < open) {
    Wgmma& p = w.products.front();
    if (!p.done) run(p, *find(w, p.arg.d));
    tell(p, check::WgmmaDone);
    w.products.erase(w.products.begin());
  }
  std::erase_if(w.accumulators, [&](const Accumulators& c) {
    if (c.group >= open) return false;
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < c.columns / 2; i++) c.lane[l][i] = c.value[row(l, i)][column(l, i)];
    return true;
  });
}

}  // namespace simt

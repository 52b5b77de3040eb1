// scheduler.cpp -- launches, fibers, barriers and warp collectives.
#include <pthread.h>
#include <sys/mman.h>

#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string_view>
#include <thread>

#include "banks.hpp"
#include "runtime.hpp"

#if !defined(__x86_64__)
#error "emulator: add a context switch for this architecture"
#endif
// Saves the callee-saved registers on this stack and takes them from the other one.
extern "C" void simt_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.p2align 4
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");

namespace simt {

constinit thread_local ThreadInfo* self = nullptr;
constinit thread_local Worker* worker = nullptr;

// ---- kernels by name ----------------------------------------------------------------------------
static std::map<std::string_view, Kernel>& kernels() {
  static std::map<std::string_view, Kernel> table;
  return table;
}
Registered::Registered(const Kernel& k) {
  if (kernels().emplace(k.name, k).second) return;
  std::fprintf(stderr, "emulator: two kernels are named %s\n", k.name);
  std::abort();
}

// ---- choosing who runs --------------------------------------------------------------------------
void Worker::wake(Thread& t) {
  unsigned w = t.linear / 32;
  warps[w].ready |= 1u << t.lane;
  ready_warps |= 1u << w;
}
Thread* Worker::pick() {
  if (!ready_warps) return nullptr;
  auto first = [](uint32_t set) { return std::countr_zero(set); };
  auto any = [&](uint32_t set) {
    int r = int(random() & 31);
    return (std::countr_zero(std::rotr(set, r)) + r) & 31;
  };
  const Schedule schedule{launch->call.schedule};
  const bool can_stay = ready_warps >> current_warp & 1;
  int w = current_warp;
  if (schedule == Schedule::Ordered) w = can_stay ? w : first(ready_warps);
  else if (schedule == Schedule::Random || !can_stay || (random() & 1023) == 0) w = any(ready_warps);
  int lane = schedule == Schedule::Ordered ? first(warps[w].ready) : any(warps[w].ready);
  current_warp = w;
  warps[w].ready &= ~(1u << lane);
  if (!warps[w].ready) ready_warps &= ~(1u << w);
  return &threads[size_t(w) * 32 + size_t(lane)];
}
// Leaves the running fiber, which is parked, ready or done, and runs whichever comes next.
void Worker::reschedule() {
  if (launch->failed.load(std::memory_order_relaxed)) abandon();
  Thread &from = running(), *to = pick();
  if (to == &from) return;
  if (!to) {
    if (alive) deadlock();
    simt_switch(&from.fiber.sp, main.sp);
    std::abort();  // nobody returns to the last thread of a block
  }
  self = to;
  stats.switches++;
  simt_switch(&from.fiber.sp, to->fiber.sp);
}
// Leaves all fibers of the block where they are.
void Worker::abandon() {
  simt_switch(&running().fiber.sp, main.sp);
  std::abort();
}
void Worker::deadlock() {
  char text[1200];
  size_t used = 0;
  const Thread* last = nullptr;  // one line for neighbours that wait at the same place
  for (int i = 0; i < count && used < sizeof text; i++) {
    const Thread& t = threads[size_t(i)];
    if (t.done || (last && last->loc.line() == t.loc.line())) continue;
    used += size_t(std::snprintf(text + used, sizeof text - used, "\n  thread %d waits at a %s (%s:%u)", i, t.waits_at,
                                 t.loc.file_name(), t.loc.line()));
    last = &t;
  }
  fail("deadlock, %d of %d threads alive:%s", alive, count, text);
}
void fail(const char* format, ...) {
  char text[1600];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  Launch& l = *worker->launch;
  if (!l.failed.exchange(true)) {
    char where[200];
    const uint3 b = worker->info.index;
    std::snprintf(where, sizeof where, "%s: block (%u, %u, %u) thread %u: ", l.kernel.name, b.x, b.y, b.z, self->linear);
    std::lock_guard guard(l.mutex);
    l.error = std::string(where) + text;
  }
  worker->abandon();
}

// ---- a block ------------------------------------------------------------------------------------
static void release(Barrier& b, int id) {
  b.arrived = 0;
  for (Thread* t : b.parked) {
    check::leave(id, t->linear);
    worker->wake(*t);
  }
  check::forget(id);
  b.parked.clear();
}
static void fiber_main() {
  worker->launch->kernel.run(worker->launch->call.args);
  Thread& t = worker->running();
  for (const auto& group : t.copies)
    if (!group.empty())
      fail("%s:%u: the thread ends and has not waited for its cp.async", group[0].loc.file_name(), group[0].loc.line());
  Warp& warp = worker->warps[t.linear / 32];
  if (!warp.wgmma.products.empty()) {
    const Location& loc = warp.wgmma.products[0].arg.loc;
    fail("%s:%u: the warp ends and has not waited for its wgmma", loc.file_name(), loc.line());
  }
  t.done = true;
  worker->alive--;
  warp.exited |= 1u << t.lane;
  for (const Pending& p : warp.pending)
    if (p.arrived && p.mask >> t.lane & 1)
      fail("the thread has exited, but lanes %08x wait for it at %s:%u", p.arrived, p.loc.file_name(), p.loc.line());
  Barrier& b = worker->barriers[0];
  // __syncthreads counts the threads that have not exited
  if (b.arrived && b.arrived == worker->alive) release(b, 0);
  worker->reschedule();
  std::abort();
}
Worker::~Worker() {
  if (stacks) munmap(stacks, stacks_bytes);
  std::free(shared);
}
void Worker::prepare(Launch& l) {
  launch = &l;
  stats = {};
  count = int(l.block.x * l.block.y * l.block.z);
  if (threads.size() < size_t(count)) {
    if (stacks) munmap(stacks, stacks_bytes);
    constexpr size_t each = kGuardBytes + kStackBytes;
    stacks_bytes = each * size_t(count);
    void* p = mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) { std::perror("emulator: no memory for stacks"); std::abort(); }
    stacks = static_cast<char*>(p);
    threads = std::vector<Thread>(size_t(count));
    for (size_t i = 0; i < threads.size(); i++) {
      mprotect(stacks + i * each, kGuardBytes, PROT_NONE);
      threads[i].fiber.stack = stacks + i * each + kGuardBytes;
    }
  }
  std::free(shared);
  static_begin = (l.call.shared_bytes + kSlack + 1023) / 1024 * 1024;
  shared_bytes = static_begin + kStaticLimit + kSlack;
  shared = static_cast<unsigned char*>(std::aligned_alloc(1024, shared_bytes));
}
void Worker::run_block(unsigned index) {
  const dim3 grid = launch->grid, size = launch->block;
  info = {{index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y}, size, grid};
  rng = launch->call.seed * 0x9e3779b97f4a7c15u + index;  // splitmix64 of (seed, block)
  rng = (rng ^ rng >> 30) * 0xbf58476d1ce4e5b9u;
  rng = (rng ^ rng >> 27) * 0x94d049bb133111ebu;
  rng |= 1;
  alive = count;
  ready_warps = 0;
  current_warp = 0;
  for (Barrier& b : barriers) { b.arrived = 0; b.parked.clear(); }
  for (Warp& w : warps) { w.ready = w.exited = 0; w.pending.clear(); w.wgmma = {}; }
  for (auto& i : issued) i.clear();
  std::memset(shared, 0xff, shared_bytes);  // NaN in every type
  dynamic_end = 0;
  static_end = static_begin;
  statics.clear();
  check::block_begin(count, shared, shared_bytes);
  for (unsigned i = 0; i < unsigned(count); i++) {
    Thread& t = threads[i];
    t.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    t.linear = i;
    t.lane = int(i % 32);
    t.block = &info;
    t.done = false;
    t.copies.assign(1, {});
    void** sp = reinterpret_cast<void**>(t.fiber.stack + kStackBytes) - 2;
    *--sp = nullptr;  // fiber_main's return address: ends backtraces
    *--sp = reinterpret_cast<void*>(fiber_main);
    for (int k = 0; k < 6; k++) *--sp = nullptr;
    t.fiber.sp = sp;
    wake(t);
  }
  Thread* first = pick();
  self = first;
  simt_switch(&main.sp, first->fiber.sp);
  self = nullptr;
  banks::block_end();
}
bool Worker::in_private(const void* p) const {
  auto in = [&](const void* low, size_t bytes) { return uintptr_t(p) - uintptr_t(low) < bytes; };
  return in(stacks, stacks_bytes) || in(threads.data(), threads.size() * sizeof(Thread)) || in(this, sizeof *this) ||
         in(&self, sizeof self);
}

// ---- collectives and barriers -------------------------------------------------------------------
static bool same(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() && !std::strcmp(a.file_name(), b.file_name());
}
void collective(uint32_t mask, void* arg, Op op, bool whole_warp, const Location& loc) {
  Thread& t = worker->running();
  Warp& warp = worker->warps[t.linear / 32];
  if (!(mask >> t.lane & 1)) fail("%s:%u: the calling lane is not in its own mask %08x", loc.file_name(), loc.line(), mask);
  if (mask & warp.exited)
    fail("%s:%u: lanes %08x of the mask have exited", loc.file_name(), loc.line(), mask & warp.exited);
  if (int lanes = worker->count - int(t.linear) + t.lane; lanes < 32 && mask >> lanes)
    fail("%s:%u: mask %08x names lanes beyond the block", loc.file_name(), loc.line(), mask);
  Pending* p = nullptr;
  for (Pending& x : warp.pending) if (x.arrived && x.mask == mask) p = &x;
  if (!p) {
    for (Pending& x : warp.pending) if (!x.arrived) p = &x;
    if (!p) p = &warp.pending.emplace_back();
    p->mask = mask;
    p->op = op;
    p->loc = loc;
  } else if (p->op != op || (whole_warp && !same(p->loc, loc))) {
    fail("divergent warp collective: lane %d at %s:%u, others at %s:%u", t.lane, loc.file_name(), loc.line(),
         p->loc.file_name(), p->loc.line());
  }
  p->arg[t.lane] = arg;
  p->arrived |= 1u << t.lane;
  if (p->arrived == mask) {
    check::at(loc);
    op(p->arg, mask);
    worker->stats.collectives++;
    if (op == op_syncwarp) check::join_lanes(t.linear / 32, mask);
    p->arrived = 0;
    warp.ready |= mask;
    worker->ready_warps |= 1u << (t.linear / 32);
  } else {
    t.waits_at = "warp collective";
    t.loc = loc;
  }
  worker->reschedule();
}
void barrier(int id, int threads, bool wait, const Location& loc) {
  Thread& t = worker->running();
  if (id < 0 || id > 15) fail("%s:%u: there is no barrier %d", loc.file_name(), loc.line(), id);
  Barrier& b = worker->barriers[id];
  if (!b.arrived) {
    b.loc = loc;
    b.count = threads;
  } else if (b.count != threads || (!threads && !same(b.loc, loc))) {
    fail("divergent barrier: this thread at %s:%u, others at %s:%u", loc.file_name(), loc.line(), b.loc.file_name(),
         b.loc.line());
  }
  b.arrived++;
  check::arrive(id);
  if (wait) {
    b.parked.push_back(&t);
    t.waits_at = "barrier";
    t.loc = loc;
  } else {
    worker->wake(t);
  }
  if (b.arrived == (threads ? threads : worker->alive)) {
    worker->stats.barriers++;
    release(b, id);
  }
  worker->reschedule();
}

// ---- a launch -----------------------------------------------------------------------------------
static std::string refusal(const SimtLaunch& call) {
  auto found = kernels().find(call.kernel);
  if (found == kernels().end()) return "there is no such kernel";
  const Kernel& k = found->second;
  auto volume = [](const uint32_t (&n)[3]) { return uint64_t(n[0]) * n[1] * n[2]; };
  const uint64_t blocks = volume(call.grid), threads = volume(call.block);
  if (!blocks || blocks > 1u << 31) return "a grid of " + std::to_string(blocks) + " blocks";
  if (!threads || threads > k.max_threads)
    return "a block of " + std::to_string(threads) + " threads, the kernel allows " + std::to_string(k.max_threads);
  if (call.shared_bytes > kSharedLimit)
    return std::to_string(call.shared_bytes) + " bytes of shared memory, the limit is " + std::to_string(kSharedLimit);
  if (call.arg_count != k.count)
    return std::to_string(call.arg_count) + " arguments, the kernel takes " + std::to_string(k.count);
  for (size_t i = 0; i < k.count; i++)
    if (call.arg_bytes[i] != k.sizes[i])
      return "argument " + std::to_string(i) + " has " + std::to_string(call.arg_bytes[i]) + " bytes, the kernel's parameter " +
             std::to_string(k.sizes[i]);
  return {};
}
static int report(const std::string& text, char* error, size_t bytes) {
  std::snprintf(error, bytes, "%s", text.c_str());
  return 1;
}

}  // namespace simt

using namespace simt;

extern "C" int simt_launch(const SimtLaunch* call, SimtStats* stats, char* error, size_t error_bytes) {
  if (std::string why = refusal(*call); !why.empty()) return report(call->kernel + (": " + why), error, error_bytes);
  const uint32_t *g = call->grid, *b = call->block;
  Launch launch{*call, kernels().find(call->kernel)->second, dim3{g[0], g[1], g[2]}, dim3{b[0], b[1], b[2]}};
  const unsigned blocks = g[0] * g[1] * g[2];
  // race mode keeps its books per host thread, so there one thread runs every block
  const unsigned workers = check::enabled ? 1 : std::min(std::max(1u, std::thread::hardware_concurrency()), blocks);
  // stacks are kept from launch to launch
  static thread_local std::vector<std::unique_ptr<Worker>> pool;
  while (pool.size() < workers) pool.push_back(std::make_unique<Worker>());
  check::launch_begin();
  auto run = [&](Worker& w) {
    worker = &w;
    w.prepare(launch);
    for (unsigned i; !launch.failed && (i = launch.next_block.fetch_add(1)) < blocks;) w.run_block(i);
    worker = nullptr;
    std::lock_guard guard(launch.mutex);
    auto *total = reinterpret_cast<uint64_t*>(&launch.stats), *mine = reinterpret_cast<uint64_t*>(&w.stats);
    for (size_t i = 0; i < sizeof w.stats / sizeof *mine; i++) total[i] += mine[i];
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < workers; i++) others.emplace_back(run, std::ref(*pool[i]));
  run(*pool[0]);
  for (std::thread& t : others) t.join();
  *stats = launch.stats;
  return launch.failed ? report(launch.error, error, error_bytes) : 0;
}
extern "C" const char* simt_kernel(size_t i) {
  return i < kernels().size() ? std::next(kernels().begin(), ptrdiff_t(i))->second.name : nullptr;
}
extern "C" int simt_parameters(const char* kernel, const size_t** bytes) {
  auto found = kernels().find(kernel);
  if (found == kernels().end()) return -1;
  *bytes = found->second.sizes;
  return int(found->second.count);
}

// runtime.hpp -- the emulator's state, shared by its source files.
#pragma once
#include <atomic>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "simt.hpp"

#pragma GCC visibility push(default)
extern "C" {
// What Rust calls (src/device/emulator.rs mirrors these structs).
struct SimtLaunch {
  const char* kernel;
  const void* const* args;
  const size_t* arg_bytes;
  size_t arg_count;
  uint64_t seed;
  uint32_t grid[3], block[3];
  uint32_t shared_bytes;
  uint32_t schedule;  // simt::Schedule
};
// How often things happened, over the whole grid.
struct SimtStats {
  uint64_t barriers, collectives, switches, atomics, copies, mma, ldmatrix;
  // extra cycles: ways of the worst bank, less one, over all 8x8 matrices
  uint64_t ldmatrix_conflicts;
  // others, in race mode: cycles without conflicts, and the extra ones
  uint64_t shared_accesses, shared_conflicts;
};
// Runs a grid; 0, or 1 and the text of the first error.
int simt_launch(const SimtLaunch* launch, SimtStats* stats, char* error, size_t error_bytes);
// Memory that kernels may touch. Only race mode looks.
void simt_register(const void* p, size_t bytes);
void simt_unregister(const void* p);
// The i-th kernel's name in alphabetical order; null past the end.
const char* simt_kernel(size_t i);
// How many parameters a kernel has, and their bytes; -1: there is no such kernel.
int simt_parameters(const char* kernel, const size_t** bytes);
}
#pragma GCC visibility pop

namespace simt {

enum class Schedule : uint32_t { Ordered, Random, Skewed };

constexpr size_t kSharedLimit = 227 * 1024;   // dynamic, of a block on sm_90
constexpr size_t kStaticLimit = 48 * 1024;
// after each array; a multiple of 128 keeps the banks as on a GPU
constexpr size_t kRedZone = 128;
constexpr size_t kSlack = 32 * 1024;          // room for red zones and alignment
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 4096;          // below each stack

struct Fiber { void* sp = nullptr; char* stack = nullptr; };
struct Copy { void* dst; const void* src; int bytes, src_bytes; Location loc; };
struct Thread : ThreadInfo {
  Fiber fiber;
  bool done = false;
  const char* waits_at = "";                  // for the deadlock report
  Location loc;
  // groups of cp.async, oldest first; back() is still open
  std::vector<std::vector<Copy>> copies;
};
struct Pending { uint32_t mask = 0, arrived = 0; Op op = nullptr; Location loc; void* arg[32]; };
// A wgmma between issue and wait: the warp's rows of one product, and its accumulators, which the
// lanes do not have meanwhile.
struct Wgmma { WgmmaArg arg; uint32_t a[32][4]; int group; bool done; };
struct Accumulators { float* lane[32]; float value[16][128]; int columns, group; };  // the last group that adds to them
struct Wgmmas {
  std::vector<Wgmma> products;                // oldest first
  std::vector<Accumulators> accumulators;
  int group = 0;                              // the open one
  size_t issued = 0;
  bool fenced = false;
};
struct Warp { uint32_t ready = 0, exited = 0; std::vector<Pending> pending; Wgmmas wgmma; };
struct Barrier { int arrived = 0, count = 0; Location loc; std::vector<Thread*> parked; };

struct Launch {
  const SimtLaunch& call;
  const Kernel& kernel;
  dim3 grid, block;
  std::atomic<unsigned> next_block{0};
  std::atomic<bool> failed{false};
  std::mutex mutex{};                         // guards the two below
  std::string error{};
  SimtStats stats{};
};

// One host thread's executor: the fibers, barriers and shared memory of the block it runs.
struct Worker {
  Launch* launch = nullptr;
  BlockInfo info{};
  std::vector<Thread> threads;
  Warp warps[32];
  Barrier barriers[16];
  std::vector<WgmmaArg> issued[8];            // by each warpgroup: its warps must issue the same
  uint32_t ready_warps = 0;
  int count = 0, alive = 0, current_warp = 0;
  uint64_t rng = 1;
  Fiber main;
  char* stacks = nullptr;
  size_t stacks_bytes = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0, dynamic_end = 0, static_begin = 0, static_end = 0;
  std::vector<std::pair<const void*, unsigned char*>> statics;  // SHARED_ARRAYs by key
  SimtStats stats{};

  ~Worker();
  void prepare(Launch& l);
  void run_block(unsigned index);
  void wake(Thread& t);
  Thread* pick();
  void reschedule();
  [[noreturn]] void abandon();
  [[noreturn]] void deadlock();
  uint32_t random() { rng ^= rng << 13; rng ^= rng >> 7; rng ^= rng << 17; return uint32_t(rng >> 32); }
  Thread& running() { return *static_cast<Thread*>(self); }
  bool in_shared(const void* p) const { return uintptr_t(p) - uintptr_t(shared) < shared_bytes; }
  bool in_private(const void* p) const;       // stacks, threadIdx and the like
};
extern constinit thread_local Worker* worker;

}  // namespace simt

// banks.cpp -- bank conflicts of plain accesses to shared memory, counted in race mode, which sees
// every access.
//
// The lanes of a warp run one after another here. What each lane does for the k-th time at a place
// in the code is taken for one instruction of the warp, as the GPU would issue it. (ldmatrix counts
// its own: SimtStats.)
#include "banks.hpp"

#if defined(SIMT_RACE)
#include <algorithm>
#include <deque>
#include <map>

#include "runtime.hpp"

namespace simt::banks {
namespace {

struct Instruction { uint32_t lanes = 0, bytes = 0, offset[32]; };
struct Site {
  uint32_t times[32] = {};         // that each lane was here
  uint32_t first = 0;              // time of the first in `open`
  std::deque<Instruction> open{};  // that some lanes may still come to
};
// by place and warp, of the block that runs
thread_local std::map<std::pair<uintptr_t, unsigned>, Site> sites;

// A GPU serves 128 bytes at a time: 32 lanes of 4 bytes or less, 16 of 8, 8 of 16. Each needs as
// many cycles as the busiest bank has words.
void count(const Instruction& instruction) {
  const unsigned together = instruction.bytes <= 4 ? 32 : instruction.bytes == 8 ? 16 : 8;
  for (unsigned first = 0; first < 32; first += together) {
    std::vector<uint32_t> words;
    for (unsigned lane = first; lane < first + together; lane++) {
      if (!(instruction.lanes >> lane & 1)) continue;
      for (uint32_t at = instruction.offset[lane] / 4; at <= (instruction.offset[lane] + instruction.bytes - 1) / 4; at++)
        words.push_back(at);
    }
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    unsigned uses[32] = {};
    for (uint32_t word : words) uses[word % 32]++;
    worker->stats.shared_accesses++;
    worker->stats.shared_conflicts += *std::max_element(uses, uses + 32) - 1;
  }
}
}  // namespace

void access(const void* p, size_t bytes, uintptr_t place) {
  Site& site = sites[{place, self->linear / 32}];
  const uint32_t time = site.times[self->lane]++ - site.first;
  if (time >= site.open.size()) site.open.resize(time + 1);
  Instruction& instruction = site.open[time];
  instruction.lanes |= 1u << self->lane;
  instruction.bytes = uint32_t(bytes);
  instruction.offset[self->lane] = uint32_t(uintptr_t(p) - uintptr_t(worker->shared));
  for (; !site.open.empty() && site.open.front().lanes == ~0u; site.first++) {
    count(site.open.front());
    site.open.pop_front();
  }
}
void block_end() {
  for (const auto& [key, site] : sites)
    for (const Instruction& instruction : site.open)
      if (instruction.lanes) count(instruction);
  sites.clear();
}
}  // namespace simt::banks
#endif

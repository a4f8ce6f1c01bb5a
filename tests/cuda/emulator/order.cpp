// The order of blocks: what a fence gives away, a count passes on, and a fence after it takes.
#include "order.h"

#include <algorithm>
#include <unordered_map>

#include "fibers.h"

namespace emulator {
namespace {

// Of each counter what those that have counted gave away, in this launch.
std::unordered_map<const void*, Seen> given;
uint64_t given_launch = 0;

}  // namespace

void Seen::add(const Mark& fence) {
  Mark& kept = fences_[{fence.block, fence.thread}];
  if (kept.thread == kNobody) kept = fence;
  kept.block_time = std::max(kept.block_time, fence.block_time);
  kept.fences = std::max(kept.fences, fence.fences);
}

void Seen::add(const Seen& other) {
  for (const auto& entry : other.fences_) add(entry.second);
}

bool Seen::has(const Mark& access) const {
  for (auto entry = fences_.lower_bound({access.block, INT32_MIN});
       entry != fences_.end() && entry->first.first == access.block; ++entry) {
    const Mark& fence = entry->second;
    if (access.block_time < fence.block_time) return true;
    if (access.thread == fence.thread && access.fences < fence.fences) return true;
  }
  return false;
}

void fence() {
  Fiber& self = *running();
  ++self.fences;
  self.seen.add(self.met);
  self.gives = self.seen;
  self.gives.add(seen_by_block());
  self.gives.add(mark());
}

uint32_t count_up(uint32_t* counter, uint32_t last) {
  if (given_launch != launch_number()) given.clear();
  given_launch = launch_number();
  judge_count(counter);
  Seen& here = given[counter];
  running()->met.add(here);
  here.add(running()->gives);
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

}  // namespace emulator

// What of other blocks a thread may count on: fences and counts order blocks, nothing else does.
#pragma once

#include <cstdint>
#include <map>
#include <utility>

namespace emulator {

// Who did something, and when: marks of another launch, or in shared memory another block, are old.
constexpr int32_t kNobody = -1, kSeveral = -2;
struct Mark {
  uint64_t launch = 0, block = 0;
  int32_t thread = kNobody, warp = kNobody;
  uint32_t block_time = 0, warp_time = 0, fences = 0;
};

// Of a block and one thread of it what was before that thread's fence: the thread's own accesses,
// and those of the others before the barriers it has passed.
class Seen {
 public:
  void add(const Mark& fence);
  void add(const Seen& other);
  bool has(const Mark& access) const;

 private:
  std::map<std::pair<uint64_t, int32_t>, Mark> fences_;
};

}  // namespace emulator

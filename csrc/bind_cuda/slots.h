// Who may use which counters of arrivals (csrc/cuda/arrivals.cuh); nothing of torch or CUDA.
//
// A launch leaves its counters 0, so those one after another of a stream can use the same: a stream
// keeps its slot. A captured graph may be replayed at any time and on any stream: what is captured
// on a stream has a slot of its own until its graph is gone.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "../cuda/kernels.h"

namespace fastvlm {
namespace cuda {

// device, stream (an id that no other has, of those of its capture), capture (0 for none)
using Launcher = std::tuple<int32_t, uint64_t, uint64_t>;

class Slots {
 public:
  struct Found {
    int64_t slot;  // -1 where all are taken
    bool is_new;
  };

  Found of(const Launcher& who) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto entry = taken_.find(who); entry != taken_.end()) return {entry->second, false};
    int64_t slot = next_;
    if (!free_.empty()) {
      slot = free_.back();
      free_.pop_back();
    } else if (next_ < kArrivalSlots) {
      ++next_;
    } else {
      return {-1, false};
    }
    taken_.emplace(who, slot);
    return {slot, true};
  }

  // No launch of `who` is under way, and none will come.
  void release(const Launcher& who) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto entry = taken_.find(who);
    if (entry == taken_.end()) return;
    free_.push_back(entry->second);
    taken_.erase(entry);
  }

 private:
  std::mutex mutex_;
  std::map<Launcher, int64_t> taken_;
  std::vector<int64_t> free_;
  int64_t next_ = 0;
};

}  // namespace cuda
}  // namespace fastvlm

// Which counters of arrivals a launch may use (csrc/cuda/attention_splits.cuh).
//
// A launch leaves them 0, so that those one after another of a stream can use the same. A captured
// graph may be replayed at any time and on any stream: each capture gets a slot that nobody else
// ever gets. Nothing is allocated, inside a capture or outside; who comes when the slots have run
// out gets zeros from torch's allocator, which costs a launch.
#pragma once

#include <map>
#include <mutex>

#include "../cuda/attention.h"
#include "bind.h"

namespace fastvlm {
namespace cuda {

// The slot of a stream or of what is captured on it, or -1.
inline int64_t slot_of(const Call& call) {
  // one name for as many streams as there are threads
  constexpr uintptr_t kPerThread = 2;
  static std::mutex mutex;
  static std::map<std::tuple<int32_t, void*, uint64_t>, int64_t> slots;
  void* const stream = call.stream();
  if (reinterpret_cast<uintptr_t>(stream) == kPerThread) return -1;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] =
      slots.try_emplace({call.device(), stream, call.capture()}, slots.size());
  return entry->second < kArrivalSlots ? entry->second : -1;
}

// Where the keys are split: counters for the launch. The tensor must live until it is launched.
inline Optional set_arrivals(AttentionArgs& args, const Call& call, const Tensor& q,
                             int64_t tiles) {
  const int64_t needed = tiles * args.kv_heads;
  if (args.splits == 1) return std::nullopt;
  args.slot = needed > kArrivals ? -1 : slot_of(call);
  if (args.slot >= 0) return std::nullopt;
  Tensor zeros = torch::stable::new_zeros(q, {needed}, ScalarType::Int);
  give(zeros, "arrivals", Access::kCounters);
  args.arrivals = static_cast<uint32_t*>(zeros.mutable_data_ptr());
  return zeros;
}

}  // namespace cuda
}  // namespace fastvlm

// The counters of arrivals that a launch gets. Nothing is allocated, inside a capture or outside,
// but where all slots are taken or a stream cannot be told from others: then torch's allocator
// gives zeros, which costs a launch.
#pragma once

#include "bind.h"
#include "slots.h"

namespace fastvlm {
namespace cuda {

// Never destroyed: graphs may outlive what a library destroys at exit.
inline Slots& slots() {
  static Slots* const all = new Slots;
  return *all;
}

// The slot of a stream or of what is captured on it, or -1.
inline int64_t slot_of(const Call& call) {
  const uint64_t capture = call.capture();
  const std::optional<uint64_t> stream = call.stream_id(capture);
  if (!stream.has_value()) return -1;
  const Launcher who{call.device(), *stream, capture};
  const auto [slot, is_new] = slots().of(who);
  if (is_new && capture != 0) {
    auto* const kept = new Launcher(who);
    const bool noted = call.when_the_graph_is_gone(kept, [](void* gone) {
      slots().release(*static_cast<Launcher*>(gone));
      delete static_cast<Launcher*>(gone);
    });
    if (!noted) {
      slots().release(who);
      delete kept;
      return -1;
    }
  }
  return slot;
}

// Counters for a launch in which several blocks share each of `pieces` of work. The tensor must
// live until it is launched.
inline Optional set_arrivals(Arrivals& arrivals, const Call& call, const Tensor& like,
                             int64_t pieces) {
  arrivals.slot = pieces > kArrivals ? -1 : slot_of(call);
  if (arrivals.slot >= 0) return std::nullopt;
  Tensor zeros = torch::stable::new_zeros(like, {pieces}, ScalarType::Int);
  give(zeros, "arrivals", Access::kCounters);
  arrivals.own = static_cast<uint32_t*>(zeros.mutable_data_ptr());
  return zeros;
}

}  // namespace cuda
}  // namespace fastvlm

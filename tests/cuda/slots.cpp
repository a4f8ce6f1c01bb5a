// Checks of csrc/bind_cuda/slots.h; the exit status says how many failed.
#include "bind_cuda/slots.h"

#include <cstdio>
#include <set>
#include <thread>

using fastvlm::cuda::kArrivalSlots;
using fastvlm::cuda::Launcher;
using fastvlm::cuda::Slots;

namespace {

int failed = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("%s\n", what);
  ++failed;
}

Launcher stream(uint64_t id) { return {0, id, 0}; }
Launcher capture(uint64_t id) { return {0, 7, id}; }

void streams_keep_theirs() {
  Slots slots;
  const auto first = slots.of(stream(1)), other = slots.of(stream(2));
  expect(first.is_new && first.slot >= 0 && other.slot >= 0, "a stream gets a slot");
  expect(first.slot != other.slot, "another one than another stream");
  expect(slots.of({1, 1, 0}).slot != first.slot, "and than on another device");
  const auto again = slots.of(stream(1));
  expect(!again.is_new && again.slot == first.slot, "the same each time");
}

void captures_give_theirs_back() {
  Slots slots;
  const int64_t streams = slots.of(stream(7)).slot;
  for (uint64_t id = 1; id <= 10 * kArrivalSlots; ++id) {
    const auto found = slots.of(capture(id));
    expect(found.is_new && found.slot >= 0, "a capture gets a slot after any number of others");
    expect(found.slot != streams, "not that of the stream");
    slots.release(capture(id));
  }
  expect(slots.of(stream(7)).slot == streams, "the stream has its slot still");
  slots.release(capture(1));
  expect(slots.of(stream(7)).slot == streams, "what was released is not released twice");
}

void graphs_that_live_share_nothing() {
  Slots slots;
  std::set<int64_t> seen;
  for (uint64_t id = 1; id <= kArrivalSlots; ++id) seen.insert(slots.of(capture(id)).slot);
  expect(seen.size() == kArrivalSlots && *seen.begin() == 0 && *seen.rbegin() == kArrivalSlots - 1,
         "as many graphs as there are slots have one each");
  expect(slots.of(capture(9999)).slot == -1, "the next one has none");
  slots.release(capture(5));
  expect(slots.of(capture(9999)).slot >= 0, "until another is gone");
}

void many_threads() {
  Slots slots;
  std::thread threads[4];
  for (uint64_t t = 0; t < 4; ++t) {
    threads[t] = std::thread([&slots, t] {
      for (uint64_t id = 1; id <= 2000; ++id) {
        const auto found = slots.of(capture(4 * id + t));
        expect(found.is_new && found.slot >= 0, "threads find slots");
        slots.release(capture(4 * id + t));
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace

int main() {
  streams_keep_theirs();
  captures_give_theirs_back();
  graphs_that_live_share_nothing();
  many_threads();
  return failed;
}

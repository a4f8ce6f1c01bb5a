// What the two halves of the emulator know of each other: fibers.cpp runs threads, memory.cpp
// judges what they do to memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <vector>

#include "emulator.h"
#include "order.h"

namespace emulator {

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, group;
};

struct Fiber {
  int thread, warp;
  // how many barriers of the block and of the warp it has passed: what came before them is ordered
  uint32_t block_time, warp_time;
  enum State { kReady, kAtBarrier, kAtCollective, kDone } state;
  int line;
  const char* kind;
  bool started;
  uint32_t fences;
  // of other blocks: what it may count on, what its counts have met, what its last fence gives away
  Seen seen, met, gives;
  std::vector<Copy> copies;
  int group, groups_done;
  unsigned char* stack;
  void* fake_stack;  // AddressSanitizer's
  ucontext_t context;
  jmp_buf at;
};

// The thread that runs, or null outside of a kernel.
Fiber* running();
// Of the launch and of the block that run: what tells old marks in memory from new ones.
uint64_t launch_number();
uint64_t block_number();
int shared_size();
Mark mark();
// What all threads of the block may count on: what one of them had seen before a barrier.
const Seen& seen_by_block();
void judge_count(const uint32_t* counter);
// Whether all counters that the launch was given are 0, as they must be behind it; then they are.
bool zero_counters();
void land(const Copy& copy);
void issue(const Copy& copy);
Counts& counts();

constexpr size_t kStack = 128 << 10;

}  // namespace emulator

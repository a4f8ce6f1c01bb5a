// Launches, threads, barriers, collectives of a warp, asynchronous copies.
#include "fibers.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

// There where a process runs under AddressSanitizer, which must know of stacks that are changed.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake, const void** bottom,
                                                           size_t* size);
}

namespace emulator {
namespace {

struct Gathering {
  const char* kind;
  int count;
  const void* in[kWarp];
  void* out[kWarp];
};

Settings settings;
Counts counted;
int largest_shared = 0, most_threads = 0;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<std::unique_ptr<unsigned char[]>> stacks;
std::vector<int> ready;
std::vector<uint64_t> priority;
std::vector<Gathering> gatherings;
std::vector<unsigned char> shared;
Seen block_seen;
Fiber* now = nullptr;
jmp_buf launcher;
Body body = nullptr;
const void* context = nullptr;
dim3 grid, block;
int size = 0, waiting = 0, shared_bytes = 0;
uint64_t launches = 0, blocks = 0, random_state = 1;
std::string message;

uint64_t random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

// The launcher's stack, for the sanitizer.
const void* launcher_bottom = nullptr;
size_t launcher_size = 0;

void leaving(void** fake, const void* bottom, size_t size) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(fake, bottom, size);
}
void arrived(void* fake, const void** bottom, size_t* size) {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake, bottom, size);
}
[[noreturn]] void to_launcher(void** fake, int back) {
  leaving(fake, launcher_bottom, launcher_size);
  _longjmp(launcher, back);
}

// Back to the launcher until somebody lets this thread go on.
void pause() {
  if (_setjmp(now->at) == 0) to_launcher(&now->fake_stack, 1);
  arrived(now->fake_stack, &launcher_bottom, &launcher_size);
}

void make_ready(Fiber& fiber) {
  fiber.state = Fiber::kReady;
  ready.push_back(fiber.thread);
}

void entry() {
  arrived(nullptr, &launcher_bottom, &launcher_size);
  body(context);
  now->state = Fiber::kDone;
  to_launcher(nullptr, 1);
}

int next_ready() {
  size_t chosen = 0;
  if (settings.schedule != Schedule::kRoundRobin) chosen = random() % ready.size();
  if (settings.schedule == Schedule::kPriority) {
    for (size_t i = 0; i < ready.size(); ++i) {
      if (priority[ready[i]] > priority[ready[chosen]]) chosen = i;
    }
  }
  const int thread = ready[chosen];
  ready.erase(ready.begin() + chosen);
  return thread;
}

void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
  fiber.started = true;
  setcontext(&fiber.context);
}

void prepare_block() {
  ++blocks;
  ++counted.blocks;
  waiting = 0;
  block_seen = {};
  ready.clear();
  gatherings.assign((size + kWarp - 1) / kWarp, {});
  std::fill(shared.begin(), shared.end(), 0xff);
  for (int i = 0; i < size; ++i) {
    if (static_cast<int>(fibers.size()) == i) {
      fibers.push_back(std::make_unique<Fiber>());
      stacks.emplace_back(new unsigned char[kStack]);
      fibers.back()->stack = stacks.back().get();
    }
    Fiber& fiber = *fibers[i];
    fiber.thread = i;
    fiber.warp = i / kWarp;
    fiber.block_time = fiber.warp_time = 0;
    fiber.started = false;
    fiber.fences = 0;
    fiber.seen = fiber.met = fiber.gives = {};
    fiber.copies.clear();
    fiber.group = fiber.groups_done = 0;
    make_ready(fiber);
  }
  // a warp runs ahead of another as far as it can, its lanes in any order
  std::vector<uint64_t> of_warp(gatherings.size());
  for (auto& p : of_warp) p = random();
  priority.resize(size);
  for (int i = 0; i < size; ++i) priority[i] = (of_warp[i / kWarp] << 8) + random() % 256;
}

void nobody_can_go_on() {
  std::string text = "no thread can go on:";
  for (int i = 0; i < size; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state == Fiber::kDone) continue;
    text += " thread " + std::to_string(i) + " waits at " +
            (fiber.state == Fiber::kAtBarrier ? "a barrier" : fiber.kind);
    break;
  }
  const auto done = std::count_if(fibers.begin(), fibers.begin() + size,
                                  [](auto& f) { return f->state == Fiber::kDone; });
  message = text + ", " + std::to_string(waiting) + " of " + std::to_string(size) +
            " are at a barrier, " + std::to_string(done) + " have ended";
}

// Whether the block ran to its end.
bool run_block() {
  prepare_block();
  volatile int done = 0;
  while (done < size) {
    if (ready.empty()) {
      nobody_can_go_on();
      return false;
    }
    now = fibers[next_ready()].get();
    void* volatile fake_stack = nullptr;
    const int back = _setjmp(launcher);
    if (back == 0) {
      void* fake = nullptr;
      leaving(&fake, now->stack, kStack);
      fake_stack = fake;
      if (!now->started) start(*now);
      _longjmp(now->at, 1);
    }
    arrived(fake_stack, nullptr, nullptr);
    if (back == 2) return false;
    if (now->state == Fiber::kDone) ++done;
    now = nullptr;
  }
  return true;
}

}  // namespace

Fiber* running() { return now; }
uint64_t launch_number() { return launches; }
uint64_t block_number() { return blocks; }
int shared_size() { return shared_bytes; }
const Seen& seen_by_block() { return block_seen; }
Mark mark() {
  return {launches, blocks, now->thread, now->warp, now->block_time, now->warp_time, now->fences};
}
Counts& counts() { return counted; }

int thread_index() { return now->thread; }
dim3 block_index() { return block; }
dim3 grid_size() { return grid; }
int block_size() { return size; }
// 64 bytes of nobody's on either side
unsigned char* shared_memory() { return shared.data() + 64; }

void fault(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  message = text;
  if (now == nullptr) throw std::runtime_error(message);
  message += " (thread " + std::to_string(now->thread) + ")";
  to_launcher(nullptr, 2);
}

void launch(const char* name, dim3 grid_, int threads, int bytes, Body body_, const void* context_,
            const Launch& itself) {
  grid = grid_;
  size = threads;
  shared_bytes = bytes;
  body = body_;
  context = context_;
  ++launches;
  ++counted.launches;
  largest_shared = std::max(largest_shared, bytes);
  most_threads = std::max(most_threads, threads);
  // a launch that failed, here or elsewhere, leaves its counts to nobody
  struct Zeros {
    ~Zeros() { zero_counters(); }
  } zeros;
  const auto place = [name] {
    return std::string(name) + ", block (" + std::to_string(block.x) + ", " +
           std::to_string(block.y) + ", " + std::to_string(block.z) + "): ";
  };
  if (ran_elsewhere(name, grid, threads, bytes, itself)) {
    if (!zero_counters())
      throw std::runtime_error(place() + "a counter is not 0 behind the launch");
    return;
  }
  random_state = settings.seed * 0x9E3779B97F4A7C15u + 1;
  shared.resize(bytes + 128);
  if (threads < 1 || threads > 1024 || threads % kWarp != 0) {
    throw std::runtime_error(std::string(name) + ": a block of " + std::to_string(threads));
  }
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (settings.schedule != Schedule::kRoundRobin) {
    for (uint64_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  }
  for (const uint64_t i : order) {
    block = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    if (run_block()) continue;
    now = nullptr;
    throw std::runtime_error(place() + message);
  }
  if (!zero_counters()) throw std::runtime_error(place() + "a counter is not 0 behind the launch");
}

void barrier(int line) {
  if (waiting > 0) {
    const auto other = std::find_if(fibers.begin(), fibers.begin() + size,
                                    [](auto& f) { return f->state == Fiber::kAtBarrier; });
    if ((*other)->line != line) fault("barriers at lines %d and %d meet", (*other)->line, line);
  }
  now->state = Fiber::kAtBarrier;
  now->line = line;
  if (++waiting == size) {
    waiting = 0;
    ++counted.barriers;
    for (int i = 0; i < size; ++i) {
      ++fibers[i]->block_time;
      block_seen.add(fibers[i]->seen);
      make_ready(*fibers[i]);
    }
  }
  pause();
}

void collective(const char* kind, const void* in, void* out, Model model) {
  Gathering& here = gatherings[now->warp];
  if (here.count > 0 && std::strcmp(here.kind, kind) != 0) {
    fault("lanes of a warp part: some are at %s, this one at %s", here.kind, kind);
  }
  here.kind = now->kind = kind;
  here.in[now->thread % kWarp] = in;
  here.out[now->thread % kWarp] = out;
  now->state = Fiber::kAtCollective;
  if (++here.count == kWarp) {
    here.count = 0;
    ++counted.collectives;
    if (model != nullptr) model(here.in, here.out);
    for (int i = 0; i < kWarp; ++i) make_ready(*fibers[now->warp * kWarp + i]);
  }
  pause();
}

void sync_warp() {
  collective("a barrier of the warp", nullptr, nullptr, nullptr);
  ++now->warp_time;
}

void copy_async(void* to, const void* from, int bytes) {
  const Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes,
                  now->group};
  ++counted.copies;
  issue(copy);
  now->copies.push_back(copy);
}

void copy_commit() { ++now->group; }

void copy_wait(int groups_left) {
  // what was issued and not committed belongs to no group yet, and is not waited for
  const int last = now->group - groups_left;
  auto& copies = now->copies;
  const auto left = std::stable_partition(copies.begin(), copies.end(),
                                          [&](const Copy& c) { return c.group < last; });
  for (auto copy = copies.begin(); copy != left; ++copy) land(*copy);
  copies.erase(copies.begin(), left);
}

}  // namespace emulator

// What tests/cuda_emulator.py sets and asks by ctypes.
extern "C" {
void emulator_settings(int schedule, uint64_t seed) {
  emulator::settings.schedule = static_cast<emulator::Schedule>(schedule);
  emulator::settings.seed = seed;
}
void emulator_counts(int64_t* to) { std::memcpy(to, &emulator::counted, sizeof(emulator::Counts)); }
void emulator_reset_counts() {
  emulator::counted = {};
  emulator::largest_shared = emulator::most_threads = 0;
}
// Of the launches since then: bytes of shared memory and threads of a block.
int emulator_largest_shared() { return emulator::largest_shared; }
int emulator_most_threads() { return emulator::most_threads; }
}

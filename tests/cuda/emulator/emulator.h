// CUDA on a CPU: what gpu.h stands on where a kernel is compiled by g++ instead of nvcc.
//
// A thread of a block is a fiber, the blocks of a launch run one after another, in any order. The
// kernel is compiled with -fsanitize=thread, whose calls at every access to memory are answered
// here (memory.cpp): an access outside of what the launch was given, shared memory that nobody has
// written, an unaligned access and a race are faults, whatever the schedule was. A fault ends the
// launch with an exception. Of what another block wrote only that may be read which a fence, a
// count and a fence hand over (order.cpp).
//
// Not modelled: time, caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

constexpr int kWarp = 32;

// Which thread runs next where several can.
enum class Schedule { kRoundRobin, kRandom, kPriority };
struct Settings {
  Schedule schedule = Schedule::kRoundRobin;
  uint64_t seed = 1;
};

struct Counts {
  int64_t launches, blocks, barriers, collectives, copies, bank_conflicts;
};

// Memory that the launches to come may touch, until forget_memory(): an input is only read, a
// result is a fault to read where it is not written yet, counters are only counted.
enum class Access { kInput, kResult, kCounters };
void give_memory(const char* name, const void* data, int64_t bytes, Access access);
void forget_memory();

// Runs body(context) once for each thread of each block.
using Body = void (*)(const void* context);
// The same launch for who executes something else that was made of the kernel (libraries.cpp).
struct Launch {
  const void* kernel;
  const void* parameters;
  int bytes;
};
void launch(const char* name, dim3 grid, int threads, int shared_bytes, Body body,
            const void* context, const Launch& itself);
// Whether somebody else ran it; a fault of theirs is an exception here.
bool ran_elsewhere(const char* name, dim3 grid, int threads, int shared_bytes,
                   const Launch& launch);

// Of the thread that runs.
int thread_index();
dim3 block_index();
dim3 grid_size();
int block_size();
unsigned char* shared_memory();

// All threads of the block, at the same line.
void barrier(int line);

// What orders blocks: a fence, then a count that another thread's count finds, then a fence there.
void fence();
// Counts up to last and begins again at 0; what was counted before.
uint32_t count_up(uint32_t* counter, uint32_t last);

// All lanes of a warp bring `in` and get `out`; model computes all of them at once.
using Model = void (*)(const void* const in[kWarp], void* const out[kWarp]);
void collective(const char* kind, const void* in, void* out, Model model);
void sync_warp();

// 16 bytes to shared memory, which nobody may touch until the thread that copies has waited.
// bytes of them are read, the rest are zeros.
void copy_async(void* shared, const void* global, int bytes);
void copy_commit();
void copy_wait(int groups_left);

void read(const void* data, size_t bytes);
void write(void* data, size_t bytes);
// Eight lanes read 16 bytes each of shared memory at a time.
void count_bank_conflicts(const void* const rows[8]);

[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulator

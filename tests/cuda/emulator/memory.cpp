// Judges every access to memory of a kernel. g++ calls __tsan_* before each one.
//
// A cell of two bytes remembers its last write and its last reads. Two accesses of different
// threads, one of them a write, are a race unless a barrier of the block, or of the warp if both
// are of one, lies between them. Threads of different blocks are ordered by order.cpp alone.
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "fibers.h"

namespace emulator {
namespace {

constexpr int kCell = 2;

struct Cell {
  Mark write, read;
  bool written = false, copying = false;
};

struct Region {
  const char* name;
  uintptr_t begin, end;
  Access access;
  std::vector<Cell> cells;
};

std::vector<Region> regions;
uint64_t regions_forgotten = 0;
// false where kernels are compiled for other sanitizers: plain accesses are not seen
bool watching = true;
std::vector<Cell> shared_cells;
uint64_t shared_block = 0;

uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

bool passed_on(const Mark& before) {
  return running()->seen.has(before) || seen_by_block().has(before);
}

bool ordered(const Mark& before, const Mark& after) {
  if (before.thread == kNobody || before.launch != after.launch) return true;
  if (before.block != after.block) return passed_on(before);
  if (before.thread == after.thread || before.block_time < after.block_time) return true;
  return before.warp == after.warp && before.block_time == after.block_time &&
         before.warp_time < after.warp_time;
}

// Of several reads what a later write must be ordered after.
Mark joined(const Mark& old, Mark mine) {
  if (old.thread == kNobody || old.launch != mine.launch) return mine;
  if (old.block != mine.block) {
    if (!passed_on(old)) mine.block = UINT64_MAX;
    return mine;
  }
  if (old.block_time < mine.block_time) return mine;
  if (old.thread != mine.thread) mine.thread = kSeveral;
  if (old.warp != mine.warp) mine.warp = kSeveral;
  mine.warp_time = std::max(old.warp_time, mine.warp_time);
  return mine;
}

void judge(Cell& cell, const char* name, int64_t at, bool write) {
  const Mark mine = mark();
  if (cell.copying)
    fault("%s of %s[%ld], where a copy is under way", write ? "a write" : "a read", name,
          static_cast<long>(at));
  if (!ordered(cell.write, mine)) {
    fault("a race: %s[%ld] is %s, which thread %d has written", name, static_cast<long>(at),
          write ? "written" : "read", cell.write.thread);
  }
  if (write) {
    if (!ordered(cell.read, mine)) {
      fault("a race: %s[%ld] is written, which another thread has read", name,
            static_cast<long>(at));
    }
    cell.write = mine;
    cell.written = true;
  } else {
    if (!cell.written) {
      fault("%s[%ld] is read, which nobody has written", name, static_cast<long>(at));
    }
    cell.read = joined(cell.read, mine);
  }
}

std::vector<Cell>& cells_of_shared() {
  if (shared_block != block_number()) {
    shared_block = block_number();
    shared_cells.assign((shared_size() + kCell - 1) / kCell, {});
  }
  return shared_cells;
}

bool in_shared(uintptr_t p, size_t bytes) {
  const uintptr_t begin = address(shared_memory());
  return p >= begin && p + bytes <= begin + shared_size();
}

void access(const void* data, size_t bytes, bool write) {
  const Fiber* fiber = running();
  if (fiber == nullptr || !watching) return;
  const uintptr_t p = address(data), stack = address(fiber->stack);
  if (p >= stack && p < stack + kStack) return;
  const bool whole = bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16;
  if (whole && p % bytes != 0) fault("an unaligned access of %zu bytes", bytes);
  if (in_shared(p, bytes)) {
    const int64_t at = p - address(shared_memory());
    auto& cells = cells_of_shared();
    for (int64_t i = at / kCell; i * kCell < at + static_cast<int64_t>(bytes); ++i) {
      judge(cells[i], "shared", i * kCell, write);
    }
    return;
  }
  for (Region& region : regions) {
    if (p < region.begin || p + bytes > region.end) continue;
    if (region.access == Access::kCounters) fault("a plain access to %s", region.name);
    if (region.access == Access::kInput) {
      if (write) fault("a write to %s, which is an input", region.name);
      return;
    }
    const int64_t at = p - region.begin;
    for (int64_t i = at / kCell; i * kCell < at + static_cast<int64_t>(bytes); ++i) {
      judge(region.cells[i], region.name, i * kCell, write);
    }
    return;
  }
  // the nearest that ends before it is most likely what it ran out of
  const char* nearest = "shared memory";
  uintptr_t distance = UINTPTR_MAX;
  for (const Region& region : regions) {
    const uintptr_t away = p >= region.end ? p - region.end : region.begin - p;
    if (away < distance) distance = away, nearest = region.name;
  }
  fault("a %s of %zu bytes outside of everything, %zu bytes from %s", write ? "write" : "read",
        bytes, static_cast<size_t>(distance), nearest);
}

}  // namespace

void give_memory(const char* name, const void* data, int64_t bytes, Access access) {
  if (bytes <= 0) return;
  Region region{name, address(data), address(data) + bytes, access, {}};
  if (access == Access::kResult) region.cells.resize((bytes + kCell - 1) / kCell);
  regions.push_back(std::move(region));
}

void forget_memory() {
  regions.clear();
  ++regions_forgotten;
}

bool zero_counters() {
  bool were_zero = true;
  for (const Region& region : regions) {
    if (region.access != Access::kCounters) continue;
    auto* const begin = reinterpret_cast<uint32_t*>(region.begin);
    auto* const end = reinterpret_cast<uint32_t*>(region.end);
    were_zero &= std::all_of(begin, end, [](uint32_t count) { return count == 0; });
    std::fill(begin, end, 0);
  }
  return were_zero;
}

void judge_count(const uint32_t* counter) {
  const uintptr_t p = address(counter);
  for (const Region& region : regions) {
    if (region.access == Access::kCounters && p >= region.begin && p + 4 <= region.end) return;
  }
  fault("a count outside of all counters");
}

void read(const void* data, size_t bytes) { access(data, bytes, false); }
void write(void* data, size_t bytes) { access(data, bytes, true); }

void issue(const Copy& copy) {
  if (!in_shared(address(copy.to), 16)) fault("an asynchronous copy to outside of shared memory");
  if (address(copy.from) % 16 != 0) fault("an asynchronous copy from an unaligned address");
  if (copy.bytes > 0) access(copy.from, copy.bytes, false);
  access(copy.to, 16, true);
  Cell* cells = &cells_of_shared()[(copy.to - shared_memory()) / kCell];
  for (int i = 0; i < 16 / kCell; ++i) cells[i].copying = true;
}

void land(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, copy.bytes);
  Cell* cells = &cells_of_shared()[(copy.to - shared_memory()) / kCell];
  for (int i = 0; i < 16 / kCell; ++i) {
    cells[i].copying = false;
    cells[i].write = mark();
  }
}

void count_bank_conflicts(const void* const rows[8]) {
  bool taken[8] = {};
  for (int i = 0; i < 8; ++i) {
    const int bank = address(rows[i]) / 16 % 8;
    if (taken[bank]) ++counts().bank_conflicts;
    taken[bank] = true;
  }
}

}  // namespace emulator

extern "C" {

void emulator_watch(int on) { emulator::watching = on != 0; }

// What a launch was given, for who runs it elsewhere: how often it was all forgotten, and a region.
uint64_t emulator_regions_forgotten() { return emulator::regions_forgotten; }
int emulator_region(int index, const char** name, uint64_t* begin, int64_t* bytes, int* access) {
  if (index >= static_cast<int>(emulator::regions.size())) return 0;
  const auto& region = emulator::regions[index];
  *name = region.name;
  *begin = region.begin;
  *bytes = static_cast<int64_t>(region.end - region.begin);
  *access = static_cast<int>(region.access);
  return 1;
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, size_t n) { emulator::read(p, n); }
void __tsan_write_range(void* p, size_t n) { emulator::write(p, n); }
#define ANSWER(n)                                                  \
  void __tsan_read##n(void* p) { emulator::read(p, n); }           \
  void __tsan_write##n(void* p) { emulator::write(p, n); }         \
  void __tsan_unaligned_read##n(void* p) { emulator::read(p, n); } \
  void __tsan_unaligned_write##n(void* p) { emulator::write(p, n); }
ANSWER(1)
ANSWER(2)
ANSWER(4)
ANSWER(8)
ANSWER(16)
#undef ANSWER
}

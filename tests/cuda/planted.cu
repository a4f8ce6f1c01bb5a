// Kernels with one fault each, and some without, for the emulator that must tell them apart.
#include "cuda/launch.h"

namespace {

using namespace fastvlm::cuda;

struct Planted {
  const float* in;
  float* out;
  int n;
};

// Each thread its element.
GPU_KERNEL(128) copies(const Planted p) {
  const int i = gpu::block_x() * gpu::block_size() + gpu::thread_index();
  if (i < p.n) p.out[i] = p.in[i];
}

GPU_KERNEL(128) reads_outside(const Planted p) { p.out[gpu::thread_index()] = p.in[p.n]; }

GPU_KERNEL(128) writes_outside(const Planted p) { p.out[gpu::thread_index() + p.n - 127] = 1.f; }

GPU_KERNEL(128) writes_to_its_input(const Planted p) {
  const_cast<float*>(p.in)[gpu::thread_index()] = 1.f;
}

GPU_KERNEL(128) unaligned(const Planted p) {
  gpu::store16(p.out + 4 * gpu::thread_index() % 64, gpu::load16(p.in + 1));
}

GPU_KERNEL(128) blocks_write_one_element(const Planted p) {
  if (gpu::thread_index() == 0) p.out[0] = p.in[gpu::block_x()];
}

// Sums of neighbours; which of the barriers are there is the parameter.
template <bool before, bool after>
GPU_KERNEL(128)
neighbours(const Planted p) {
  GPU_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const int i = gpu::thread_index();
  for (int round = 0; round < 2; ++round) {
    values[i] = p.in[i] + round;
    if (before) gpu::barrier();
    const float sum = values[i] + values[(i + 1) % 128];
    if (after) gpu::barrier();
    if (round == 1) p.out[i] = sum;
  }
}

GPU_KERNEL(128) reads_what_nobody_wrote(const Planted p) {
  GPU_SHARED(shared);
  p.out[gpu::thread_index()] = reinterpret_cast<float*>(shared)[gpu::thread_index()];
}

GPU_KERNEL(128) reads_its_result(const Planted p) {
  p.out[gpu::thread_index()] += p.in[gpu::thread_index()];
}

GPU_KERNEL(128) half_of_a_warp_shuffles(const Planted p) {
  float x = p.in[gpu::thread_index()];
  if (gpu::thread_index() % 2 == 0) x = gpu::shuffle_xor(x, 2);
  p.out[gpu::thread_index()] = x;
}

GPU_KERNEL(128) one_warp_waits(const Planted p) {
  if (gpu::thread_index() < 32) gpu::barrier();
  p.out[gpu::thread_index()] = p.in[gpu::thread_index()];
}

GPU_KERNEL(128) barriers_apart(const Planted p) {
  if (gpu::thread_index() < 32) {
    gpu::barrier();
  } else {
    gpu::barrier();
  }
  p.out[gpu::thread_index()] = p.in[gpu::thread_index()];
}

// Copies 16 bytes a thread through shared memory and reads its neighbour's.
template <int groups_left, bool meet>
GPU_KERNEL(128)
asynchronous(const Planted p) {
  GPU_SHARED(shared);
  const int i = gpu::thread_index();
  gpu::copy_async16(shared + 16 * i, p.in + 4 * i, 16);
  gpu::copy_commit();
  gpu::copy_wait<groups_left>();
  if (meet) gpu::barrier();
  const float* const values = reinterpret_cast<float*>(shared);
  p.out[i] = values[4 * (meet ? (i + 1) % 128 : (i + 127) % 128)];
}

GPU_KERNEL(128) copies_over_what_is_read(const Planted p) {
  GPU_SHARED(shared);
  const int i = gpu::thread_index();
  float* const values = reinterpret_cast<float*>(shared);
  values[i] = p.in[i];
  gpu::barrier();
  p.out[i] = values[(i + 4) % 128];
  if (i % 4 == 0) gpu::copy_async16(values + i, p.in + i, 16);
  gpu::copy_wait<0>();
}

// Rows of 128 bytes: as they are, all of a matrix lie in one bank; each moved by its number, none.
template <bool moved>
GPU_KERNEL(32)
matrices(const Planted p) {
  GPU_SHARED(shared);
  const int lane = gpu::thread_index();
  for (int i = lane; i < 1024; i += 32) reinterpret_cast<float*>(shared)[i] = p.in[i % p.n];
  gpu::barrier();
  const gpu::Chunk x = gpu::load_matrices(shared + 128 * lane + (moved ? 16 * (lane % 8) : 0));
  p.out[lane] = gpu::float_of_bits(x.word[0]);
}

GPU_ZEROS(counters, 2);

// Each block leaves a number for the one that comes last; which of the fences are there is the
// parameter.
template <bool before, bool after>
GPU_KERNEL(32)
comes_last(const Planted p) {
  if (gpu::thread_index() != 0) return;
  p.out[1 + gpu::block_x()] = p.in[gpu::block_x()];
  if (before) gpu::fence();
  const bool last = gpu::count_up(counters, 1) == 1;
  if (after) gpu::fence();
  if (last) p.out[0] = p.out[1] + p.out[2];
}

// The other threads of a block hand over through a barrier on either side.
template <bool before, bool after>
GPU_KERNEL(64)
hands_over(const Planted p) {
  GPU_SHARED(shared);
  bool* const last = reinterpret_cast<bool*>(shared);
  const int i = gpu::thread_index();
  if (i == 63) p.out[1 + gpu::block_x()] = p.in[gpu::block_x()];
  if (before) gpu::barrier();
  if (i == 0) {
    gpu::fence();
    *last = gpu::count_up(counters, 1) == 1;
    gpu::fence();
  }
  gpu::barrier();
  if (*last && i == (after ? 0 : 63)) p.out[0] = p.out[1] + p.out[2];
}

// What is written after the fence is not handed over.
GPU_KERNEL(32) writes_after_the_fence(const Planted p) {
  if (gpu::thread_index() != 0) return;
  gpu::fence();
  p.out[1 + gpu::block_x()] = p.in[gpu::block_x()];
  const bool last = gpu::count_up(counters, 1) == 1;
  gpu::fence();
  if (last) p.out[0] = p.out[1] + p.out[2];
}

GPU_KERNEL(32) writes_to_a_counter(const Planted) { counters[1] = 0; }

GPU_KERNEL(32) leaves_a_count(const Planted) {
  if (gpu::thread_index() == 0) gpu::count_up(counters, 1);
}

GPU_KERNEL(32) counts_outside(const Planted) { gpu::count_up(counters + 2, 1); }

}  // namespace

#define PLANTED(name, kernel)                                                 \
  extern "C" void planted_##name(const float* in, float* out, int n) {        \
    using namespace fastvlm::cuda;                                            \
    launch(#name, &kernel, dim3(2), 128, 4096, nullptr, Planted{in, out, n}); \
  }
#define PLANTED_ONE(name, kernel, threads)                                        \
  extern "C" void planted_##name(const float* in, float* out, int n) {            \
    using namespace fastvlm::cuda;                                                \
    launch(#name, &kernel, dim3(1), threads, 4096, nullptr, Planted{in, out, n}); \
  }
#define PLANTED_TWO(name, kernel, threads)                                        \
  extern "C" void planted_##name(const float* in, float* out, int n) {            \
    using namespace fastvlm::cuda;                                                \
    launch(#name, &kernel, dim3(2), threads, 4096, nullptr, Planted{in, out, n}); \
  }
PLANTED(copies, copies)
PLANTED_ONE(reads_outside, reads_outside, 128)
PLANTED_ONE(writes_outside, writes_outside, 128)
PLANTED_ONE(writes_to_its_input, writes_to_its_input, 128)
PLANTED_ONE(unaligned, unaligned, 128)
PLANTED(blocks_write_one_element, blocks_write_one_element)
PLANTED_ONE(neighbours, (neighbours<true, true>), 128)
PLANTED_ONE(no_barrier_before, (neighbours<false, true>), 128)
PLANTED_ONE(no_barrier_after, (neighbours<true, false>), 128)
PLANTED_ONE(reads_what_nobody_wrote, reads_what_nobody_wrote, 128)
PLANTED_ONE(reads_its_result, reads_its_result, 128)
PLANTED_ONE(half_of_a_warp_shuffles, half_of_a_warp_shuffles, 128)
PLANTED_ONE(one_warp_waits, one_warp_waits, 128)
PLANTED_ONE(barriers_apart, barriers_apart, 128)
PLANTED_ONE(asynchronous, (asynchronous<0, true>), 128)
PLANTED_ONE(no_wait, (asynchronous<1, true>), 128)
PLANTED_ONE(no_meeting, (asynchronous<0, false>), 128)
PLANTED_ONE(copies_over_what_is_read, copies_over_what_is_read, 128)
PLANTED_ONE(matrices_in_one_bank, matrices<false>, 32)
PLANTED_ONE(matrices_moved, matrices<true>, 32)
PLANTED_TWO(last_comes, (comes_last<true, true>), 32)
PLANTED_TWO(no_fence_before, (comes_last<false, true>), 32)
PLANTED_TWO(no_fence_after, (comes_last<true, false>), 32)
PLANTED_TWO(handed_over, (hands_over<true, true>), 64)
PLANTED_TWO(handed_over_to_another, (hands_over<true, false>), 64)
PLANTED_TWO(no_barrier_before_the_fence, (hands_over<false, true>), 64)
PLANTED_TWO(writes_after_the_fence, writes_after_the_fence, 32)
PLANTED_ONE(writes_to_a_counter, writes_to_a_counter, 32)
PLANTED_ONE(leaves_a_count, leaves_a_count, 32)
PLANTED_ONE(counts_outside, counts_outside, 32)

namespace {
std::string words;
}

// An exception must not reach ctypes: its words, or null.
extern "C" const char* planted_run(void (*kernel)(const float*, float*, int), const float* in,
                                   float* out, int n) {
  emulator::forget_memory();
  emulator::give_memory("in", in, n * sizeof(float), emulator::Access::kInput);
  emulator::give_memory("out", out, n * sizeof(float), emulator::Access::kResult);
  fastvlm::cuda::give_counters("counters", counters, 2);
  try {
    kernel(in, out, n);
  } catch (const std::exception& error) {
    words = error.what();
    return words.c_str();
  }
  return nullptr;
}

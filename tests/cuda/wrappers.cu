// Each instruction of gpu.h alone, for one warp: words in, words out, so that what a GPU makes of
// it can be held against its scalar model.
#include "cuda/launch.h"

// Not one without a name: kernels are told apart by their symbols.
namespace wrappers {

using fastvlm::cuda::launch;

struct Words {
  const uint32_t* in;
  uint32_t* out;
};

GPU_FN gpu::Chunk chunk_at(const uint32_t* words) {
  return {{words[0], words[1], words[2], words[3]}};
}

GPU_FN void put(uint32_t* to, const gpu::Chunk& x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = x.word[i];
}

// in: of a lane 4 words of a, 2 of b, 4 of d; out: 4 of d.
template <class T>
GPU_KERNEL(32)
multiply_add(const Words w) {
  const int lane = gpu::thread_index();
  const uint32_t* const in = w.in + 10 * lane;
  float d[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = gpu::float_of_bits(in[6 + i]);
  gpu::multiply_add<T>(d, chunk_at(in), in[4], in[5]);
#pragma unroll
  for (int i = 0; i < 4; ++i) w.out[4 * lane + i] = gpu::bits_of_float(d[i]);
}

// in: 32 rows of 16 bytes; out: 4 words of a lane.
template <bool transposed>
GPU_KERNEL(32)
load_matrices(const Words w) {
  GPU_SHARED(shared);
  const int lane = gpu::thread_index();
  gpu::store16(shared + 16 * lane, chunk_at(w.in + 4 * lane));
  gpu::barrier();
  put(w.out + 4 * lane, transposed ? gpu::load_matrices_transposed(shared + 16 * lane)
                                   : gpu::load_matrices(shared + 16 * lane));
}

// in: 32 chunks. A lane copies that of its number, of every third only 8 bytes and of every fifth
// none, in two groups, and reads that of its neighbour.
GPU_KERNEL(32) copy_async(const Words w) {
  GPU_SHARED(shared);
  const int lane = gpu::thread_index();
  const int bytes = lane % 5 == 0 ? 0 : lane % 3 == 0 ? 8 : 16;
  gpu::copy_async16(shared + 16 * lane, w.in + 4 * lane, bytes);
  gpu::copy_commit();
  gpu::copy_async16(shared + 512 + 16 * lane, w.in + 4 * (31 - lane), 16);
  gpu::copy_commit();
  gpu::copy_wait<1>();
  gpu::barrier();
  put(w.out + 4 * lane, gpu::load16(shared + 16 * (lane ^ 1)));
  gpu::copy_wait<0>();
  gpu::barrier();
  put(w.out + 128 + 4 * lane, gpu::load16(shared + 512 + 16 * (lane ^ 1)));
}

GPU_KERNEL(32) loads(const Words w) {
  const int lane = gpu::thread_index();
  gpu::store16(w.out + 8 * lane, gpu::load16(w.in + 4 * lane));
  gpu::store16(w.out + 8 * lane + 4, gpu::load16_once(w.in + 4 * (lane ^ 3)));
}

// in: two words of a lane; out: for 1, 2, 4, 8, 16 the first as a number, and both as one.
GPU_KERNEL(32) shuffles(const Words w) {
  const int lane = gpu::thread_index();
  const uint32_t first = w.in[2 * lane], second = w.in[2 * lane + 1];
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const float one = gpu::shuffle_xor(gpu::float_of_bits(first), 1 << i);
    const uint64_t both = gpu::shuffle_xor(uint64_t{second} << 32 | first, 1 << i);
    uint32_t* const out = w.out + 15 * lane + 3 * i;
    out[0] = gpu::bits_of_float(one);
    out[1] = static_cast<uint32_t>(both);
    out[2] = static_cast<uint32_t>(both >> 32);
  }
}

// in: a float of a lane; out: what the functions make of it.
GPU_KERNEL(32) functions(const Words w) {
  const int lane = gpu::thread_index();
  const float x = gpu::float_of_bits(w.in[lane]);
  const float values[] = {gpu::exp2(x), gpu::tanh_fast(x), gpu::divide(1.f, x),
                          gpu::reciprocal_root(x < 0.f ? -x : x)};
#pragma unroll
  for (int i = 0; i < 4; ++i) w.out[4 * lane + i] = gpu::bits_of_float(values[i]);
}

}  // namespace wrappers

// An exception must not reach ctypes.
#define WRAPPER(name, kernel)                                             \
  extern "C" int wrapper_##name(const uint32_t* in, uint32_t* out) {      \
    using namespace wrappers;                                             \
    try {                                                                 \
      launch(#name, &kernel, dim3(1), 32, 1024, nullptr, Words{in, out}); \
    } catch (const std::exception&) {                                     \
      return 1;                                                           \
    }                                                                     \
    return 0;                                                             \
  }
WRAPPER(multiply_add_bf16, multiply_add<gpu::bf16>)
WRAPPER(multiply_add_half, multiply_add<gpu::half>)
WRAPPER(load_matrices, load_matrices<false>)
WRAPPER(load_matrices_transposed, load_matrices<true>)
WRAPPER(copy_async, copy_async)
WRAPPER(loads, loads)
WRAPPER(shuffles, shuffles)
WRAPPER(functions, functions)

#if !defined(__CUDACC__)
extern "C" void wrapper_give(const uint32_t* in, uint32_t* out, int words_in, int words_out) {
  emulator::forget_memory();
  emulator::give_memory("in", in, 4 * words_in, emulator::Access::kInput);
  emulator::give_memory("out", out, 4 * words_out, emulator::Access::kResult);
}
#endif

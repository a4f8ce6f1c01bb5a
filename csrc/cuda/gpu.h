// Everything a kernel knows of the machine, and the only file with inline PTX. nvcc compiles the
// instructions; g++ compiles the same kernels onto emulator/, with a scalar model of each.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define GPU_FN __device__ __forceinline__
// The most threads of a block; after them, where it is said, how many blocks of it a multiprocessor
// is to hold: ptxas gives a thread what registers that leaves.
#define GPU_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
// All shared memory of a block: the bytes that its launch asked for.
#define GPU_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// Counters that are 0 when the library is loaded, in the memory of the device.
#define GPU_ZEROS(name, size) static __device__ uint32_t name[size]
#else
#include "emulator/machine.h"
#define GPU_FN inline
#define GPU_KERNEL(...) inline void
#define GPU_SHARED(name) unsigned char* const name = ::emulator::shared_memory()
#define GPU_ZEROS(name, size) static uint32_t name[size]
#endif

namespace gpu {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

// Four registers of 32 bits: what one instruction moves for a thread.
struct alignas(16) Chunk {
  uint32_t word[4];
};

#if defined(__CUDACC__)

using bf16 = __nv_bfloat16;
using half = __half;

GPU_FN int thread_index() { return threadIdx.x; }
GPU_FN int block_size() { return blockDim.x; }
GPU_FN int block_x() { return blockIdx.x; }
GPU_FN int block_y() { return blockIdx.y; }
GPU_FN int grid_x() { return gridDim.x; }

GPU_FN float to_float(float x) { return x; }
GPU_FN float to_float(bf16 x) { return __bfloat162float(x); }
GPU_FN float to_float(half x) { return __half2float(x); }
template <class T>
GPU_FN T from_float(float x);
template <>
GPU_FN float from_float<float>(float x) {
  return x;
}
template <>
GPU_FN bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
GPU_FN half from_float<half>(float x) {
  return __float2half_rn(x);
}

GPU_FN float float_of_bits(uint32_t x) { return __uint_as_float(x); }
GPU_FN uint32_t bits_of_float(float x) { return __float_as_uint(x); }
GPU_FN float reciprocal_root(float x) { return rsqrtf(x); }

GPU_FN Chunk load16(const void* from) {
  const uint4 x = *static_cast<const uint4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}
GPU_FN void store16(void* to, const Chunk& x) {
  *static_cast<uint4*>(to) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}
// Of what is read once and by nobody else: it takes no place in the first cache.
GPU_FN Chunk load16_once(const void* from) {
  Chunk x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(__cvta_generic_to_global(from)));
  return x;
}

GPU_FN uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// 16 bytes to shared memory, of which the first `bytes` are read and the rest are zeros.
GPU_FN void copy_async16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}
GPU_FN void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `groups` of this thread's groups are under way.
template <int groups>
GPU_FN void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

GPU_FN void barrier() { __syncthreads(); }
// What this thread has seen of memory, of its block's threads through a barrier too, comes before
// what it does to memory next, for every block of the launch.
GPU_FN void fence() { __threadfence(); }
// Counts up to `last` and begins again at 0; what was counted before. No order but the fences'.
GPU_FN uint32_t count_up(uint32_t* counter, uint32_t last) { return atomicInc(counter, last); }
GPU_FN float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(kAll, x, lanes); }
GPU_FN uint64_t shuffle_xor(uint64_t x, int lanes) {
  return __shfl_xor_sync(kAll, static_cast<unsigned long long>(x), lanes);
}

// Four matrices of 8 x 8 elements of 16 bits: lane l names row l % 8 of matrix l / 8, and gets of
// matrix i, in word i, elements 2 (l % 4) and the next of row l / 4.
GPU_FN Chunk load_matrices(const void* row) {
  Chunk x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "r"(shared_address(row))
               : "memory");
  return x;
}
// The same of the transposed matrices.
GPU_FN Chunk load_matrices_transposed(const void* row) {
  Chunk x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "r"(shared_address(row))
               : "memory");
  return x;
}

#define GPU_MMA(type)                                                                 \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1))
// d [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8, two elements in a word
//   b: rows 2t and 2t + 8, two elements in a word, at column g
//   d: rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1
template <class T>
GPU_FN void multiply_add(float (&d)[4], const Chunk& a, uint32_t b0, uint32_t b1);
template <>
GPU_FN void multiply_add<bf16>(float (&d)[4], const Chunk& a, uint32_t b0, uint32_t b1) {
  GPU_MMA("bf16");
}
template <>
GPU_FN void multiply_add<half>(float (&d)[4], const Chunk& a, uint32_t b0, uint32_t b1) {
  GPU_MMA("f16");
}
#undef GPU_MMA

GPU_FN float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
GPU_FN float divide(float a, float b) { return __fdividef(a, b); }

#else
using namespace machine;
#endif

// Elements 0 and 1 of a word.
template <class T>
GPU_FN uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}

// tanh from one exponential, off by some 1e-7: what tanh.approx is off by, 5e-4, a cap of 50
// would make 0.02 of a score.
GPU_FN float tanh_fast(float x) {
  const float e = exp2(-2.885390081777927f * (x < 0.f ? -x : x));
  const float t = divide(1.f - e, 1.f + e);
  return x < 0.f ? -t : t;
}

template <class T>
GPU_FN T sum_of_warp(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

template <class T>
GPU_FN T largest_of_warp(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const T other = shuffle_xor(x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace gpu

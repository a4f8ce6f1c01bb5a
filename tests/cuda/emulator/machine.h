// The emulator's half of gpu.h: each function of the same name there is one instruction, this is
// what it means.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

namespace gpu {
struct Chunk;
}

namespace machine {

using gpu::Chunk;

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct bf16 {
  uint16_t bits;
};
struct half {
  _Float16 value;
};
static_assert(sizeof(half) == 2, "as on the GPU");

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of_bits(uint32_t{x.bits} << 16); }
inline float to_float(half x) { return static_cast<float>(x.value); }

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = bits_of_float(x);
  if (std::isnan(x)) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline half from_float<half>(float x) {
  return {static_cast<_Float16>(x)};
}

inline int thread_index() { return emulator::thread_index(); }
inline int block_size() { return emulator::block_size(); }
inline int block_x() { return static_cast<int>(emulator::block_index().x); }
inline int block_y() { return static_cast<int>(emulator::block_index().y); }
inline int grid_x() { return static_cast<int>(emulator::grid_size().x); }

inline float reciprocal_root(float x) { return 1.f / std::sqrt(x); }
inline float exp2(float x) { return std::exp2(x); }
inline float divide(float a, float b) { return a / b; }

Chunk load16(const void* from);
Chunk load16_once(const void* from);
void store16(void* to, const Chunk& x);

inline void copy_async16(void* shared, const void* global, int bytes) {
  emulator::copy_async(shared, global, bytes);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int groups>
inline void copy_wait() {
  emulator::copy_wait(groups);
}

inline void barrier(int line = __builtin_LINE()) { emulator::barrier(line); }

inline void fence() { emulator::fence(); }
inline uint32_t count_up(uint32_t* counter, uint32_t last) {
  return emulator::count_up(counter, last);
}

// Words of 32 bits.
uint32_t shuffle_xor_bits(uint32_t x, int lanes);
inline float shuffle_xor(float x, int lanes) {
  return float_of_bits(shuffle_xor_bits(bits_of_float(x), lanes));
}
inline int shuffle_xor(int x, int lanes) {
  return static_cast<int>(shuffle_xor_bits(static_cast<uint32_t>(x), lanes));
}
inline uint64_t shuffle_xor(uint64_t x, int lanes) {
  const uint64_t low = shuffle_xor_bits(static_cast<uint32_t>(x), lanes);
  return uint64_t{shuffle_xor_bits(static_cast<uint32_t>(x >> 32), lanes)} << 32 | low;
}

Chunk load_matrices(const void* row);
Chunk load_matrices_transposed(const void* row);

void multiply_add_bf16(float* d, const Chunk& a, uint32_t b0, uint32_t b1);
void multiply_add_half(float* d, const Chunk& a, uint32_t b0, uint32_t b1);
template <class T>
inline void multiply_add(float (&d)[4], const Chunk& a, uint32_t b0, uint32_t b1);
template <>
inline void multiply_add<bf16>(float (&d)[4], const Chunk& a, uint32_t b0, uint32_t b1) {
  multiply_add_bf16(d, a, b0, b1);
}
template <>
inline void multiply_add<half>(float (&d)[4], const Chunk& a, uint32_t b0, uint32_t b1) {
  multiply_add_half(d, a, b0, b1);
}

}  // namespace machine

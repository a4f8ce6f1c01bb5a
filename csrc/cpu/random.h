// Dropout without a stored mask: the bits of element i are splitmix64(seed + i) (Steele, Lea,
// Flood, OOPSLA 2014), as in fastvlm/reference/_random.py, so that forward, backward and every
// backend draw the same mask.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

constexpr int kHalfLanes = kLanes / 2;
typedef uint64_t U64Vec __attribute__((vector_size(4 * kLanes)));
typedef int64_t I64Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t HalfMask __attribute__((vector_size(2 * kLanes)));

// All ones in the lanes that are kept.
inline HalfMask kept(const Dropout& dropout, U64Vec counter) {
  U64Vec z = (counter + 1) * 0x9E3779B97F4A7C15u + dropout.seed;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z = (z ^ (z >> 31)) >> 11;
  const I64Vec threshold = I64Vec{} + static_cast<int64_t>(dropout.threshold);
  return __builtin_convertvector((I64Vec)z >= threshold, HalfMask);
}

// 0 where an element is dropped and 1 / (1 - p) where it is kept, for counters first, first + 1,
// ...
inline Vec keep_scale(const Dropout& dropout, uint64_t first) {
  U64Vec counter;
  for (int i = 0; i < kHalfLanes; ++i) counter[i] = first + i;
  const HalfMask halves[2] = {kept(dropout, counter), kept(dropout, counter + kHalfLanes)};
  IVec mask;
  static_assert(sizeof(mask) == sizeof(halves), "two halves make a vector");
  std::memcpy(&mask, halves, sizeof(mask));
  return select(mask, broadcast(dropout.scale), Vec{});
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

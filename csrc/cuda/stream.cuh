// Products of few rows with a weight that is read once, from memory to tensor core without a stop
// in shared memory.
//
// A lane of a group of four reads 16 neighbouring bytes of a weight's row, and the same elements of
// x. An instruction multiplies 16 elements of depth in an order of its own: a lane's elements
// 4s .. 4s + 3 are what its s-th instruction takes from it, of both sides, and the sum is the same.
#pragma once

#include "gpu.h"
#include "kernels.h"

namespace fastvlm {
namespace cuda {

// Four int8 as two words of T: byte + 128 in the lowest bits of 2^23 is exact, and so is what
// remains without them.
template <class T>
GPU_FN void widen(uint32_t bytes, uint32_t (&words)[2]) {
  const uint32_t shifted = bytes ^ 0x80808080u;
  float value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[i] = gpu::float_of_bits(0x4B000000u | (shifted >> 8 * i & 0xffu)) - 8388736.f;
  }
  words[0] = gpu::pack<T>(value[0], value[1]);
  words[1] = gpu::pack<T>(value[2], value[3]);
}

// 16 bytes of a weight as pairs of T.
template <class T, class W>
struct Pairs {
  static constexpr int kElements = 16 / sizeof(W), kWords = kElements / 2;
  uint32_t word[kWords];

  GPU_FN explicit Pairs(const gpu::Chunk& chunk) {
    if constexpr (sizeof(W) == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t two[2];
        widen<T>(chunk.word[i], two);
        word[2 * i] = two[0];
        word[2 * i + 1] = two[1];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] = chunk.word[i];
    }
  }
};

template <class T>
GPU_FN gpu::Chunk load_or_zero(const Rows& rows, int64_t row, int64_t count, int64_t element,
                               int64_t depth, bool once) {
  if (row >= count || element >= depth) return {{0, 0, 0, 0}};
  const T* from = static_cast<const T*>(rows.data) + row * rows.stride + element;
  return once ? gpu::load16_once(from) : gpu::load16(from);
}

// sums[m][tile] += rows of x times 8 columns of weight m, from `first_column` on; of the depth the
// steps first_step, first_step + every, ... kTiles: of 16 rows.
template <class T, class W, int kTiles, int kWeights>
GPU_FN void stream(const Rows& x, int64_t rows, const Rows (&weights)[kWeights], int64_t columns,
                   int64_t depth, int64_t first_column, int first_step, int every,
                   float (&sums)[kWeights][kTiles][4]) {
  constexpr int kElements = Pairs<T, W>::kElements, kStep = 4 * kElements;
  const int lane = gpu::thread_index() % 32, g = lane / 4, t = lane % 4;
  const int64_t begin = int64_t{first_step} * kStep, stride = int64_t{every} * kStep;
  // a number, so that the loads of two steps are under way together
  const int64_t steps = begin < depth ? (depth - begin + stride - 1) / stride : 0;
#pragma unroll 2
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t element = begin + step * stride + t * kElements;
    gpu::Chunk raw[kWeights];
#pragma unroll
    for (int m = 0; m < kWeights; ++m) {
      raw[m] = load_or_zero<W>(weights[m], first_column + g, columns, element, depth, true);
    }
    gpu::Chunk low[kTiles][kElements / 8], high[kTiles][kElements / 8];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kElements / 8; ++i) {
        low[tile][i] = load_or_zero<T>(x, 16 * tile + g, rows, element + 8 * i, depth, false);
        high[tile][i] = load_or_zero<T>(x, 16 * tile + g + 8, rows, element + 8 * i, depth, false);
      }
    }
#pragma unroll
    for (int m = 0; m < kWeights; ++m) {
      const Pairs<T, W> pairs(raw[m]);
#pragma unroll
      for (int s = 0; s < kElements / 4; ++s) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const gpu::Chunk& top = low[tile][s / 2];
          const gpu::Chunk& bottom = high[tile][s / 2];
          const int w = 2 * (s % 2);
          const gpu::Chunk a{{top.word[w], bottom.word[w], top.word[w + 1], bottom.word[w + 1]}};
          gpu::multiply_add<T>(sums[m][tile], a, pairs.word[2 * s], pairs.word[2 * s + 1]);
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace fastvlm

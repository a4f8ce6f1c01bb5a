// Products of more than a dozen rows of x with weight rows that are read once, as they lie: x is
// transposed once a call, and a tile multiplies elements of a few weight rows with vectors of x.
#pragma once

#include "panel.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

// From how many rows on this is ahead of sums along a row (gemm.h), where rows that are multiples
// of 4 KiB apart are in each other's way in the cache. Fewer leave too much of the last vector
// empty.
constexpr int64_t kTransposedRows = kRegisters == 32 ? 25 : 13;
// Elements of a weight row in one part: no lane adds up more than 128 products, or 64 where each is
// rounded twice, and that part of x stays in the first-level cache.
constexpr int64_t kPart = kLanes == 4 ? 64 : 128;
// Weight rows that are at work together; a multiple of those of every tile.
constexpr int64_t kGroup = kRegisters == 32 ? 24 : 12;

// Elements of scratch memory: a group's part as float32, where the weight is none.
constexpr int64_t kGroupScratch = kGroup * kPart;

template <int N>
inline void group_products(Strided w, int64_t count, const float* x, int64_t lanes, int64_t k,
                           bool accumulate, float* out) {
  constexpr int M = kGroup / N;
  int64_t n = 0;
  for (; n + M <= count; n += M) {
    panel_tile<M, N>({w.data + n * w.row, w.row, 1}, x, lanes, k, accumulate, out + n * lanes,
                     lanes);
  }
  for (; n < count; ++n) {
    panel_tile<1, N>({w.data + n * w.row, w.row, 1}, x, lanes, k, accumulate, out + n * lanes,
                     lanes);
  }
}

// out[n][lane] = w[n] . x[.][lane] for `count` rows of w; x: [k][lanes], whole vectors.
template <class T>
void transposed_products(const T* w, int64_t w_stride, int64_t count, const float* x, int64_t lanes,
                         int64_t k, float* scratch, float* out) {
  for (int64_t begin = 0; begin < k || begin == 0; begin += kPart) {
    const int64_t depth = smaller(kPart, k - begin);
    // what comes next: the same rows further on, or those of the next task from their beginning
    const int64_t ahead = begin + kPart < k ? begin + kPart : count * w_stride;
    const float* part = x + begin * lanes;
    for (int64_t n = 0; n < count; n += kGroup) {
      const int64_t rows = smaller(kGroup, count - n);
      const T* from = w + n * w_stride + begin;
      for (int64_t r = 0; r < rows; ++r) {
        const T* next = w + (n + r) * w_stride + ahead;
        for (int64_t i = 0; i < depth; i += 64 / int64_t{sizeof(T)}) prefetch_far(next + i);
      }
      Strided group{scratch, kPart, 1};
      if constexpr (std::is_same_v<T, float>) {
        group = {from, w_stride, 1};
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          to_float(from + r * w_stride, depth, scratch + r * kPart);
        }
      }
      float* sums = out + n * lanes;
      int64_t lane = 0;
      auto run = [&](auto vectors) {
        constexpr int N = decltype(vectors)::value;
        group_products<N>(group, rows, part + lane, lanes, depth, begin > 0, sums + lane);
        lane += N * kLanes;
      };
      while (lane < lanes) {
        switch ((lanes - lane) / kLanes) {
          case 1: run(std::integral_constant<int, 1>{}); break;
          case 2:
          case 4: run(std::integral_constant<int, 2>{}); break;
          default: run(std::integral_constant<int, 3>{});
        }
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

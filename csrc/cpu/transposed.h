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
// Weight rows that are at work together, each a stream from memory; a multiple of every tile's.
constexpr int64_t kGroup = 24;

// Elements of scratch memory: a group's part as float32, where the weight is none.
constexpr int64_t kGroupScratch = kGroup * kPart;

// Vectors of sums of a tile: as many as there are registers for.
constexpr int kSums = kRegisters == 32 ? 24 : 12;

// out[n][lane] (+)= w[n] . x[.][lane] for `count` rows of w and N vectors of lanes.
template <int N>
inline void group_products(Strided w, int64_t count, const float* x, int64_t lanes, int64_t k,
                           bool accumulate, float* out, Ahead& ahead) {
  constexpr int M = kSums / N;
  int64_t n = 0;
  for (; n + M <= count; n += M) {
    ahead.more();
    panel_tile<M, N>({w.data + n * w.row, w.row, 1}, x, lanes, k, accumulate, out + n * lanes,
                     lanes);
  }
  for (; n < count; ++n) {
    ahead.more();
    panel_tile<1, N>({w.data + n * w.row, w.row, 1}, x, lanes, k, accumulate, out + n * lanes,
                     lanes);
  }
}

// Vectors of lanes that a tile takes where so many are left.
constexpr int tile_vectors(int64_t left) { return left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3; }

// Tiles of a group of weight rows.
inline int64_t tiles_of(int64_t lanes) {
  int64_t tiles = 0;
  for (int64_t left = lanes / kLanes; left > 0;) {
    const int vectors = tile_vectors(left);
    tiles += kGroup * vectors / kSums;
    left -= vectors;
  }
  return tiles;
}

// The same for all lanes, and for weights of any type.
template <class T>
inline void part_products(const T* w, int64_t w_stride, int64_t count, const float* x,
                          int64_t lanes, int64_t k, bool accumulate, float* scratch, float* out,
                          Ahead ahead) {
  Strided rows{scratch, kPart, 1};
  if constexpr (std::is_same_v<T, float>) {
    rows = {w, w_stride, 1};
  } else {
    for (int64_t r = 0; r < count; ++r) to_float(w + r * w_stride, k, scratch + r * kPart);
  }
  int64_t lane = 0;
  auto run = [&](auto vectors) {
    constexpr int N = decltype(vectors)::value;
    group_products<N>(rows, count, x + lane, lanes, k, accumulate, out + lane, ahead);
    lane += N * kLanes;
  };
  while (lane < lanes) {
    switch (tile_vectors((lanes - lane) / kLanes)) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      default: run(std::integral_constant<int, 3>{});
    }
  }
}

// out[n][lane] = w[n] . x[.][lane] for `count` rows of w; x: [k][lanes], whole vectors.
template <class T>
void transposed_products(const T* w, int64_t w_stride, int64_t count, const float* x, int64_t lanes,
                         int64_t k, float* scratch, float* out) {
  const int64_t tiles = tiles_of(lanes), row = w_stride * int64_t{sizeof(T)};
  for (int64_t n = 0; n < count; n += kGroup) {
    const int64_t rows = smaller(kGroup, count - n);
    const T* from = w + n * w_stride;
    for (int64_t begin = 0; begin < k || begin == 0; begin += kPart) {
      const int64_t depth = smaller(kPart, k - begin);
      // the same rows further on, or the next ones from their beginning
      const int64_t next = begin + kPart < k ? begin + kPart : rows * w_stride;
      const Ahead ahead(from + next, rows, row, depth * int64_t{sizeof(T)}, tiles);
      part_products(from + begin, w_stride, rows, x + begin * lanes, lanes, depth, begin > 0,
                    scratch, out + n * lanes, ahead);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

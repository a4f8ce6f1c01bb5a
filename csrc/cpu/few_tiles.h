// Products of bfloat16 rows with weight rows that are read once, as they lie, in tiles: x becomes
// panels once a call, and a tile of a weight is 16 of its rows.
#pragma once

#include "tiles.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

// From how many rows on this is ahead of products of pairs, which add up along a row.
constexpr int64_t kTiledRows = 8;

// Whether rows of `depth` elements can meet so many weight rows in tiles: the last tiles reach
// back over rows that are done, and along a row there are whole ones.
inline bool fits_tiles(int64_t weight_rows, int64_t depth) {
  return has_tiles() && weight_rows >= kPair && depth % kTileDepth == 0 && depth > 0;
}

// to[panel of kPair rows][step][2 tiles] = `rows` rows of x from the column first on, count
// columns, both of whole tiles; zeros in the rows beyond them.
inline void pack_panels(const BFloat16* x, int64_t stride, int64_t rows, int64_t depth,
                        int64_t first, int64_t count, BFloat16* to) {
  for (int64_t row = 0; row < rows; row += kPair) {
    for (int64_t k = first; k < first + count; k += kTileDepth) {
      BFloat16* tiles = to + row * depth + k * kPair;
      for (int64_t half = 0; half < kPair; half += kTile) {
        const int64_t n = larger(0, smaller(kTile, rows - row - half));
        pack_tile(x + (row + half) * stride + k, stride, n, kTileDepth, tiles + half * kTileDepth);
      }
    }
  }
}

// Rows of sums before the first one that tiled_products may write, and behind the last.
constexpr int64_t kTileSlack = kPair;

// sums[n - begin][lane] = w[n] . x[lane] for n = begin, begin + 1, ... of a weight of `rows` rows;
// x: panels of whole kPair lanes.
inline void tiled_products(const BFloat16* w, int64_t w_stride, int64_t rows, int64_t begin,
                           int64_t count, const BFloat16* x, int64_t lanes, int64_t depth,
                           float* sums) {
#if defined(CPU_CAPABILITY_AVX512)
  using Unit = Amx;
#else
  using Unit = OneByOne;
#endif
  const int64_t steps = depth / kTileDepth, row = w_stride * int64_t{sizeof(BFloat16)};
  Unit::begin();
  for (int64_t n = begin; n < begin + count; n += kPair) {
    const int64_t first = smaller(n, rows - kPair);
    const bool half = begin + count - n <= kTile && first == n;
    const BFloat16* from = w + first * w_stride;
    const int64_t next = smaller(kPair, larger(0, rows - n - kPair));
    Ahead ahead(from + kPair * w_stride, next, row, depth * int64_t{sizeof(BFloat16)}, steps);
    Nowhere nowhere;
    for (int64_t lane = 0; lane < lanes; lane += kPair) {
      const BFloat16* panel = x + lane * depth;
      float* out = sums + (first - begin) * lanes + lane;
      if (half) {
        Unit::template multiply<1>(from, w_stride, panel, steps, out, lanes, nowhere);
      } else if (lane == 0) {
        Unit::template multiply<2>(from, w_stride, panel, steps, out, lanes, ahead);
      } else {
        Unit::template multiply<2>(from, w_stride, panel, steps, out, lanes, nowhere);
      }
    }
  }
  Unit::end();
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

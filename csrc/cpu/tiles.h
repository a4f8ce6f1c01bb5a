// Products of bfloat16 matrices in tiles of 16 rows of 64 bytes: the instructions of AMX, products
// of pairs of AVX-512, or the same one by one where a CPU has neither, for tests.
#pragma once

#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

constexpr int64_t kTile = 16;                      // rows and columns of a tile of sums
constexpr int64_t kPair = 2 * kTile;               // of a block of 2 x 2 tiles
constexpr int64_t kTileDepth = 32;                 // elements of a row of x in a tile
constexpr int64_t kTileSize = kTile * kTileDepth;  // elements of a tile of x or of a weight

// A tile of a weight is [kTileDepth / 2][kTile columns][2]: neighbours along the depth in pairs.

// Nothing to be read ahead.
struct Nowhere {
  void more() {}
};

// sums[R tiles][2 tiles] = x[R tiles of rows][steps tiles] panel[steps][2], from zero, in float32.
// x_stride: elements. sums_stride: floats. ahead.more() is called once a step.
struct OneByOne {
  static void begin() {}
  static void end() {}
  static HVec narrowed(Vec x) { return narrow(x, BFloat16{}); }
  static void put(BFloat16* to, Vec x, Vec next) {
    store(to, x);
    store(to + kLanes, next);
  }

  template <int R, class Ahead>
  static void multiply(const BFloat16* x, int64_t x_stride, const BFloat16* panel, int64_t steps,
                       float* sums, int64_t sums_stride, Ahead& ahead) {
    for (int64_t m = 0; m < R * kTile; ++m) {
      for (int64_t n = 0; n < 2 * kTile; ++n) {
        float sum = 0.0f;
        for (int64_t k = 0; k < steps * kTileDepth; ++k) {
          const int64_t tile = (k / kTileDepth * 2 + n / kTile) * kTileSize;
          const BFloat16* w = panel + tile + k % kTileDepth / 2 * (2 * kTile);
          sum += wide(x[m * x_stride + k]) * wide(w[n % kTile * 2 + k % 2]);
        }
        sums[m * sums_stride + n] = sum;
      }
    }
  }

 private:
  static float wide(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

#if defined(CPU_CAPABILITY_AVX512)
// The same by products of pairs in vectors, for CPUs that have these and no tiles. Assembly: this
// copy is compiled for CPUs without either, where nothing calls this.
struct Pairwise {
  static void begin() {}
  static void end() {}
  // x rounded to bfloat16; what is below its normal numbers becomes 0.
  static HVec narrowed(Vec x) {
    HVec y;
    asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
    return y;
  }
  // The same of two, written as one whole line of a cache: half as many stores to wait for.
  static void put(BFloat16* to, Vec x, Vec next) {
    Vec both;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(x), "v"(next));
    std::memcpy(to, &both, sizeof(both));
  }

  template <int R, class Ahead>
  static void multiply(const BFloat16* x, int64_t x_stride, const BFloat16* panel, int64_t steps,
                       float* sums, int64_t sums_stride, Ahead& ahead) {
    constexpr int kCount = 8;  // rows at a time
    for (int64_t first = 0; first < R * kTile; first += kCount) {
      Vec totals[kCount][2] = {};
      for (int64_t k = 0; k < steps * kTileDepth; k += 2) {
        const BFloat16* at = panel + k / kTileDepth * (2 * kTileSize) + k % kTileDepth * kTile;
        const __m512i w[2] = {_mm512_loadu_si512(at), _mm512_loadu_si512(at + kTileSize)};
#pragma GCC unroll 8
        for (int m = 0; m < kCount; ++m) {
          int32_t pair;
          std::memcpy(&pair, x + (first + m) * x_stride + k, sizeof(pair));
          const __m512i both = _mm512_set1_epi32(pair);
          for (int n = 0; n < 2; ++n) {
            asm("vdpbf16ps %2, %1, %0" : "+v"(totals[m][n]) : "v"(both), "v"(w[n]));
          }
        }
      }
      for (int m = 0; m < kCount; ++m) {
        store(sums + (first + m) * sums_stride, totals[m][0]);
        store(sums + (first + m) * sums_stride + kTile, totals[m][1]);
      }
    }
  }
};

// Assembly for the same reason. Tiles 0 to 3 are sums, 4 and 5 of x, 6 and 7 of the weight.
struct Amx {
  // Every thread that multiplies has tiles of its own, of a shape that it must have set.
  static void begin() {
    alignas(64) uint8_t shape[64] = {1};  // palette
    for (int tile = 0; tile < 8; ++tile) {
      shape[16 + 2 * tile] = kTile * sizeof(float);  // bytes of a row
      shape[48 + tile] = kTile;                      // rows
    }
    asm volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0x00" /* ldtilecfg */ : : "a"(shape) : "memory");
  }
  static void end() { asm volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0" /* tilerelease */); }
  static HVec narrowed(Vec x) { return Pairwise::narrowed(x); }
  static void put(BFloat16* to, Vec x, Vec next) { Pairwise::put(to, x, next); }

// As bytes, with the address in rax and the stride in rcx: assemblers learned their names late.
#define FASTVLM_TILE_LOAD(tile, from, stride)                            \
  asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, %c2, 0x08" /* tileloadd */ \
               :                                                         \
               : "a"(from), "c"(stride), "i"((tile) << 3 | 4)            \
               : "memory")
#define FASTVLM_TILE_STORE(tile, to, stride)                              \
  asm volatile(".byte 0xc4, 0xe2, 0x7a, 0x4b, %c2, 0x08" /* tilestored */ \
               :                                                          \
               : "a"(to), "c"(stride), "i"((tile) << 3 | 4)               \
               : "memory")
#define FASTVLM_TILE_ZERO(tile) \
  asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x49, %c0" /* tilezero */ : : "i"(0xc0 | (tile) << 3))
#define FASTVLM_TILE_MULTIPLY(sums, x, w)                         \
  asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" /* tdpbf16ps */ \
               :                                                  \
               : "i"((15 - (w)) << 3 | 2), "i"(0xc0 | (sums) << 3 | (x)))

  template <int R, class Ahead>
  static void multiply(const BFloat16* x, int64_t x_stride, const BFloat16* panel, int64_t steps,
                       float* sums, int64_t sums_stride, Ahead& ahead) {
    static_assert(R == 1 || R == 2, "tiles of sums");
    const int64_t x_bytes = x_stride * 2, line = 64, sums_bytes = sums_stride * 4;
    FASTVLM_TILE_ZERO(0);
    FASTVLM_TILE_ZERO(1);
    if (R == 2) {
      FASTVLM_TILE_ZERO(2);
      FASTVLM_TILE_ZERO(3);
    }
    for (int64_t step = 0; step < steps; ++step) {
      ahead.more();
      FASTVLM_TILE_LOAD(4, x, x_bytes);
      FASTVLM_TILE_LOAD(6, panel, line);
      FASTVLM_TILE_MULTIPLY(0, 4, 6);
      FASTVLM_TILE_LOAD(7, panel + kTileSize, line);
      FASTVLM_TILE_MULTIPLY(1, 4, 7);
      if (R == 2) {
        FASTVLM_TILE_LOAD(5, x + kTile * x_stride, x_bytes);
        FASTVLM_TILE_MULTIPLY(2, 5, 6);
        FASTVLM_TILE_MULTIPLY(3, 5, 7);
      }
      x += kTileDepth;
      panel += 2 * kTileSize;
    }
    FASTVLM_TILE_STORE(0, sums, sums_bytes);
    FASTVLM_TILE_STORE(1, sums + kTile, sums_bytes);
    if (R == 2) {
      FASTVLM_TILE_STORE(2, sums + kTile * sums_stride, sums_bytes);
      FASTVLM_TILE_STORE(3, sums + kTile * sums_stride + kTile, sums_bytes);
    }
  }

#undef FASTVLM_TILE_LOAD
#undef FASTVLM_TILE_STORE
#undef FASTVLM_TILE_ZERO
#undef FASTVLM_TILE_MULTIPLY
};
#endif

// body(unit), of the best that the CPU has.
template <class Body>
void with_unit(Body body) {
#if defined(CPU_CAPABILITY_AVX512)
  if (has_tiles()) return body(Amx{});
  if (has_bfloat16_products()) return body(Pairwise{});
#endif
  body(OneByOne{});
}

// to[i] = from[i] rounded to bfloat16.
template <class Unit = OneByOne, class T>
inline void to_bfloat16(const T* from, int64_t n, BFloat16* to) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (n > 0) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  } else {
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const HVec bits = Unit::narrowed(load(from + i));
      std::memcpy(to + i, &bits, sizeof(bits));
    }
    if (whole < n) store_partial(to + whole, load_partial(from + whole, n - whole), n - whole);
  }
}

// to[i][j] = from[j][i] for i, j = 0 to 15, of pairs of elements. from_stride, to_stride: elements.
inline void transpose_pairs(const BFloat16* from, int64_t from_stride, BFloat16* to,
                            int64_t to_stride) {
  for (int64_t c = 0; c < kTile; c += kLanes) {
    for (int64_t pair = 0; pair < kTile; pair += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        std::memcpy(&square[i], from + (c + i) * from_stride + 2 * pair, sizeof(Vec));
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) {
        std::memcpy(to + (pair + i) * to_stride + 2 * c, &square[i], sizeof(Vec));
      }
    }
  }
}

// A tile of a weight from `count` rows of `depth` elements, with zeros around them.
template <class T>
void pack_tile(const T* from, int64_t stride, int64_t count, int64_t depth, BFloat16* to) {
  BFloat16 lines[kTile * kTileDepth] = {};
  for (int64_t c = 0; c < count; ++c) {
    to_bfloat16(from + c * stride, depth, lines + c * kTileDepth);
  }
  transpose_pairs(lines, kTileDepth, to, kTileDepth);
}

// The same from a transpose, whose columns are rows in memory: two of these become pairs.
template <class T>
void join_tile(const T* from, int64_t step, int64_t count, int64_t depth, BFloat16* to) {
  auto bits = [&](int64_t k, int64_t c) {
    const int64_t n = k < depth ? larger(0, smaller(kLanes, count - c)) : 0;
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (n == kLanes) {
        HVec same;
        std::memcpy(&same, from + k * step + c, sizeof(same));
        return __builtin_convertvector(same, UVec);
      }
    }
    const Vec x = n > 0 ? load_some(from + k * step + c, n) : Vec{};
    return __builtin_convertvector(narrow(x, BFloat16{}), UVec);
  };
  for (int64_t k = 0; k < kTileDepth; k += 2) {
    for (int64_t c = 0; c < kTile; c += kLanes) {
      const UVec pairs = bits(k, c) | bits(k + 1, c) << 16;
      std::memcpy(to + k * kTile + c * 2, &pairs, sizeof(pairs));
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

// Register-blocked products of quantized rows with a panel of int8 weights, exact in int32, and the
// quantization of the rows.
//
// x is cut along the depth into groups of kGroup elements with a factor each, so that one channel
// that is much larger than the others costs its neighbours their precision, and no more.
#pragma once

#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

constexpr int64_t kGroup = 64;

// An int32 sum of each column, of neighbours two by two: x is int16, though it holds int8.
struct Pairs {
  using X = int16_t;
  static constexpr int kStep = 2;    // neighbours along the depth, in x and in a column of weights
  static constexpr int kOffset = 0;  // of x as it is stored
#if defined(CPU_CAPABILITY_AVX512)
  using Weights = __m512i;
  static Weights load(const int8_t* w) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
  }
  static IVec add(IVec sums, int32_t x, Weights w) {
    return sums + (IVec)_mm512_madd_epi16(_mm512_set1_epi32(x), w);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  using Weights = __m256i;
  static Weights load(const int8_t* w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
  static IVec add(IVec sums, int32_t x, Weights w) {
    return sums + (IVec)_mm256_madd_epi16(_mm256_set1_epi32(x), w);
  }
#else
  using Weights = const int8_t*;
  static Weights load(const int8_t* w) { return w; }
  static IVec add(IVec sums, int32_t x, Weights w) {
    int16_t pair[2];
    std::memcpy(pair, &x, sizeof(pair));
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += pair[0] * w[2 * lane] + pair[1] * w[2 * lane + 1];
    }
    return sums;
  }
#endif
};

// The same four by four, as VNNI has it: its x has no sign, so 128 is added to each, and a column's
// sum begins with what that adds to it.
struct Quads {
  using X = uint8_t;
  static constexpr int kStep = 4;
  static constexpr int kOffset = 128;
#if defined(CPU_CAPABILITY_AVX512)
  using Weights = __m512i;
  static Weights load(const int8_t* w) { return _mm512_loadu_si512(w); }
  // Not the intrinsic: this copy is compiled for CPUs without VNNI too, where nothing calls this.
  static IVec add(IVec sums, int32_t x, Weights w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(_mm512_set1_epi32(x)), "v"(w));
    return sums;
  }
#else
  using Weights = const int8_t*;
  static Weights load(const int8_t* w) { return w; }
  static IVec add(IVec sums, int32_t x, Weights w) {
    uint8_t quad[4];
    std::memcpy(quad, &x, sizeof(quad));
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) sums[lane] += quad[i] * w[4 * lane + i];
    }
    return sums;
  }
#endif
};

// Quantized rows, and the factor of each group of each.
template <class Kind>
struct QuantizedRows {
  const typename Kind::X* data;
  int64_t stride;
  const float* factors;
  int64_t groups;  // of a row, padding included
};

// Of a part of the columns of a weight: [group][kGroup / kStep][columns][kStep], and for each group
// what the sums of the columns begin with.
struct Int8Panel {
  const int8_t* data;
  const int32_t* begin;
};

// sums[M][N vectors] (+)= x[M] panel[N vectors] over some groups, each times the factor of x's.
template <class Kind, int M, int N>
void int8_tile(QuantizedRows<Kind> x, Int8Panel panel, int64_t groups, bool accumulate, float* sums,
               int64_t sums_stride) {
  for (int64_t g = 0; g < groups; ++g) {
    IVec totals[M][N];
    for (int n = 0; n < N; ++n) {
      IVec begin{};
      if (Kind::kOffset != 0) std::memcpy(&begin, panel.begin + n * kLanes, sizeof(begin));
      for (int m = 0; m < M; ++m) totals[m][n] = begin;
    }
    for (int64_t k = 0; k < kGroup; k += Kind::kStep) {
      typename Kind::Weights w[N];
      for (int n = 0; n < N; ++n) w[n] = Kind::load(panel.data + n * kLanes * Kind::kStep);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        int32_t xs;
        std::memcpy(&xs, x.data + m * x.stride + k, sizeof(xs));
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) totals[m][n] = Kind::add(totals[m][n], xs, w[n]);
      }
      panel.data += N * kLanes * Kind::kStep;
    }
    for (int m = 0; m < M; ++m) {
      const Vec factor = broadcast(x.factors[m * x.groups + g]);
      for (int n = 0; n < N; ++n) {
        float* to = sums + m * sums_stride + n * kLanes;
        const Vec part = __builtin_convertvector(totals[m][n], Vec) * factor;
        store(to, accumulate || g > 0 ? load(to) + part : part);
      }
    }
    x.data += kGroup;
    if (Kind::kOffset != 0) panel.begin += N * kLanes;
  }
}

// To the nearest integer, half to even.
inline IVec to_nearest(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return (IVec)_mm512_cvtps_epi32((__m512)x);
#elif defined(CPU_CAPABILITY_AVX2)
  return (IVec)_mm256_cvtps_epi32((__m256)x);
#else
  IVec out;
  for (int lane = 0; lane < kLanes; ++lane) {
    out[lane] = static_cast<int32_t>(__builtin_rintf(x[lane]));
  }
  return out;
#endif
}

// n elements, at most kGroup, as one group with zeros behind them, and its factor: max |x| / 127. A
// group with a NaN or an infinity is zeros with a factor of NaN, which reaches every column.
template <class Kind, class T>
inline void quantize_group(const T* from, int64_t n, typename Kind::X* to, float* factor) {
  constexpr int kVecs = kGroup / kLanes;
  typedef typename Kind::X XVec __attribute__((vector_size(kLanes * sizeof(typename Kind::X))));
  Vec x[kVecs];
  IVec largest{};  // the bits of |x|: those of an infinity or a NaN are above all others
  for (int i = 0; i < kVecs; ++i) {
    const int64_t left = n - i * kLanes;
    x[i] = left >= kLanes ? load(from + i * kLanes)
           : left > 0     ? load_partial(from + i * kLanes, left)
                          : Vec{};
    const IVec bits = (IVec)x[i] & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  int32_t most = 0;
  for (int lane = 0; lane < kLanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
  float magnitude;
  std::memcpy(&magnitude, &most, sizeof(magnitude));
  const bool finite = most < 0x7f800000;
  // at least the smallest normal number, whose inverse is finite
  const float scale = magnitude / 127.0f > 0x1p-126f ? magnitude / 127.0f : 0x1p-126f;
  *factor = finite ? scale : __builtin_nanf("");
  const Vec inverse = broadcast(1.0f / scale);
  for (int i = 0; i < kVecs; ++i) {
    const IVec q = finite ? to_nearest(x[i] * inverse) : IVec{};
    const XVec stored = __builtin_convertvector(q + Kind::kOffset, XVec);
    std::memcpy(to + i * kLanes, &stored, sizeof(stored));
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

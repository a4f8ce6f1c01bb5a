// One float vector type per CPU capability, and the elementwise functions the kernels need.
//
// This is the only file that knows the instruction set. at::vec is not used: its headers refuse to
// compile under TORCH_TARGET_VERSION, and the compiler's own vector types need no torch header.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

// For what a loop calls once a vector or a row, where a call would pass through memory what lies in
// registers.
#define FASTVLM_INLINE __attribute__((always_inline)) inline

#ifndef CPU_CAPABILITY
#define CPU_CAPABILITY DEFAULT
#endif

namespace fastvlm {
namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HVec __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Int8 {
  int8_t value;
};

inline Vec broadcast(float x) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Vec)_mm512_set1_ps(x);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

// a where the mask is set, b elsewhere. A comparison gives a mask of all ones or zeros.
inline Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }

// Both keep a NaN in x: of two numbers that cannot be compared the instructions give the second.
inline Vec at_most(Vec x, Vec limit) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Vec)_mm512_min_ps((__m512)limit, (__m512)x);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Vec)_mm256_min_ps((__m256)limit, (__m256)x);
#else
  return select(x > limit, limit, x);
#endif
}
inline Vec at_least(Vec x, Vec limit) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Vec)_mm512_max_ps((__m512)limit, (__m512)x);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Vec)_mm256_max_ps((__m256)limit, (__m256)x);
#else
  return select(x < limit, limit, x);
#endif
}
inline Vec abs(Vec x) { return (Vec)((UVec)x & 0x7fffffffu); }

inline Vec lane_index() {
#if defined(CPU_CAPABILITY_AVX512)
  return Vec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(CPU_CAPABILITY_AVX2)
  return Vec{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return Vec{0, 1, 2, 3};
#endif
}

inline Vec widen(HVec bits, BFloat16) { return (Vec)(__builtin_convertvector(bits, UVec) << 16); }

inline Vec widen(HVec bits, Half) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Vec)_mm512_cvtph_ps((__m256i)bits);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Vec)_mm256_cvtph_ps((__m128i)bits);
#else
  const UVec h = __builtin_convertvector(bits, UVec);
  // The exponent bias differs by 112; multiplying by 2^112 also normalises subnormals.
  const Vec scaled = (Vec)((h & 0x7fffu) << 13) * broadcast(0x1p112f);
  const UVec special = (UVec)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Vec)((UVec)scaled | special | ((h & 0x8000u) << 16));
#endif
}

inline HVec narrow(Vec x, BFloat16) {
  const UVec bits = (UVec)x;
  const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UVec nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((IVec)(x == x) ? rounded : nan, HVec);
}

inline HVec narrow(Vec x, Half) {
#if defined(CPU_CAPABILITY_AVX512)
  return (HVec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(CPU_CAPABILITY_AVX2)
  return (HVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const UVec bits = (UVec)x;
  const UVec magnitude = bits & 0x7fffffffu;
  // Adding 0.5 makes the adder round a subnormal result to the 2^-24 grid.
  const UVec subnormal = (UVec)((Vec)magnitude + broadcast(0.5f)) - 0x3f000000u;
  const UVec normal = (magnitude - 0x37fff001u + ((magnitude >> 13) & 1u)) >> 13;
  UVec half = (IVec)(magnitude < 0x38800000u) ? subnormal : normal;
  half = (IVec)(magnitude >= 0x477ff000u) ? UVec{} + 0x7c00u : half;
  half = (IVec)(magnitude > 0x7f800000u) ? UVec{} + 0x7e00u : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), HVec);
#endif
}

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }

inline Vec load(const Int8* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[i].value;
  return x;
#endif
}

template <class T>
inline Vec load(const T* p) {
  HVec bits;
  std::memcpy(&bits, p, sizeof(bits));
  return widen(bits, T{});
}
template <class T>
inline void store(T* p, Vec x) {
  const HVec bits = narrow(x, T{});
  std::memcpy(p, &bits, sizeof(bits));
}

// The first n < kLanes elements, zeros behind; nothing past them is touched.
template <class T>
inline Vec load_partial(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
inline void store_partial(T* p, Vec x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

#if defined(__clang__)
#define FASTVLM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTVLM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IVec{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... of the lower and of the upper halves.
inline Vec interleave_low(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return FASTVLM_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(CPU_CAPABILITY_AVX2)
  return FASTVLM_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return FASTVLM_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
inline Vec interleave_high(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return FASTVLM_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(CPU_CAPABILITY_AVX2)
  return FASTVLM_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return FASTVLM_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// x[i] lane j becomes x[j] lane i: log2(kLanes) rounds of a perfect shuffle.
inline void transpose(Vec (&x)[kLanes]) {
  for (int round = 1; round < kLanes; round *= 2) {
    Vec y[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + kLanes / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

// Adds the lanes of a and of b that lie `Step` apart: where the index of a lane has that bit, the
// result is b's. One of the two operands is a blend, which does not wait for the shuffle unit.
template <int Step, int... I>
inline Vec fold(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return FASTVLM_SHUFFLE(a, b, ((I & Step) ? I + kLanes : I)...) +
         FASTVLM_SHUFFLE(a, b, ((I & Step) ? (I ^ Step) + kLanes : (I ^ Step))...);
}

// Lane i of the result is the sum over the lanes of x[i]. Destroys x.
template <int Step = kLanes / 2>
inline Vec sum_each(Vec (&x)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < Step; ++i) {
    x[i] = fold<Step>(x[i], x[i + Step], std::make_integer_sequence<int, kLanes>{});
  }
  if constexpr (Step > 1) return sum_each<Step / 2>(x);
  return x[0];
}

inline float sum(Vec x) {
  for (int n = 1; n < kLanes; n *= 2) x = interleave_low(x, x) + interleave_high(x, x);
  return x[0];
}
inline float max(Vec x) {
  for (int n = 1; n < kLanes; n *= 2) {
    x = at_least(interleave_low(x, x), interleave_high(x, x));
  }
  return x[0];
}

// About 1 ulp, for x from -87.3 to 88.3; a NaN stays one.
inline Vec exp_within(Vec x) {
  const Vec magic = broadcast(0x1.8p23f);  // adding it rounds to an integer, kept in the low bits
  const Vec shifted = x * broadcast(1.44269504f) + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * broadcast(0.693359375f)) + n * broadcast(2.12194440e-4f);
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + broadcast(1.3981999507e-3f);
  p = p * r + broadcast(8.3334519073e-3f);
  p = p * r + broadcast(4.1665795894e-2f);
  p = p * r + broadcast(1.6666665459e-1f);
  p = p * r + broadcast(5.0000001201e-1f);
  p = p * (r * r) + r + broadcast(1.0f);
  return p * (Vec)(((UVec)shifted << 23) + 0x3f800000u);  // 2^n
}

// 0 below -87.3, where float would become subnormal; infinite above 88.3.
inline Vec exp(Vec x) {
  const Vec scaled = exp_within(at_most(x, broadcast(88.3f)));
  const Vec finite = select(x > broadcast(88.3f), broadcast(__builtin_inff()), scaled);
  return select(x < broadcast(-87.3f), Vec{}, finite);
}

// For x that is at most 0; next to nothing below -87.3.
inline Vec exp_of_negative(Vec x) { return exp_within(at_least(x, broadcast(-87.3f))); }

// For results that are rounded to bfloat16 or fewer bits: 1 / x to 2^-14 where the CPU has that,
// and 2^x to 2^-18, next to nothing below -100 and infinite from 127.5 on. Below -126 products with
// it would be subnormal, which cost a hundred cycles each.
inline Vec rough_reciprocal(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Vec)_mm512_rcp14_ps((__m512)x);
#else
  return broadcast(1.0f) / x;
#endif
}
inline Vec rough_exp2(Vec x) {
  const Vec magic = broadcast(0x1.8p23f);
  x = at_most(at_least(x, broadcast(-100.0f)), broadcast(128.0f));
  const Vec shifted = x + magic, r = x - (shifted - magic);
  Vec p = broadcast(9.5701019e-3f);
  p = p * r + broadcast(5.59178618e-2f);
  p = p * r + broadcast(2.40247448e-1f);
  p = p * r + broadcast(6.93121814e-1f);
  p = p * r + broadcast(9.99999261e-1f);
  return p * (Vec)(((UVec)shifted << 23) + 0x3f800000u);
}

inline Vec tanh(Vec x) {
  const Vec z = abs(x);
  const Vec large = broadcast(1.0f) - broadcast(2.0f) / (exp(z + z) + broadcast(1.0f));
  const Vec square = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = p * square + broadcast(2.06390887954e-2f);
  p = p * square + broadcast(-5.37397155531e-2f);
  p = p * square + broadcast(1.33314422036e-1f);
  p = p * square + broadcast(-3.33332819422e-1f);
  const Vec small = p * square * x + x;
  const Vec signed_large = (Vec)((UVec)large | ((UVec)x & 0x80000000u));
  return select(z < broadcast(0.625f), small, signed_large);
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

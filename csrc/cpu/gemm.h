// What the kernels are made of: tasks, scratch memory, and register-blocked products of a few rows
// with weight rows that stream from memory.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

template <class Body>
void for_each_task(int64_t tasks, Body& body) {
  run_tasks(
      tasks,
      [](void* context, int64_t task, int64_t worker) {
        (*static_cast<Body*>(context))(task, worker);
      },
      &body);
}

// Work on fewer elements than this is done before a second thread has begun.
constexpr int64_t kFewElements = 32768;

// The same for work on `elements` numbers, on the calling thread where they are few.
template <class Body>
void for_each_task(int64_t tasks, int64_t elements, Body& body) {
  if (elements >= kFewElements) return for_each_task(tasks, body);
  for (int64_t task = 0; task < tasks; ++task) body(task, int64_t{0});
}

// Scratch memory that goes with its scope.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))))) {}
  ~Scratch() { release(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Calls body with a value of the element type.
template <class Body>
void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat: return body(float{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kHalf: return body(Half{});
    case DType::kInt8: return;  // see with_weight_type
  }
}

// The same where the element may be one that is only ever read.
template <class Body>
void with_weight_type(DType dtype, Body&& body) {
  if (dtype == DType::kInt8) return body(Int8{});
  with_type(dtype, body);
}

// Writes f(i, vector) for i = 0, kLanes, ... over n elements of to.
template <class T, class F>
FASTVLM_INLINE void map_to(T* to, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, f(i, static_cast<int64_t>(kLanes)));
  if (i < n) store_partial(to + i, f(i, n - i), n - i);
}

template <class T>
inline Vec load_some(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_partial(p, n);
}

template <class T>
inline void to_float(const T* from, int64_t n, float* to) {
  map_to(to, n, [&](int64_t i, int64_t count) { return load_some(from + i, count); });
}

// A row of n elements as float, zeros up to a whole vector.
template <class T>
inline void gather_row(const T* from, int64_t n, float* to) {
  to_float(from, n, to);
  for (int64_t d = n; d % kLanes != 0; ++d) to[d] = 0.0f;
}

// How many weight rows are read side by side for a number of x rows: as many sums as there are
// registers for.
constexpr int rows_in_flight(int x_rows) {
  if (kRegisters == 32) return x_rows <= 2 ? 8 : x_rows == 3 ? 8 : 6;
  return x_rows <= 2 ? 6 : x_rows == 3 ? 4 : 3;
}

// The rows that come next are asked for: their pages and streams change too often for the hardware.
// Into the second-level cache: in the first they would be in the way of the rows at work, which
// with a stride of 4 KiB all share a few of its sets.
template <class T>
inline void prefetch_far(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// What is read next, asked for a few cache lines at a time: more than that at once would wait for
// each other, and the products for them.
class Ahead {
 public:
  // rows of so many bytes, so many bytes apart, in so many calls of more().
  Ahead(const void* first, int64_t rows, int64_t stride, int64_t bytes, int64_t calls)
      : at_(static_cast<const char*>(first)),
        rows_(rows),
        stride_(stride),
        bytes_(bytes),
        share_(divide_up(rows * divide_up(bytes, kLine), calls)) {}

  void more() {
    for (int64_t i = 0; i < share_ && rows_ > 0; ++i) {
      prefetch_far(at_ + done_);
      done_ += kLine;
      if (done_ < bytes_) continue;
      done_ = 0;
      at_ += stride_;
      --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  const char* at_;
  int64_t rows_, stride_, bytes_, share_, done_ = 0;
};

// sums[m][n] += x[m] w[n], lane by lane, for M rows of x and N rows of w over k elements.
template <class T, class X, int N, int M>
inline void dot_sums(const T* w, int64_t w_stride, const X* x, int64_t x_stride, int64_t k,
                     Vec (&sums)[M][N]) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    Vec xs[M];
    for (int m = 0; m < M; ++m) xs[m] = load(x + m * x_stride + i);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec wn = load(w + n * w_stride + i);
      prefetch_far(w + (n + N) * w_stride + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m][n] += xs[m] * wn;
    }
  }
  if (i < k) {
    for (int n = 0; n < N; ++n) {
      const Vec wn = load_partial(w + n * w_stride + i, k - i);
      for (int m = 0; m < M; ++m) sums[m][n] += load_partial(x + m * x_stride + i, k - i) * wn;
    }
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// bfloat16 times bfloat16 with the CPU's own instruction, two products a lane: only where
// has_bfloat16_products().
template <int N, int M>
__attribute__((target("avx512bf16"))) inline void dot_sums(const BFloat16* w, int64_t w_stride,
                                                           const BFloat16* x, int64_t x_stride,
                                                           int64_t k, Vec (&sums)[M][N]) {
  __m512 totals[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) totals[m][n] = (__m512)sums[m][n];
  }
  int64_t i = 0;
  for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
    __m512bh xs[M];
    for (int m = 0; m < M; ++m) xs[m] = (__m512bh)_mm512_loadu_si512(x + m * x_stride + i);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const __m512bh wn = (__m512bh)_mm512_loadu_si512(w + n * w_stride + i);
      prefetch_far(w + (n + N) * w_stride + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) totals[m][n] = _mm512_dpbf16_ps(totals[m][n], xs[m], wn);
    }
  }
  if (i < k) {
    const __mmask32 rest = (__mmask32)((1ull << (k - i)) - 1);
    for (int n = 0; n < N; ++n) {
      const __m512bh wn = (__m512bh)_mm512_maskz_loadu_epi16(rest, w + n * w_stride + i);
      for (int m = 0; m < M; ++m) {
        const __m512bh xm = (__m512bh)_mm512_maskz_loadu_epi16(rest, x + m * x_stride + i);
        totals[m][n] = _mm512_dpbf16_ps(totals[m][n], xm, wn);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sums[m][n] = (Vec)totals[m][n];
  }
}
#endif

// out[m][n] = the lanes of sums[m][n] added up.
template <int N, int M>
inline void store_totals(const Vec (&sums)[M][N], float* out, int64_t out_stride) {
  float totals[round_up(M * N, kLanes)];
#pragma GCC unroll 8
  for (int first = 0; first < M * N; first += kLanes) {
    Vec group[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      const int at = first + j;
      group[j] = at < M * N ? sums[at / N % M][at % N] : Vec{};
    }
    store(totals + first, sum_each(group));
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) out[m * out_stride + n] = totals[m * N + n];
  }
}

// A part of k of the products of M rows of x and N rows of w: it is added to what `kept` holds of
// the parts before (unless this is the first), and after the last part the totals go to out. Each
// part begins at zero, so that a rounding is one of a short sum.
template <class T, class X, int N, int M>
inline void dot_tile(const T* w, int64_t w_stride, const X* x, int64_t x_stride, int64_t k,
                     bool first, bool last, Vec* kept, float* out, int64_t out_stride) {
  Vec sums[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = Vec{};
  }
  dot_sums(w, w_stride, x, x_stride, k, sums);
  if (!first) {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) sums[m][n] += kept[m * N + n];
    }
  }
  if (last) return store_totals(sums, out, out_stride);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) kept[m * N + n] = sums[m][n];
  }
}

template <class T, class X, int N>
inline void dot_rows(int m, const T* w, int64_t w_stride, const X* x, int64_t x_stride, int64_t k,
                     bool first, bool last, Vec* kept, float* out, int64_t out_stride) {
  auto run = [&](auto rows) {
    dot_tile<T, X, N, decltype(rows)::value>(w, w_stride, x, x_stride, k, first, last, kept, out,
                                             out_stride);
  };
  switch (m) {
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case 3: return run(std::integral_constant<int, 3>{});
    default: return run(std::integral_constant<int, 4>{});
  }
}

constexpr int64_t kMostRows = 64;  // of x in one call of products

// Bytes of a row of x in one part of k: weight rows that are used again stay in the first-level
// cache, and no lane adds up more than 128 products, or 64 where each is rounded twice.
constexpr int64_t kDotBytes = kLanes == 4 ? 1024 : kRegisters == 32 ? 2048 : 4096;

// out[m][n] = x[m] . w[n] for N rows of w. They come from memory once and from cache for the
// further groups of x rows, part by part of k.
template <class T, class X, int N>
void products_of_rows(const T* w, int64_t w_stride, const X* x, int64_t x_stride, int64_t m_rows,
                      int64_t k, float* out, int64_t out_stride) {
  const int64_t groups = divide_up(m_rows, 4);
  const int64_t block = kDotBytes / int64_t{sizeof(X)};
  Vec kept[kMostRows * N];
  for (int64_t begin = 0; begin < k || begin == 0; begin += block) {
    for (int64_t group = 0, m = 0; group < groups; ++group) {
      const int64_t end = m_rows * (group + 1) / groups;
      dot_rows<T, X, N>(static_cast<int>(end - m), w + begin, w_stride, x + m * x_stride + begin,
                        x_stride, smaller(block, k - begin), begin == 0, begin + block >= k,
                        kept + m * N, out + m * out_stride, out_stride);
      m = end;
    }
  }
}

template <class T, class X, int N>
void products_in_flight(const T* w, int64_t w_stride, int64_t n_rows, const X* x, int64_t x_stride,
                        int64_t m_rows, int64_t k, float* out, int64_t out_stride) {
  int64_t n = 0;
  for (; n + N <= n_rows; n += N) {
    products_of_rows<T, X, N>(w + n * w_stride, w_stride, x, x_stride, m_rows, k, out + n,
                              out_stride);
  }
  for (; n < n_rows; ++n) {
    products_of_rows<T, X, 1>(w + n * w_stride, w_stride, x, x_stride, m_rows, k, out + n,
                              out_stride);
  }
}

// out[m][n] = x[m] . w[n] for up to kMostRows rows of x.
template <class T, class X>
void products(const T* w, int64_t w_stride, int64_t n_rows, const X* x, int64_t x_stride,
              int64_t m_rows, int64_t k, float* out, int64_t out_stride) {
  auto run = [&](auto rows) {
    products_in_flight<T, X, decltype(rows)::value>(w, w_stride, n_rows, x, x_stride, m_rows, k,
                                                    out, out_stride);
  };
  switch (m_rows) {
    case 1:
    case 2: return run(std::integral_constant<int, rows_in_flight(2)>{});
    case 3: return run(std::integral_constant<int, rows_in_flight(3)>{});
    default: return run(std::integral_constant<int, rows_in_flight(4)>{});
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

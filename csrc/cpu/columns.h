// Products of a few rows with weights whose columns are contiguous, [inputs, outputs]: each row of
// such a weight is read once, from memory, and adds to a sum of every output.
#pragma once

#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

// Inputs that a sum adds up before it begins again, so that a rounding is one of a short sum; a
// block of a chunk's outputs stays in the first-level cache for all rows of x.
constexpr int64_t kColumnBlock = 64;
// How many rows of a weight are asked for before they are read: each lies on a page of its own.
constexpr int64_t kRowsAhead = 12;

// Vectors of outputs side by side for a number of x rows: as many sums as there are registers for.
constexpr int columns_in_flight(int x_rows) {
  if (kRegisters == 32) return 6;
  return x_rows == 1 ? 12 : x_rows == 2 ? 6 : x_rows == 3 ? 4 : 3;
}

// out[m][n] = sum over i of x[m][i] w[i][n], added to what is there unless it is the first part,
// for M rows of x and N vectors of outputs, or the first `some` of one. ahead: of how many outputs
// the rows to come are asked for.
template <class T, int M, int N>
inline void column_tile(const T* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t k,
                        bool first, int64_t ahead, int64_t some, float* out, int64_t out_stride) {
  Vec sums[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) sums[m][n] = Vec{};
  }
  for (int64_t i = 0; i < k; ++i) {
    const T* row = w + i * w_stride;
    for (int64_t n = 0; n < ahead; n += 64 / int64_t{sizeof(T)}) {
      prefetch_far(row + kRowsAhead * w_stride + n);
    }
    Vec xs[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) xs[m] = broadcast(x[m * x_stride + i]);
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
      const Vec wn = some > 0 ? load_partial(row, some) : load(row + n * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m][n] += xs[m] * wn;
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float* to = out + m * out_stride + n * kLanes;
      store(to, first ? sums[m][n] : load(to) + sums[m][n]);
    }
  }
}

template <class T, int M>
void products_of_columns(const T* w, int64_t w_stride, int64_t count, const float* x,
                         int64_t x_stride, int64_t k, bool first, bool asks, float* out,
                         int64_t out_stride) {
  constexpr int N = columns_in_flight(M);
  int64_t n = 0;
  for (; n + N * kLanes <= count; n += N * kLanes) {
    column_tile<T, M, N>(w + n, w_stride, x, x_stride, k, first, asks && n == 0 ? count : 0, 0,
                         out + n, out_stride);
  }
  for (; n < count; n += kLanes) {
    const int64_t some = n + kLanes <= count ? 0 : count - n;
    column_tile<T, M, 1>(w + n, w_stride, x, x_stride, k, first, 0, some, out + n, out_stride);
  }
}

// out[m][n] = sum over i of x[m][i] w[i][n] for up to kMostRows rows of x and `count` outputs, for
// which out has room in whole vectors.
template <class T>
void column_products(const T* w, int64_t w_stride, int64_t count, const float* x, int64_t x_stride,
                     int64_t m_rows, int64_t k, float* out, int64_t out_stride) {
  const int64_t groups = divide_up(m_rows, 4);
  for (int64_t begin = 0; begin < k || begin == 0; begin += kColumnBlock) {
    for (int64_t group = 0, m = 0; group < groups; ++group) {
      const int64_t end = m_rows * (group + 1) / groups;
      auto run = [&](auto rows) {
        products_of_columns<T, decltype(rows)::value>(
            w + begin * w_stride, w_stride, count, x + m * x_stride + begin, x_stride,
            smaller(kColumnBlock, k - begin), begin == 0, m == 0, out + m * out_stride, out_stride);
      };
      switch (end - m) {
        case 1: run(std::integral_constant<int, 1>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        case 3: run(std::integral_constant<int, 3>{}); break;
        default: run(std::integral_constant<int, 4>{});
      }
      m = end;
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

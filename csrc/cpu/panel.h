// Register-blocked products of a small panel with a panel that lies in cache.
#pragma once

#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

// Rows of an operand and what lies between neighbours in a row and between rows: a matrix, or with
// the two exchanged its transpose.
struct Strided {
  const float* data;
  int64_t row, step;
};

// to[k][lanes] = from[lane][k] as float32 for `count` rows of `depth` elements; zeros in the lanes
// beyond them, whose number is one of whole vectors.
template <class T>
void pack_columns(const T* from, int64_t stride, int64_t count, int64_t depth, float* to,
                  int64_t lanes) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t n = smaller(kLanes, depth - k);
      Vec square[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        square[j] = lane + j < count ? load_some(from + (lane + j) * stride + k, n) : Vec{};
      }
      transpose(square);
      for (int64_t j = 0; j < n; ++j) store(to + (k + j) * lanes + lane, square[j]);
    }
  }
}

// c[M][N vectors] (+)= a[M][k] b[k][N vectors], a element by element, b vector by vector. What is
// added to c is summed apart from it first: short sums of short sums round less than one long one.
template <int M, int N>
void panel_tile(Strided a, const float* b, int64_t b_stride, int64_t k, bool accumulate, float* c,
                int64_t c_stride) {
  Vec sums[M][N] = {};
  for (int64_t i = 0; i < k; ++i) {
    Vec bs[N];
    for (int n = 0; n < N; ++n) bs[n] = load(b + i * b_stride + n * kLanes);
#pragma GCC unroll 24
    for (int m = 0; m < M; ++m) {
      const Vec am = broadcast(a.data[m * a.row + i * a.step]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] += am * bs[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float* to = c + m * c_stride + n * kLanes;
      store(to, accumulate ? load(to) + sums[m][n] : sums[m][n]);
    }
  }
}

template <int N>
inline void panel_rows(int64_t m_rows, Strided a, const float* b, int64_t b_stride, int64_t k,
                       bool accumulate, float* c, int64_t c_stride) {
  auto rows = [&](auto count, int64_t m) {
    panel_tile<decltype(count)::value, N>({a.data + m * a.row, a.row, a.step}, b, b_stride, k,
                                          accumulate, c + m * c_stride, c_stride);
  };
  int64_t m = 0;
  for (; m + 6 <= m_rows; m += 6) rows(std::integral_constant<int, 6>{}, m);
  for (; m + 2 <= m_rows; m += 2) rows(std::integral_constant<int, 2>{}, m);
  if (m < m_rows) rows(std::integral_constant<int, 1>{}, m);
}

// c[m_rows][cols] (+)= a[m_rows][k] b[k][cols]; cols is a multiple of kLanes.
inline void panel_product(Strided a, int64_t m_rows, const float* b, int64_t b_stride, int64_t k,
                          bool accumulate, float* c, int64_t c_stride, int64_t cols) {
  constexpr int kWide = kRegisters == 32 ? 4 : 2;
  int64_t n = 0;
  for (; n + kWide * kLanes <= cols; n += kWide * kLanes) {
    panel_rows<kWide>(m_rows, a, b + n, b_stride, k, accumulate, c + n, c_stride);
  }
  for (; n < cols; n += kLanes) {
    panel_rows<1>(m_rows, a, b + n, b_stride, k, accumulate, c + n, c_stride);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

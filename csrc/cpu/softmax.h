// What both attention kernels share: scores of a few query rows against keys given by their
// offsets, the weighted sum of values, and the softmax that runs over blocks of keys.
#pragma once

#include <cmath>

#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

// A query row's softmax so far: the largest score and the sum of exp(score - largest).
struct Running {
  float largest;
  float total;
};
constexpr Running kNothingSeen = {-INFINITY, 0.0f};

struct ScoreRule {
  float scale;
  float softcap;
};

// Keys of one tile of scores: so many that their sums fill the registers, and divide a vector.
constexpr int keys_in_flight(int rows) { return kLanes / (rows == 3 ? 2 : rows); }

// scores[m][i] = q[m] . keys[i] for M rows and K keys.
template <class T, int M, int K>
inline void score_tile(const float* q, int64_t q_stride, const T* const* keys, int64_t dim,
                       float* scores, int64_t scores_stride) {
  Vec sums[M][K] = {};
  auto add = [&](int64_t d, int64_t n) {
    Vec qs[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) qs[m] = load(q + m * q_stride + d);
#pragma GCC unroll 16
    for (int j = 0; j < K; ++j) {
      const Vec key = load_some(keys[j] + d, n);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m][j] += qs[m] * key;
    }
  };
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) add(d, kLanes);
  if (d < dim) add(d, dim - d);
  store_totals(sums, scores, scores_stride);
}

// The same for all n keys; rounds n up to whole vectors by repeating the last key, so that a score
// row must have room for that. q rows are padded with zeros. A key is loaded once for four rows.
template <class T>
void score_rows(const float* q, int64_t q_stride, int64_t m_rows, const T* k,
                const int64_t* offsets, int64_t n, int64_t dim, float* scores,
                int64_t scores_stride) {
  auto rows = [&](auto count, int64_t m) {
    constexpr int M = decltype(count)::value, K = keys_in_flight(M);
    for (int64_t i = 0; i < round_up(n, kLanes); i += K) {
      const T* keys[K];
      for (int j = 0; j < K; ++j) keys[j] = k + offsets[smaller(i + j, n - 1)];
      score_tile<T, M, K>(q + m * q_stride, q_stride, keys, dim, scores + m * scores_stride + i,
                          scores_stride);
    }
  };
  int64_t m = 0;
  for (; m + 4 <= m_rows; m += 4) rows(std::integral_constant<int, 4>{}, m);
  switch (m_rows - m) {
    case 3: return rows(std::integral_constant<int, 3>{}, m);
    case 2: return rows(std::integral_constant<int, 2>{}, m);
    case 1: return rows(std::integral_constant<int, 1>{}, m);
  }
}

// sums[M][N vectors] += p[M][n] v[offsets[n]], from column d; the last vector may be partial.
template <class T, int M, int N>
inline void value_tile(const float* p, int64_t p_stride, const T* v, const int64_t* offsets,
                       int64_t n, int64_t columns, float* sums, int64_t sums_stride) {
  Vec acc[M][N] = {};
  for (int64_t i = 0; i < n; ++i) {
    const T* row = v + offsets[i];
    Vec weights[M];
    for (int m = 0; m < M; ++m) weights[m] = broadcast(p[m * p_stride + i]);
    for (int c = 0; c < N; ++c) {
      const Vec value = N == 1 ? load_some(row, columns) : load(row + c * kLanes);
      for (int m = 0; m < M; ++m) acc[m][c] += weights[m] * value;
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < N; ++c) {
      float* to = sums + m * sums_stride + c * kLanes;
      store(to, load(to) + acc[m][c]);
    }
  }
}

// sums[m] += sum over i of p[m][i] v[offsets[i]]; sums rows are padded to whole vectors.
template <class T>
void add_values(const float* p, int64_t p_stride, int64_t m_rows, const T* v,
                const int64_t* offsets, int64_t n, int64_t dim, float* sums, int64_t sums_stride) {
  constexpr int kRows = kRegisters == 32 ? 4 : 3;
  auto columns = [&](auto width, int64_t d, int64_t count) {
    constexpr int N = decltype(width)::value;
    auto rows = [&](auto some, int64_t m) {
      value_tile<T, decltype(some)::value, N>(p + m * p_stride, p_stride, v + d, offsets, n, count,
                                              sums + m * sums_stride + d, sums_stride);
    };
    int64_t m = 0;
    for (; m + kRows <= m_rows; m += kRows) rows(std::integral_constant<int, kRows>{}, m);
    switch (m_rows - m) {
      case 3: return rows(std::integral_constant<int, 3>{}, m);
      case 2: return rows(std::integral_constant<int, 2>{}, m);
      case 1: return rows(std::integral_constant<int, 1>{}, m);
    }
  };
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
    columns(std::integral_constant<int, 4>{}, d, 4 * kLanes);
  }
  for (; d < dim; d += kLanes) {
    columns(std::integral_constant<int, 1>{}, d, smaller(kLanes, dim - d));
  }
}

// Turns a row of n products into exp(score - largest), in place, and brings `running` and the sum
// of values gathered under the former largest score up to date. Only keys from `first` up to
// `last` are visible. Whole vectors are written: keys from n on get weight 0. bias: of each key, in
// whole vectors, or null.
inline void softmax_row(float* scores, int64_t n, int64_t first, int64_t last, ScoreRule rule,
                        Running& running, float* sums, int64_t sums_size, const float* bias) {
  const Vec scale = broadcast(rule.softcap > 0 ? rule.scale / rule.softcap : rule.scale);
  const Vec softcap = broadcast(rule.softcap);
  const Vec hidden = broadcast(-INFINITY);
  const Vec from = broadcast(static_cast<float>(first));
  const Vec to = broadcast(static_cast<float>(smaller(last, n)));
  const bool all_visible = first <= 0 && last >= n && n % kLanes == 0;
  Vec largest = broadcast(running.largest);
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec s = load(scores + i) * scale;
    if (rule.softcap > 0) s = tanh(s) * softcap;
    if (bias != nullptr) s += load(bias + i);
    if (!all_visible) {
      const Vec index = lane_index() + broadcast(static_cast<float>(i));
      s = select((index >= from) & (index < to), s, hidden);
    }
    largest = at_least(largest, s);
    store(scores + i, s);
  }
  const float now = max(largest);
  // With nothing visible so far any finite reference keeps exp(-inf - reference) at 0.
  const Vec reference = broadcast(now == -INFINITY ? 0.0f : now);
  Vec total{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec p = exp(load(scores + i) - reference);
    total += p;
    store(scores + i, p);
  }
  if (now != running.largest && running.total != 0.0f) {
    const Vec factor = exp(broadcast(running.largest) - reference);
    running.total *= factor[0];
    for (int64_t d = 0; d < sums_size; d += kLanes) store(sums + d, load(sums + d) * factor);
  }
  running.largest = now;
  running.total += sum(total);
}

// A row's result over one block of keys, kept until all blocks of the row are there.
inline void combine(const float* parts, const Running* running, int64_t blocks, int64_t part_size,
                    float* sums, Running& result) {
  result = kNothingSeen;
  for (int64_t b = 0; b < blocks; ++b) {
    // A NaN is never the larger; it arrives through the total instead.
    if (running[b].largest > result.largest) result.largest = running[b].largest;
  }
  for (int64_t d = 0; d < part_size; ++d) sums[d] = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) {
    if (running[b].total == 0.0f) continue;
    const Vec factor = exp(broadcast(running[b].largest - result.largest));
    result.total += running[b].total * factor[0];
    for (int64_t d = 0; d < part_size; d += kLanes) {
      store(sums + d, load(sums + d) + load(parts + b * part_size + d) * factor);
    }
  }
}

template <class T>
inline void write_row(const float* sums, Running running, int64_t dim, T* out) {
  const Vec factor = broadcast(running.total == 0.0f ? 0.0f : 1.0f / running.total);
  map_to(out, dim, [&](int64_t i, int64_t) { return load(sums + i) * factor; });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

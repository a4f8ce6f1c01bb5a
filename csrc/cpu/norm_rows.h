// What the norm kernels are made of: rows in float32 with their statistics, and sums over all rows.
//
// A row comes from memory once, stays in the first-level cache as float32, and its results are
// written once. Rows are done in blocks whose size depends on the shape alone: each block sums the
// gradients of the weights over its rows, and the blocks are added in order, so the bits are the
// same for any number of threads.
#pragma once

#include <cmath>

#include "gemm.h"
#include "norm.h"
#include "random.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockElements = 16384;
constexpr int64_t kMostBlocks = 256;
// so many rows are summed in float32 before the sum goes into a double
constexpr int64_t kFloatRows = 32;

inline int64_t block_rows(const NormArgs& a) {
  return larger(divide_up(kBlockElements, larger(1, a.cols)), divide_up(a.rows, kMostBlocks));
}

// Sums that do not wait for each other: an addition takes as long as so many others may begin.
constexpr int kChains = 4;

// f(i, n, chain) for the vectors of a row: n elements from i on, whole but for the last.
template <class F>
inline void for_row(int64_t cols, F f) {
  int64_t i = 0;
  for (; i + kChains * kLanes <= cols; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      f(i + chain * kLanes, static_cast<int64_t>(kLanes), chain);
    }
  }
  for (; i + kLanes <= cols; i += kLanes) f(i, static_cast<int64_t>(kLanes), 0);
  if (i < cols) f(i, cols - i, 0);
}

class RowSum {
 public:
  void add(int chain, Vec x) { parts_[chain] += x; }
  double total() const {
    double total = 0.0;
    for (const Vec& part : parts_) total += double{sum(part)};
    return total;
  }

 private:
  Vec parts_[kChains] = {};
};

// A sum of products of three float32 numbers in double: the gradient of a gate is one number, what
// is left of millions that cancel.
class DoubleSum {
 public:
  void add(Vec a, Vec b, Vec c) {
    for (int half = 0; half < 2; ++half) sums_ += wide(a, half) * wide(b, half) * wide(c, half);
  }
  double total() const {
    double total = 0.0;
    for (int i = 0; i < kLanes / 2; ++i) total += sums_[i];
    return total;
  }

 private:
  typedef double DVec __attribute__((vector_size(4 * kLanes)));
  typedef float HalfVec __attribute__((vector_size(2 * kLanes)));
  static DVec wide(Vec x, int half) {
    HalfVec part;
    std::memcpy(&part, reinterpret_cast<const char*>(&x) + half * sizeof(part), sizeof(part));
    return __builtin_convertvector(part, DVec);
  }
  DVec sums_{};
};

template <class T>
inline void put(T* to, int64_t i, int64_t n, Vec x) {
  n == kLanes ? store(to + i, x) : store_partial(to + i, x, n);
}

// Zeros in the lanes from n on.
inline Vec first_lanes(Vec x, int64_t n) {
  if (n == kLanes) return x;
  return select(lane_index() < broadcast(static_cast<float>(n)), x, Vec{});
}

// offset + a vector of any dtype, as float32.
class FloatVector {
 public:
  FloatVector(const Matrix& from, float offset)
      : data_(from.data == nullptr ? 0 : round_up(from.cols, kLanes)) {
    if (from.data == nullptr) return;
    with_type(from.dtype, [&](auto type) {
      const auto* p = static_cast<const decltype(type)*>(from.data);
      for_row(from.cols, [&](int64_t i, int64_t n, int) {
        store(data_.data() + i, load_some(p + i, n) + broadcast(offset));
      });
    });
  }
  Vec at(int64_t i) const { return load(data_.data() + i); }

 private:
  Scratch<float> data_;
};

// What every kernel is: a body for each row, with float32 rows of scratch, and columns that are
// summed over all rows.
template <class T>
class Rows {
 public:
  // scratch: float32 rows that a body needs; sums: how many arrays [cols] it adds to
  Rows(const NormArgs& args, int64_t scratch, int64_t sums)
      : a(args),
        width_(round_up(larger(1, args.cols), kLanes)),
        size_(block_rows(args)),
        blocks_(divide_up(args.rows, size_)),
        scratch_rows_(scratch),
        sums_size_(sums * width_),
        scratch_(workers() * scratch * width_),
        wide_(size_ > kFloatRows ? workers() * sums_size_ : 0),
        sums_(blocks_ * sums_size_),
        totals_(blocks_) {}

  // body(row, scratch, sums, total): array r of scratch and of sums lies r * width() further; total
  // is a number that is summed over all rows
  template <class Body>
  void run(Body body) {
    auto task = [&](int64_t block, int64_t worker) {
      float* sums = sums_.data() + block * sums_size_;
      double* wide = wide_.data() + (size_ > kFloatRows ? worker * sums_size_ : 0);
      float* scratch = scratch_.data() + worker * scratch_rows_ * width_;
      const int64_t begin = block * size_, end = smaller(a.rows, begin + size_);
      const bool in_parts = end - begin > kFloatRows;
      for (int64_t i = 0; i < sums_size_; ++i) sums[i] = 0.0f;
      for (int64_t i = 0; in_parts && i < sums_size_; ++i) wide[i] = 0.0;
      totals_.data()[block] = 0.0;
      for (int64_t first = begin; first < end; first += kFloatRows) {
        const int64_t last = smaller(end, first + kFloatRows);
        for (int64_t r = first; r < last; ++r) body(r, scratch, sums, totals_.data()[block]);
        for (int64_t i = 0; in_parts && i < sums_size_; ++i) {
          wide[i] += sums[i];
          sums[i] = last < end ? 0.0f : static_cast<float>(wide[i]);
        }
      }
    };
    for_each_task(blocks_, a.rows * a.cols, task);
  }

  // to[i] = the sum of an array over all blocks
  void add_up(int64_t which, float* to) const {
    if (to == nullptr) return;
    Scratch<double> totals(width_);
    double* total = totals.data();
    for (int64_t i = 0; i < a.cols; ++i) total[i] = 0.0;
    for (int64_t b = 0; b < blocks_; ++b) {
      const float* sums = sums_.data() + b * sums_size_ + which * width_;
      for (int64_t i = 0; i < a.cols; ++i) total[i] += sums[i];
    }
    for (int64_t i = 0; i < a.cols; ++i) to[i] = static_cast<float>(total[i]);
  }

  double total() const {
    double total = 0.0;
    for (int64_t b = 0; b < blocks_; ++b) total += totals_.data()[b];
    return total;
  }

  int64_t width() const { return width_; }
  const T* row(const NormRows& rows, int64_t r) const {
    return static_cast<const T*>(rows.data) + r * rows.stride;
  }
  T* result(void* to, int64_t r) const {
    return to == nullptr ? nullptr : static_cast<T*>(to) + r * a.cols;
  }
  double mean(double total) const { return total / static_cast<double>(a.cols); }
  double inverse_root(double mean_square) const {
    return 1.0 / std::sqrt(mean_square + double{a.eps});
  }

  const NormArgs& a;

 private:
  int64_t width_, size_, blocks_, scratch_rows_, sums_size_;
  Scratch<float> scratch_;
  Scratch<double> wide_;
  Scratch<float> sums_;
  Scratch<double> totals_;
};

// A row x in float32, and 1 / sqrt(mean(x^2) + eps).
template <class T>
class RmsRow {
 public:
  RmsRow(const Rows<T>& rows, const T* from, float* x) : x_(x) {
    RowSum squares;
    for_row(rows.a.cols, [&](int64_t i, int64_t n, int chain) {
      const Vec v = load_some(from + i, n);
      squares.add(chain, v * v);
      store(x + i, v);
    });
    rstd_ = rows.inverse_root(rows.mean(squares.total()));
  }
  Vec at(int64_t i) const { return load(x_ + i); }
  Vec normed(int64_t i) const { return at(i) * broadcast(static_cast<float>(rstd_)); }
  double rstd() const { return rstd_; }

 private:
  float* x_;
  double rstd_;
};

// A row z = residual + dropout(x), or x, in float32, less its mean, and 1 / sqrt(variance + eps).
// Where y is given z goes there too.
template <class T>
class LayerNormRow {
 public:
  LayerNormRow(const Rows<T>& rows, int64_t r, float* z) : z_(z) {
    const NormArgs& a = rows.a;
    const T* x = rows.row(a.x, r);
    const T* residual = a.residual.data == nullptr ? nullptr : rows.row(a.residual, r);
    T* stream = rows.result(a.y, r);
    const bool drops = a.dropout.scale != 0;
    RowSum total, squares, rest;
    for_row(a.cols, [&](int64_t i, int64_t n, int chain) {
      Vec branch = load_some(x + i, n);
      if (drops) branch *= keep_scale(a.dropout, r * a.cols + i);
      if (residual != nullptr) branch = load_some(residual + i, n) + branch;
      if (stream != nullptr) put(stream, i, n, branch);
      const Vec v = first_lanes(branch, n);
      total.add(chain, v);
      store(z + i, v);
    });
    const Vec mean = broadcast(static_cast<float>(rows.mean(total.total())));
    for_row(a.cols, [&](int64_t i, int64_t n, int chain) {
      const Vec centred = first_lanes(load(z + i) - mean, n);
      squares.add(chain, centred * centred);
      rest.add(chain, centred);
      store(z + i, centred);
    });
    // the mean was rounded: next to a large one what is left is not small against the deviation
    const double left = rows.mean(rest.total());
    const double variance = rows.mean(squares.total()) - left * left;
    const double rstd = rows.inverse_root(variance < 0.0 ? 0.0 : variance);  // a NaN stays
    rstd_ = static_cast<float>(rstd);
    shift_ = static_cast<float>(left * rstd);
  }
  // Not zero in the lanes past the row's end.
  Vec normed(int64_t i) const { return load(z_ + i) * broadcast(rstd_) - broadcast(shift_); }
  float rstd() const { return rstd_; }

 private:
  float* z_;
  float rstd_, shift_;
};

inline float gate_of(const Matrix& gate) {
  float value = 1.0f;
  if (gate.data == nullptr) return value;
  with_type(gate.dtype, [&](auto type) {
    value = std::tanh(load_partial(static_cast<const decltype(type)*>(gate.data), 1)[0]);
  });
  return value;
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

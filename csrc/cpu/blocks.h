// What products of many rows share: blocks of rows and columns for the tasks, and what is added to
// a block of sums while it is in cache.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "packed.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

constexpr int kPanelVecs = kRegisters == 32 ? 4 : 2;
constexpr int64_t kPanel = kPanelVecs * kLanes;
constexpr int64_t kRows = 192;  // of a task: a multiple of the tiles' rows, 6 and 32
constexpr int64_t kCols = 128;  // of a block of sums, which stays in the second-level cache
constexpr int64_t kEach = 2;    // tasks for each thread, at least, where there is work for them

// A bias as float32; zeros where there is none.
class FloatBias {
 public:
  FloatBias(const Matrix& from, int64_t count) : data_(count) {
    if (from.data == nullptr) {
      std::fill_n(data_.data(), count, 0.0f);
      return;
    }
    with_type(from.dtype, [&](auto type) {
      to_float(static_cast<const decltype(type)*>(from.data), from.cols, data_.data());
    });
  }
  const float* from(int64_t i) const { return data_.data() + i; }

 private:
  Scratch<float> data_;
};

// How an arithmetic that has no way of its own writes numbers.
struct Stores {
  template <class T>
  static void put(T* to, Vec x) {
    store(to, x);
  }
  template <class T>
  static void put(T* to, Vec x, Vec next) {
    store(to, x);
    store(to + kLanes, next);
  }
};

// to[i] = f(i, lanes), as map_to, in the arithmetic's own rounding where it has one.
template <class Arithmetic, class T, class F>
FASTVLM_INLINE void put_all(T* to, int64_t n, F f) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    Arithmetic::put(to + i, f(i, int64_t{kLanes}), f(i + kLanes, int64_t{kLanes}));
  }
  for (; i + kLanes <= n; i += kLanes) Arithmetic::put(to + i, f(i, int64_t{kLanes}));
  if (i < n) store_partial(to + i, f(i, n - i), n - i);
}

template <class Arithmetic, class T, class R>
void write_row(const float* sums, const float* bias, float factor, const R* residual, int64_t n,
               T* out) {
  put_all<Arithmetic>(out, n, [=](int64_t i, int64_t some) {
    const Vec branch = load_some(sums + i, some) + load_some(bias + i, some);
    return load_some(residual + i, some) + branch * broadcast(factor);
  });
}
template <class Arithmetic, class T>
void write_row(const float* sums, const float* bias, float factor, int64_t n, T* out) {
  put_all<Arithmetic>(out, n, [=](int64_t i, int64_t some) {
    return (load_some(sums + i, some) + load_some(bias + i, some)) * broadcast(factor);
  });
}

// A part of a row of sums to where it goes.
template <class Arithmetic, class T>
void write(const Tail& tail, const FloatBias& bias, int64_t row, int64_t cols, int64_t first,
           int64_t count, const float* sums) {
  const float factor = tail.factors == nullptr ? 1.0f : tail.factors[row / tail.rows_per_factor];
  const float* shift = bias.from(first);
  T* out = static_cast<T*>(tail.out) + row * cols + first;
  if (tail.residual.data == nullptr) return write_row<Arithmetic>(sums, shift, factor, count, out);
  const int64_t at = row * tail.residual.stride + first;
  with_type(tail.residual.dtype, [&](auto type) {
    const auto* residual = static_cast<const decltype(type)*>(tail.residual.data) + at;
    write_row<Arithmetic>(sums, shift, factor, residual, count, out);
  });
}

// Rows in blocks of the same size, and the columns of a block in shares for several tasks where
// blocks are too few for the threads.
struct Cut {
  // tile: what the rows of a block are a multiple of, but for the last; kRows is one of it.
  Cut(int64_t rows, int64_t cols, int64_t tile = 6) : rows(rows), cols(cols) {
    blocks = divide_up(rows, kRows);
    size = round_up(divide_up(rows, larger(1, blocks)), tile);
    const int64_t wanted = divide_up(kEach * workers(), larger(1, blocks));
    shares = larger(1, smaller(wanted, divide_up(cols, kCols)));
  }
  template <class Body>
  void run(int64_t work, Body body) const {
    auto task = [&](int64_t index, int64_t worker) {
      const int64_t first = index / shares * size, share = index % shares;
      const int64_t chunks = divide_up(cols, kCols);
      const int64_t begin = chunks * share / shares * kCols;
      const int64_t end = smaller(cols, chunks * (share + 1) / shares * kCols);
      body(first, smaller(size, rows - first), begin, end, worker);
    };
    for_each_task(divide_up(rows, larger(1, size)) * shares, work, task);
  }

  int64_t rows, cols, blocks, size, shares;
};

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

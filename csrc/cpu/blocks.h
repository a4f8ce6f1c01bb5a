// What products of many rows share: blocks of rows and columns for the tasks, and what is added to
// a block of sums while it is in cache.
#pragma once

#include "gemm.h"
#include "packed.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

constexpr int kPanelVecs = kRegisters == 32 ? 4 : 2;
constexpr int64_t kPanel = kPanelVecs * kLanes;
constexpr int64_t kRows = 192;  // of a task: a multiple of the tiles' rows, 6 and 32
constexpr int64_t kCols = 128;  // of a block of sums, which stays in the second-level cache
constexpr int64_t kEach = 2;    // tasks for each thread, at least, where there is work for them

class FloatBias {
 public:
  explicit FloatBias(const Matrix& from)
      : data_(from.data == nullptr ? 0 : from.cols), absent_(from.data == nullptr) {
    if (absent_) return;
    with_type(from.dtype, [&](auto type) {
      to_float(static_cast<const decltype(type)*>(from.data), from.cols, data_.data());
    });
  }
  Vec at(int64_t i, int64_t n) const { return absent_ ? Vec{} : load_some(data_.data() + i, n); }

 private:
  Scratch<float> data_;
  bool absent_;
};

template <class T>
void write(const Tail& tail, const FloatBias& bias, int64_t row, int64_t cols, int64_t first,
           int64_t count, const float* sums) {
  const float factor = tail.factors == nullptr ? 1.0f : tail.factors[row / tail.rows_per_factor];
  T* out = static_cast<T*>(tail.out) + row * cols + first;
  if (tail.residual.data == nullptr) {
    return map_to(out, count, [&](int64_t i, int64_t n) {
      return (load_some(sums + i, n) + bias.at(first + i, n)) * broadcast(factor);
    });
  }
  with_type(tail.residual.dtype, [&](auto type) {
    const auto* residual =
        static_cast<const decltype(type)*>(tail.residual.data) + row * tail.residual.stride + first;
    map_to(out, count, [&](int64_t i, int64_t n) {
      const Vec branch = load_some(sums + i, n) + bias.at(first + i, n);
      return load_some(residual + i, n) + branch * broadcast(factor);
    });
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

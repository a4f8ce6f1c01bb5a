// packed_linear and packed_mlp: products of many rows with weights that are packed once a call.
//
// A weight becomes panels of a few columns, read in order by the register-blocked products of
// panel.h; both it and x may be transposes, as in a backward pass. A task takes a block of rows as
// float32 and all columns, or a share of them where there are few rows. What follows a product
// (bias, activation, residual) happens while its block is in cache, and so does the second product
// of an MLP: what lies between the two is never in memory.
#include "packed.h"

#include "activation.h"
#include "blocks.h"
#include "panel.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kDepth = 256;  // of a panel that stays in the first-level cache
constexpr int64_t kLine = 64;    // bytes

constexpr int kTile = 6;  // rows of a register-blocked product

// Rows of float32 in groups of kTile: between the rows of a group, the elements of a row, groups.
struct Rows {
  const float* data;
  int64_t row, step, group;
};

Rows of_rows(const float* data, int64_t stride) { return {data, stride, 1, kTile * stride}; }

// Between rows: no multiple of 4 KiB, where rows would be in each other's way in the cache.
int64_t row_stride(int64_t cols) { return round_up(cols, 16) + 16; }

class PackedWeight {
 public:
  explicit PackedWeight(const Matrix& w)
      : rows(w.rows), depth(w.cols), data_(divide_up(w.rows, kPanel) * kPanel * w.cols) {
    with_type(w.dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(w.data);
      if (w.step != 1) return copy(from, w.step);
      auto task = [&](int64_t index, int64_t) {
        const int64_t first = index * kPanel;
        pack_columns(from + first * w.stride, w.stride, smaller(kPanel, rows - first), depth,
                     data_.data() + first * depth, kPanel);
      };
      for_each_task(divide_up(rows, kPanel), rows * depth, task);
    });
  }
  // Of the columns first, first + 1, ...: [depth][kPanel].
  const float* panel(int64_t first) const { return data_.data() + first * depth; }

  const int64_t rows, depth;

 private:
  // Of a transpose, whose columns are rows in memory: a few of these at a time, from end to end.
  template <class T>
  void copy(const T* from, int64_t step) {
    auto task = [&](int64_t index, int64_t) {
      const int64_t begin = index * kLines, end = smaller(depth, begin + kLines);
      for (int64_t first = 0; first < rows; first += kPanel) {
        for (int64_t k = begin; k < end; ++k) {
          float* to = data_.data() + first * depth + k * kPanel;
          for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
            const int64_t n = smaller(kLanes, larger(0, rows - first - lane));
            store(to + lane, load_some(from + k * step + first + lane, n));
          }
        }
      }
    };
    for_each_task(divide_up(depth, kLines), rows * depth, task);
  }

  static constexpr int64_t kLines = 16;  // as many as the hardware reads ahead in

  Scratch<float> data_;
};

// Rows first, first + 1, ... of x as float32. What a group of a transpose's rows has in a column
// lies side by side there; a store that reaches into the next column's comes before that one's.
Rows float_rows(const Matrix& x, int64_t first, int64_t count, float* scratch) {
  const int64_t stride = row_stride(x.cols), group = kTile * x.cols + 2 * kLanes;
  with_type(x.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(x.data) + first * x.stride;
    if (x.step == 1) {
      for (int64_t r = 0; r < count; ++r) {
        to_float(from + r * x.stride, x.cols, scratch + r * stride);
      }
      return;
    }
    for (int64_t k = 0; k < x.cols; ++k) {
      for (int64_t r = 0; r < count; r += kTile) {
        float* to = scratch + r / kTile * group + k * kTile;
        for (int64_t i = 0; i < smaller(kTile, count - r); i += kLanes) {
          const int64_t n = smaller(kLanes, count - r - i);
          store(to + i, load_some(from + k * x.step + r + i, n));
        }
      }
    }
  });
  return x.step == 1 ? of_rows(scratch, stride) : Rows{scratch, 1, kTile, group};
}

// Elements that float_rows writes for a block of rows.
int64_t row_scratch(int64_t cols) { return kRows * row_stride(cols) + kRows / kTile * 2 * kLanes; }

// sums[rows][kPanel] (+)= x[rows][depth] panel[depth][kPanel], while what is multiplied next, of
// the same size, comes into the second-level cache.
void multiply_panel(Rows x, int64_t rows, const float* panel, const float* next, int64_t depth,
                    bool accumulate, float* sums) {
  const int64_t tiles = rows / kTile, bytes = depth * kPanel * int64_t{sizeof(float)};
  const int64_t share = divide_up(bytes, larger(1, tiles) * kLine) * kLine;
  for (int64_t m = 0; m < tiles; ++m) {
    const char* from = reinterpret_cast<const char*>(next);
    for (int64_t i = m * share; i < smaller(bytes, (m + 1) * share); i += kLine) {
      prefetch_far(from + i);
    }
    panel_tile<kTile, kPanelVecs>({x.data + m * x.group, x.row, x.step}, panel, kPanel, depth,
                                  accumulate, sums + kTile * m * kCols, kCols);
  }
  const int64_t done = kTile * tiles;
  panel_rows<kPanelVecs>(rows - done, {x.data + tiles * x.group, x.row, x.step}, panel, kPanel,
                         depth, accumulate, sums + done * kCols, kCols);
}

// finish(row, first column, columns, sums of these) for rows x columns [begin, end) of w.
template <class Finish>
void multiply(Rows x, int64_t rows, const PackedWeight& w, int64_t begin, int64_t end, float* sums,
              Finish finish) {
  for (int64_t n = begin; n < end; n += kCols) {
    const int64_t cols = smaller(kCols, end - n);
    for (int64_t k = 0; k < w.depth || k == 0; k += kDepth) {
      const int64_t depth = smaller(kDepth, w.depth - k);
      for (int64_t p = 0; p < cols; p += kPanel) {
        const float* panel = w.panel(n + p) + k * kPanel;
        multiply_panel({x.data + k * x.step, x.row, x.step, x.group}, rows, panel,
                       panel + w.depth * kPanel, depth, k > 0, sums + p);
      }
    }
    for (int64_t r = 0; r < rows; ++r) finish(r, n, cols, sums + r * kCols);
  }
}

void linear_of(const Matrix& x, const PackedWeight& w, const Tail& tail) {
  const Cut cut(x.rows, w.rows);
  const FloatBias bias(tail.bias, w.rows);
  const int64_t own = row_scratch(x.cols) + kRows * kCols;
  Scratch<float> scratch(workers() * own);
  with_type(tail.dtype, [&](auto type) {
    using T = decltype(type);
    cut.run(x.rows * w.rows,
            [&](int64_t first, int64_t rows, int64_t begin, int64_t end, int64_t worker) {
              float* sums = scratch.data() + worker * own;
              const Rows a = float_rows(x, first, rows, sums + kRows * kCols);
              multiply(a, rows, w, begin, end, sums,
                       [&](int64_t r, int64_t n, int64_t count, const float* from) {
                         write<Stores, T>(tail, bias, first + r, w.rows, n, count, from);
                       });
            });
  });
}

template <Activation kKind>
void activate_as(const float* sums, const float* bias, int64_t count, float* to) {
  map_to(to, count, [=](int64_t i, int64_t n) {
    return activated(load_some(sums + i, n) + load_some(bias + i, n), kKind);
  });
}

void activate_row(Activation activation, const float* sums, const float* bias, int64_t count,
                  float* to) {
  auto run = [&](auto kind) { activate_as<kind.value>(sums, bias, count, to); };
  with_activation(activation, run);
}

// An MLP whose row blocks are enough for the threads: each goes through both products.
void mlp_of_blocks(const PackedMlpArgs& args, const PackedWeight& w1, const PackedWeight& w2,
                   const FloatBias& b1) {
  const Cut cut(args.x.rows, 1);
  const FloatBias b2(args.tail.bias, w2.rows);
  const int64_t between = row_stride(w1.rows);
  const int64_t own = row_scratch(args.x.cols) + kRows * (between + kCols);
  Scratch<float> scratch(workers() * own);
  with_type(args.tail.dtype, [&](auto type) {
    using T = decltype(type);
    cut.run(args.x.rows * w1.rows, [&](int64_t first, int64_t rows, int64_t, int64_t,
                                       int64_t worker) {
      float* sums = scratch.data() + worker * own;
      float* hidden = sums + kRows * kCols;
      const Rows a = float_rows(args.x, first, rows, hidden + kRows * between);
      multiply(a, rows, w1, 0, w1.rows, sums,
               [&](int64_t r, int64_t n, int64_t count, const float* from) {
                 activate_row(args.activation, from, b1.from(n), count, hidden + r * between + n);
               });
      multiply(of_rows(hidden, between), rows, w2, 0, w2.rows, sums,
               [&](int64_t r, int64_t n, int64_t count, const float* from) {
                 write<Stores, T>(args.tail, b2, first + r, w2.rows, n, count, from);
               });
    });
  });
}

// An MLP of fewer rows: the columns of each product are shared, with all of its rows between them.
void mlp_of_shares(const PackedMlpArgs& args, const PackedWeight& w1, const PackedWeight& w2,
                   const FloatBias& b1) {
  const int64_t between = row_stride(w1.rows);
  Scratch<float> hidden(args.x.rows * between);
  const Cut cut(args.x.rows, w1.rows);
  const int64_t own = row_scratch(args.x.cols) + kRows * kCols;
  Scratch<float> scratch(workers() * own);
  cut.run(args.x.rows * w1.rows,
          [&](int64_t first, int64_t rows, int64_t begin, int64_t end, int64_t worker) {
            float* sums = scratch.data() + worker * own;
            const Rows a = float_rows(args.x, first, rows, sums + kRows * kCols);
            multiply(a, rows, w1, begin, end, sums,
                     [&](int64_t r, int64_t n, int64_t count, const float* from) {
                       activate_row(args.activation, from, b1.from(n), count,
                                    hidden.data() + (first + r) * between + n);
                     });
          });
  linear_of({hidden.data(), DType::kFloat, args.x.rows, w1.rows, between}, w2, args.tail);
}

}  // namespace

void packed_linear(const PackedLinearArgs& args) {
  if (args.x.rows == 0 || args.weight.rows == 0) return;
  linear_of(args.x, PackedWeight(args.weight), args.tail);
}

void packed_mlp(const PackedMlpArgs& args) {
  if (args.x.rows == 0 || args.w2.rows == 0) return;
  const PackedWeight w1(args.w1), w2(args.w2);
  const FloatBias b1(args.b1, w1.rows);
  const bool many = divide_up(args.x.rows, kRows) >= kEach * workers();
  (many ? mlp_of_blocks : mlp_of_shares)(args, w1, w2, b1);
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

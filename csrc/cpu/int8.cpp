// int8_linear and int8_mlp: products of many rows in int8 arithmetic.
//
// Weights come as int8 with a factor for each row, and are put into panels once a call: they are a
// quarter of what the products of packed.cpp pack. A task quantizes its block of rows and goes over
// the columns as there; what lies between the two products of an MLP is quantized in its block.
#include "int8.h"

#include "activation.h"
#include "blocks.h"
#include "int8_panel.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kGroups = kRegisters == 32 ? 4 : 8;  // of a panel in the first-level cache

int64_t groups_of(int64_t depth) { return divide_up(depth, kGroup); }

template <class Kind>
class PackedInt8 {
 public:
  explicit PackedInt8(const Matrix& w)
      : rows(w.rows),
        groups(groups_of(w.cols)),
        scale(w.scale),
        data_(divide_up(w.rows, kPanel) * kPanel * groups * kGroup),
        begin_(Kind::kOffset == 0 ? 0 : divide_up(w.rows, kPanel) * kPanel * groups) {
    auto task = [&](int64_t index, int64_t) { pack(w, index * kPanel); };
    for_each_task(divide_up(rows, kPanel), rows * w.cols, task);
  }
  // Of the columns first, first + 1, ... from a group on.
  Int8Panel panel(int64_t first, int64_t group) const {
    const int64_t at = first * groups + group * kPanel;
    return {data_.data() + at * kGroup, Kind::kOffset == 0 ? nullptr : begin_.data() + at};
  }

  const int64_t rows, groups;
  const float* const scale;

 private:
  void pack(const Matrix& w, int64_t first) {
    int8_t* to = data_.data() + first * groups * kGroup;
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t length = first + c < w.rows ? w.cols : 0;
      const int8_t* from = static_cast<const int8_t*>(w.data) + (first + c) * w.stride;
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int64_t k = g * kGroup; k < (g + 1) * kGroup; k += Kind::kStep) {
          int8_t part[Kind::kStep];
          for (int i = 0; i < Kind::kStep; ++i) {
            part[i] = k + i < length ? from[k + i] : int8_t{0};
            sum += part[i];
          }
          std::memcpy(to + (k * kPanel + c * Kind::kStep), part, sizeof(part));
        }
        if (Kind::kOffset != 0) {
          begin_.data()[(first * groups) + g * kPanel + c] = -Kind::kOffset * sum;
        }
      }
    }
  }

  Scratch<int8_t> data_;
  Scratch<int32_t> begin_;
};

// Room for quantized rows of some depth.
template <class Kind>
class QuantizedBlock {
 public:
  QuantizedBlock(int64_t rows, int64_t depth)
      : groups_(groups_of(depth)), data_(rows * stride()), factors_(rows * groups_) {}
  // between rows: no multiple of 4 KiB, where rows would be in each other's way in the cache
  int64_t stride() const { return groups_ * kGroup + kGroup; }

  template <class T>
  void set(int64_t row, int64_t first, int64_t n, const T* from) const {
    for (int64_t i = 0; i < n; i += kGroup) {
      quantize_group<Kind>(from + i, smaller(kGroup, n - i),
                           data_.data() + row * stride() + first + i,
                           factors_.data() + row * groups_ + (first + i) / kGroup);
    }
  }
  void set(int64_t row, const Matrix& x, int64_t first, int64_t count) const {
    with_type(x.dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(x.data) + first * x.stride;
      for (int64_t r = 0; r < count; ++r) set(row + r, 0, x.cols, from + r * x.stride);
    });
  }
  QuantizedRows<Kind> rows(int64_t first) const {
    return {data_.data() + first * stride(), stride(), factors_.data() + first * groups_, groups_};
  }

 private:
  int64_t groups_;
  Scratch<typename Kind::X> data_;
  Scratch<float> factors_;
};

template <class Kind>
void multiply_panel(QuantizedRows<Kind> x, int64_t rows, Int8Panel panel, int64_t groups,
                    bool accumulate, float* sums) {
  auto tile = [&](auto count, int64_t m) {
    const QuantizedRows<Kind> from{x.data + m * x.stride, x.stride, x.factors + m * x.groups,
                                   x.groups};
    int8_tile<Kind, decltype(count)::value, kPanelVecs>(from, panel, groups, accumulate,
                                                        sums + m * kCols, kCols);
  };
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6) tile(std::integral_constant<int, 6>{}, m);
  for (; m + 2 <= rows; m += 2) tile(std::integral_constant<int, 2>{}, m);
  if (m < rows) tile(std::integral_constant<int, 1>{}, m);
}

// finish(row, first column, columns, their products) for rows x columns [begin, end) of w.
template <class Kind, class Finish>
void multiply(QuantizedRows<Kind> x, int64_t rows, const PackedInt8<Kind>& w, int64_t begin,
              int64_t end, float* sums, Finish finish) {
  for (int64_t n = begin; n < end; n += kCols) {
    const int64_t cols = smaller(kCols, end - n);
    for (int64_t g = 0; g < w.groups; g += kGroups) {
      const QuantizedRows<Kind> part{x.data + g * kGroup, x.stride, x.factors + g, x.groups};
      for (int64_t p = 0; p < cols; p += kPanel) {
        multiply_panel(part, rows, w.panel(n + p, g), smaller(kGroups, w.groups - g), g > 0,
                       sums + p);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* row = sums + r * kCols;
      map_to(row, cols, [&](int64_t i, int64_t count) {
        return w.groups == 0 ? Vec{}
                             : load_some(row + i, count) * load_some(w.scale + n + i, count);
      });
      finish(r, n, cols, row);
    }
  }
}

// x is quantized where it comes as a matrix; rows that are quantized already are read as they are.
template <class Kind>
void linear_of(const Matrix& x, const QuantizedBlock<Kind>* given, const PackedInt8<Kind>& w,
               const Tail& tail) {
  const Cut cut(x.rows, w.rows);
  const FloatBias bias(tail.bias);
  const QuantizedBlock<Kind> own(given == nullptr ? workers() * kRows : 0, x.cols);
  Scratch<float> scratch(workers() * kRows * kCols);
  with_type(tail.dtype, [&](auto type) {
    using T = decltype(type);
    cut.run(x.rows * w.rows,
            [&](int64_t first, int64_t rows, int64_t begin, int64_t end, int64_t worker) {
              if (given == nullptr) own.set(worker * kRows, x, first, rows);
              multiply(given == nullptr ? own.rows(worker * kRows) : given->rows(first), rows, w,
                       begin, end, scratch.data() + worker * kRows * kCols,
                       [&](int64_t r, int64_t n, int64_t count, const float* from) {
                         write<T>(tail, bias, first + r, w.rows, n, count, from);
                       });
            });
  });
}

// gelu(sums + bias) of a row's columns n, n + 1, ..., quantized; sums are overwritten.
template <class Kind>
void activate_row(const Int8MlpArgs& args, const FloatBias& b1, int64_t n, int64_t count,
                  float* sums, const QuantizedBlock<Kind>& to, int64_t row) {
  map_to(sums, count, [&](int64_t i, int64_t some) {
    const Vec x = load_some(sums + i, some) + b1.at(n + i, some);
    return activated(x, args.activation);
  });
  to.set(row, n, count, sums);
}

// An MLP whose row blocks are enough for the threads: each goes through both products.
template <class Kind>
void mlp_of_blocks(const Int8MlpArgs& args, const PackedInt8<Kind>& w1, const PackedInt8<Kind>& w2,
                   const FloatBias& b1) {
  const Cut cut(args.x.rows, 1);
  const FloatBias b2(args.tail.bias);
  const QuantizedBlock<Kind> x(workers() * kRows, args.x.cols), hidden(workers() * kRows, w1.rows);
  Scratch<float> scratch(workers() * kRows * kCols);
  with_type(args.tail.dtype, [&](auto type) {
    using T = decltype(type);
    cut.run(args.x.rows * w1.rows,
            [&](int64_t first, int64_t rows, int64_t, int64_t, int64_t worker) {
              const int64_t at = worker * kRows;
              float* sums = scratch.data() + at * kCols;
              x.set(at, args.x, first, rows);
              multiply(x.rows(at), rows, w1, 0, w1.rows, sums,
                       [&](int64_t r, int64_t n, int64_t count, float* from) {
                         activate_row(args, b1, n, count, from, hidden, at + r);
                       });
              multiply(hidden.rows(at), rows, w2, 0, w2.rows, sums,
                       [&](int64_t r, int64_t n, int64_t count, const float* from) {
                         write<T>(args.tail, b2, first + r, w2.rows, n, count, from);
                       });
            });
  });
}

// An MLP of fewer rows: the columns of each product are shared, with all of its rows between them.
template <class Kind>
void mlp_of_shares(const Int8MlpArgs& args, const PackedInt8<Kind>& w1, const PackedInt8<Kind>& w2,
                   const FloatBias& b1) {
  const QuantizedBlock<Kind> x(workers() * kRows, args.x.cols), hidden(args.x.rows, w1.rows);
  const Cut cut(args.x.rows, w1.rows);
  Scratch<float> scratch(workers() * kRows * kCols);
  cut.run(args.x.rows * w1.rows,
          [&](int64_t first, int64_t rows, int64_t begin, int64_t end, int64_t worker) {
            const int64_t at = worker * kRows;
            x.set(at, args.x, first, rows);
            multiply(x.rows(at), rows, w1, begin, end, scratch.data() + at * kCols,
                     [&](int64_t r, int64_t n, int64_t count, float* from) {
                       activate_row(args, b1, n, count, from, hidden, first + r);
                     });
          });
  linear_of<Kind>({nullptr, DType::kFloat, args.x.rows, w1.rows, 0}, &hidden, w2, args.tail);
}

template <class Body>
void with_products(Int8Products products, Body body) {
  if (products == Int8Products::kQuads) return body(Quads{});
  body(Pairs{});
}

}  // namespace

void int8_linear(const Int8LinearArgs& args) {
  if (args.x.rows == 0 || args.weight.rows == 0) return;
  with_products(args.products, [&](auto kind) {
    using Kind = decltype(kind);
    linear_of<Kind>(args.x, nullptr, PackedInt8<Kind>(args.weight), args.tail);
  });
}

void int8_mlp(const Int8MlpArgs& args) {
  if (args.x.rows == 0 || args.w2.rows == 0) return;
  with_products(args.products, [&](auto kind) {
    using Kind = decltype(kind);
    const PackedInt8<Kind> w1(args.w1), w2(args.w2);
    const FloatBias b1(args.b1);
    const bool many = divide_up(args.x.rows, kRows) >= kEach * workers();
    (many ? mlp_of_blocks<Kind> : mlp_of_shares<Kind>)(args, w1, w2, b1);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

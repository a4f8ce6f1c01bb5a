// int8_linear and int8_mlp: products of many rows in int8 arithmetic.
//
// Weights come as int8 with a factor for each row, and are put into panels once a call: they are a
// quarter of what the products of packed.cpp pack. A task quantizes its block of rows and goes over
// the columns as there; what lies between the two products of an MLP is quantized in its block.
#include "int8.h"

#include "int8_panel.h"
#include "many_rows.h"

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
  // of f(i, lanes); sums are overwritten
  template <class F>
  void set(int64_t row, int64_t first, int64_t n, float* sums, F f) const {
    map_to(sums, n, f);
    set(row, first, n, sums);
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

template <class Kind>
struct Int8Arithmetic : Stores {
  using Weight = PackedInt8<Kind>;
  using Block = QuantizedBlock<Kind>;
  static constexpr int64_t kTileRows = 6;

  template <class Finish>
  static void multiply(QuantizedRows<Kind> x, int64_t rows, const Weight& w, int64_t begin,
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
};

template <class Body>
void with_products(Int8Products products, Body body) {
  if (products == Int8Products::kQuads) return body(Quads{});
  body(Pairs{});
}

}  // namespace

void int8_linear(const Int8LinearArgs& args) {
  with_products(args.products,
                [&](auto kind) { linear_of_many<Int8Arithmetic<decltype(kind)>>(args); });
}

void int8_mlp(const Int8MlpArgs& args) {
  with_products(args.products,
                [&](auto kind) { mlp_of_many<Int8Arithmetic<decltype(kind)>>(args); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

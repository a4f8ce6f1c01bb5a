// linear, gelu_mlp and geglu_mlp: a few rows of x against weights that are read once.
//
// Sums are float32, and so is what lies between the two products, but where the CPU multiplies
// bfloat16 pairs: there it is rounded to bfloat16, as PyTorch does.
#include "mlp.h"

#include "activation.h"
#include "columns.h"
#include "few_tiles.h"
#include "gemm.h"
#include "transposed.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 96;  // weight rows of one task; a multiple of every rows_in_flight

const void* element(const void* data, DType dtype, int64_t index) {
  const int64_t size = dtype == DType::kFloat ? 4 : 2;
  return static_cast<const char*>(data) + index * size;
}

// Rows of contiguous elements, float32 or, for products of bfloat16 pairs, bfloat16; or, where
// lanes is not 0, their transpose, float32 [columns][lanes], or panels of bfloat16 tiles.
struct Rows {
  const void* data;
  int64_t stride;
  bool narrow;
  int64_t lanes = 0;
};

int64_t lanes_of(int64_t rows) { return round_up(rows, kLanes); }

// How rows meet their weights: as float32, or as bfloat16 whose pairs are multiplied, or tiles too.
enum class Form { kWide, kPairs, kTiles };

// Rows of x that stay in the second-level cache, and are met by a part of a weight while that is.
int64_t row_block(Form form) { return form == Form::kTiles ? 2 * kMostRows : kMostRows; }

// Whether products of so many rows in this form take the transpose of the rows, or panels of them.
bool turns(int64_t rows, Form form, bool columns) {
  if (form == Form::kWide) return rows >= kTransposedRows && !columns;
  return form == Form::kTiles && rows >= kTiledRows;
}

// The transpose of rows [rows][cols], float32 [cols][lanes_of(rows)].
template <class T>
Rows transposed(const T* from, int64_t stride, int64_t rows, int64_t cols, float* to) {
  const int64_t lanes = lanes_of(rows);
  auto task = [&](int64_t index, int64_t) {
    const int64_t first = index * kPart;
    pack_columns(from + first, stride, rows, smaller(kPart, cols - first), to + first * lanes,
                 lanes);
  };
  for_each_task(divide_up(cols, kPart), rows * cols, task);
  return {to, cols, false, lanes};
}

// The same as panels of tiles.
Rows in_panels(const BFloat16* from, int64_t stride, int64_t rows, int64_t cols, BFloat16* to) {
  auto task = [&](int64_t index, int64_t) {
    const int64_t first = index * kPart;
    pack_panels(from, stride, rows, cols, first, smaller(kPart, cols - first), to);
  };
  for_each_task(divide_up(cols, kPart), rows * cols, task);
  return {to, cols, true, round_up(rows, kPair)};
}

// How the rows of x meet these weights (null: no such weight).
Form form_of(const Matrix& x, const Matrix& w, const Matrix* w2 = nullptr,
             const Matrix* w3 = nullptr) {
  bool pairs = has_bfloat16_products() && x.dtype == DType::kBFloat16, tiles = pairs;
  for (const Matrix* m : {&w, w2, w3}) {
    if (m == nullptr) continue;
    pairs = pairs && m->dtype == DType::kBFloat16 && m->step == 1;
    tiles = tiles && fits_tiles(m->rows, m->cols);
  }
  return pairs && tiles ? Form::kTiles : pairs ? Form::kPairs : Form::kWide;
}

// The rows of x, block by block: transposed where there are many, in place where they can be
// multiplied as they are, else as float32. columns: whether they meet a weight of such.
class Input {
 public:
  Input(const Matrix& x, Form form, bool columns)
      : x_(x),
        form_(form),
        columns_(columns),
        in_place_(form != Form::kWide || x.dtype == DType::kFloat),
        copy_(size() * x.cols) {}

  Rows block(int64_t begin, int64_t rows) {
    const void* first = element(x_.data, x_.dtype, begin * x_.stride);
    if (turns(rows, form_, columns_)) {
      if (form_ == Form::kTiles) {
        return in_panels(static_cast<const BFloat16*>(first), x_.stride, rows, x_.cols,
                         reinterpret_cast<BFloat16*>(copy_.data()));
      }
      Rows found{};
      with_type(x_.dtype, [&](auto type) {
        found = transposed(static_cast<const decltype(type)*>(first), x_.stride, rows, x_.cols,
                           copy_.data());
      });
      return found;
    }
    if (in_place_) return {first, x_.stride, form_ != Form::kWide};
    with_type(x_.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t r = 0; r < rows; ++r) {
        to_float(static_cast<const T*>(first) + r * x_.stride, x_.cols, copy_.data() + r * x_.cols);
      }
    });
    return {copy_.data(), x_.cols, false};
  }

 private:
  // of the largest block
  int64_t size() const {
    const int64_t rows = smaller(x_.rows, row_block(form_));
    if (!turns(rows, form_, columns_)) return in_place_ ? 0 : rows;
    return form_ == Form::kTiles ? round_up(rows, kPair) / 2 : lanes_of(rows);
  }

  const Matrix& x_;
  Form form_;
  bool columns_, in_place_;
  Scratch<float> copy_;
};

// What lies between the products of an MLP, in what the second one takes.
class Hidden {
 public:
  Hidden(int64_t rows, const Matrix& next, Form form)
      : cols_(next.cols),
        form_(form),
        columns_(next.step != 1),
        data_(smaller(rows, row_block(form)) * cols_),
        turned_(turns(smaller(rows, row_block(form)), form_, columns_)
                    ? round_up(smaller(rows, row_block(form)), kPair) * cols_
                    : 0) {}

  template <class F>
  void write(int64_t row, int64_t first, int64_t count, F f) {
    const int64_t at = row * cols_ + first;
    if (form_ != Form::kWide) {
      return map_to(reinterpret_cast<BFloat16*>(data_.data()) + at, count, f);
    }
    map_to(data_.data() + at, count, f);
  }
  Rows rows(int64_t count) const {
    if (!turns(count, form_, columns_)) return {data_.data(), cols_, form_ != Form::kWide};
    if (form_ == Form::kWide) {
      return transposed(data_.data(), cols_, count, cols_, turned_.data());
    }
    return in_panels(reinterpret_cast<const BFloat16*>(data_.data()), cols_, count, cols_,
                     reinterpret_cast<BFloat16*>(turned_.data()));
  }

 private:
  int64_t cols_;
  Form form_;
  bool columns_;
  Scratch<float> data_, turned_;
};

// spare: as chunk_scratch has it.
void multiply(const Matrix& w, int64_t begin, int64_t count, Rows x, int64_t rows, float* spare,
              float* out) {
  if (w.step != 1) {
    return with_type(w.dtype, [&](auto type) {
      using T = decltype(type);
      column_products(static_cast<const T*>(w.data) + begin, w.step, count,
                      static_cast<const float*>(x.data), x.stride, rows, w.cols, out, kChunk);
    });
  }
  with_weight_type(w.dtype, [&](auto type) {
    using T = decltype(type);
    const T* first = static_cast<const T*>(w.data) + begin * w.stride;
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (x.lanes > 0 && x.narrow) {
        float* sums = spare + kTileSlack * x.lanes;
        tiled_products(static_cast<const T*>(w.data), w.stride, w.rows, begin, count,
                       static_cast<const BFloat16*>(x.data), x.lanes, w.cols, sums);
        return pack_columns(sums, x.lanes, count, rows, out, kChunk);
      }
    }
    if (x.lanes > 0) {
      float* sums = spare + kGroupScratch;
      transposed_products(first, w.stride, count, static_cast<const float*>(x.data), x.lanes,
                          w.cols, spare, sums);
      return pack_columns(sums, x.lanes, count, rows, out, kChunk);
    }
    auto run = [&](auto* data) {
      products(first, w.stride, count, data, x.stride, rows, w.cols, out, kChunk);
    };
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (x.narrow) return run(static_cast<const BFloat16*>(x.data));
    }
    run(static_cast<const float*>(x.data));
  });
  if (w.scale == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    float* sums = out + r * kChunk;
    map_to(sums, count, [&](int64_t i, int64_t n) {
      return load_some(sums + i, n) * load_some(w.scale + begin + i, n);
    });
  }
}

void load_bias(const Matrix& bias, int64_t begin, int64_t count, float* to) {
  if (bias.data == nullptr) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
    return;
  }
  with_type(bias.dtype, [&](auto type) {
    using T = decltype(type);
    to_float(static_cast<const T*>(bias.data) + begin, count, to);
  });
}

// Weight rows of one task where a call has so many: short where there would be too few tasks for
// the threads; no sum depends on it.
int64_t chunk_size(int64_t weight_rows) {
  return divide_up(weight_rows, kChunk) < 4 * workers() ? kChunk / 2 : kChunk;
}

// The products of `rows` rows of x with `count` rows of w (and of w2, read alongside, where given):
// finish(row, first column, columns, products, products with w2, bias).
template <class Finish>
void project_chunk(Rows x, int64_t rows, const Matrix& w, const Matrix* w2, const Matrix& bias,
                   int64_t begin, int64_t count, float* scratch, Finish finish) {
  float* first = scratch;
  float* second = first + rows * kChunk;
  float* shift = second + rows * kChunk;
  float* spare = shift + kChunk;
  multiply(w, begin, count, x, rows, spare, first);
  if (w2 != nullptr) multiply(*w2, begin, count, x, rows, spare, second);
  load_bias(bias, begin, count, shift);
  for (int64_t r = 0; r < rows; ++r) {
    finish(r, begin, count, first + r * kChunk, second + r * kChunk, shift);
  }
}

int64_t chunk_scratch(int64_t rows) {
  const int64_t transposed = rows < kTransposedRows ? 0 : kGroupScratch + lanes_of(rows) * kChunk;
  const int64_t tiled =
      rows < kTiledRows || !has_tiles() ? 0 : (2 * kTileSlack + kChunk) * round_up(rows, kPair);
  return (2 * rows + 1) * kChunk + larger(transposed, tiled);
}

// The products with all rows of w, a chunk at a time.
template <class Finish>
void project(Rows x, int64_t rows, const Matrix& w, const Matrix* w2, const Matrix& bias,
             Finish finish) {
  const int64_t size = chunk_size(w.rows);
  Scratch<float> scratch(workers() * chunk_scratch(rows));
  auto task = [&](int64_t index, int64_t worker) {
    const int64_t begin = index * size;
    project_chunk(x, rows, w, w2, bias, begin, smaller(size, w.rows - begin),
                  scratch.data() + worker * chunk_scratch(rows), finish);
  };
  for_each_task(divide_up(w.rows, size), task);
}

// Rows of every out, from first_row on, in one go: x[r] weight^T + bias, in the type of out.
void project_out(Rows x, int64_t rows, const Product* products, int64_t count, DType dtype,
                 int64_t first_row) {
  int64_t weight_rows = 0;
  for (int64_t i = 0; i < count; ++i) weight_rows += products[i].weight.rows;
  const int64_t size = chunk_size(weight_rows);
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; ++i) tasks += divide_up(products[i].weight.rows, size);
  Scratch<float> scratch(workers() * chunk_scratch(rows));
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    auto task = [&](int64_t index, int64_t worker) {
      const Product* product = products;
      for (int64_t own; index >= (own = divide_up(product->weight.rows, size)); ++product) {
        index -= own;
      }
      const Matrix& w = product->weight;
      T* base = static_cast<T*>(product->out) + first_row * w.rows;
      project_chunk(x, rows, w, nullptr, product->bias, index * size,
                    smaller(size, w.rows - index * size),
                    scratch.data() + worker * chunk_scratch(rows),
                    [&](int64_t r, int64_t begin, int64_t columns, const float* sums, const float*,
                        const float* shift) {
                      map_to(base + r * w.rows + begin, columns, [&](int64_t i, int64_t n) {
                        return load_some(sums + i, n) + load_some(shift + i, n);
                      });
                    });
    };
    for_each_task(tasks, task);
  });
}

void project_out(Rows x, int64_t rows, const Matrix& w, const Matrix& bias, DType dtype, void* out,
                 int64_t first_row) {
  const Product product{w, bias, out};
  project_out(x, rows, &product, 1, dtype, first_row);
}

}  // namespace

void linear(const Matrix& x, const Product* products, int64_t count, DType dtype) {
  Form form = Form::kTiles;
  bool columns = false;
  for (int64_t i = 0; i < count; ++i) {
    const Form found = form_of(x, products[i].weight);
    if (found < form) form = found;
    columns = columns || products[i].weight.step != 1;
  }
  Input input(x, form, columns);
  for (int64_t begin = 0; begin < x.rows; begin += row_block(form)) {
    const int64_t rows = smaller(row_block(form), x.rows - begin);
    project_out(input.block(begin, rows), rows, products, count, dtype, begin);
  }
}

void gelu_mlp(const Matrix& x, const Matrix& w1, const Matrix& b1, const Matrix& w2,
              const Matrix& b2, Activation activation, void* out) {
  const Form form = form_of(x, w1, &w2);
  Input input(x, form, w1.step != 1);
  Hidden hidden(x.rows, w2, form);
  for (int64_t begin = 0; begin < x.rows; begin += row_block(form)) {
    const int64_t rows = smaller(row_block(form), x.rows - begin);
    project(input.block(begin, rows), rows, w1, nullptr, b1,
            [&](int64_t r, int64_t first, int64_t count, const float* sums, const float*,
                const float* shift) {
              hidden.write(r, first, count, [&](int64_t i, int64_t n) {
                return activated(load_some(sums + i, n) + load_some(shift + i, n), activation);
              });
            });
    project_out(hidden.rows(rows), rows, w2, b2, x.dtype, out, begin);
  }
}

void geglu_mlp(const Matrix& x, const Matrix& gate, const Matrix& up, const Matrix& down,
               Activation activation, void* out) {
  const Matrix no_bias{};
  const Form form = form_of(x, gate, &up, &down);
  Input input(x, form, gate.step != 1 || up.step != 1);
  Hidden hidden(x.rows, down, form);
  for (int64_t begin = 0; begin < x.rows; begin += row_block(form)) {
    const int64_t rows = smaller(row_block(form), x.rows - begin);
    project(input.block(begin, rows), rows, gate, &up, no_bias,
            [&](int64_t r, int64_t first, int64_t count, const float* gates, const float* ups,
                const float*) {
              hidden.write(r, first, count, [&](int64_t i, int64_t n) {
                return activated(load_some(gates + i, n), activation) * load_some(ups + i, n);
              });
            });
    project_out(hidden.rows(rows), rows, down, no_bias, x.dtype, out, begin);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

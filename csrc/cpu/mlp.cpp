// linear, gelu_mlp and geglu_mlp: a few rows of x against weights that are read once.
#include "mlp.h"

#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kRowBlock = 64;  // rows of x that stay in the second-level cache meanwhile
constexpr int64_t kChunk = 96;     // weight rows of one task; a multiple of every rows_in_flight

const void* element(const void* data, DType dtype, int64_t index) {
  const int64_t size = dtype == DType::kFloat ? 4 : 2;
  return static_cast<const char*>(data) + index * size;
}

// x as float32 rows: in place when it already is, else converted block by block.
class FloatRows {
 public:
  explicit FloatRows(const Matrix& x)
      : x_(x), copy_(x.dtype == DType::kFloat ? 0 : smaller(x.rows, kRowBlock) * x.cols) {}

  const float* block(int64_t begin, int64_t rows) {
    const void* first = element(x_.data, x_.dtype, begin * x_.stride);
    if (x_.dtype == DType::kFloat) return static_cast<const float*>(first);
    with_type(x_.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t r = 0; r < rows; ++r) {
        to_float(static_cast<const T*>(first) + r * x_.stride, x_.cols, copy_.data() + r * x_.cols);
      }
    });
    return copy_.data();
  }
  int64_t stride() const { return x_.dtype == DType::kFloat ? x_.stride : x_.cols; }

 private:
  const Matrix& x_;
  Scratch<float> copy_;
};

void multiply(const Matrix& w, int64_t begin, int64_t count, const float* x, int64_t x_stride,
              int64_t rows, float* out) {
  with_weight_type(w.dtype, [&](auto type) {
    using T = decltype(type);
    products(static_cast<const T*>(w.data) + begin * w.stride, w.stride, count, x, x_stride, rows,
             w.cols, out, kChunk);
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

Vec gelu(Vec x, bool tanh) { return tanh ? gelu_tanh(x) : gelu_erf(x); }

// The products of `rows` rows of x with all rows of w (and of w2, read alongside, where given),
// a chunk at a time: finish(row, first column, columns, products, products with w2, bias).
template <class Finish>
void project(const float* x, int64_t x_stride, int64_t rows, const Matrix& w, const Matrix* w2,
             const Matrix& bias, Finish finish) {
  // Short chunks where there would be too few for the threads; no sum depends on the chunk.
  const int64_t size = divide_up(w.rows, kChunk) < 4 * workers() ? kChunk / 2 : kChunk;
  const int64_t per_worker = (2 * rows + 1) * kChunk;
  Scratch<float> scratch(workers() * per_worker);
  auto task = [&](int64_t index, int64_t worker) {
    const int64_t begin = index * size;
    const int64_t count = smaller(size, w.rows - begin);
    float* first = scratch.data() + worker * per_worker;
    float* second = first + rows * kChunk;
    float* shift = second + rows * kChunk;
    multiply(w, begin, count, x, x_stride, rows, first);
    if (w2 != nullptr) multiply(*w2, begin, count, x, x_stride, rows, second);
    load_bias(bias, begin, count, shift);
    for (int64_t r = 0; r < rows; ++r) {
      finish(r, begin, count, first + r * kChunk, second + r * kChunk, shift);
    }
  };
  for_each_task(divide_up(w.rows, size), task);
}

// out[first_row + r] = x[r] w^T + bias, in out's type.
void project_out(const float* x, int64_t x_stride, int64_t rows, const Matrix& w,
                 const Matrix& bias, DType dtype, void* out, int64_t first_row) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T* base = static_cast<T*>(out) + first_row * w.rows;
    project(x, x_stride, rows, w, nullptr, bias,
            [&](int64_t r, int64_t begin, int64_t count, const float* sums, const float*,
                const float* shift) {
              map_to(base + r * w.rows + begin, count, [&](int64_t i, int64_t n) {
                return load_some(sums + i, n) + load_some(shift + i, n);
              });
            });
  });
}

}  // namespace

void linear(const Matrix& x, const Matrix& weight, const Matrix& bias, void* out) {
  FloatRows input(x);
  for (int64_t begin = 0; begin < x.rows; begin += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, x.rows - begin);
    project_out(input.block(begin, rows), input.stride(), rows, weight, bias, x.dtype, out, begin);
  }
}

void gelu_mlp(const Matrix& x, const Matrix& w1, const Matrix& b1, const Matrix& w2,
              const Matrix& b2, bool tanh, void* out) {
  FloatRows input(x);
  Scratch<float> hidden(smaller(x.rows, kRowBlock) * w1.rows);
  for (int64_t begin = 0; begin < x.rows; begin += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, x.rows - begin);
    project(input.block(begin, rows), input.stride(), rows, w1, nullptr, b1,
            [&](int64_t r, int64_t first, int64_t count, const float* sums, const float*,
                const float* shift) {
              map_to(hidden.data() + r * w1.rows + first, count, [&](int64_t i, int64_t n) {
                return gelu(load_some(sums + i, n) + load_some(shift + i, n), tanh);
              });
            });
    project_out(hidden.data(), w1.rows, rows, w2, b2, x.dtype, out, begin);
  }
}

void geglu_mlp(const Matrix& x, const Matrix& gate, const Matrix& up, const Matrix& down, bool tanh,
               void* out) {
  const Matrix no_bias{};
  FloatRows input(x);
  Scratch<float> hidden(smaller(x.rows, kRowBlock) * gate.rows);
  for (int64_t begin = 0; begin < x.rows; begin += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, x.rows - begin);
    project(input.block(begin, rows), input.stride(), rows, gate, &up, no_bias,
            [&](int64_t r, int64_t first, int64_t count, const float* gates, const float* ups,
                const float*) {
              map_to(hidden.data() + r * gate.rows + first, count, [&](int64_t i, int64_t n) {
                return gelu(load_some(gates + i, n), tanh) * load_some(ups + i, n);
              });
            });
    project_out(hidden.data(), gate.rows, rows, down, no_bias, x.dtype, out, begin);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

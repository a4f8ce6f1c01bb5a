// rms_norm, residual_rms_norm and residual_layer_norm, forward and backward: a row comes from
// memory once, stays in the first-level cache as float32, and its results are written once.
//
// Rows are done in blocks whose size depends on the shape alone. Each block sums the gradients of
// the weights over its rows, and the blocks are added in order: the same bits for any number of
// threads.
#include "norm.h"

#include <cmath>

#include "gemm.h"
#include "random.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockElements = 16384;
constexpr int64_t kMostBlocks = 256;

int64_t block_rows(const NormArgs& a) {
  return larger(divide_up(kBlockElements, larger(1, a.cols)), divide_up(a.rows, kMostBlocks));
}

// f(i, n) for the vectors of a row.
template <class F>
void for_row(int64_t cols, F f) {
  for (int64_t i = 0; i < cols; i += kLanes) f(i, smaller(kLanes, cols - i));
}

// The sum of f(i, n) over all lanes of a row, in several partial sums: less latency, less rounding.
template <class F>
double row_sum(int64_t cols, F f) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= cols; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += f(i + j * kLanes, static_cast<int64_t>(kLanes));
  }
  for (; i < cols; i += kLanes) sums[0] += f(i, smaller(kLanes, cols - i));
  return double{sum(sums[0])} + double{sum(sums[1])} + double{sum(sums[2])} + double{sum(sums[3])};
}

template <class T>
void put(T* to, int64_t i, int64_t n, Vec x) {
  n == kLanes ? store(to + i, x) : store_partial(to + i, x, n);
}

// Zeros in the lanes from n on.
Vec first_lanes(Vec x, int64_t n) {
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
      for_row(from.cols, [&](int64_t i, int64_t n) {
        store(data_.data() + i, load_some(p + i, n) + broadcast(offset));
      });
    });
  }
  Vec at(int64_t i) const { return load(data_.data() + i); }

 private:
  Scratch<float> data_;
};

// What every kernel below is: a body for each row, with float32 rows of scratch, and columns that
// are summed over all rows.
template <class T>
class Rows {
 public:
  // scratch: float32 rows that a body needs; sums: how many arrays [cols] it adds to
  Rows(const NormArgs& args, int64_t scratch, int64_t sums)
      : a(args),
        width_(round_up(larger(1, args.cols), kLanes)),
        size_(block_rows(args)),
        blocks_(divide_up(args.rows, size_)),
        scratch_(workers() * scratch * width_),
        scratch_rows_(scratch),
        sums_rows_(sums),
        sums_(blocks_ * sums * width_),
        totals_(blocks_) {}

  // body(row, scratch, sums, total): row r of the arrays lies r * width() further; total is a
  // number that is summed over all rows
  template <class Body>
  void run(Body body) {
    auto task = [&](int64_t block, int64_t worker) {
      float* sums = sums_.data() + block * sums_rows_ * width_;
      for (int64_t i = 0; i < sums_rows_ * width_; ++i) sums[i] = 0.0f;
      totals_.data()[block] = 0.0;
      const int64_t end = smaller(a.rows, (block + 1) * size_);
      for (int64_t row = block * size_; row < end; ++row) {
        body(row, scratch_.data() + worker * scratch_rows_ * width_, sums, totals_.data()[block]);
      }
    };
    for_each_task(blocks_, task);
  }

  // to[i] = the sum of an array over all blocks, from its begin to end columns
  void add_up(int64_t which, float* to, int64_t cols) const {
    if (to == nullptr) return;
    map_to(to, cols, [&](int64_t i, int64_t) {
      Vec total{};
      for (int64_t b = 0; b < blocks_; ++b) {
        total += load(sums_.data() + (b * sums_rows_ + which) * width_ + i);
      }
      return total;
    });
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
  double inverse_rms(double squares) const {
    return 1.0 / std::sqrt(squares / static_cast<double>(a.cols) + double{a.eps});
  }

  const NormArgs& a;

 private:
  int64_t width_, size_, blocks_;
  Scratch<float> scratch_;
  int64_t scratch_rows_, sums_rows_;
  Scratch<float> sums_;
  Scratch<double> totals_;
};

// x as float32 into `to`, and 1 / sqrt(mean(x^2) + eps).
template <class T>
double load_rms(const Rows<T>& rows, const T* x, float* to) {
  return rows.inverse_rms(row_sum(rows.a.cols, [&](int64_t i, int64_t n) {
    const Vec v = load_some(x + i, n);
    store(to + i, v);
    return v * v;
  }));
}

// The gradient through x * rstd * weight: dx(i) = rstd (scaled(i) - x(i) factor), with
// scaled = grad * weight and factor from their products with x.
float rms_factor(double products, double rstd, int64_t cols) {
  return static_cast<float>(products * rstd * rstd / static_cast<double>(cols));
}

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

float gate_of(const Matrix& gate) {
  float value = 1.0f;
  if (gate.data == nullptr) return value;
  with_type(gate.dtype, [&](auto type) {
    value = std::tanh(load_partial(static_cast<const decltype(type)*>(gate.data), 1)[0]);
  });
  return value;
}

template <class T>
class LayerNormRow {
 public:
  LayerNormRow(const Rows<T>& rows, int64_t r, float* z) : z_(z) {
    const NormArgs& a = rows.a;
    const T *x = rows.row(a.x, r), *residual = rows.row(a.residual, r);
    const double total = row_sum(a.cols, [&](int64_t i, int64_t n) {
      Vec branch = load_some(x + i, n);
      if (a.dropout.scale != 0) branch *= keep_scale(a.dropout, r * a.cols + i);
      const Vec v = first_lanes(load_some(residual + i, n) + branch, n);
      store(z + i, v);
      return v;
    });
    const Vec mean = broadcast(static_cast<float>(total / static_cast<double>(a.cols)));
    rstd_ = static_cast<float>(rows.inverse_rms(row_sum(a.cols, [&](int64_t i, int64_t n) {
      const Vec centred = first_lanes(load(z + i) - mean, n);
      store(z + i, centred);
      return centred * centred;
    })));
  }
  Vec normed(int64_t i) const { return load(z_ + i) * broadcast(rstd_); }
  Vec rstd() const { return broadcast(rstd_); }

 private:
  float* z_;
  float rstd_;
};

}  // namespace

void rms_norm(const NormArgs& args) {
  const FloatVector weight(args.weight, args.offset);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Rows<T> rows(args, 1, 0);
    rows.run([&](int64_t r, float* x, float*, double&) {
      const Vec rstd = broadcast(static_cast<float>(load_rms(rows, rows.row(args.x, r), x)));
      map_to(rows.result(args.out, r), args.cols,
             [&](int64_t i, int64_t) { return load(x + i) * rstd * weight.at(i); });
    });
  });
}

void rms_norm_backward(const NormArgs& args) {
  const FloatVector weight(args.weight, args.offset);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Rows<T> rows(args, 2, args.dweight == nullptr ? 0 : 1);
    rows.run([&](int64_t r, float* x, float* dweight, double&) {
      float* scaled = x + rows.width();
      const T* grad = rows.row(args.grad, r);
      const double inverse = load_rms(rows, rows.row(args.x, r), x);
      const Vec rstd = broadcast(static_cast<float>(inverse));
      const double products = row_sum(args.cols, [&](int64_t i, int64_t n) {
        const Vec g = load_some(grad + i, n), v = load(x + i), s = g * weight.at(i);
        store(scaled + i, s);
        if (args.dweight != nullptr) store(dweight + i, load(dweight + i) + g * v * rstd);
        return s * v;
      });
      if (args.dx == nullptr) return;
      const Vec factor = broadcast(rms_factor(products, inverse, args.cols));
      map_to(rows.result(args.dx, r), args.cols,
             [&](int64_t i, int64_t) { return rstd * (load(scaled + i) - load(x + i) * factor); });
    });
    rows.add_up(0, args.dweight, args.cols);
  });
}

void residual_rms_norm(const NormArgs& args) {
  const FloatVector weight(args.weight, args.offset), next(args.next_weight, args.offset);
  const Vec gate = broadcast(gate_of(args.gate));
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Rows<T> rows(args, 1, 0);
    rows.run([&](int64_t r, float* x, float*, double&) {
      const Vec rstd = broadcast(static_cast<float>(load_rms(rows, rows.row(args.x, r), x)));
      const T* residual = rows.row(args.residual, r);
      T* h = rows.result(args.out, r);
      map_to(h, args.cols, [&](int64_t i, int64_t n) {
        return load_some(residual + i, n) + gate * (load(x + i) * rstd * weight.at(i));
      });
      if (args.y == nullptr) return;
      const Vec rstd_h = broadcast(static_cast<float>(load_rms(rows, h, x)));
      map_to(rows.result(args.y, r), args.cols,
             [&](int64_t i, int64_t) { return load(x + i) * rstd_h * next.at(i); });
    });
  });
}

void residual_rms_norm_backward(const NormArgs& args) {
  const FloatVector weight(args.weight, args.offset), next(args.next_weight, args.offset);
  const float tanh_gate = gate_of(args.gate);
  const Vec gate = broadcast(tanh_gate);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Rows<T> rows(args, 3, 2);  // sums: dweight, dnext_weight; total: for dgate
    rows.run([&](int64_t r, float* x, float* dweight, double& total) {
      float *dh = x + rows.width(), *scaled = dh + rows.width();
      float* dnext = dweight + rows.width();
      const T* grad = args.grad.data == nullptr ? nullptr : rows.row(args.grad, r);
      for_row(args.cols, [&](int64_t i, int64_t n) {
        store(dh + i, grad == nullptr ? Vec{} : load_some(grad + i, n));
      });
      if (args.grad_y.data != nullptr) {
        const T* grad_y = rows.row(args.grad_y, r);
        const double inverse = load_rms(rows, rows.row(args.h, r), x);
        const Vec rstd = broadcast(static_cast<float>(inverse));
        const double products = row_sum(args.cols, [&](int64_t i, int64_t n) {
          const Vec g = load_some(grad_y + i, n), v = load(x + i), s = g * next.at(i);
          store(scaled + i, s);
          store(dnext + i, load(dnext + i) + g * v * rstd);
          return s * v;
        });
        const Vec factor = broadcast(rms_factor(products, inverse, args.cols));
        for_row(args.cols, [&](int64_t i, int64_t) {
          store(dh + i, load(dh + i) + rstd * (load(scaled + i) - load(x + i) * factor));
        });
      }
      const double inverse = load_rms(rows, rows.row(args.x, r), x);
      const Vec rstd = broadcast(static_cast<float>(inverse));
      DoubleSum branches;
      T* dresidual = rows.result(args.dresidual, r);
      const double products = row_sum(args.cols, [&](int64_t i, int64_t n) {
        const Vec d = load(dh + i), v = load(x + i), normed = v * rstd;
        if (dresidual != nullptr) put(dresidual, i, n, d);
        const Vec s = d * gate * weight.at(i);
        store(scaled + i, s);
        store(dweight + i, load(dweight + i) + d * gate * normed);
        if (args.dgate != nullptr) branches.add(d, v, weight.at(i));
        return s * v;
      });
      total += branches.total() * inverse;
      if (args.dx == nullptr) return;
      const Vec factor = broadcast(rms_factor(products, inverse, args.cols));
      map_to(rows.result(args.dx, r), args.cols,
             [&](int64_t i, int64_t) { return rstd * (load(scaled + i) - load(x + i) * factor); });
    });
    rows.add_up(0, args.dweight, args.cols);
    rows.add_up(1, args.dnext_weight, args.cols);
    if (args.dgate == nullptr) return;
    const double slope = 1.0 - double{tanh_gate} * tanh_gate;
    *args.dgate = static_cast<float>(rows.total() * slope);
  });
}

void residual_layer_norm(const NormArgs& args) {
  const FloatVector weight(args.weight, 0.0f), bias(args.bias, 0.0f);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Rows<T> rows(args, 1, 0);
    rows.run([&](int64_t r, float* z, float*, double&) {
      const LayerNormRow<T> row(rows, r, z);
      map_to(rows.result(args.out, r), args.cols,
             [&](int64_t i, int64_t) { return row.normed(i) * weight.at(i) + bias.at(i); });
    });
  });
}

void residual_layer_norm_backward(const NormArgs& args) {
  const FloatVector weight(args.weight, 0.0f);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Rows<T> rows(args, 2, 2);  // sums: dweight, dbias
    rows.run([&](int64_t r, float* z, float* dweight, double&) {
      float *scaled = z + rows.width(), *dbias = dweight + rows.width();
      const T* grad = rows.row(args.grad, r);
      const LayerNormRow<T> row(rows, r, z);
      Vec total{}, products{};
      for_row(args.cols, [&](int64_t i, int64_t n) {
        const Vec g = load_some(grad + i, n), normed = row.normed(i), s = g * weight.at(i);
        total += s;
        products += s * normed;
        store(scaled + i, s);
        store(dweight + i, load(dweight + i) + g * normed);
        store(dbias + i, load(dbias + i) + g);
      });
      const float scale = 1.0f / static_cast<float>(args.cols);
      const Vec mean = broadcast(sum(total) * scale), factor = broadcast(sum(products) * scale);
      T *dx = rows.result(args.dx, r), *dresidual = rows.result(args.dresidual, r);
      for_row(args.cols, [&](int64_t i, int64_t n) {
        const Vec dz = row.rstd() * (load(scaled + i) - mean - row.normed(i) * factor);
        if (dresidual != nullptr) put(dresidual, i, n, dz);
        if (dx == nullptr) return;
        const bool drops = args.dropout.scale != 0;
        put(dx, i, n, drops ? dz * keep_scale(args.dropout, r * args.cols + i) : dz);
      });
    });
    rows.add_up(0, args.dweight, args.cols);
    rows.add_up(1, args.dbias, args.cols);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

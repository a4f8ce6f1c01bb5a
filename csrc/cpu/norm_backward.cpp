// Backward of rms_norm, residual_rms_norm and residual_layer_norm. A result that nobody wants is
// null, and nothing is read or computed for it.
#include "norm.h"
#include "norm_rows.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

// Where the arrays that are wanted lie among the sums of a block.
class SumPlaces {
 public:
  // The place of the next array, or -1 where it is not wanted.
  int64_t add(const float* wanted) { return wanted == nullptr ? -1 : count_++; }
  int64_t count() const { return count_; }

 private:
  int64_t count_ = 0;
};

template <class T>
float* place(const Rows<T>& rows, float* sums, int64_t which) {
  return which < 0 ? nullptr : sums + which * rows.width();
}

void add_to(float* sums, int64_t i, Vec x) { store(sums + i, load(sums + i) + x); }

// Through y = gate * normed(x) * weight for the gradient grad(i, n) of y: adds to dweight if it is
// not null, and hands dx to write(i, n, dx) if wanted. scaled: a row of scratch.
//
// dx = gate rstd (s - x f) with s = grad * weight and f = mean(s x) rstd^2.
template <class T, class Grad, class Write>
void rms_backward(const Rows<T>& rows, const RmsRow<T>& x, const FloatVector& weight, float gate,
                  float* scaled, float* dweight, bool wanted, Grad grad, Write write) {
  const Vec factor = broadcast(static_cast<float>(gate * x.rstd()));
  RowSum products;
  for_row(rows.a.cols, [&](int64_t i, int64_t n, int chain) {
    const Vec g = grad(i, n), v = x.at(i), s = g * weight.at(i);
    if (dweight != nullptr) add_to(dweight, i, g * (v * factor));
    if (!wanted) return;
    products.add(chain, s * v);
    store(scaled + i, s);
  });
  if (!wanted) return;
  const double scaled_mean = rows.mean(products.total()) * x.rstd() * x.rstd();
  const Vec mean = broadcast(static_cast<float>(scaled_mean));
  for_row(rows.a.cols, [&](int64_t i, int64_t n, int) {
    write(i, n, factor * (load(scaled + i) - x.at(i) * mean));
  });
}

}  // namespace

void rms_norm_backward(const NormArgs& args) {
  if (args.dx == nullptr && args.dweight == nullptr) return;
  const FloatVector weight(args.weight, args.offset);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    SumPlaces sums;
    const int64_t dweight = sums.add(args.dweight);
    Rows<T> rows(args, 2, sums.count());
    rows.run([&](int64_t r, float* scratch, float* sums, double&) {
      const T* grad = rows.row(args.grad, r);
      T* dx = rows.result(args.dx, r);
      const RmsRow<T> x(rows, rows.row(args.x, r), scratch);
      rms_backward(
          rows, x, weight, 1.0f, scratch + rows.width(), place(rows, sums, dweight), dx != nullptr,
          [&](int64_t i, int64_t n) { return load_some(grad + i, n); },
          [&](int64_t i, int64_t n, Vec d) { put(dx, i, n, d); });
    });
    rows.add_up(dweight, args.dweight);
  });
}

void residual_rms_norm_backward(const NormArgs& args) {
  const bool branch =
      args.dx != nullptr || args.dweight != nullptr || args.dgate != nullptr;  // what reads x
  const bool sum = branch || args.dresidual != nullptr;                        // what needs dh
  if (!sum && args.dnext_weight == nullptr) return;
  const bool follows = args.grad_y.data != nullptr && (sum || args.dnext_weight != nullptr);
  const FloatVector weight(args.weight, args.offset), next(args.next_weight, args.offset);
  const float gate = gate_of(args.gate);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    SumPlaces sums;
    const int64_t dweight = sums.add(args.dweight), dnext = sums.add(args.dnext_weight);
    Rows<T> rows(args, 3, sums.count());  // total: for dgate
    rows.run([&](int64_t r, float* scratch, float* sums, double& total) {
      float *dh = scratch + rows.width(), *scaled = dh + rows.width();
      const T* grad = args.grad.data == nullptr ? nullptr : rows.row(args.grad, r);
      for_row(args.cols, [&](int64_t i, int64_t n, int) {
        store(dh + i, grad == nullptr ? Vec{} : load_some(grad + i, n));
      });
      if (follows) {
        const T* grad_y = rows.row(args.grad_y, r);
        const RmsRow<T> h(rows, rows.row(args.h, r), scratch);
        rms_backward(
            rows, h, next, 1.0f, scaled, place(rows, sums, dnext), sum,
            [&](int64_t i, int64_t n) { return load_some(grad_y + i, n); },
            [&](int64_t i, int64_t, Vec d) { add_to(dh, i, d); });
      }
      if (args.dresidual != nullptr) {
        map_to(rows.result(args.dresidual, r), args.cols,
               [&](int64_t i, int64_t) { return load(dh + i); });
      }
      if (!branch) return;
      T* dx = rows.result(args.dx, r);
      const RmsRow<T> x(rows, rows.row(args.x, r), scratch);
      if (args.dgate != nullptr) {
        DoubleSum branches;
        for_row(args.cols, [&](int64_t i, int64_t, int) {
          branches.add(load(dh + i), x.at(i), weight.at(i));
        });
        total += branches.total() * x.rstd();
      }
      if (dx == nullptr && args.dweight == nullptr) return;
      rms_backward(
          rows, x, weight, gate, scaled, place(rows, sums, dweight), dx != nullptr,
          [&](int64_t i, int64_t) { return load(dh + i); },
          [&](int64_t i, int64_t n, Vec d) { put(dx, i, n, d); });
    });
    rows.add_up(dweight, args.dweight);
    rows.add_up(dnext, args.dnext_weight);
    if (args.dgate == nullptr) return;
    *args.dgate = static_cast<float>(rows.total() * (1.0 - double{gate} * gate));
  });
}

void residual_layer_norm_backward(const NormArgs& args) {
  const bool inputs = args.dx != nullptr || args.dresidual != nullptr;
  if (!inputs && args.dweight == nullptr && args.dbias == nullptr) return;
  const FloatVector weight(args.weight, 0.0f);
  const bool drops = args.dropout.scale != 0;
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    SumPlaces sums;
    const int64_t dweight = sums.add(args.dweight), dbias = sums.add(args.dbias);
    Rows<T> rows(args, 2, sums.count());
    rows.run([&](int64_t r, float* scratch, float* sums, double&) {
      float *scaled = scratch + rows.width(), *to_bias = place(rows, sums, dbias);
      float* to_weight = place(rows, sums, dweight);
      const T* grad = rows.row(args.grad, r);
      const LayerNormRow<T> z(rows, r, scratch);
      RowSum total, products;
      for_row(args.cols, [&](int64_t i, int64_t n, int chain) {
        const Vec g = load_some(grad + i, n), normed = z.normed(i), s = g * weight.at(i);
        if (to_bias != nullptr) add_to(to_bias, i, g);
        if (to_weight != nullptr) add_to(to_weight, i, g * normed);
        if (!inputs) return;
        total.add(chain, s);
        products.add(chain, s * normed);
        store(scaled + i, s);
      });
      if (!inputs) return;
      const Vec mean = broadcast(static_cast<float>(rows.mean(total.total())));
      const Vec factor = broadcast(static_cast<float>(rows.mean(products.total())));
      const Vec rstd = broadcast(z.rstd());
      T *dx = rows.result(args.dx, r), *dresidual = rows.result(args.dresidual, r);
      for_row(args.cols, [&](int64_t i, int64_t n, int) {
        const Vec dz = rstd * (load(scaled + i) - mean - z.normed(i) * factor);
        if (dresidual != nullptr) put(dresidual, i, n, dz);
        if (dx == nullptr) return;
        put(dx, i, n, drops ? dz * keep_scale(args.dropout, r * args.cols + i) : dz);
      });
    });
    rows.add_up(dweight, args.dweight);
    rows.add_up(dbias, args.dbias);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

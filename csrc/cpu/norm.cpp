// rms_norm, residual_rms_norm and residual_layer_norm, forward.
#include "norm.h"

#include "norm_rows.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

void rms_norm(const NormArgs& args) {
  const FloatVector weight(args.weight, args.offset);
  const Vec gate = broadcast(gate_of(args.gate));
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Rows<T> rows(args, 1, 0);
    rows.run([&](int64_t r, float* scratch, float*, double&) {
      const T* from = rows.row(args.x, r);
      if (args.residual.data != nullptr) {
        const T *residual = rows.row(args.residual, r), *branch = from;
        T* sum = rows.result(args.y, r);
        map_to(sum, args.cols, [&](int64_t i, int64_t n) {
          return load_some(residual + i, n) + gate * load_some(branch + i, n);
        });
        from = sum;  // as stored: rounded to its dtype
      }
      const RmsRow<T> x(rows, from, scratch);
      map_to(rows.result(args.out, r), args.cols,
             [&](int64_t i, int64_t) { return x.normed(i) * weight.at(i); });
    });
  });
}

void residual_rms_norm(const NormArgs& args) {
  const FloatVector weight(args.weight, args.offset), next(args.next_weight, args.offset);
  const Vec gate = broadcast(gate_of(args.gate));
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Rows<T> rows(args, 1, 0);
    rows.run([&](int64_t r, float* scratch, float*, double&) {
      const RmsRow<T> x(rows, rows.row(args.x, r), scratch);
      const T* residual = rows.row(args.residual, r);
      T* out = rows.result(args.out, r);
      map_to(out, args.cols, [&](int64_t i, int64_t n) {
        return load_some(residual + i, n) + gate * (x.normed(i) * weight.at(i));
      });
      if (args.y == nullptr) return;
      // as stored: rounded to its dtype
      const RmsRow<T> h(rows, out, scratch);
      map_to(rows.result(args.y, r), args.cols,
             [&](int64_t i, int64_t) { return h.normed(i) * next.at(i); });
    });
  });
}

void residual_layer_norm(const NormArgs& args) {
  const FloatVector weight(args.weight, 0.0f), bias(args.bias, 0.0f);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    Rows<T> rows(args, 1, 0);
    rows.run([&](int64_t r, float* scratch, float*, double&) {
      const LayerNormRow<T> z(rows, r, scratch);
      map_to(rows.result(args.out, r), args.cols,
             [&](int64_t i, int64_t) { return z.normed(i) * weight.at(i) + bias.at(i); });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

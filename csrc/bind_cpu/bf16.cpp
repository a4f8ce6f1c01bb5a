// Products in bfloat16 arithmetic as torch ops.
#include "../cpu/bf16.h"

#include "tail.h"

namespace fastvlm {
namespace {

// Of int8 where it has factors, else of float.
Matrix weight_of(const Tensor& weight, const Optional& scale, const char* name, int64_t cols) {
  return scale.has_value() ? scaled_weight_for(weight, *scale, cols)
                           : any_weight_for(weight, name, cols);
}

Tensor bf16_linear(const Tensor& x, const Tensor& weight, const Optional& scale,
                   const Optional& bias, const Optional& residual, const Optional& factors) {
  PackedLinearArgs args{};
  args.x = any_matrix(x, "x");
  args.weight = weight_of(weight, scale, "weight", args.x.cols);
  Tensor out = make_out(x, args.weight.rows, bias, residual, factors, args.tail);
  FASTVLM_KERNEL(bf16_linear)(args);
  return out;
}

Tensor bf16_mlp(const Tensor& x, const Tensor& w1, const Optional& scale1, const Optional& b1,
                const Tensor& w2, const Optional& scale2, const Optional& b2,
                const Optional& residual, const Optional& factors, int64_t activation) {
  PackedMlpArgs args{};
  args.x = any_matrix(x, "x");
  args.w1 = weight_of(w1, scale1, "w1", args.x.cols);
  args.b1 = bias_for(b1, "b1", args.w1.rows);
  args.w2 = weight_of(w2, scale2, "w2", args.w1.rows);
  args.activation = activation_of(activation);
  Tensor out = make_out(x, args.w2.rows, b2, residual, factors, args.tail);
  FASTVLM_KERNEL(bf16_mlp)(args);
  return out;
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def(
      "bf16_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, "
      "Tensor? factors) -> Tensor");
  m.def(
      "bf16_mlp(Tensor x, Tensor w1, Tensor? scale1, Tensor? b1, Tensor w2, Tensor? scale2, "
      "Tensor? b2, Tensor? residual, Tensor? factors, int activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("bf16_linear", TORCH_BOX(&fastvlm::bf16_linear));
  m.impl("bf16_mlp", TORCH_BOX(&fastvlm::bf16_mlp));
}

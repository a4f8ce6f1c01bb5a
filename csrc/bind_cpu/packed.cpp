// Products of many rows, with what follows them, as torch ops.
#include "tail.h"

namespace fastvlm {
namespace {

Tensor packed_linear(const Tensor& x, const Tensor& weight, const Optional& bias,
                     const Optional& residual, const Optional& factors) {
  PackedLinearArgs args{};
  args.x = any_matrix(x, "x");
  args.weight = any_weight_for(weight, "weight", args.x.cols);
  Tensor out = make_out(x, args.weight.rows, bias, residual, factors, args.tail);
  FASTVLM_KERNEL(packed_linear)(args);
  return out;
}

Tensor packed_mlp(const Tensor& x, const Tensor& w1, const Optional& b1, const Tensor& w2,
                  const Optional& b2, const Optional& residual, const Optional& factors,
                  int64_t activation) {
  PackedMlpArgs args{};
  args.x = any_matrix(x, "x");
  args.w1 = any_weight_for(w1, "w1", args.x.cols);
  args.b1 = bias_for(b1, "b1", args.w1.rows);
  args.w2 = any_weight_for(w2, "w2", args.w1.rows);
  args.activation = activation_of(activation);
  Tensor out = make_out(x, args.w2.rows, b2, residual, factors, args.tail);
  FASTVLM_KERNEL(packed_mlp)(args);
  return out;
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def(
      "packed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? factors) "
      "-> Tensor");
  m.def(
      "packed_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, "
      "Tensor? factors, int activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&fastvlm::packed_linear));
  m.impl("packed_mlp", TORCH_BOX(&fastvlm::packed_mlp));
}

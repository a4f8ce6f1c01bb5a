// Products in int8 arithmetic as torch ops.
#include "../cpu/int8.h"

#include "tail.h"

namespace fastvlm {
namespace {

// quads: for tests; by default whatever the CPU does faster.
Int8Products products(std::optional<bool> quads) {
  STD_TORCH_CHECK(!quads.value_or(false) || has_int8_quads() || capability() < Capability::kAVX512,
                  "quads: this CPU has no VNNI");
  return quads.value_or(has_int8_quads()) ? Int8Products::kQuads : Int8Products::kPairs;
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const Optional& bias,
                   const Optional& residual, const Optional& factors, std::optional<bool> quads) {
  Int8LinearArgs args{};
  args.x = matrix(x, "x");
  args.weight = scaled_weight_for(weight, scale, args.x.cols);
  args.products = products(quads);
  Tensor out = make_out(x, args.weight.rows, bias, residual, factors, args.tail);
  FASTVLM_KERNEL(int8_linear)(args);
  return out;
}

Tensor int8_gelu_mlp(const Tensor& x, const Tensor& w1, const Tensor& scale1, const Optional& b1,
                     const Tensor& w2, const Tensor& scale2, const Optional& b2,
                     const Optional& residual, const Optional& factors, int64_t activation,
                     std::optional<bool> quads) {
  Int8MlpArgs args{};
  args.x = matrix(x, "x");
  args.w1 = scaled_weight_for(w1, scale1, args.x.cols);
  args.b1 = bias_for(b1, "b1", args.w1.rows);
  args.w2 = scaled_weight_for(w2, scale2, args.w1.rows);
  args.activation = activation_of(activation);
  args.products = products(quads);
  Tensor out = make_out(x, args.w2.rows, b2, residual, factors, args.tail);
  FASTVLM_KERNEL(int8_mlp)(args);
  return out;
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, "
      "Tensor? factors, bool? quads=None) -> Tensor");
  m.def(
      "int8_gelu_mlp(Tensor x, Tensor w1, Tensor scale1, Tensor? b1, Tensor w2, Tensor scale2, "
      "Tensor? b2, Tensor? residual, Tensor? factors, int activation, bool? quads=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&fastvlm::int8_linear));
  m.impl("int8_gelu_mlp", TORCH_BOX(&fastvlm::int8_gelu_mlp));
}

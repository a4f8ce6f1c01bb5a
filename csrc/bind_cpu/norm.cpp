// The norms as torch ops. Backward ops give empty tensors for what is not wanted; the gradients of
// weights are float32.
#include "../cpu/norm.h"

#include "bind.h"

namespace fastvlm {
namespace {

using Optional = std::optional<Tensor>;

// What all of them have: rows x and a weight.
NormArgs norm_args(const Tensor& x, const Tensor& weight, double eps, double offset) {
  NormArgs args{};
  check(x, "x", 2);
  args.dtype = dtype_of(x, "x");
  args.rows = x.size(0);
  args.cols = x.size(1);
  args.x = {x.const_data_ptr(), x.stride(0)};
  args.eps = static_cast<float>(eps);
  args.offset = static_cast<float>(offset);
  args.weight = vector_for(weight, "weight", args.cols);
  return args;
}

NormRows rows_for(const Optional& t, const char* name, const NormArgs& args) {
  if (!t.has_value()) return {};
  check(*t, name, 2);
  STD_TORCH_CHECK(dtype_of(*t, name) == args.dtype, name, ": expected the dtype of x");
  STD_TORCH_CHECK(t->size(0) == args.rows && t->size(1) == args.cols, name,
                  ": expected the shape of x");
  return {t->const_data_ptr(), t->stride(0)};
}

Tensor rows_like(const Tensor& x, bool need, void** to) {
  if (!need) return torch::stable::new_empty(x, {0});
  Tensor made = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  *to = made.mutable_data_ptr();
  return made;
}

Tensor floats(const Tensor& x, bool need, int64_t size, float** to) {
  Tensor made = torch::stable::new_empty(x, {need ? size : 0}, ScalarType::Float);
  if (need) *to = static_cast<float*>(made.mutable_data_ptr());
  return made;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  NormArgs args = norm_args(x, weight, eps, offset);
  Tensor out = rows_like(x, true, &args.out);
  FASTVLM_KERNEL(rms_norm)(args);
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, double eps, double offset,
                                             bool need_x, bool need_weight) {
  NormArgs args = norm_args(x, weight, eps, offset);
  args.grad = rows_for(grad, "grad", args);
  Tensor dx = rows_like(x, need_x, &args.dx);
  Tensor dweight = floats(x, need_weight, args.cols, &args.dweight);
  FASTVLM_KERNEL(rms_norm_backward)(args);
  return {dx, dweight};
}

void set_residual(NormArgs& args, const Optional& gate, const Optional& next_weight) {
  args.gate = gate_for(gate);
  if (next_weight.has_value()) {
    args.next_weight = vector_for(*next_weight, "next_weight", args.cols);
  }
}

std::tuple<Tensor, Tensor> residual_rms_norm(const Tensor& x, const Tensor& residual,
                                             const Tensor& weight, const Optional& gate,
                                             const Optional& next_weight, double eps,
                                             double offset) {
  NormArgs args = norm_args(x, weight, eps, offset);
  args.residual = rows_for(residual, "residual", args);
  set_residual(args, gate, next_weight);
  Tensor h = rows_like(x, true, &args.out);
  Tensor y = rows_like(x, next_weight.has_value(), &args.y);
  FASTVLM_KERNEL(residual_rms_norm)(args);
  return {h, y};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_rms_norm_backward(
    const Optional& grad_h, const Optional& grad_y, const Tensor& x, const Tensor& h,
    const Tensor& weight, const Optional& gate, const Optional& next_weight, double eps,
    double offset, bool need_x, bool need_residual, bool need_weight, bool need_gate,
    bool need_next) {
  NormArgs args = norm_args(x, weight, eps, offset);
  set_residual(args, gate, next_weight);
  STD_TORCH_CHECK(next_weight.has_value() || !grad_y.has_value(), "grad_y: needs next_weight");
  args.grad = rows_for(grad_h, "grad_h", args);
  args.grad_y = rows_for(grad_y, "grad_y", args);
  args.h = rows_for(h, "h", args);
  Tensor dx = rows_like(x, need_x, &args.dx);
  Tensor dresidual = rows_like(x, need_residual, &args.dresidual);
  Tensor dweight = floats(x, need_weight, args.cols, &args.dweight);
  Tensor dgate = floats(x, need_gate && gate.has_value(), 1, &args.dgate);
  Tensor dnext = floats(x, need_next && next_weight.has_value(), args.cols, &args.dnext_weight);
  FASTVLM_KERNEL(residual_rms_norm_backward)(args);
  return {dx, dresidual, dweight, dgate, dnext};
}

Tensor residual_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                           const Tensor& bias, const Optional& seed, double eps, double dropout_p) {
  NormArgs args = norm_args(x, weight, eps, 0.0);
  args.residual = rows_for(residual, "residual", args);
  args.bias = vector_for(bias, "bias", args.cols);
  args.dropout = dropout_of(seed, dropout_p);
  Tensor out = rows_like(x, true, &args.out);
  FASTVLM_KERNEL(residual_layer_norm)(args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& residual, const Tensor& weight,
    const Optional& seed, double eps, double dropout_p, bool need_x, bool need_residual,
    bool need_weight, bool need_bias) {
  NormArgs args = norm_args(x, weight, eps, 0.0);
  args.grad = rows_for(grad, "grad", args);
  args.residual = rows_for(residual, "residual", args);
  args.dropout = dropout_of(seed, dropout_p);
  Tensor dx = rows_like(x, need_x, &args.dx);
  Tensor dresidual = rows_like(x, need_residual, &args.dresidual);
  Tensor dweight = floats(x, need_weight, args.cols, &args.dweight);
  Tensor dbias = floats(x, need_bias, args.cols, &args.dbias);
  FASTVLM_KERNEL(residual_layer_norm_backward)(args);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, float offset, "
      "bool need_x, bool need_weight) -> (Tensor, Tensor)");
  m.def(
      "residual_rms_norm(Tensor x, Tensor residual, Tensor weight, Tensor? gate, "
      "Tensor? next_weight, float eps, float offset) -> (Tensor, Tensor)");
  m.def(
      "residual_rms_norm_backward(Tensor? grad_h, Tensor? grad_y, Tensor x, Tensor h, "
      "Tensor weight, Tensor? gate, Tensor? next_weight, float eps, float offset, bool need_x, "
      "bool need_residual, bool need_weight, bool need_gate, bool need_next) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed, "
      "float eps, float dropout_p) -> Tensor");
  m.def(
      "residual_layer_norm_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, "
      "Tensor? seed, float eps, float dropout_p, bool need_x, bool need_residual, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&fastvlm::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&fastvlm::rms_norm_backward));
  m.impl("residual_rms_norm", TORCH_BOX(&fastvlm::residual_rms_norm));
  m.impl("residual_rms_norm_backward", TORCH_BOX(&fastvlm::residual_rms_norm_backward));
  m.impl("residual_layer_norm", TORCH_BOX(&fastvlm::residual_layer_norm));
  m.impl("residual_layer_norm_backward", TORCH_BOX(&fastvlm::residual_layer_norm_backward));
}

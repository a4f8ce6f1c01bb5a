// linear, low_precision_linear, the MLPs and their activations as torch ops.
#include "../cpu/mlp.h"

#include "bind.h"

namespace fastvlm {
namespace {

Tensor empty_rows(const Tensor& like, int64_t rows, int64_t cols) {
  return torch::stable::new_empty(like, {rows, cols});
}

// wide: the result is float32 whatever x is.
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool wide) {
  const Matrix rows = matrix(x, "x");
  const Matrix w = any_weight_for(weight, "weight", rows.cols);
  const Matrix b = bias_for(bias, "bias", w.rows);
  Tensor out = wide ? torch::stable::new_empty(x, {rows.rows, w.rows}, ScalarType::Float)
                    : empty_rows(x, rows.rows, w.rows);
  const Product product{w, b, out.mutable_data_ptr()};
  FASTVLM_KERNEL(linear)(rows, &product, 1, wide ? DType::kFloat : rows.dtype);
  return out;
}

// A weight of fewer bits than x: bfloat16, or int8 with a factor for each row.
Tensor low_precision_linear(const Tensor& x, const Tensor& weight,
                            const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  if (!scale.has_value()) return linear(x, weight, bias, false);
  const Matrix rows = matrix(x, "x");
  const Matrix w = scaled_weight_for(weight, *scale, rows.cols);
  const Matrix b = bias_for(bias, "bias", w.rows);
  Tensor out = empty_rows(x, rows.rows, w.rows);
  const Product product{w, b, out.mutable_data_ptr()};
  FASTVLM_KERNEL(linear)(rows, &product, 1, rows.dtype);
  return out;
}

Tensor gelu_mlp(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                const Tensor& w2, const std::optional<Tensor>& b2, int64_t activation) {
  const Matrix rows = matrix(x, "x");
  const Matrix first = any_weight_for(w1, "w1", rows.cols);
  const Matrix second = any_weight_for(w2, "w2", first.rows);
  const Matrix first_bias = bias_for(b1, "b1", first.rows);
  const Matrix second_bias = bias_for(b2, "b2", second.rows);
  Tensor out = empty_rows(x, rows.rows, second.rows);
  FASTVLM_KERNEL(gelu_mlp)(rows, first, first_bias, second, second_bias, activation_of(activation),
                           out.mutable_data_ptr());
  return out;
}

Tensor geglu_mlp(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                 int64_t activation) {
  const Matrix rows = matrix(x, "x");
  const Matrix gate = any_weight_for(w_gate, "w_gate", rows.cols);
  const Matrix up = any_weight_for(w_up, "w_up", rows.cols, gate.rows);
  const Matrix down = any_weight_for(w_down, "w_down", gate.rows);
  Tensor out = empty_rows(x, rows.rows, down.rows);
  FASTVLM_KERNEL(geglu_mlp)(rows, gate, up, down, activation_of(activation),
                            out.mutable_data_ptr());
  return out;
}

// The common part of all activations: what they read. up and grad may be missing.
ActivationArgs activation_args(const Tensor& pre, const std::optional<Tensor>& up,
                               const std::optional<Tensor>& grad, const std::optional<Tensor>& seed,
                               int64_t activation, double dropout_p) {
  auto read = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.dim() == 2 &&
                        t.scalar_type() == pre.scalar_type() && t.size(0) == pre.size(0) &&
                        t.size(1) == pre.size(1),
                    name, ": expected a contiguous CPU tensor of the first one's shape and dtype");
    return t.const_data_ptr();
  };
  ActivationArgs args{};
  args.dtype = dtype_of(pre, "pre");
  args.pre = read(pre, "pre");
  args.count = pre.numel();
  if (up.has_value()) args.up = read(*up, "up");
  if (grad.has_value()) args.grad = read(*grad, "grad");
  args.activation = activation_of(activation);
  args.dropout = dropout_of(seed, dropout_p);
  return args;
}

Tensor activate(const Tensor& pre, const std::optional<Tensor>& up,
                const std::optional<Tensor>& seed, int64_t activation, double dropout_p) {
  ActivationArgs args = activation_args(pre, up, std::nullopt, seed, activation, dropout_p);
  Tensor hidden = empty_rows(pre, pre.size(0), pre.size(1));
  args.hidden = hidden.mutable_data_ptr();
  FASTVLM_KERNEL(activate)(args);
  return hidden;
}

// The gradients of pre and up and, where wanted, hidden; empty tensors for what is not.
std::tuple<Tensor, Tensor, Tensor> activate_backward(const Tensor& grad, const Tensor& pre,
                                                     const std::optional<Tensor>& up,
                                                     const std::optional<Tensor>& seed,
                                                     int64_t activation, double dropout_p,
                                                     bool need_inputs, bool need_hidden) {
  ActivationArgs args = activation_args(pre, up, grad, seed, activation, dropout_p);
  auto result = [&](bool need, void** to) {
    if (!need) return torch::stable::new_empty(pre, {0});
    Tensor made = empty_rows(pre, pre.size(0), pre.size(1));
    *to = made.mutable_data_ptr();
    return made;
  };
  Tensor dpre = result(need_inputs, &args.dpre);
  Tensor dup = result(need_inputs && up.has_value(), &args.dup);
  Tensor hidden = result(need_hidden, &args.hidden);
  FASTVLM_KERNEL(activate_backward)(args);
  return {dpre, dup, hidden};
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool wide=False) -> Tensor");
  m.def("low_precision_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor");
  m.def(
      "gelu_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int activation) -> Tensor");
  m.def("geglu_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, int activation) -> Tensor");
  m.def(
      "activate(Tensor pre, Tensor? up, Tensor? seed, int activation, float dropout_p) -> Tensor");
  m.def(
      "activate_backward(Tensor grad, Tensor pre, Tensor? up, Tensor? seed, int activation, "
      "float dropout_p, bool need_inputs, bool need_hidden) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&fastvlm::linear));
  m.impl("low_precision_linear", TORCH_BOX(&fastvlm::low_precision_linear));
  m.impl("gelu_mlp", TORCH_BOX(&fastvlm::gelu_mlp));
  m.impl("geglu_mlp", TORCH_BOX(&fastvlm::geglu_mlp));
  m.impl("activate", TORCH_BOX(&fastvlm::activate));
  m.impl("activate_backward", TORCH_BOX(&fastvlm::activate_backward));
}

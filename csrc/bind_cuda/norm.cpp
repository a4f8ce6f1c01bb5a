// The norms as torch ops. Backward ops give empty tensors for what is not wanted, and sums for the
// weights in parts, [blocks, cols] float32, which the launcher in Python adds up.
#include "../cuda/norm.h"

#include "bind.h"

namespace fastvlm {
namespace cuda {
namespace {

NormArgs norm_args(const Tensor& x, const Tensor& weight, double eps, double offset) {
  NormArgs args{};
  args.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions");
  args.rows = x.size(0);
  args.cols = x.size(1);
  STD_TORCH_CHECK(args.cols <= kWidestRow, "x: rows of up to ", kWidestRow);
  STD_TORCH_CHECK(args.rows <= INT32_MAX, "x: too many rows");
  args.x = rows_of(x, "x", args.dtype, args.rows, args.cols);
  args.weight = vector_of(weight, "weight", args.dtype, args.cols);
  args.eps = static_cast<float>(eps);
  args.offset = static_cast<float>(offset);
  return args;
}

Rows optional_rows(const Optional& t, const char* name, const NormArgs& args) {
  return t.has_value() ? rows_of(*t, name, args.dtype, args.rows, args.cols) : Rows{};
}

void set_residual(NormArgs& args, const Optional& gate, const Optional& next_weight) {
  if (gate.has_value()) {
    STD_TORCH_CHECK(on_device(*gate) && gate->numel() == 1, "gate: expected one number");
    args.gate = {gate->const_data_ptr(), dtype_of(*gate, "gate")};
    STD_TORCH_CHECK(args.gate.dtype == DType::kFloat || args.gate.dtype == args.dtype,
                    "gate: expected float32 or x's dtype");
    give(*gate, "gate", Access::kInput);
  }
  if (next_weight.has_value()) {
    args.next_weight = vector_of(*next_weight, "next_weight", args.dtype, args.cols);
  }
}

Tensor like_x(const Tensor& x, const char* name, bool wanted, void** to) {
  return result(x, name, wanted, {x.size(0), x.size(1)}, x.scalar_type(), to);
}

int64_t set_blocks(NormArgs& args, int64_t rows_per_block) {
  STD_TORCH_CHECK(rows_per_block > 0, "rows_per_block: expected a positive number");
  args.rows_per_block = rows_per_block;
  return (args.rows + rows_per_block - 1) / rows_per_block;
}

Tensor parts(const Tensor& x, const char* name, bool wanted, int64_t blocks, int64_t cols,
             float** to) {
  return result(x, name, wanted, {blocks, cols}, ScalarType::Float, to);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  const Call call(x);
  NormArgs args = norm_args(x, weight, eps, offset);
  Tensor out = like_x(x, "out", true, &args.out);
  FASTVLM_CUDA_KERNEL(rms_norm)(args, call.stream());
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, double eps, double offset,
                                             int64_t rows_per_block, bool need_x,
                                             bool need_weight) {
  const Call call(x);
  NormArgs args = norm_args(x, weight, eps, offset);
  args.grad = optional_rows(grad, "grad", args);
  const int64_t blocks = set_blocks(args, rows_per_block);
  Tensor dx = like_x(x, "dx", need_x, &args.dx);
  Tensor dweight = parts(x, "dweight", need_weight, blocks, args.cols, &args.dweight);
  FASTVLM_CUDA_KERNEL(rms_norm_backward)(args, call.stream());
  return {dx, dweight};
}

std::tuple<Tensor, Tensor> residual_rms_norm(const Tensor& x, const Tensor& residual,
                                             const Tensor& weight, const Optional& gate,
                                             const Optional& next_weight, double eps,
                                             double offset) {
  const Call call(x);
  NormArgs args = norm_args(x, weight, eps, offset);
  args.residual = optional_rows(residual, "residual", args);
  set_residual(args, gate, next_weight);
  Tensor h = like_x(x, "h", true, &args.out);
  Tensor y = like_x(x, "y", next_weight.has_value(), &args.y);
  FASTVLM_CUDA_KERNEL(residual_rms_norm)(args, call.stream());
  return {h, y};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_rms_norm_backward(
    const Optional& grad_h, const Optional& grad_y, const Tensor& x, const Tensor& h,
    const Tensor& weight, const Optional& gate, const Optional& next_weight, double eps,
    double offset, int64_t rows_per_block, bool need_x, bool need_residual, bool need_weight,
    bool need_gate, bool need_next) {
  const Call call(x);
  NormArgs args = norm_args(x, weight, eps, offset);
  set_residual(args, gate, next_weight);
  STD_TORCH_CHECK(next_weight.has_value() || !grad_y.has_value(), "grad_y: needs next_weight");
  args.grad = optional_rows(grad_h, "grad_h", args);
  args.grad_y = optional_rows(grad_y, "grad_y", args);
  args.h = optional_rows(h, "h", args);
  const int64_t blocks = set_blocks(args, rows_per_block);
  Tensor dx = like_x(x, "dx", need_x, &args.dx);
  Tensor dresidual = like_x(x, "dresidual", need_residual, &args.dresidual);
  Tensor dweight = parts(x, "dweight", need_weight, blocks, args.cols, &args.dweight);
  Tensor dgate = parts(x, "dgate", need_gate && gate.has_value(), blocks, 1, &args.dgate);
  Tensor dnext = parts(x, "dnext_weight", need_next && next_weight.has_value(), blocks, args.cols,
                       &args.dnext_weight);
  FASTVLM_CUDA_KERNEL(residual_rms_norm_backward)(args, call.stream());
  return {dx, dresidual, dweight, dgate, dnext};
}

Tensor residual_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                           const Tensor& bias, const Optional& seed, double eps, double dropout_p) {
  const Call call(x);
  NormArgs args = norm_args(x, weight, eps, 0.0);
  args.residual = optional_rows(residual, "residual", args);
  args.bias = vector_of(bias, "bias", args.dtype, args.cols);
  args.dropout = dropout_of(seed, dropout_p);
  Tensor out = like_x(x, "out", true, &args.out);
  FASTVLM_CUDA_KERNEL(residual_layer_norm)(args, call.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& residual, const Tensor& weight,
    const Optional& seed, double eps, double dropout_p, int64_t rows_per_block, bool need_x,
    bool need_residual, bool need_weight, bool need_bias) {
  const Call call(x);
  NormArgs args = norm_args(x, weight, eps, 0.0);
  args.grad = optional_rows(grad, "grad", args);
  args.residual = optional_rows(residual, "residual", args);
  args.dropout = dropout_of(seed, dropout_p);
  const int64_t blocks = set_blocks(args, rows_per_block);
  Tensor dx = like_x(x, "dx", need_x, &args.dx);
  Tensor dresidual = like_x(x, "dresidual", need_residual, &args.dresidual);
  Tensor dweight = parts(x, "dweight", need_weight, blocks, args.cols, &args.dweight);
  Tensor dbias = parts(x, "dbias", need_bias, blocks, args.cols, &args.dbias);
  FASTVLM_CUDA_KERNEL(residual_layer_norm_backward)(args, call.stream());
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace cuda
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cuda, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, float offset, "
      "int rows_per_block, bool need_x, bool need_weight) -> (Tensor, Tensor)");
  m.def(
      "residual_rms_norm(Tensor x, Tensor residual, Tensor weight, Tensor? gate, "
      "Tensor? next_weight, float eps, float offset) -> (Tensor, Tensor)");
  m.def(
      "residual_rms_norm_backward(Tensor? grad_h, Tensor? grad_y, Tensor x, Tensor h, "
      "Tensor weight, Tensor? gate, Tensor? next_weight, float eps, float offset, "
      "int rows_per_block, bool need_x, bool need_residual, bool need_weight, bool need_gate, "
      "bool need_next) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed, "
      "float eps, float dropout_p) -> Tensor");
  m.def(
      "residual_layer_norm_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, "
      "Tensor? seed, float eps, float dropout_p, int rows_per_block, bool need_x, "
      "bool need_residual, bool need_weight, bool need_bias) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

FASTVLM_IMPL {
  m.impl("rms_norm", TORCH_BOX(&fastvlm::cuda::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&fastvlm::cuda::rms_norm_backward));
  m.impl("residual_rms_norm", TORCH_BOX(&fastvlm::cuda::residual_rms_norm));
  m.impl("residual_rms_norm_backward", TORCH_BOX(&fastvlm::cuda::residual_rms_norm_backward));
  m.impl("residual_layer_norm", TORCH_BOX(&fastvlm::cuda::residual_layer_norm));
  m.impl("residual_layer_norm_backward", TORCH_BOX(&fastvlm::cuda::residual_layer_norm_backward));
}

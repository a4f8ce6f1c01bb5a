// The products of few rows as torch ops.
#include "../cuda/mlp.h"

#include "arrivals.h"
#include "bind.h"

namespace fastvlm {
namespace cuda {
namespace {

Rows weight_rows(const Tensor& t, const char* name, const MlpArgs& args, int64_t rows) {
  return short_rows(t, name, args.weight_dtype, rows, args.depth);
}

const float* scale_of(const Optional& scale, const char* name, const MlpArgs& args) {
  if (!scale.has_value()) return nullptr;
  return static_cast<const float*>(vector_of(*scale, name, DType::kFloat, args.columns).data);
}

MlpArgs mlp_args(const Tensor& x, const Tensor& weight, const Optional& scale, const Optional& bias,
                 int64_t activation, int64_t splits) {
  MlpArgs args{};
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x, weight: expected 2 dimensions");
  args.dtype = dtype_of(x, "x");
  args.weight_dtype = dtype_of(weight, "weight");
  STD_TORCH_CHECK(args.dtype == DType::kBFloat16 || args.dtype == DType::kHalf,
                  "x: expected bfloat16 or float16");
  STD_TORCH_CHECK(args.weight_dtype == args.dtype || args.weight_dtype == DType::kInt8,
                  "weight: expected x's dtype or int8");
  args.rows = x.size(0);
  args.depth = x.size(1);
  args.columns = weight.size(0);
  STD_TORCH_CHECK(args.rows <= kMostRows, "x: up to ", kMostRows, " rows");
  args.x = short_rows(x, "x", args.dtype, args.rows, args.depth);
  args.weight = weight_rows(weight, "weight", args, args.columns);
  args.scale = scale_of(scale, "scale", args);
  if (bias.has_value()) args.bias = vector_of(*bias, "bias", args.dtype, args.columns);
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation: expected 0, 1 or 2");
  args.activation = static_cast<Activation>(activation);
  STD_TORCH_CHECK(splits >= 1 && splits <= kMostParts, "splits: expected 1 to ", kMostParts);
  args.splits = splits;
  return args;
}

Tensor run(const Tensor& x, MlpArgs& args, const Call& call) {
  Tensor out = result(x, "out", true, {args.rows, args.columns}, x.scalar_type(), &args.out);
  const bool split = args.splits > 1;
  const int64_t weights = args.up.data == nullptr ? 1 : 2;
  const Tensor parts = result(x, "parts", split, {args.splits, weights, args.rows, args.columns},
                              ScalarType::Float, &args.parts);
  Optional arrivals;
  if (split) {
    arrivals = set_arrivals(args.arrivals, call, x, (args.columns + kColumns - 1) / kColumns);
  }
  FASTVLM_CUDA_KERNEL(few_rows_linear)(args, call.stream());
  return out;
}

Tensor few_rows_linear(const Tensor& x, const Tensor& weight, const Optional& scale,
                       const Optional& bias, int64_t activation, int64_t splits) {
  const Call call(x);
  MlpArgs args = mlp_args(x, weight, scale, bias, activation, splits);
  return run(x, args, call);
}

Tensor few_rows_gated(const Tensor& x, const Tensor& gate, const Tensor& up,
                      const Optional& gate_scale, const Optional& up_scale, int64_t activation,
                      int64_t splits) {
  const Call call(x);
  MlpArgs args = mlp_args(x, gate, gate_scale, std::nullopt, activation, splits);
  args.up = weight_rows(up, "up", args, args.columns);
  args.up_scale = scale_of(up_scale, "up_scale", args);
  return run(x, args, call);
}

}  // namespace
}  // namespace cuda
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cuda, m) {
  // activation: 0 none, 1 GELU (erf), 2 GELU (tanh)
  m.def(
      "few_rows_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int activation, "
      "int splits) -> Tensor");
  m.def(
      "few_rows_gated(Tensor x, Tensor gate, Tensor up, Tensor? gate_scale, Tensor? up_scale, "
      "int activation, int splits) -> Tensor");
}

FASTVLM_IMPL {
  m.impl("few_rows_linear", TORCH_BOX(&fastvlm::cuda::few_rows_linear));
  m.impl("few_rows_gated", TORCH_BOX(&fastvlm::cuda::few_rows_gated));
}

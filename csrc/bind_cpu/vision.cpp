// The kernels of the vision tower as torch ops.
#include "../cpu/vision.h"

#include "bind.h"

namespace fastvlm {
namespace {

// A contiguous map or list of tokens.
void check_dense(const Tensor& t, const char* name, int64_t dims) {
  check(t, name, dims);
  STD_TORCH_CHECK(t.is_contiguous(), name, ": must be contiguous");
}

Tensor window_attention(const Tensor& qkv, const std::optional<Tensor>& pad, int64_t heads,
                        int64_t window, double scale, bool tiles) {
  check_dense(qkv, "qkv", 4);
  WindowAttentionArgs args{};
  args.dtype = dtype_of(qkv, "qkv");
  args.qkv = qkv.const_data_ptr();
  args.images = qkv.size(0);
  args.height = qkv.size(1);
  args.width = qkv.size(2);
  STD_TORCH_CHECK(heads > 0 && qkv.size(3) % (3 * heads) == 0, "heads: ", heads,
                  " do not divide a third of ", qkv.size(3));
  STD_TORCH_CHECK(window > 0 && window < 4096, "window: expected 1 to 4095, got ", window);
  args.heads = heads;
  args.dim = qkv.size(3) / (3 * heads);
  args.window = window;
  args.scale = static_cast<float>(scale);
  args.pad = bias_for(pad, "pad", qkv.size(3));
  STD_TORCH_CHECK(!tiles || (args.dtype == DType::kBFloat16 && scale > 1e-30),
                  "tiles: for bfloat16 and a scale above 1e-30");
  args.tiles = tiles;
  Tensor out =
      torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), args.heads * args.dim});
  args.out = out.mutable_data_ptr();
  if (out.numel() > 0) FASTVLM_KERNEL(window_attention)(args);
  return out;
}

Tensor channel_attention(const Tensor& qkv, int64_t groups) {
  check_dense(qkv, "qkv", 3);
  ChannelAttentionArgs args{};
  args.dtype = dtype_of(qkv, "qkv");
  args.qkv = qkv.const_data_ptr();
  args.images = qkv.size(0);
  args.tokens = qkv.size(1);
  STD_TORCH_CHECK(groups > 0 && qkv.size(2) % (3 * groups) == 0, "groups: ", groups,
                  " do not divide a third of ", qkv.size(2));
  args.groups = groups;
  args.dim = qkv.size(2) / (3 * groups);
  Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), groups * args.dim});
  args.out = out.mutable_data_ptr();
  if (out.numel() > 0) FASTVLM_KERNEL(channel_attention)(args);
  return out;
}

std::tuple<Tensor, Tensor> depthwise_conv_norm(const Tensor& x, const Tensor& weight,
                                               const std::optional<Tensor>& bias,
                                               const Tensor& norm_weight, const Tensor& norm_bias,
                                               double eps, ScalarType dtype) {
  check_dense(x, "x", 4);
  DepthwiseNormArgs args{};
  args.dtype = dtype_of(x, "x");
  args.x = x.const_data_ptr();
  args.images = x.size(0);
  args.height = x.size(1);
  args.width = x.size(2);
  args.channels = x.size(3);
  args.weight = weight_for(weight, "weight", 9, args.channels);
  args.bias = bias_for(bias, "bias", args.channels);
  args.norm_weight = vector_for(norm_weight, "norm_weight", args.channels);
  args.norm_bias = vector_for(norm_bias, "norm_bias", args.channels);
  args.eps = static_cast<float>(eps);
  const auto shape = {x.size(0), x.size(1), x.size(2), x.size(3)};
  Tensor h = torch::stable::new_empty(x, shape), y = torch::stable::new_empty(x, shape, dtype);
  args.y_dtype = dtype_of(y, "dtype");
  args.h = h.mutable_data_ptr();
  args.y = y.mutable_data_ptr();
  if (h.numel() > 0) FASTVLM_KERNEL(depthwise_conv_norm)(args);
  return {h, y};
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def(
      "window_attention(Tensor qkv, Tensor? pad, int heads, int window, float scale, bool tiles) "
      "-> Tensor");
  m.def("channel_attention(Tensor qkv, int groups) -> Tensor");
  m.def(
      "depthwise_conv_norm(Tensor x, Tensor weight, Tensor? bias, Tensor norm_weight, "
      "Tensor norm_bias, float eps, ScalarType dtype) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&fastvlm::window_attention));
  m.impl("channel_attention", TORCH_BOX(&fastvlm::channel_attention));
  m.impl("depthwise_conv_norm", TORCH_BOX(&fastvlm::depthwise_conv_norm));
}

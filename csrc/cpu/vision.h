// What the kernels of the vision tower take: maps of B x H x W tokens whose channels lie together.
#pragma once

#include "kernels.h"

namespace fastvlm {

// qkv [B, H, W, 3, heads, dim] in one dtype, contiguous. pad: what qkv is in a row of padding, a
// vector of 3 * heads * dim, or no data for zeros. out [B, H, W, heads, dim]. tiles: of bfloat16,
// in which the weights are rounded; for a scale above 1e-30.
struct WindowAttentionArgs {
  DType dtype;
  const void* qkv;
  Matrix pad;
  int64_t images, height, width, heads, dim, window;
  float scale;
  bool tiles;
  void* out;
};

// qkv [B, N, 3, groups, dim] in one dtype, contiguous. out [B, N, groups, dim].
struct ChannelAttentionArgs {
  DType dtype;
  const void* qkv;
  int64_t images, tokens, groups, dim;
  void* out;
};

// x [B, H, W, C] -> h of its dtype, and y of another. weight [C, 9], bias and those of the norm
// are vectors of C of any dtype; no data for an absent bias.
struct DepthwiseNormArgs {
  DType dtype, y_dtype;
  const void* x;
  Matrix weight, bias, norm_weight, norm_bias;
  int64_t images, height, width, channels;
  float eps;
  void *h, *y;
};

#define FASTVLM_DECLARE(CAPABILITY)                         \
  namespace CAPABILITY {                                    \
  void window_attention(const WindowAttentionArgs& args);   \
  void channel_attention(const ChannelAttentionArgs& args); \
  void depthwise_conv_norm(const DepthwiseNormArgs& args);  \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

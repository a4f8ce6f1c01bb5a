// What the rope kernel takes.
#pragma once

#include "kernels.h"

namespace fastvlm {

// q and k are [tokens, heads, dim], the last dimension contiguous; cos and sin [tokens, rotary].
struct RopeArgs {
  DType dtype;
  const void *q, *k;
  int64_t q_strides[2], k_strides[2];  // of tokens and heads
  int64_t tokens, heads, kv_heads, dim;
  Matrix cos, sin;
  bool back;  // the transpose: from gradients of the results to those of q and k
  void *out_q, *out_k;
};

#define FASTVLM_DECLARE(CAPABILITY) \
  namespace CAPABILITY {            \
  void rope(const RopeArgs& args);  \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

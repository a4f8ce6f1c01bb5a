// What the projection and MLP kernels take.
#pragma once

#include "kernels.h"

namespace fastvlm {

// activation(pre) [* up], contiguous arrays of `count` elements of one dtype; dropout counts them.
// up is null for the MLP without a gate. Backward: grad is the gradient of hidden, and those of pre
// and up, and hidden itself once more, are written where they are not null.
struct ActivationArgs {
  DType dtype;
  int64_t count;
  const void *pre, *up, *grad;
  Activation activation;
  Dropout dropout;
  void *hidden, *dpre, *dup;
};

// out = x weight^T + bias.
struct Product {
  Matrix weight, bias;
  void* out;
};

#define FASTVLM_DECLARE(CAPABILITY)                                                         \
  namespace CAPABILITY {                                                                    \
  void linear(const Matrix& x, const Product* products, int64_t count, DType dtype);        \
  void gelu_mlp(const Matrix& x, const Matrix& w1, const Matrix& b1, const Matrix& w2,      \
                const Matrix& b2, Activation activation, void* out);                        \
  void geglu_mlp(const Matrix& x, const Matrix& gate, const Matrix& up, const Matrix& down, \
                 Activation activation, void* out);                                         \
  void activate(const ActivationArgs& args);                                                \
  void activate_backward(const ActivationArgs& args);                                       \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

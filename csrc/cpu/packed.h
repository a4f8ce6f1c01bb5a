// What the products of many rows take: weights are packed for them once a call.
#pragma once

#include "kernels.h"

namespace fastvlm {

// residual + factor * (product + bias), in the type of out; what is absent has no data. A factor is
// that of `rows_per_factor` neighbouring rows.
struct Tail {
  Matrix bias, residual;
  const float* factors;
  int64_t rows_per_factor;
  DType dtype;  // of out, which is contiguous
  void* out;
};

struct PackedLinearArgs {
  Matrix x, weight;
  Tail tail;
};

// The tail is that of the second product.
struct PackedMlpArgs {
  Matrix x, w1, b1, w2;
  Activation activation;
  Tail tail;
};

#define FASTVLM_DECLARE(CAPABILITY)                 \
  namespace CAPABILITY {                            \
  void packed_linear(const PackedLinearArgs& args); \
  void packed_mlp(const PackedMlpArgs& args);       \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

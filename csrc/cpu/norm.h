// What the norm kernels take.
#pragma once

#include "kernels.h"

namespace fastvlm {

// Rows of `cols` contiguous elements; data is null where an argument is absent.
struct NormRows {
  const void* data;
  int64_t stride;
};

// One struct for all of them; see fastvlm/reference/norm.py for what each computes. Vectors are
// Matrix of one row, of any dtype. Results are contiguous and null where nobody wants them; those
// of weights are float32.
// rms_norm of a residual is that of residual + tanh(gate) x, and y that sum.
struct NormArgs {
  DType dtype;  // of all rows
  int64_t rows, cols;
  NormRows x, residual, h, grad, grad_y;  // h: what forward gave; grad: of its first result
  Matrix weight, bias, next_weight, gate;
  float eps, offset;
  Dropout dropout;
  void *out, *y;
  void *dx, *dresidual;
  float *dweight, *dbias, *dnext_weight, *dgate;
};

#define FASTVLM_DECLARE(CAPABILITY)                        \
  namespace CAPABILITY {                                   \
  void rms_norm(const NormArgs& args);                     \
  void rms_norm_backward(const NormArgs& args);            \
  void residual_rms_norm(const NormArgs& args);            \
  void residual_rms_norm_backward(const NormArgs& args);   \
  void residual_layer_norm(const NormArgs& args);          \
  void residual_layer_norm_backward(const NormArgs& args); \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

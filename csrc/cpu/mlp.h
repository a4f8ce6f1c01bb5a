// What the projection and MLP kernels take.
#pragma once

#include "kernels.h"

namespace fastvlm {

#define FASTVLM_DECLARE(CAPABILITY)                                                         \
  namespace CAPABILITY {                                                                    \
  void linear(const Matrix& x, const Matrix& weight, const Matrix& bias, void* out);        \
  void gelu_mlp(const Matrix& x, const Matrix& w1, const Matrix& b1, const Matrix& w2,      \
                const Matrix& b2, bool tanh, void* out);                                    \
  void geglu_mlp(const Matrix& x, const Matrix& gate, const Matrix& up, const Matrix& down, \
                 bool tanh, void* out);                                                     \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

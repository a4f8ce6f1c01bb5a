// What is added to a product of many rows, and where its result goes.
#pragma once

#include "../cpu/packed.h"
#include "bind.h"

namespace fastvlm {

using Optional = std::optional<Tensor>;

// The result, of residual's dtype or else of x's, and what is added to the product.
inline Tensor make_out(const Tensor& x, int64_t cols, const Optional& bias,
                       const Optional& residual, const Optional& factors, Tail& tail) {
  const int64_t rows = x.size(0);
  tail.bias = bias_for(bias, "bias", cols);
  if (residual.has_value()) {
    tail.residual = matrix(*residual, "residual");
    STD_TORCH_CHECK(tail.residual.rows == rows && tail.residual.cols == cols,
                    "residual: expected [", rows, ", ", cols, "]");
  }
  if (factors.has_value()) {
    const int64_t count = factors->numel();
    STD_TORCH_CHECK(factors->is_cpu() && factors->is_contiguous() &&
                        factors->scalar_type() == ScalarType::Float && count > 0 &&
                        rows % count == 0,
                    "factors: expected float32 of a number of elements that divides ", rows);
    tail.factors = static_cast<const float*>(factors->const_data_ptr());
    tail.rows_per_factor = rows / count;
  }
  const Tensor& like = residual.has_value() ? *residual : x;
  Tensor out = torch::stable::new_empty(like, {rows, cols});
  tail.dtype = dtype_of(out, "x");
  tail.out = out.mutable_data_ptr();
  return out;
}

}  // namespace fastvlm

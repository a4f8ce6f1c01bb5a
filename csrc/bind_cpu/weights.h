// Weights of a step's products, which read them by rows or by columns, and parts of them.
#pragma once

#include <utility>

#include "../cpu/mlp.h"
#include "bind.h"

namespace fastvlm {

// A weight as a step keeps it: with `transposed` the tensor itself lies as [cols, rows].
inline Matrix kept_weight_for(const Tensor& t, const char* name, int64_t cols, bool transposed) {
  if (!transposed) return any_weight_for(t, name, cols);
  Matrix m = matrix(t, name);
  std::swap(m.rows, m.cols);
  std::swap(m.stride, m.step);
  return fitting(m, name, cols, -1);
}

// The product with `count` rows of a weight from row `first` on, with their bias.
inline Product part_of(const Matrix& weight, const Matrix& bias, int64_t first, int64_t count,
                       void* out) {
  auto from = [](const Matrix& m, int64_t elements) -> const void* {
    const int64_t size = m.dtype == DType::kFloat ? 4 : m.dtype == DType::kInt8 ? 1 : 2;
    return static_cast<const char*>(m.data) + elements * size;
  };
  Product part{weight, bias, out};
  part.weight.data = from(weight, first * weight.stride);
  part.weight.rows = count;
  if (weight.scale != nullptr) part.weight.scale = weight.scale + first;
  if (bias.data != nullptr) {
    part.bias.data = from(bias, first);
    part.bias.cols = part.bias.stride = count;
  }
  return part;
}

}  // namespace fastvlm

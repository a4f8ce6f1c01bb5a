// Weights of the products of a few rows, which read them by rows or by columns.
#pragma once

#include "../cpu/mlp.h"
#include "bind.h"

namespace fastvlm {

// As weight_for, of a view [rows, cols] of what lies as [cols, rows] too; with `transposed` of a
// tensor that lies so.
inline Matrix streamed_weight_for(const Tensor& t, const char* name, int64_t cols,
                                  int64_t rows = -1, bool transposed = false) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, name, ": expected a CPU tensor of 2 dimensions");
  if (transposed) {
    const Matrix m = matrix(t, name);
    return fitting({m.data, m.dtype, m.cols, m.rows, 1, nullptr, m.stride}, name, cols, rows);
  }
  if (t.numel() == 0 || t.size(1) <= 1 || t.stride(1) == 1 || t.stride(0) != 1) {
    return weight_for(t, name, cols, rows);
  }
  return fitting(
      {t.const_data_ptr(), dtype_of(t, name), t.size(0), t.size(1), 1, nullptr, t.stride(1)},
      name, cols, rows);
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

// What the bindings share: reading tensors, checking what could touch foreign memory, and the copy
// of a kernel that fits the machine. Torch's stable ABI: one library serves many versions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "../cpu/kernels.h"

namespace fastvlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Capability { kDefault, kAVX2, kAVX512, kAVX512BF16, kAMX };
Capability capability();

// The copy of a kernel that fits the machine.
#if defined(FASTVLM_X86)
#define FASTVLM_KERNEL(name)                                                 \
  (::fastvlm::capability() >= ::fastvlm::Capability::kAVX512 ? &AVX512::name \
   : ::fastvlm::capability() == ::fastvlm::Capability::kAVX2 ? &AVX2::name   \
                                                             : &DEFAULT::name)
#else
#define FASTVLM_KERNEL(name) (&DEFAULT::name)
#endif

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline Activation activation_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(Activation::kSilu),
                  "activation: there is none of number ", number);
  return static_cast<Activation>(number);
}

inline void check(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.dim() == dims, name, ": expected ", dims, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.numel() == 0 || t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1, name,
                  ": the last dimension must be contiguous");
}

inline Matrix matrix(const Tensor& t, const char* name) {
  check(t, name, 2);
  return {t.const_data_ptr(), dtype_of(t, name), t.size(0), t.size(1), t.stride(0)};
}

// The same, or the transpose of one, for products that take either.
inline Matrix any_matrix(const Tensor& t, const char* name) {
  if (t.dim() != 2 || t.stride(1) == 1 || t.stride(0) != 1) return matrix(t, name);
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  Matrix m{t.const_data_ptr(), dtype_of(t, name), t.size(0), t.size(1), 1};
  m.step = t.stride(1);
  return m;
}

inline const int32_t* indices(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == dims && t.scalar_type() == ScalarType::Int, name,
                  ": expected an int32 CPU tensor of ", dims, " dimensions");
  STD_TORCH_CHECK(dims > 1 || t.is_contiguous(), name, ": must be contiguous");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// A vector, as a matrix of one row.
inline Matrix vector_for(const Tensor& t, const char* name, int64_t size) {
  check(t, name, 1);
  STD_TORCH_CHECK(t.size(0) == size, name, ": expected ", size, " elements, got ", t.size(0));
  return {t.const_data_ptr(), dtype_of(t, name), 1, size, size};
}

inline Matrix fitting(const Matrix& m, const char* name, int64_t cols, int64_t rows) {
  STD_TORCH_CHECK(m.cols == cols && (rows < 0 || m.rows == rows), name, ": shape [", m.rows, ", ",
                  m.cols, "] does not fit");
  return m;
}

// A weight of products with rows of `cols` elements.
inline Matrix weight_for(const Tensor& t, const char* name, int64_t cols, int64_t rows = -1) {
  return fitting(matrix(t, name), name, cols, rows);
}

// The same, or the transpose of one.
inline Matrix any_weight_for(const Tensor& t, const char* name, int64_t cols, int64_t rows = -1) {
  return fitting(any_matrix(t, name), name, cols, rows);
}

// The same of int8, with a factor for each row.
inline Matrix scaled_weight_for(const Tensor& weight, const Tensor& scale, int64_t cols) {
  check(weight, "weight", 2);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, "weight: expected int8 with a scale");
  STD_TORCH_CHECK(weight.size(1) == cols, "weight: shape [", weight.size(0), ", ", weight.size(1),
                  "] does not fit");
  check(scale, "scale", 1);
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.size(0) == weight.size(0),
                  "scale: expected ", weight.size(0), " elements of float32");
  return {weight.const_data_ptr(), DType::kInt8,
          weight.size(0),          weight.size(1),
          weight.stride(0),        static_cast<const float*>(scale.const_data_ptr())};
}

inline Matrix bias_for(const std::optional<Tensor>& t, const char* name, int64_t size) {
  return t.has_value() ? vector_for(*t, name, size) : Matrix{};
}

// The gate of a norm, one number; of no gate no matrix.
inline Matrix gate_for(const std::optional<Tensor>& gate) {
  if (!gate.has_value()) return {};
  STD_TORCH_CHECK(gate->is_cpu() && gate->numel() == 1, "gate: expected one number on the CPU");
  return {gate->const_data_ptr(), dtype_of(*gate, "gate"), 1, 1, 1};
}

// The counter's 53 bits are a fraction of 2^53: it is below p where they are below ceil(p 2^53).
inline Dropout dropout_of(const std::optional<Tensor>& seed, double p) {
  if (!seed.has_value() || p <= 0.0) return {};
  STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed: expected one int64 on the CPU");
  STD_TORCH_CHECK(p < 1.0, "dropout_p: expected a number in [0, 1), got ", p);
  const uint64_t value =
      static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  return {value, static_cast<uint64_t>(std::ceil(std::ldexp(p, 53))),
          static_cast<float>(1.0 / (1.0 - p))};
}

}  // namespace fastvlm

// What the launch functions of the CUDA kernels take; nothing of torch and nothing of CUDA.
#pragma once

#include <cstdint>

namespace fastvlm {
namespace cuda {

enum class DType { kFloat, kBFloat16, kHalf, kInt8 };  // kInt8: weights only

// Rows of contiguous elements, `stride` elements apart. data is null where an argument is absent.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
};

// Of any floating dtype; data is null where it is absent.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
};

// An element is kept where the 53 random bits of its counter are at least `threshold`, and then
// multiplied by scale. seed: where it lies on the device; null for no dropout.
struct Dropout {
  const int64_t* seed = nullptr;
  uint64_t threshold = 0;
  float scale = 1.f;
};

}  // namespace cuda
}  // namespace fastvlm

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

// Counters of the blocks that are done with a part of a piece of work, a piece each, all 0 before
// and after a launch: those of a slot of the library's own, or, where it is not null, `own`.
struct Arrivals {
  int64_t slot = 0;
  uint32_t* own = nullptr;
};
// Counters of a slot: work is split where it has less than two pieces for a multiprocessor.
constexpr int64_t kArrivalSlots = 512, kArrivals = 512;

// An element is kept where the 53 random bits of its counter are at least `threshold`, and then
// multiplied by scale. seed: where it lies on the device; null for no dropout.
struct Dropout {
  const int64_t* seed = nullptr;
  uint64_t threshold = 0;
  float scale = 1.f;
};

}  // namespace cuda
}  // namespace fastvlm

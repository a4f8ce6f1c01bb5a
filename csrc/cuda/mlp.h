// What the products of few rows with a streamed weight take.
#pragma once

#include "kernels.h"

namespace fastvlm {
namespace cuda {

enum class Activation { kNone, kGeluErf, kGeluTanh };

// out [rows, columns] = act(x weight^T * scale + bias), or with `up`
// act(x weight^T) * (x up^T). x and out are of one short dtype, weights of it or int8. Rows of x
// and of weights start at multiples of 16 bytes, and 16 bytes divide them.
struct MlpArgs {
  DType dtype, weight_dtype;
  int64_t rows, columns, depth;
  Rows x, weight, up;
  const float* scale;  // of each row of an int8 weight, or null
  Vector bias;         // float32 or the dtype of x
  Activation activation;
  void* out;
};

// Rows of one tensor core instruction: more of them would read the weight twice.
constexpr int64_t kMostRows = 16;

}  // namespace cuda
}  // namespace fastvlm

extern "C" void fastvlm_cuda_few_rows_linear(const fastvlm::cuda::MlpArgs& args, void* stream);

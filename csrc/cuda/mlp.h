// What the products of few rows with a streamed weight take.
#pragma once

#include "kernels.h"

namespace fastvlm {
namespace cuda {

enum class Activation { kNone, kGeluErf, kGeluTanh };

// out [rows, columns] = act(x weight^T * scale + bias), or with `up`
// act(x weight^T * scale) * (x up^T * up_scale). x and out are of one short dtype, weights of it or
// int8. Rows of x and of weights start at multiples of 16 bytes, and 16 bytes divide them.
struct MlpArgs {
  DType dtype, weight_dtype;
  int64_t rows, columns, depth;
  Rows x, weight, up;
  const float *scale, *up_scale;  // of each row of an int8 weight, or null
  Vector bias;                    // float32 or the dtype of x
  Activation activation;
  void* out;
  int64_t splits;  // parts of the depth, each of another block
  // where there are several, sums of each: [splits, weights, rows, columns]
  float* parts;
  Arrivals arrivals;  // of the splits of 8 columns each
};

// Rows of one tensor core instruction: more of them would read the weight twice.
constexpr int64_t kMostRows = 16;
// Columns of a block, and parts of the depth at most.
constexpr int64_t kColumns = 8, kMostParts = 16;

}  // namespace cuda
}  // namespace fastvlm

extern "C" void fastvlm_cuda_few_rows_linear(const fastvlm::cuda::MlpArgs& args, void* stream);

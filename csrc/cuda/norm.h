// What the norm kernels take.
#pragma once

#include "kernels.h"

namespace fastvlm {
namespace cuda {

// One struct for all of them; see fastvlm/reference/norm.py for what each computes. Results are
// contiguous and null where nobody wants them. Vectors are float32 or of the dtype of the rows.
struct NormArgs {
  DType dtype;  // of all rows
  int64_t rows, cols;
  Rows x, residual, h, grad, grad_y;  // h: what forward gave; grad: of its first result
  Vector weight, bias, next_weight, gate;
  float eps, offset;
  Dropout dropout;
  void *out, *y;
  void *dx, *dresidual;
  // sums over the rows of one block, a row of these for each block: the blocks are not added up
  float *dweight, *dbias, *dnext_weight, *dgate;
  int64_t rows_per_block;  // of a backward kernel
  bool aligned;            // all rows and vectors start at multiples of 16 bytes; set by launching
};

// Rows that fit into the registers of a block.
constexpr int64_t kWidestRow = 6144;

}  // namespace cuda
}  // namespace fastvlm

extern "C" {
void fastvlm_cuda_rms_norm(const fastvlm::cuda::NormArgs& args, void* stream);
void fastvlm_cuda_rms_norm_backward(const fastvlm::cuda::NormArgs& args, void* stream);
void fastvlm_cuda_residual_rms_norm(const fastvlm::cuda::NormArgs& args, void* stream);
void fastvlm_cuda_residual_rms_norm_backward(const fastvlm::cuda::NormArgs& args, void* stream);
void fastvlm_cuda_residual_layer_norm(const fastvlm::cuda::NormArgs& args, void* stream);
void fastvlm_cuda_residual_layer_norm_backward(const fastvlm::cuda::NormArgs& args, void* stream);
}

// A decoding step's products: 1 to 16 rows with a weight that is read once; of a GeGLU gate and up
// together, with the activation where their sums are.
//
// A block has 8 columns, few enough that the blocks fill the chip. Its warps share the depth.
#pragma once

#include <cmath>

#include "mlp.h"
#include "stream.cuh"

namespace fastvlm {
namespace cuda {

struct MlpBlock {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kColumns = 8;
  static constexpr int kOutputs = static_cast<int>(kMostRows) * kColumns;
  static constexpr int bytes(int weights) { return weights * kWarps * kOutputs * 4; }
};

GPU_FN float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::kGeluErf: return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    default: return x;
  }
}

// kWeights 2: gate and up.
template <class T, class W, int kWeights>
GPU_KERNEL(MlpBlock::kThreads)
few_rows_linear_kernel(const MlpArgs args) {
  GPU_SHARED(shared);
  float* const parts = reinterpret_cast<float*>(shared);
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
  const int64_t first = int64_t{gpu::block_x()} * MlpBlock::kColumns;
  Rows weights[kWeights];
  weights[0] = args.weight;
  if constexpr (kWeights == 2) weights[1] = args.up;
  float sums[kWeights][1][4] = {};
  stream<T, W, 1, kWeights>(args.x, args.rows, weights, args.columns, args.depth, first, warp,
                            MlpBlock::kWarps, sums);
#pragma unroll
  for (int m = 0; m < kWeights; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      parts[(m * MlpBlock::kWarps + warp) * MlpBlock::kOutputs + row * MlpBlock::kColumns +
            column] = sums[m][0][i];
    }
  }
  gpu::barrier();
  const int64_t row = gpu::thread_index() / MlpBlock::kColumns;
  const int64_t column = first + gpu::thread_index() % MlpBlock::kColumns;
  if (row >= args.rows || column >= args.columns) return;
  float value[kWeights] = {};
#pragma unroll
  for (int m = 0; m < kWeights; ++m) {
#pragma unroll
    for (int w = 0; w < MlpBlock::kWarps; ++w) {
      value[m] += parts[(m * MlpBlock::kWarps + w) * MlpBlock::kOutputs + gpu::thread_index()];
    }
  }
  if (args.scale != nullptr) value[0] *= args.scale[column];
  if (args.bias.data != nullptr) {
    value[0] += args.bias.dtype == DType::kFloat
                    ? static_cast<const float*>(args.bias.data)[column]
                    : gpu::to_float(static_cast<const T*>(args.bias.data)[column]);
  }
  float out = activated(args.activation, value[0]);
  if constexpr (kWeights == 2) out *= value[1];
  static_cast<T*>(args.out)[row * args.columns + column] = gpu::from_float<T>(out);
}

}  // namespace cuda
}  // namespace fastvlm

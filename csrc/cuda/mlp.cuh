// A decoding step's products: 1 to 16 rows with a weight that is read once; of a GeGLU gate and up
// together, with the activation where their sums are.
//
// A block has 8 columns. Its warps share the depth, and where there are too few columns to fill the
// chip, so do several blocks: the one that ends last puts their sums together.
#pragma once

#include <cmath>

#include "arrivals.cuh"
#include "mlp.h"
#include "stream.cuh"

namespace fastvlm {
namespace cuda {

struct MlpBlock {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kOutputs = static_cast<int>(kMostRows * kColumns);
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

// What a product becomes where its sums are complete. kWeights 2: gate and up.
template <class T, int kWeights>
GPU_FN void finish(const MlpArgs& args, int64_t row, int64_t column, float (&value)[kWeights]) {
  if (args.scale != nullptr) value[0] *= args.scale[column];
  if (args.bias.data != nullptr) {
    value[0] += args.bias.dtype == DType::kFloat
                    ? static_cast<const float*>(args.bias.data)[column]
                    : gpu::to_float(static_cast<const T*>(args.bias.data)[column]);
  }
  float out = activated(args.activation, value[0]);
  if constexpr (kWeights == 2) {
    if (args.up_scale != nullptr) value[1] *= args.up_scale[column];
    out *= value[1];
  }
  static_cast<T*>(args.out)[row * args.columns + column] = gpu::from_float<T>(out);
}

template <class T, class W, int kWeights>
GPU_KERNEL(MlpBlock::kThreads)
few_rows_linear_kernel(const MlpArgs args) {
  GPU_SHARED(shared);
  float* const sums_of_warps = reinterpret_cast<float*>(shared);
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
  const int64_t first = gpu::block_x() * kColumns;
  const int split = gpu::block_y(), splits = static_cast<int>(args.splits);
  Rows weights[kWeights];
  weights[0] = args.weight;
  if constexpr (kWeights == 2) weights[1] = args.up;
  float sums[kWeights][1][4] = {};
  stream<T, W, 1, kWeights>(args.x, args.rows, weights, args.columns, args.depth, first,
                            split * MlpBlock::kWarps + warp, splits * MlpBlock::kWarps, sums);
#pragma unroll
  for (int m = 0; m < kWeights; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      sums_of_warps[(m * MlpBlock::kWarps + warp) * MlpBlock::kOutputs + row * kColumns + column] =
          sums[m][0][i];
    }
  }
  gpu::barrier();
  const int64_t row = gpu::thread_index() / kColumns;
  const int64_t column = first + gpu::thread_index() % kColumns;
  const bool mine = row < args.rows && column < args.columns;
  const int64_t all = args.rows * args.columns, to = row * args.columns + column;
  float value[kWeights] = {};
  if (mine) {
#pragma unroll
    for (int m = 0; m < kWeights; ++m) {
#pragma unroll
      for (int w = 0; w < MlpBlock::kWarps; ++w) {
        value[m] +=
            sums_of_warps[(m * MlpBlock::kWarps + w) * MlpBlock::kOutputs + gpu::thread_index()];
      }
      if (splits > 1) args.parts[(split * kWeights + m) * all + to] = value[m];
    }
    if (splits == 1) finish<T, kWeights>(args, row, column, value);
  }
  if (splits == 1) return;
  bool* const last = reinterpret_cast<bool*>(shared);
  if (!is_last(args.arrivals, gpu::block_x(), splits, last) || !mine) return;
  // in the order of the splits, whoever comes last
#pragma unroll
  for (int m = 0; m < kWeights; ++m) {
    value[m] = 0.f;
    for (int s = 0; s < splits; ++s) value[m] += args.parts[(s * kWeights + m) * all + to];
  }
  finish<T, kWeights>(args, row, column, value);
}

}  // namespace cuda
}  // namespace fastvlm

// rms_norm, residual_rms_norm and residual_layer_norm, forward: a block takes a row, reads it once
// and keeps it in registers.
#pragma once

#include "norm_rows.cuh"

namespace fastvlm {
namespace cuda {

template <class T, int E>
GPU_KERNEL(threads_for(E))
rms_norm_kernel(const NormArgs args) {
  GPU_SHARED(shared);
  const RowOf<T, E> row{args.cols, args.aligned};
  BlockSums sums{reinterpret_cast<float*>(shared)};
  const int64_t r = gpu::block_x();
  float x[E], weight[E], square[1] = {0.f};
  row.load(args.x, r, x);
  row.load(args.weight, weight);
#pragma unroll
  for (int i = 0; i < E; ++i) square[0] += x[i] * x[i];
  sums(square);
  const float rstd = gpu::reciprocal_root(square[0] / args.cols + args.eps);
#pragma unroll
  for (int i = 0; i < E; ++i) x[i] = x[i] * rstd * (args.offset + weight[i]);
  row.store_row(args.out, r, x);
}

template <class T, int E>
GPU_KERNEL(threads_for(E))
residual_rms_norm_kernel(const NormArgs args) {
  GPU_SHARED(shared);
  const RowOf<T, E> row{args.cols, args.aligned};
  BlockSums sums{reinterpret_cast<float*>(shared)};
  const int64_t r = gpu::block_x();
  float x[E], h[E], weight[E], square[1] = {0.f};
  row.load(args.x, r, x);
  row.load(args.residual, r, h);
  row.load(args.weight, weight);
#pragma unroll
  for (int i = 0; i < E; ++i) square[0] += x[i] * x[i];
  sums(square);
  const float rstd = gpu::reciprocal_root(square[0] / args.cols + args.eps);
  const float gate = gate_of<T>(args.gate).factor;
#pragma unroll
  for (int i = 0; i < E; ++i) h[i] += gate * (x[i] * rstd * (args.offset + weight[i]));
  row.store_row(args.out, r, h);
  if (args.next_weight.data == nullptr) return;
  // the next norm reads what was stored
  row.round(h);
  row.load(args.next_weight, weight);
  square[0] = 0.f;
#pragma unroll
  for (int i = 0; i < E; ++i) square[0] += h[i] * h[i];
  sums(square);
  const float next_rstd = gpu::reciprocal_root(square[0] / args.cols + args.eps);
#pragma unroll
  for (int i = 0; i < E; ++i) h[i] = h[i] * next_rstd * (args.offset + weight[i]);
  row.store_row(args.y, r, h);
}

// z = residual + dropout(x) minus its mean, zeros beyond the row; x is overwritten by z.
template <class T, int E>
GPU_FN void centre(const RowOf<T, E>& row, BlockSums& sums, const NormArgs& args, int64_t r,
                   float (&z)[E]) {
  float residual[E], sum[1] = {0.f};
  row.load(args.x, r, z);
  row.drop(args.dropout, r, z);
  row.load(args.residual, r, residual);
#pragma unroll
  for (int i = 0; i < E; ++i) {
    z[i] += residual[i];
    sum[0] += z[i];
  }
  sums(sum);
  const float mean = sum[0] / args.cols;
#pragma unroll
  for (int i = 0; i < E; ++i) z[i] = row.inside(i) ? z[i] - mean : 0.f;
}

template <class T, int E>
GPU_KERNEL(threads_for(E))
residual_layer_norm_kernel(const NormArgs args) {
  GPU_SHARED(shared);
  const RowOf<T, E> row{args.cols, args.aligned};
  BlockSums sums{reinterpret_cast<float*>(shared)};
  const int64_t r = gpu::block_x();
  float z[E], weight[E], bias[E], square[1] = {0.f};
  centre(row, sums, args, r, z);
  row.load(args.weight, weight);
  row.load(args.bias, bias);
#pragma unroll
  for (int i = 0; i < E; ++i) square[0] += z[i] * z[i];
  sums(square);
  const float rstd = gpu::reciprocal_root(square[0] / args.cols + args.eps);
#pragma unroll
  for (int i = 0; i < E; ++i) z[i] = z[i] * rstd * weight[i] + bias[i];
  row.store_row(args.out, r, z);
}

}  // namespace cuda
}  // namespace fastvlm

// The norms backward: a block takes some rows one after another and keeps what it adds up for the
// weights in registers; the sums of the blocks are added by whoever launched them, in order.
#pragma once

#include "norm.cuh"

namespace fastvlm {
namespace cuda {

struct RowRange {
  int64_t first, last;
};

GPU_FN RowRange rows_of_block(const NormArgs& args) {
  const int64_t first = gpu::block_x() * args.rows_per_block;
  const int64_t last = first + args.rows_per_block;
  return {first, last < args.rows ? last : args.rows};
}

// dx of y = x rstd w for scaled = dy w, dot = sum(scaled x).
GPU_FN float through_rms(float scaled, float x, float rstd, float dot, int64_t cols) {
  return rstd * (scaled - x * rstd * rstd * (dot / cols));
}

template <class T, int E>
GPU_KERNEL(threads_for(E))
rms_norm_backward_kernel(const NormArgs args) {
  GPU_SHARED(shared);
  const RowOf<T, E> row{args.cols, args.aligned};
  BlockSums sums{reinterpret_cast<float*>(shared)};
  float weight[E], dweight[E] = {};
  row.load(args.weight, weight);
  const RowRange rows = rows_of_block(args);
  for (int64_t r = rows.first; r < rows.last; ++r) {
    float x[E], grad[E], sum[2] = {0.f, 0.f};
    row.load(args.x, r, x);
    row.load(args.grad, r, grad);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      sum[0] += x[i] * x[i];
      sum[1] += grad[i] * (args.offset + weight[i]) * x[i];
    }
    sums(sum);
    const float rstd = gpu::reciprocal_root(sum[0] / args.cols + args.eps);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      dweight[i] += grad[i] * x[i] * rstd;
      x[i] = through_rms(grad[i] * (args.offset + weight[i]), x[i], rstd, sum[1], args.cols);
    }
    if (args.dx != nullptr) row.store_row(args.dx, r, x);
  }
  if (args.dweight != nullptr) row.store(args.dweight + gpu::block_x() * args.cols, dweight);
}

template <class T, int E>
GPU_KERNEL(threads_for(E))
residual_rms_norm_backward_kernel(const NormArgs args) {
  GPU_SHARED(shared);
  const RowOf<T, E> row{args.cols, args.aligned};
  BlockSums sums{reinterpret_cast<float*>(shared)};
  const bool next = args.grad_y.data != nullptr;
  const Gate tanh_gate = gate_of<T>(args.gate);
  const float gate = tanh_gate.factor;
  float dweight[E] = {}, dnext[E] = {}, dgate = 0.f;
  const RowRange rows = rows_of_block(args);
  for (int64_t r = rows.first; r < rows.last; ++r) {
    float dh[E] = {}, x[E], weight[E];
    if (args.grad.data != nullptr) row.load(args.grad, r, dh);
    if (next) {
      float grad[E], sum[2] = {0.f, 0.f};
      row.load(args.h, r, x);
      row.load(args.grad_y, r, grad);
      row.load(args.next_weight, weight);
#pragma unroll
      for (int i = 0; i < E; ++i) {
        sum[0] += x[i] * x[i];
        sum[1] += grad[i] * (args.offset + weight[i]) * x[i];
      }
      sums(sum);
      const float rstd = gpu::reciprocal_root(sum[0] / args.cols + args.eps);
#pragma unroll
      for (int i = 0; i < E; ++i) {
        dnext[i] += grad[i] * x[i] * rstd;
        dh[i] += through_rms(grad[i] * (args.offset + weight[i]), x[i], rstd, sum[1], args.cols);
      }
    }
    if (args.dresidual != nullptr) row.store_row(args.dresidual, r, dh);
    float sum[2] = {0.f, 0.f};
    row.load(args.x, r, x);
    row.load(args.weight, weight);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      sum[0] += x[i] * x[i];
      sum[1] += dh[i] * (args.offset + weight[i]) * x[i];
    }
    sums(sum);
    const float rstd = gpu::reciprocal_root(sum[0] / args.cols + args.eps);
    dgate += rstd * sum[1];
#pragma unroll
    for (int i = 0; i < E; ++i) {
      dweight[i] += gate * dh[i] * x[i] * rstd;
      x[i] = gate * through_rms(dh[i] * (args.offset + weight[i]), x[i], rstd, sum[1], args.cols);
    }
    if (args.dx != nullptr) row.store_row(args.dx, r, x);
  }
  const int64_t part = gpu::block_x() * args.cols;
  if (args.dweight != nullptr) row.store(args.dweight + part, dweight);
  if (args.dnext_weight != nullptr) row.store(args.dnext_weight + part, dnext);
  if (args.dgate != nullptr && gpu::thread_index() == 0) {
    args.dgate[gpu::block_x()] = dgate * tanh_gate.slope;
  }
}

template <class T, int E>
GPU_KERNEL(threads_for(E))
residual_layer_norm_backward_kernel(const NormArgs args) {
  GPU_SHARED(shared);
  const RowOf<T, E> row{args.cols, args.aligned};
  BlockSums sums{reinterpret_cast<float*>(shared)};
  float weight[E], dweight[E] = {}, dbias[E] = {};
  row.load(args.weight, weight);
  const RowRange rows = rows_of_block(args);
  for (int64_t r = rows.first; r < rows.last; ++r) {
    float z[E], grad[E], sum[3] = {0.f, 0.f, 0.f};
    centre(row, sums, args, r, z);
    row.load(args.grad, r, grad);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      sum[0] += z[i] * z[i];
      sum[1] += grad[i] * weight[i] * z[i];
      sum[2] += grad[i] * weight[i];
    }
    sums(sum);
    const float rstd = gpu::reciprocal_root(sum[0] / args.cols + args.eps);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      dweight[i] += grad[i] * z[i] * rstd;
      dbias[i] += grad[i];
      z[i] = through_rms(grad[i] * weight[i], z[i], rstd, sum[1], args.cols) -
             rstd * (sum[2] / args.cols);
    }
    if (args.dresidual != nullptr) row.store_row(args.dresidual, r, z);
    row.drop(args.dropout, r, z);
    if (args.dx != nullptr) row.store_row(args.dx, r, z);
  }
  const int64_t part = gpu::block_x() * args.cols;
  if (args.dweight != nullptr) row.store(args.dweight + part, dweight);
  if (args.dbias != nullptr) row.store(args.dbias + part, dbias);
}

}  // namespace cuda
}  // namespace fastvlm

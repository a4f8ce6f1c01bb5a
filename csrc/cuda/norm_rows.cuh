// A row in the registers of a block: how it comes there, how it is summed, how it leaves.
//
// Thread t holds columns (c * threads + t) * V and the V - 1 after it for each of its chunks c,
// so that neighbours read neighbouring chunks of 16 bytes. Columns beyond the row are zeros.
#pragma once

#include <cmath>

#include "gpu.h"
#include "norm.h"

namespace fastvlm {
namespace cuda {

// Elements of a thread: 8 of them as long as 256 threads hold the row.
constexpr int threads_for(int elements) { return elements == 8 ? 256 : 384; }

template <class T, int E>
struct RowOf {
  static constexpr int V = sizeof(gpu::Chunk) / sizeof(T), C = E / V;
  int64_t cols;
  bool aligned;

  GPU_FN int64_t column(int chunk) const {
    return (int64_t{chunk} * gpu::block_size() + gpu::thread_index()) * V;
  }

  GPU_FN bool whole(int64_t column) const { return aligned && column + V <= cols; }

  GPU_FN void load(const void* data, float (&v)[E]) const {
    const T* row = static_cast<const T*>(data);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t first = column(c);
      T part[V];
      if (whole(first)) {
        const gpu::Chunk chunk = gpu::load16(row + first);
        memcpy(part, &chunk, sizeof part);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          part[i] = first + i < cols ? row[first + i] : gpu::from_float<T>(0.f);
        }
      }
#pragma unroll
      for (int i = 0; i < V; ++i) v[c * V + i] = gpu::to_float(part[i]);
    }
  }

  GPU_FN void load(const Rows& rows, int64_t row, float (&v)[E]) const {
    load(static_cast<const T*>(rows.data) + row * rows.stride, v);
  }

  // A vector of float32, or of T.
  GPU_FN void load(const Vector& vector, float (&v)[E]) const {
    if (sizeof(T) == sizeof(float) || vector.dtype != DType::kFloat) return load(vector.data, v);
    const float* data = static_cast<const float*>(vector.data);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t first = column(c);
#pragma unroll
      for (int i = 0; i < V; i += 4) {
        float part[4];
        if (whole(first)) {
          const gpu::Chunk chunk = gpu::load16(data + first + i);
          memcpy(part, &chunk, sizeof part);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) part[j] = first + i + j < cols ? data[first + i + j] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) v[c * V + i + j] = part[j];
      }
    }
  }

  template <class To>
  GPU_FN void store(To* row, const float (&v)[E]) const {
    constexpr int kTogether = sizeof(gpu::Chunk) / sizeof(To);
    static_assert(V % kTogether == 0, "wider results than rows, never narrower");
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < V; i += kTogether) {
        const int64_t first = column(c) + i;
        To part[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) part[j] = gpu::from_float<To>(v[c * V + i + j]);
        if (whole(column(c))) {
          gpu::Chunk chunk;
          memcpy(&chunk, part, sizeof chunk);
          gpu::store16(row + first, chunk);
        } else {
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            if (first + j < cols) row[first + j] = part[j];
          }
        }
      }
    }
  }

  // Row `row` of a contiguous result.
  GPU_FN void store_row(void* to, int64_t row, const float (&v)[E]) const {
    store(static_cast<T*>(to) + row * cols, v);
  }

  // As stored: rounded to T.
  GPU_FN void round(float (&v)[E]) const {
#pragma unroll
    for (int i = 0; i < E; ++i) v[i] = gpu::to_float(gpu::from_float<T>(v[i]));
  }

  // 0 where an element is dropped, and the factor of those that are kept. The bits of element i
  // are splitmix64(seed + i) (Steele, Lea, Flood, OOPSLA 2014), as everywhere in fastvlm.
  GPU_FN void drop(const Dropout& dropout, int64_t row, float (&v)[E]) const {
    if (dropout.seed == nullptr) return;
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const uint64_t counter = static_cast<uint64_t>(row * cols + column(i / V) + i % V);
      uint64_t z = (counter + 1) * 0x9E3779B97F4A7C15u + seed;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
      z = (z ^ (z >> 31)) >> 11;
      v[i] = z >= dropout.threshold ? v[i] * dropout.scale : 0.f;
    }
  }

  // Zeros beyond the row, where a mean was taken off them.
  GPU_FN bool inside(int i) const { return column(i / V) + i % V < cols; }
};

// Sums over a block, all threads get them. Two places in turn: who is still reading one is not
// overtaken by a sum later than the next, since that waits for everybody.
struct BlockSums {
  static constexpr int kMost = 3, kWarps = 16;
  static constexpr int kBytes = 2 * kMost * kWarps * sizeof(float);
  float* shared;
  int turn = 0;

  template <int N>
  GPU_FN void operator()(float (&x)[N]) {
    static_assert(N <= kMost, "room for three");
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = gpu::sum_of_warp(x[i]);
    const int warps = gpu::block_size() / gpu::kWarp;
    if (warps == 1) return;
    const int warp = gpu::thread_index() / gpu::kWarp, lane = gpu::thread_index() % gpu::kWarp;
    float* const place = shared + turn * kMost * kWarps;
    turn ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) place[i * kWarps + warp] = x[i];
    }
    gpu::barrier();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = gpu::sum_of_warp(lane < warps ? place[i * kWarps + lane] : 0.f);
    }
  }
};

struct Gate {
  float factor, slope;  // tanh(gate) and its derivative; 1 - tanh^2 would lose the digits of it
};

// A vector of one number; factor 1 where there is none.
template <class T>
GPU_FN Gate gate_of(const Vector& gate) {
  if (gate.data == nullptr) return {1.f, 0.f};
  const float raw = gate.dtype == DType::kFloat ? *static_cast<const float*>(gate.data)
                                                : gpu::to_float(*static_cast<const T*>(gate.data));
  const float secant = 1.f / coshf(raw);
  return {tanhf(raw), secant * secant};
}

}  // namespace cuda
}  // namespace fastvlm

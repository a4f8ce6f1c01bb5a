// What the last of the blocks that share the keys of a tile of rows does: it puts their parts
// together.
#pragma once

#include <cmath>

#include "arrivals.cuh"
#include "attention.h"

namespace fastvlm {
namespace cuda {

// The parts of a tile as one, in the order of the splits whoever comes last: a warp takes a row to
// weigh its parts, a lane each.
template <class T, int D, int kThreads, class Keys>
GPU_FN void combine(const AttentionArgs& args, const Keys& keys, int64_t kv_head, float* weights) {
  constexpr int kChunks = D / 8;
  const int64_t all = args.rows * args.heads;
  const int splits = static_cast<int>(args.splits), lane = gpu::thread_index() % 32;
  for (int m = gpu::thread_index() / 32; m < kQueryRows; m += kThreads / 32) {
    const int64_t query = keys.row(m);
    if (query < 0) continue;
    const int64_t to = query * args.heads + keys.head(m, kv_head);
    const float* const own = args.parts_stats + 2 * (lane * all + to);
    const float most = lane < splits ? own[0] : -INFINITY;
    const float largest = gpu::largest_of_warp(most);
    // a row may see no key
    const float weight = gpu::exp2(most - (largest == -INFINITY ? 0.f : largest));
    const float total = gpu::sum_of_warp(lane < splits ? weight * own[1] : 0.f);
    weights[m * kMostSplits + lane] = total > 0.f ? weight / total : 0.f;
    if (lane == 0 && args.stats != nullptr) {
      args.stats[2 * to] = largest;
      args.stats[2 * to + 1] = total;
    }
  }
  gpu::barrier();
  for (int i = gpu::thread_index(); i < kQueryRows * kChunks; i += kThreads) {
    const int m = i / kChunks, c = i % kChunks;
    const int64_t query = keys.row(m);
    if (query < 0) continue;
    const int64_t to = query * args.heads + keys.head(m, kv_head);
    float sums[8] = {};
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float* const part = args.parts + (split * all + to) * D + 8 * c;
      const float weight = weights[m * kMostSplits + split];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const gpu::Chunk chunk = gpu::load16(part + j);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[j + k] += weight * gpu::float_of_bits(chunk.word[k]);
      }
    }
    gpu::Chunk chunk;
#pragma unroll
    for (int j = 0; j < 4; ++j) chunk.word[j] = gpu::pack<T>(sums[2 * j], sums[2 * j + 1]);
    gpu::store16(static_cast<T*>(args.out) + to * D + 8 * c, chunk);
  }
}

}  // namespace cuda
}  // namespace fastvlm

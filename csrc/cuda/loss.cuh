// linear_topk: the best k of a vocabulary and the logsumexp of all of it, without logits in memory.
//
// A block computes the logits of 64 tokens and leaves its best and two numbers of a softmax; a
// second kernel merges them, a block for each row.
//
// A key orders a token by its score, and of equal scores puts the smaller index first: the upper
// half are the bits of the score made to count upwards, the lower half is what the index leaves of
// 2^32 - 1. No token has key 0.
#pragma once

#include <cmath>

#include "loss.h"
#include "stream.cuh"

namespace fastvlm {
namespace cuda {

GPU_FN uint64_t key_of(float score, uint32_t index) {
  const uint32_t bits = gpu::bits_of_float(score);
  const uint32_t upwards = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{upwards} << 32 | (0xffffffffu - index);
}
GPU_FN float score_of(uint64_t key) {
  const uint32_t upwards = static_cast<uint32_t>(key >> 32);
  return gpu::float_of_bits(upwards & 0x80000000u ? upwards & 0x7fffffffu : ~upwards);
}
GPU_FN uint32_t index_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

GPU_FN float exponential(float x) { return gpu::exp2(1.4426950408889634f * x); }

struct TopkBlock {
  static constexpr int kWarps = kVocabularyBlock / 8, kThreads = 32 * kWarps;
  // of a row of logits in shared memory: neighbours in other banks
  static constexpr int kRow = kVocabularyBlock + 1;
  static constexpr int bytes(int tiles) { return 16 * tiles * kRow * 4; }
};

// kTiles: of 16 rows.
template <class T, int kTiles>
GPU_KERNEL(TopkBlock::kThreads)
topk_tiles_kernel(const TopkArgs args) {
  GPU_SHARED(shared);
  float* const logits = reinterpret_cast<float*>(shared);
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
  const int64_t block = gpu::block_x(), first = block * kVocabularyBlock;
  float sums[1][kTiles][4] = {};
  const Rows weights[1] = {args.weight};
  stream<T, T, kTiles, 1>(args.h, args.rows, weights, args.vocabulary, args.depth, first + 8 * warp,
                          0, 1, sums);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * tile + lane / 4 + i / 2 * 8, column = 8 * warp + 2 * (lane % 4) + i % 2;
      float logit = -INFINITY;
      if (first + column < args.vocabulary) {
        logit = sums[0][tile][i];
        if (args.bias.data != nullptr) {
          logit += args.bias.dtype == DType::kFloat
                       ? static_cast<const float*>(args.bias.data)[first + column]
                       : gpu::to_float(static_cast<const T*>(args.bias.data)[first + column]);
        }
        if (args.softcap > 0.f) logit = args.softcap * gpu::tanh_fast(logit / args.softcap);
      }
      logits[row * TopkBlock::kRow + column] = logit;
    }
  }
  gpu::barrier();
  for (int64_t row = warp; row < args.rows; row += TopkBlock::kWarps) {
    uint64_t keys[2];
    float score[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = lane + 32 * j;
      score[j] = logits[row * TopkBlock::kRow + column];
      // what is no token comes after all that are: -infinity, and a larger index
      keys[j] = key_of(score[j], static_cast<uint32_t>(first + column));
    }
    const float largest = gpu::largest_of_warp(fmaxf(score[0], score[1]));
    // a bias may rule out all tokens of a block
    const float base = largest == -INFINITY ? 0.f : largest;
    const float sum = gpu::sum_of_warp(exponential(score[0] - base) + exponential(score[1] - base));
    const int64_t part = row * args.blocks + block;
    if (lane == 0) {
      args.largest[part] = largest;
      args.sums[part] = sum;
    }
    for (int64_t i = 0; i < args.kept; ++i) {
      const uint64_t best = gpu::largest_of_warp(keys[0] > keys[1] ? keys[0] : keys[1]);
      if (lane == 0) args.keys[part * args.kept + i] = best;
      if (keys[0] == best) keys[0] = 0;
      if (keys[1] == best) keys[1] = 0;
    }
  }
}

struct TopkMerge {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  // how many each block of the vocabulary has given, and two places in turn for a reduction
  static int64_t bytes(int64_t blocks) { return 2 * kWarps * 8 + 2 * blocks; }
};

// The largest of all threads, for all of them; place: of kWarps values, another than the last one.
template <class T>
GPU_FN T largest_of_block(T x, T* place) {
  x = gpu::largest_of_warp(x);
  const int lane = gpu::thread_index() % 32;
  if (lane == 0) place[gpu::thread_index() / 32] = x;
  gpu::barrier();
  return gpu::largest_of_warp(place[lane % TopkMerge::kWarps]);
}

GPU_KERNEL(TopkMerge::kThreads) topk_merge_kernel(const TopkArgs args) {
  GPU_SHARED(shared);
  uint64_t* const places = reinterpret_cast<uint64_t*>(shared);
  uint16_t* const given = reinterpret_cast<uint16_t*>(places + 2 * TopkMerge::kWarps);
  const int64_t row = gpu::block_x();
  const float* const largest = args.largest + row * args.blocks;
  const float* const sums = args.sums + row * args.blocks;
  float most = -INFINITY;
  for (int64_t b = gpu::thread_index(); b < args.blocks; b += TopkMerge::kThreads) {
    most = fmaxf(most, largest[b]);
    given[b] = 0;
  }
  most = largest_of_block(most, reinterpret_cast<float*>(places));
  float total = 0.f;
  for (int64_t b = gpu::thread_index(); b < args.blocks; b += TopkMerge::kThreads) {
    total += sums[b] * exponential(largest[b] - most);
  }
  total = gpu::sum_of_warp(total);
  float* const totals = reinterpret_cast<float*>(places + TopkMerge::kWarps);
  if (gpu::thread_index() % 32 == 0) totals[gpu::thread_index() / 32] = total;
  gpu::barrier();
  total = 0.f;
#pragma unroll
  for (int w = 0; w < TopkMerge::kWarps; ++w) total += totals[w];
  const float log_total = logf(total);
  if (gpu::thread_index() == 0) args.lse[row] = most + log_total;

  // The best that this thread's blocks of the vocabulary have not given yet, and whose it is.
  uint64_t best = 0;
  int64_t owner = 0;
  const auto look = [&] {
    best = 0;
    for (int64_t b = gpu::thread_index(); b < args.blocks; b += TopkMerge::kThreads) {
      if (given[b] >= args.kept) continue;
      const uint64_t key = args.keys[(row * args.blocks + b) * args.kept + given[b]];
      if (key > best) {
        best = key;
        owner = b;
      }
    }
  };
  look();
  for (int64_t i = 0; i < args.k; ++i) {
    const uint64_t winner = largest_of_block(best, places + i % 2 * TopkMerge::kWarps);
    if (gpu::thread_index() == 0) {
      args.values[row * args.k + i] = (score_of(winner) - most) - log_total;
      args.indices[row * args.k + i] = index_of(winner);
    }
    if (best == winner) {
      ++given[owner];
      look();
    }
  }
}

}  // namespace cuda
}  // namespace fastvlm

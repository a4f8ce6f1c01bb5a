// linear_topk: the best k of a vocabulary and the logsumexp of all of it, without logits in memory.
//
// A block computes the logits of a few tiles of 64 tokens, one after the other, and leaves the best
// of all of them and two numbers of a softmax; a second kernel merges those, a block for each row.
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
  static constexpr int kWarps = kTileTokens / 8, kThreads = 32 * kWarps;
  // of a row of logits in shared memory: neighbours in other banks
  static constexpr int kRow = kTileTokens + 1;
  // that a multiprocessor is to hold: left alone, ptxas aims at more of 32 rows and spills
  static constexpr int blocks(int tiles) { return tiles == 1 ? 4 : tiles == 2 ? 3 : 2; }
  // keys, then of each row its largest logit and sum, then the logits of a tile of tokens
  static int bytes(int tiles, int64_t kept) {
    return static_cast<int>(16 * tiles * (8 * kept + 4 * (2 + kRow)));
  }
};

// The logits of a tile of tokens to shared memory; what is no token gets -infinity.
template <class T, int kTiles>
GPU_FN void logits_of_tile(const TopkArgs& args, int64_t first, float* logits) {
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
  float sums[1][kTiles][4] = {};
  const Rows weights[1] = {args.weight};
  stream<T, T, kTiles, 1>(args.h, args.rows, weights, args.vocabulary, args.depth, first + 8 * warp,
                          0, 1, sums);
  // those of the tile before have been read
  gpu::barrier();
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
}

// The best `kept` of a warp's keys, in order: lane l has those at places l and l + 32.
GPU_FN void choose(uint64_t (&keys)[4], int kept, uint64_t (&best)[2]) {
  const int lane = gpu::thread_index() % 32;
  for (int i = 0; i < kept; ++i) {
    uint64_t mine = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) mine = keys[j] > mine ? keys[j] : mine;
    const uint64_t winner = gpu::largest_of_warp(mine);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (keys[j] == winner) keys[j] = 0;
    }
    // no place that depends on i: both stay in registers
    if (lane == i) best[0] = winner;
    if (lane + 32 == i) best[1] = winner;
  }
}

// kTiles: of 16 rows.
template <class T, int kTiles>
GPU_KERNEL(TopkBlock::kThreads, TopkBlock::blocks(kTiles))
topk_tiles_kernel(const TopkArgs args) {
  GPU_SHARED(shared);
  uint64_t* const held = reinterpret_cast<uint64_t*>(shared);
  const int kept = static_cast<int>(args.kept);
  float* const stats = reinterpret_cast<float*>(held + 16 * kTiles * kept);
  float* const logits = stats + 2 * 16 * kTiles;
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
  const int64_t block = gpu::block_x();
  for (int64_t tile = 0; tile < args.tiles; ++tile) {
    const int64_t first = (block * args.tiles + tile) * kTileTokens;
    if (first >= args.vocabulary) break;
    logits_of_tile<T, kTiles>(args, first, logits);
    // A warp has the same rows in every tile, and a lane the same places: what it finds of the
    // tiles before it has written itself.
    for (int row = warp; row < args.rows; row += TopkBlock::kWarps) {
      uint64_t keys[4], best[2] = {0, 0};
      float score[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = lane + 32 * j;
        score[j] = logits[row * TopkBlock::kRow + column];
        // what is no token comes after all that are: -infinity, and a larger index
        keys[j] = key_of(score[j], static_cast<uint32_t>(first + column));
        keys[2 + j] = tile > 0 && column < kept ? held[row * kept + column] : 0;
      }
      const bool begun = tile > 0 && lane == 0;
      const float before = begun ? stats[2 * row] : -INFINITY;
      const float largest = gpu::largest_of_warp(fmaxf(before, fmaxf(score[0], score[1])));
      // a bias may rule out all tokens
      const float base = largest == -INFINITY ? 0.f : largest;
      const float sum =
          gpu::sum_of_warp(exponential(score[0] - base) + exponential(score[1] - base));
      if (lane == 0) {
        stats[2 * row] = largest;
        stats[2 * row + 1] = sum + (begun ? stats[2 * row + 1] * exponential(before - base) : 0.f);
      }
      // most tiles have nothing as good as the last of what is held
      const uint64_t last = kept > 32 ? keys[3] : keys[2];
      const uint64_t least = gpu::largest_of_warp((kept - 1) % 32 == lane ? last : uint64_t{0});
      if (gpu::largest_of_warp(keys[0] > keys[1] ? keys[0] : keys[1]) <= least) continue;
      choose(keys, kept, best);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (lane + 32 * j < kept) held[row * kept + lane + 32 * j] = best[j];
      }
    }
  }
  for (int row = warp; row < args.rows; row += TopkBlock::kWarps) {
    const int64_t part = row * args.blocks + block;
    if (lane == 0) {
      args.largest[part] = stats[2 * row];
      args.sums[part] = stats[2 * row + 1];
    }
    for (int i = lane; i < kept; i += 32) args.keys[part * kept + i] = held[row * kept + i];
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
  const float base = most == -INFINITY ? 0.f : most;
  float total = 0.f;
  for (int64_t b = gpu::thread_index(); b < args.blocks; b += TopkMerge::kThreads) {
    total += sums[b] * exponential(largest[b] - base);
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

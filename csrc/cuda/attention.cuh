// Attention of few query rows, a decoding step: 16 rows share one reading of K and V.
//
// A block takes a tile of rows, a head of K and V, and a part of the keys. Its warps take 16 keys
// each of a tile that asynchronous copies bring while the one before is worked on, keep a softmax
// of their own, and put their results together at the end (online softmax: arXiv 1805.02867;
// split over keys as in Flash-Decoding). Of the blocks that have a part of the same keys the last
// one to end puts the parts together, so that a split costs no second launch.
#pragma once

#include <cmath>

#include "attention_keys.cuh"
#include "attention_splits.cuh"

namespace fastvlm {
namespace cuda {

template <int D>
struct AttentionTile {
  // heads of 256 fill the registers with 128 sums a thread; fewer warps leave room in shared memory
  static constexpr int kWarps = D == 256 ? 2 : 4, kThreads = 32 * kWarps, kKeys = 16 * kWarps;
  static constexpr int kChunks = D / 8, kRowBytes = 2 * D, kStages = 2;
  static constexpr int kQueryBytes = kQueryRows * kRowBytes, kTileBytes = kKeys * kRowBytes;
  static constexpr int kBytes = kQueryBytes + 2 * kStages * kTileBytes;
  // four of heads of 64 leave a thread 128 registers, the others are what shared memory lets in;
  // left alone, ptxas aims at more and spills
  static constexpr int kBlocks = D <= 96 ? 4 : 3;
  static_assert(kWarps * kQueryRows * (D + 2) * 4 <= 2 * kStages * kTileBytes,
                "the warps' results fit where the tiles were");

  // Where chunk c of a row lies: moved so that eight rows below each other are in eight banks.
  GPU_FN static int at(int row, int c) {
    const int move = D == 96 ? row / 2 & 3 : row & 7;
    return row * kRowBytes + (c ^ move) * 16;
  }
};

template <class T, int D, class Keys>
GPU_FN void load_tile(const AttentionArgs& args, const Keys& keys, int64_t kv_head, int first,
                      unsigned char* k_tile, unsigned char* v_tile) {
  using Tile = AttentionTile<D>;
#pragma unroll
  for (int i = gpu::thread_index(); i < Tile::kKeys * Tile::kChunks; i += Tile::kThreads) {
    const int r = i / Tile::kChunks, c = i % Tile::kChunks, key = first + r;
    // what nobody sees becomes zeros: its weight is zero, and zero times a NaN is none
    const bool seen = keys.sees(key);
    const T* k = static_cast<const T*>(args.k);
    const T* v = static_cast<const T*>(args.v);
    if (seen) {
      k += keys.k_offset(key) + kv_head * args.k_head + c * 8;
      v += keys.v_offset(key) + kv_head * args.v_head + c * 8;
    }
    gpu::copy_async16(k_tile + Tile::at(r, c), k, seen ? 16 : 0);
    gpu::copy_async16(v_tile + Tile::at(r, c), v, seen ? 16 : 0);
  }
}

// A warp's scores and sums of 16 rows: rows g and g + 8 of a lane, g = lane / 4.
template <int D>
struct WarpSoftmax {
  float sums[D / 8][4], largest[2], total[2];

  GPU_FN void clear() {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0.f;
    }
    largest[0] = largest[1] = -INFINITY;
    total[0] = total[1] = 0.f;
  }

  // scores become 2^(score - largest), and what was summed before is weighed anew.
  GPU_FN void add(float (&scores)[2][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = fmaxf(fmaxf(scores[0][2 * h], scores[0][2 * h + 1]),
                         fmaxf(scores[1][2 * h], scores[1][2 * h + 1]));
      most = fmaxf(most, gpu::shuffle_xor(most, 1));
      most = fmaxf(most, gpu::shuffle_xor(most, 2));
      most = fmaxf(most, largest[h]);
      const float base = most == -INFINITY ? 0.f : most;
      const float before = gpu::exp2(largest[h] - base);
      largest[h] = most;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int j = 2 * h; j < 2 * h + 2; ++j) {
          scores[n][j] = gpu::exp2(scores[n][j] - base);
          sum += scores[n][j];
        }
      }
      total[h] = total[h] * before + sum;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        sums[n][2 * h] *= before;
        sums[n][2 * h + 1] *= before;
      }
    }
  }
};

// The scores of a warp's 16 keys, in base 2; -infinity where a key is not seen.
template <class T, int D, bool kCapped, class Keys>
GPU_FN void score(const AttentionArgs& args, const Keys& keys, int first,
                  const unsigned char* queries, const unsigned char* k_tile,
                  float (&scores)[2][4]) {
  using Tile = AttentionTile<D>;
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.f;
  }
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    const gpu::Chunk q = gpu::load_matrices(queries + Tile::at(lane % 16, 2 * step + lane / 16));
    const gpu::Chunk k = gpu::load_matrices(
        k_tile + Tile::at(16 * warp + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    gpu::multiply_add<T>(scores[0], q, k.word[0], k.word[1]);
    gpu::multiply_add<T>(scores[1], q, k.word[2], k.word[3]);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const bool seen = keys.sees(first + 16 * warp + 8 * n + 2 * (lane % 4) + j);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& s = scores[n][2 * h + j];
        s = kCapped ? args.outer * gpu::tanh_fast(s * args.inner) : s * args.inner;
        if (!seen) s = -INFINITY;
      }
    }
  }
}

template <class T, int D>
GPU_FN void weigh(const float (&p)[2][4], const unsigned char* v_tile, WarpSoftmax<D>& softmax) {
  using Tile = AttentionTile<D>;
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
  const gpu::Chunk a{{gpu::pack<T>(p[0][0], p[0][1]), gpu::pack<T>(p[0][2], p[0][3]),
                      gpu::pack<T>(p[1][0], p[1][1]), gpu::pack<T>(p[1][2], p[1][3])}};
#pragma unroll
  for (int n = 0; n < D / 16; ++n) {
    const gpu::Chunk v =
        gpu::load_matrices_transposed(v_tile + Tile::at(16 * warp + lane % 16, 2 * n + lane / 16));
    gpu::multiply_add<T>(softmax.sums[2 * n], a, v.word[0], v.word[1]);
    gpu::multiply_add<T>(softmax.sums[2 * n + 1], a, v.word[2], v.word[3]);
  }
}

// The results of the warps as one, where the tiles were.
template <class T, int D, class Keys>
GPU_FN void put_together(const AttentionArgs& args, const Keys& keys, int64_t kv_head,
                         int64_t split, WarpSoftmax<D>& softmax, float* shared) {
  using Tile = AttentionTile<D>;
  float* const all_stats = shared + Tile::kWarps * kQueryRows * D;
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = softmax.total[h];
    total += gpu::shuffle_xor(total, 1);
    total += gpu::shuffle_xor(total, 2);
    const int row = warp * kQueryRows + lane / 4 + 8 * h;
    if (lane % 4 == 0) {
      all_stats[2 * row] = softmax.largest[h];
      all_stats[2 * row + 1] = total;
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        shared[row * D + 8 * n + 2 * (lane % 4) + j] = softmax.sums[n][2 * h + j];
      }
    }
  }
  gpu::barrier();
  for (int i = gpu::thread_index(); i < kQueryRows * Tile::kChunks; i += Tile::kThreads) {
    const int m = i / Tile::kChunks, c = i % Tile::kChunks;
    const int64_t query = keys.row(m);
    if (query < 0) continue;
    float largest = -INFINITY, total = 0.f, sums[8] = {};
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) {
      largest = fmaxf(largest, all_stats[2 * (w * kQueryRows + m)]);
    }
    const float base = largest == -INFINITY ? 0.f : largest;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) {
      const int row = w * kQueryRows + m;
      const float weight = gpu::exp2(all_stats[2 * row] - base);
      total += weight * all_stats[2 * row + 1];
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] += weight * shared[row * D + 8 * c + j];
    }
    const int64_t to = query * args.heads + keys.head(m, kv_head);
    float* stats = args.stats;
    if (args.splits > 1) {
      const int64_t part = split * args.rows * args.heads + to;
      float* parts = args.parts + part * D + 8 * c;
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        gpu::Chunk chunk;
        memcpy(&chunk, sums + j, sizeof chunk);
        gpu::store16(parts + j, chunk);
      }
      stats = args.parts_stats + split * args.rows * args.heads * 2;
    } else {
      const float factor = total > 0.f ? 1.f / total : 0.f;
      gpu::Chunk chunk;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        chunk.word[j] = gpu::pack<T>(sums[2 * j] * factor, sums[2 * j + 1] * factor);
      }
      gpu::store16(static_cast<T*>(args.out) + to * D + 8 * c, chunk);
    }
    if (c == 0 && stats != nullptr) {
      stats[2 * to] = largest;
      stats[2 * to + 1] = total;
    }
  }
}

template <class T, int D, bool kCapped, class Keys>
GPU_KERNEL(AttentionTile<D>::kThreads, AttentionTile<D>::kBlocks)
attention_kernel(const AttentionArgs args) {
  using Tile = AttentionTile<D>;
  GPU_SHARED(shared);
  unsigned char* const tiles = shared + Tile::kQueryBytes;
  const int splits = static_cast<int>(args.splits), split = gpu::block_x() % splits;
  const int64_t kv_head = gpu::block_y();
  const Keys keys(args, gpu::block_x() / splits);
  if (keys.idle()) return;
  const int count = (keys.hi - keys.lo + Tile::kKeys - 1) / Tile::kKeys;
  const int share = (count + splits - 1) / splits;
  const int begin = split * share;
  const int end = begin + share < count ? begin + share : count;

  const T* q = static_cast<const T*>(args.q);
  for (int i = gpu::thread_index(); i < kQueryRows * Tile::kChunks; i += Tile::kThreads) {
    const int m = i / Tile::kChunks, c = i % Tile::kChunks;
    const int64_t row = keys.row(m);
    const int64_t from =
        row < 0 ? 0 : row * args.q_row + keys.head(m, kv_head) * args.q_head + c * 8;
    gpu::copy_async16(shared + Tile::at(m, c), q + from, row < 0 ? 0 : 16);
  }
  const auto fetch = [&](int tile) {
    unsigned char* const to = tiles + (tile & 1) * 2 * Tile::kTileBytes;
    if (tile < end) {
      load_tile<T, D>(args, keys, kv_head, keys.lo + tile * Tile::kKeys, to, to + Tile::kTileBytes);
    }
    gpu::copy_commit();
  };
  fetch(begin);
  WarpSoftmax<D> softmax;
  softmax.clear();
  for (int tile = begin; tile < end; ++tile) {
    fetch(tile + 1);
    gpu::copy_wait<1>();
    gpu::barrier();
    const unsigned char* const k_tile = tiles + (tile & 1) * 2 * Tile::kTileBytes;
    float scores[2][4];
    score<T, D, kCapped>(args, keys, keys.lo + tile * Tile::kKeys, shared, k_tile, scores);
    softmax.add(scores);
    weigh<T, D>(scores, k_tile + Tile::kTileBytes, softmax);
    // the next round brings a tile to where this one is
    gpu::barrier();
  }
  gpu::copy_wait<0>();
  gpu::barrier();
  put_together<T, D>(args, keys, kv_head, split, softmax, reinterpret_cast<float*>(tiles));
  if (splits == 1) return;
  const int tile = gpu::block_x() / splits * static_cast<int>(args.kv_heads) + gpu::block_y();
  if (is_last(args.arrivals, tile, splits, reinterpret_cast<bool*>(shared))) {
    combine<T, D, Tile::kThreads>(args, keys, kv_head, reinterpret_cast<float*>(tiles));
  }
}

}  // namespace cuda
}  // namespace fastvlm

// What the attention kernels of a decoding step take.
#pragma once

#include "kernels.h"

namespace fastvlm {
namespace cuda {

// See fastvlm/reference/attention.py. Rows of q, k, v and out are of one dtype, with contiguous
// elements; everything starts at multiples of 16 bytes. Strides are in elements.
struct AttentionArgs {
  DType dtype;
  const void *q, *k, *v;
  int64_t rows, heads, kv_heads, dim;
  int64_t q_row, q_head;  // strides
  int64_t k_row, k_head, v_row, v_head;
  // what multiplies q.k, and what multiplies the tanh after it where there is a cap
  float inner, outer;
  bool capped;
  int64_t splits;  // parts of the keys, each of another block

  // cross_attention: the keys of an image stand together
  const int64_t* rows_by_image;  // or null: rows stand in image order
  const int32_t *reader_offsets, *kv_offsets;
  int64_t images, row_blocks;  // row_blocks: tiles of query rows of one image

  // cached_attention: position t of a row lies in cache row ancestry[t], -1 where it sees none
  const int32_t *lengths, *ancestry;
  int64_t k_time, v_time, ancestry_row, window;

  void* out;     // [rows, heads, dim]
  float* stats;  // [rows, heads, 2]: largest score in base 2, sum of 2^(score - largest); or null
  float *parts, *parts_stats;  // the same of each split, where there are several; parts float32
  Arrivals arrivals;           // of the splits of each tile of rows and head of K
};

// Query rows of a tile: those of a tensor core instruction.
constexpr int kQueryRows = 16;
// Parts of the keys: one for each lane of the warp that weighs them.
constexpr int kMostSplits = 32;

}  // namespace cuda
}  // namespace fastvlm

extern "C" {
void fastvlm_cuda_cross_attention(const fastvlm::cuda::AttentionArgs& args, void* stream);
void fastvlm_cuda_cached_attention(const fastvlm::cuda::AttentionArgs& args, void* stream);
}

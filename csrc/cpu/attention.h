// What the attention kernels take.
#pragma once

#include "kernels.h"

namespace fastvlm {

// [rows, heads, dim], the last dimension contiguous.
struct Heads {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};

// Added to the scores by the distance of a key from its query: of each head the entries for -reach
// to reach, [heads, 2 * reach + 1] contiguous, the ends for all that is further. data: null for
// none.
struct PositionBias {
  const float* data;
  int64_t reach;
};

struct AttentionArgs {
  DType dtype;
  Heads q, k, v;
  int64_t rows, heads, kv_heads, dim;
  const int32_t* q_offsets;   // [segments + 1]
  const int32_t* kv_offsets;  // [images + 1]
  const int32_t* image_of;    // [segments]
  int64_t segments, images;
  float scale, softcap;
  bool causal;
  int64_t window, window_after;  // how near keys must be before a row, and behind it; 0 for none
  PositionBias bias;
  void* out;     // [rows, heads, dim]
  float* stats;  // [rows, heads, 2]: largest score times log2 e, sum of exp(score - largest)
  Dropout dropout;
};

// The gradients are contiguous, in the forward's shapes and dtype; null where nobody wants one.
struct AttentionBackwardArgs {
  AttentionArgs forward;  // without out and stats
  Heads grad_out;
  int64_t keys;  // rows of k and v
  void *dq, *dk, *dv;
  float* dbias;           // as the bias of forward
  const float* grad_lse;  // [rows, heads], of the logsumexp of a row's scores; null for zeros
};

// A cache is [cache rows, positions, kv heads, dim].
struct Cache {
  const void* data;
  int64_t row_stride;
  int64_t position_stride;
  int64_t head_stride;
};

struct CachedAttentionArgs {
  DType dtype;
  Heads q;
  Cache k, v;
  int64_t rows, heads, kv_heads, dim, cache_rows;
  const int32_t* lengths;   // [rows]
  const int32_t* ancestry;  // [rows, positions] or null
  int64_t ancestry_row_stride, ancestry_position_stride;
  float scale, softcap;
  int64_t window;
  PositionBias bias;  // a query stands at the last of its positions
  void* out;
  float* lse;         // [rows, heads], the logsumexp of a row's scores; null where nobody wants it
  int* bad_ancestor;  // set to 1 where ancestry names a row the cache does not have
};

#define FASTVLM_DECLARE(CAPABILITY)                           \
  namespace CAPABILITY {                                      \
  void attention(const AttentionArgs& args);                  \
  void attention_backward(const AttentionBackwardArgs& args); \
  void cached_attention(const CachedAttentionArgs& args);     \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

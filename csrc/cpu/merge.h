// What the kernels that join two attentions take.
#pragma once

#include "kernels.h"

namespace fastvlm {

// Of two sets of keys what a head of a row made of each, [count, dim] contiguous, and the logsumexp
// of its scores, [count].
struct MergeArgs {
  DType dtype;
  int64_t count, dim;
  const void *a, *b;
  const float *lse_a, *lse_b;
  void* out;
};

struct MergeBackwardArgs {
  MergeArgs forward;  // without out
  const void* grad_out;
  void *da, *db;
  float* dlse;  // of a; that of b is its negative
};

#define FASTVLM_DECLARE(CAPABILITY)                             \
  namespace CAPABILITY {                                        \
  void merge_attention(const MergeArgs& args);                  \
  void merge_attention_backward(const MergeBackwardArgs& args); \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

// What the loss kernels take: one block of the vocabulary's logits, as a product gave it.
#pragma once

#include "kernels.h"

namespace fastvlm {

struct LogitsBlock {
  float* logits;  // [rows, cols], row by row; becomes logits with bias and softcap
  int64_t rows, cols;
  int64_t first;  // the vocabulary index of the first column
  Matrix bias;    // [cols] of the block, or null
  float softcap;  // 0 for none
};

// Running figures of each row over the blocks so far, brought up to date by a block. Logsumexp
// comes in two parts, the largest logit and the sum of exp(logit - largest): see
// fastvlm/reference/loss.py.
struct ScanArgs {
  LogitsBlock block;
  float* largest;
  double* total;
  const int64_t* labels;  // or null
  float* picked;          // the label's logit
  int64_t k;              // 0 for no ranking
  float* values;          // [rows, k], descending; equal ones in ascending order of their index
  int64_t* indices;       // [rows, k]
};

// logits become the gradient of the logits before the cap.
struct LogitsGradientArgs {
  LogitsBlock block;
  const int64_t* labels;
  const float* parts;  // [rows, 2]: largest logit, log of the total
  const float* grad;   // [rows], of the loss of each row
};

#define FASTVLM_DECLARE(CAPABILITY)                     \
  namespace CAPABILITY {                                \
  void scan_logits(const ScanArgs& args);               \
  void logits_gradient(const LogitsGradientArgs& args); \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

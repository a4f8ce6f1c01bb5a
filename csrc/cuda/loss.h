// What linear_topk takes.
#pragma once

#include "kernels.h"

namespace fastvlm {
namespace cuda {

// See fastvlm/reference/loss.py. h and weight as x and weight of MlpArgs.
struct TopkArgs {
  DType dtype;
  int64_t rows, vocabulary, depth, k;
  Rows h, weight;
  Vector bias;  // float32 or the dtype of h
  float softcap;
  // of each block of the vocabulary, which is so many tiles of tokens, for each row: the largest
  // logit, the sum of exp(logit - largest), and its best `kept` as keys (see loss.cuh)
  int64_t tiles, blocks, kept;
  float *largest, *sums;  // [rows, blocks]
  uint64_t* keys;         // [rows, blocks, kept]
  float *values, *lse;    // [rows, k], [rows]
  int64_t* indices;       // [rows, k]
};

// Tokens of a tile, of which a block keeps as many as that at most.
constexpr int kTileTokens = 64;
constexpr int64_t kMostRankedRows = 64;
constexpr int64_t kLargestVocabulary = 1 << 19;

}  // namespace cuda
}  // namespace fastvlm

extern "C" void fastvlm_cuda_linear_topk(const fastvlm::cuda::TopkArgs& args, void* stream);

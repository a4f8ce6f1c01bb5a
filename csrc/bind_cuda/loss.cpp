// linear_topk as a torch op.
#include "../cuda/loss.h"

#include <algorithm>

#include "bind.h"

namespace fastvlm {
namespace cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> linear_topk(const Tensor& h, const Tensor& weight, int64_t k,
                                               const Optional& bias, double softcap,
                                               int64_t tiles) {
  const Call call(h);
  TopkArgs args{};
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h, weight: expected 2 dimensions");
  args.dtype = dtype_of(h, "h");
  args.rows = h.size(0);
  args.depth = h.size(1);
  args.vocabulary = weight.size(0);
  args.k = k;
  args.softcap = static_cast<float>(softcap);
  STD_TORCH_CHECK(args.rows <= kMostRankedRows, "h: up to ", kMostRankedRows, " rows");
  STD_TORCH_CHECK(args.vocabulary <= kLargestVocabulary, "weight: up to ", kLargestVocabulary,
                  " rows");
  STD_TORCH_CHECK(k >= 1 && k <= args.vocabulary, "k: expected 1 to ", args.vocabulary);
  args.h = short_rows(h, "h", args.dtype, args.rows, args.depth);
  args.weight = short_rows(weight, "weight", args.dtype, args.vocabulary, args.depth);
  if (bias.has_value()) args.bias = vector_of(*bias, "bias", args.dtype, args.vocabulary);
  STD_TORCH_CHECK(tiles >= 1, "tiles: expected 1 or more");
  const int64_t tokens = kTileTokens * tiles;
  args.tiles = tiles;
  args.blocks = (args.vocabulary + tokens - 1) / tokens;
  args.kept = std::min<int64_t>(k, kTileTokens);
  const int64_t rows = args.rows, blocks = args.blocks;
  Tensor largest = result(h, "largest", true, {rows, blocks}, ScalarType::Float, &args.largest);
  Tensor sums = result(h, "sums", true, {rows, blocks}, ScalarType::Float, &args.sums);
  Tensor keys = result(h, "keys", true, {rows, blocks, args.kept}, ScalarType::Long, &args.keys);
  Tensor values = result(h, "values", true, {rows, k}, ScalarType::Float, &args.values);
  Tensor indices = result(h, "indices", true, {rows, k}, ScalarType::Long, &args.indices);
  Tensor lse = result(h, "lse", true, {rows}, ScalarType::Float, &args.lse);
  FASTVLM_CUDA_KERNEL(linear_topk)(args, call.stream());
  return {values, indices, lse};
}

}  // namespace
}  // namespace cuda
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cuda, m) {
  m.def(
      "linear_topk(Tensor h, Tensor weight, int k, Tensor? bias, float softcap, int tiles) "
      "-> (Tensor, Tensor, Tensor)");
}

FASTVLM_IMPL { m.impl("linear_topk", TORCH_BOX(&fastvlm::cuda::linear_topk)); }

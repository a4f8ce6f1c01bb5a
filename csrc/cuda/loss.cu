// Launches of linear_topk.
#include "launch.h"
#include "loss.cuh"

namespace fastvlm {
namespace cuda {
namespace {

template <class T, int kTiles>
void tiles(const TopkArgs& args, void* stream) {
  launch("topk_tiles", &topk_tiles_kernel<T, kTiles>, dim3(static_cast<unsigned>(args.blocks)),
         TopkBlock::kThreads, TopkBlock::bytes(kTiles, args.kept), stream, args);
}

}  // namespace

extern "C" void fastvlm_cuda_linear_topk(const TopkArgs& args, void* stream) {
  if (args.rows == 0) return;
  if (args.rows > kMostRankedRows) throw std::runtime_error("linear_topk: too many rows");
  with_short_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.rows <= 16) return tiles<T, 1>(args, stream);
    if (args.rows <= 32) return tiles<T, 2>(args, stream);
    tiles<T, 4>(args, stream);
  });
  launch("topk_merge", &topk_merge_kernel, dim3(static_cast<unsigned>(args.rows)),
         TopkMerge::kThreads, static_cast<int>(TopkMerge::bytes(args.blocks)), stream, args);
}

}  // namespace cuda
}  // namespace fastvlm

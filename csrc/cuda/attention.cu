// Launches of the attention kernels.
#include "attention.cuh"
#include "launch.h"

namespace fastvlm {
namespace cuda {
namespace {

template <class Body>
void with_dim(int64_t dim, const Body& body) {
  if (dim == 64) return body(std::integral_constant<int, 64>{});
  if (dim == 96) return body(std::integral_constant<int, 96>{});
  if constexpr (kAll) {
    if (dim == 128) return body(std::integral_constant<int, 128>{});
    if (dim == 256) return body(std::integral_constant<int, 256>{});
  }
  throw std::runtime_error("no kernel for this head dimension");
}

template <class Keys>
void run(const char* name, const AttentionArgs& args, int64_t blocks, void* stream) {
  if (args.rows == 0 || blocks == 0) return;
  give_counters("counters", counters, kArrivalSlots * kArrivals);
  with_short_type(args.dtype, [&](auto type) {
    with_dim(args.dim, [&](auto dim) {
      using T = decltype(type);
      constexpr int D = decltype(dim)::value;
      using Tile = AttentionTile<D>;
      const dim3 grid(static_cast<unsigned>(blocks * args.splits),
                      static_cast<unsigned>(args.kv_heads));
      launch(
          name,
          args.capped ? &attention_kernel<T, D, true, Keys> : &attention_kernel<T, D, false, Keys>,
          grid, Tile::kThreads, Tile::kBytes, stream, args);
    });
  });
}

}  // namespace

extern "C" void fastvlm_cuda_cross_attention(const AttentionArgs& args, void* stream) {
  run<ImageKeys>("cross_attention", args, args.images * args.row_blocks, stream);
}

extern "C" void fastvlm_cuda_cached_attention(const AttentionArgs& args, void* stream) {
  run<CacheKeys>("cached_attention", args, args.rows * args.row_blocks, stream);
}

}  // namespace cuda
}  // namespace fastvlm

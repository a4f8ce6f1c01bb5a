// Launch of the products of few rows.
#include "launch.h"
#include "mlp.cuh"

namespace fastvlm {
namespace cuda {
namespace {

template <class T, class W, int kWeights>
void run(const MlpArgs& args, void* stream) {
  give_counters("counters", counters, kArrivalSlots * kArrivals);
  const dim3 grid(static_cast<unsigned>((args.columns + kColumns - 1) / kColumns),
                  static_cast<unsigned>(args.splits));
  launch("few_rows_linear", &few_rows_linear_kernel<T, W, kWeights>, grid, MlpBlock::kThreads,
         MlpBlock::bytes(kWeights), stream, args);
}

}  // namespace

extern "C" void fastvlm_cuda_few_rows_linear(const MlpArgs& args, void* stream) {
  if (args.rows == 0 || args.columns == 0) return;
  if (args.rows > kMostRows) throw std::runtime_error("few_rows_linear: too many rows");
  with_short_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const bool gated = args.up.data != nullptr;
    if (args.weight_dtype == DType::kInt8) {
      return gated ? run<T, int8_t, 2>(args, stream) : run<T, int8_t, 1>(args, stream);
    }
    return gated ? run<T, T, 2>(args, stream) : run<T, T, 1>(args, stream);
  });
}

}  // namespace cuda
}  // namespace fastvlm

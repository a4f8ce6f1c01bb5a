// Launches of the norms.
#include "launch.h"
#include "norm.h"
#include "norm_backward.cuh"

namespace fastvlm {
namespace cuda {
namespace {

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool all_aligned(const NormArgs& args) {
  const int64_t size = args.dtype == DType::kFloat ? 4 : 2;
  for (const Rows& rows : {args.x, args.residual, args.h, args.grad, args.grad_y}) {
    if (!aligned(rows.data) || rows.stride * size % 16 != 0) return false;
  }
  for (const Vector& vector : {args.weight, args.bias, args.next_weight}) {
    if (!aligned(vector.data)) return false;
  }
  return args.cols * size % 16 == 0;
}

template <int E, template <class, int> class Kernel>
void run(const char* name, NormArgs args, int64_t blocks, void* stream) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t each = E;
    const int64_t lanes = (args.cols + each - 1) / each;
    const int threads = static_cast<int>((lanes + 31) / 32 * 32);
    launch(name, Kernel<T, E>::get(), dim3(static_cast<unsigned>(blocks)), threads,
           BlockSums::kBytes, stream, args);
  });
}

template <template <class, int> class Kernel>
void run(const char* name, NormArgs args, int64_t blocks, void* stream) {
  if (args.rows == 0 || args.cols == 0) return;
  if (args.cols > kWidestRow) throw std::runtime_error("a row that registers do not hold");
  args.aligned = all_aligned(args);
  if (args.cols <= 8 * threads_for(8)) return run<8, Kernel>(name, args, blocks, stream);
  return run<16, Kernel>(name, args, blocks, stream);
}

int64_t backward_blocks(const NormArgs& args) {
  return (args.rows + args.rows_per_block - 1) / args.rows_per_block;
}

}  // namespace

#define FASTVLM_NORM(name, blocks)                                          \
  template <class T, int E>                                                 \
  struct Get_##name {                                                       \
    static auto get() { return &name##_kernel<T, E>; }                      \
  };                                                                        \
  extern "C" void fastvlm_cuda_##name(const NormArgs& args, void* stream) { \
    run<Get_##name>(#name, args, blocks, stream);                           \
  }

FASTVLM_NORM(rms_norm, args.rows)
FASTVLM_NORM(residual_rms_norm, args.rows)
FASTVLM_NORM(residual_layer_norm, args.rows)
FASTVLM_NORM(rms_norm_backward, backward_blocks(args))
FASTVLM_NORM(residual_rms_norm_backward, backward_blocks(args))
FASTVLM_NORM(residual_layer_norm_backward, backward_blocks(args))

}  // namespace cuda
}  // namespace fastvlm

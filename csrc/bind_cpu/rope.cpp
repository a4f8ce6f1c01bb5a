// rope as a torch op, forward and, with back, backward.
#include "../cpu/rope.h"

#include "bind.h"

namespace fastvlm {
namespace {

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos,
                                const Tensor& sin, bool back) {
  RopeArgs args{};
  check(q, "q", 3);
  check(k, "k", 3);
  args.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(dtype_of(k, "k") == args.dtype, "k: expected q's dtype");
  args.tokens = q.size(0);
  args.heads = q.size(1);
  args.kv_heads = k.size(1);
  args.dim = q.size(2);
  STD_TORCH_CHECK(k.size(0) == args.tokens && k.size(2) == args.dim, "k: expected ", args.tokens,
                  " rows and a head dimension of ", args.dim);
  args.cos = matrix(cos, "cos");
  args.sin = matrix(sin, "sin");
  for (const Matrix& table : {args.cos, args.sin}) {
    STD_TORCH_CHECK(table.rows == args.tokens && table.cols == args.cos.cols &&
                        table.cols % 2 == 0 && table.cols <= args.dim,
                    "cos, sin: expected [", args.tokens, ", an even number up to ", args.dim, "]");
  }
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  for (int64_t d = 0; d < 2; ++d) {
    args.q_strides[d] = q.stride(d);
    args.k_strides[d] = k.stride(d);
  }
  args.back = back;
  Tensor out_q = torch::stable::new_empty(q, {args.tokens, args.heads, args.dim});
  Tensor out_k = torch::stable::new_empty(k, {args.tokens, args.kv_heads, args.dim});
  args.out_q = out_q.mutable_data_ptr();
  args.out_k = out_k.mutable_data_ptr();
  FASTVLM_KERNEL(rope)(args);
  return {out_q, out_k};
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) { m.impl("rope", TORCH_BOX(&fastvlm::rope)); }

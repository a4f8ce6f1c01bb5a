// merge_attention as torch ops, forward and backward.
#include "../cpu/merge.h"

#include "bind.h"

namespace fastvlm {
namespace {

const float* floats(const Tensor& t, const char* name, const Tensor& rows) {
  check(t, name, 2);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
                      t.size(0) == rows.size(0) && t.size(1) == rows.size(1),
                  name, ": expected contiguous float32 of the rows and heads of out");
  return static_cast<const float*>(t.const_data_ptr());
}

const void* heads(const Tensor& t, const char* name, const Tensor& like) {
  check(t, name, 3);
  STD_TORCH_CHECK(dtype_of(t, name) == dtype_of(like, "out") && t.is_contiguous() &&
                      t.size(0) == like.size(0) && t.size(1) == like.size(1) &&
                      t.size(2) == like.size(2),
                  name, ": expected contiguous rows of the shape and dtype of out");
  return t.const_data_ptr();
}

MergeArgs merge_args(const Tensor& out, const Tensor& lse, const Tensor& other,
                     const Tensor& other_lse) {
  MergeArgs args{};
  args.a = heads(out, "out", out);
  args.b = heads(other, "other", out);
  args.dtype = dtype_of(out, "out");
  args.count = out.size(0) * out.size(1);
  args.dim = out.size(2);
  args.lse_a = floats(lse, "lse", out);
  args.lse_b = floats(other_lse, "other_lse", out);
  return args;
}

Tensor made_like(const Tensor& t) {
  return torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2)});
}

Tensor merge_attention(const Tensor& out, const Tensor& lse, const Tensor& other,
                       const Tensor& other_lse) {
  MergeArgs args = merge_args(out, lse, other, other_lse);
  Tensor merged = made_like(out);
  args.out = merged.mutable_data_ptr();
  FASTVLM_KERNEL(merge_attention)(args);
  return merged;
}

std::tuple<Tensor, Tensor, Tensor> merge_attention_backward(const Tensor& grad_out,
                                                            const Tensor& out, const Tensor& lse,
                                                            const Tensor& other,
                                                            const Tensor& other_lse) {
  MergeBackwardArgs args{};
  args.forward = merge_args(out, lse, other, other_lse);
  args.grad_out = heads(grad_out, "grad_out", out);
  Tensor da = made_like(out), db = made_like(out);
  Tensor dlse = torch::stable::new_empty(lse, {lse.size(0), lse.size(1)});
  args.da = da.mutable_data_ptr();
  args.db = db.mutable_data_ptr();
  args.dlse = static_cast<float*>(dlse.mutable_data_ptr());
  FASTVLM_KERNEL(merge_attention_backward)(args);
  return {da, db, dlse};
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def("merge_attention(Tensor out, Tensor lse, Tensor other, Tensor other_lse) -> Tensor");
  m.def(
      "merge_attention_backward(Tensor grad_out, Tensor out, Tensor lse, Tensor other, "
      "Tensor other_lse) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("merge_attention", TORCH_BOX(&fastvlm::merge_attention));
  m.impl("merge_attention_backward", TORCH_BOX(&fastvlm::merge_attention_backward));
}

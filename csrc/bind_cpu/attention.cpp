// attention and cached_attention as torch ops.
#include "../cpu/attention.h"

#include <algorithm>

#include "bind.h"

namespace fastvlm {
namespace {

Heads heads_of(const Tensor& t, const char* name, DType dtype) {
  check(t, name, 3);
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, ": expected q's dtype");
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

void check_heads(int64_t heads, int64_t kv_heads, int64_t dim, int64_t kv_dim) {
  STD_TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, "q has ", heads,
                  " heads, k has ", kv_heads);
  STD_TORCH_CHECK(dim == kv_dim, "q has head dimension ", dim, ", k has ", kv_dim);
}

void check_offsets(const int32_t* offsets, int64_t count, int64_t total, const char* name) {
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[count] <= total, name, ": must start at 0 and end by ",
                  total);
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(offsets[i] <= offsets[i + 1], name, ": must not decrease");
  }
}

// Everything of a call but where its results go.
AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& q_offsets, const Tensor& kv_offsets,
                             const Tensor& image_of, const std::optional<Tensor>& seed,
                             double scale, double softcap, bool causal, int64_t window,
                             double dropout_p) {
  AttentionArgs args{};
  args.dtype = dtype_of(q, "q");
  args.q = heads_of(q, "q", args.dtype);
  args.k = heads_of(k, "k", args.dtype);
  args.v = heads_of(v, "v", args.dtype);
  args.rows = q.size(0);
  args.heads = q.size(1);
  args.kv_heads = k.size(1);
  args.dim = q.size(2);
  check_heads(args.heads, args.kv_heads, args.dim, k.size(2));
  STD_TORCH_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
                  "v: expected the shape of k");
  args.q_offsets = indices(q_offsets, "q_offsets", 1);
  args.kv_offsets = indices(kv_offsets, "kv_offsets", 1);
  args.image_of = indices(image_of, "image_of", 1);
  args.segments = q_offsets.size(0) - 1;
  args.images = kv_offsets.size(0) - 1;
  STD_TORCH_CHECK(args.segments >= 0 && args.images >= 0 && image_of.size(0) == args.segments,
                  "q_offsets, kv_offsets, image_of: expected S + 1, I + 1 and S elements");
  check_offsets(args.q_offsets, args.segments, args.rows, "q_offsets");
  check_offsets(args.kv_offsets, args.images, k.size(0), "kv_offsets");
  STD_TORCH_CHECK(args.q_offsets[args.segments] == args.rows, "q_offsets: must end at ", args.rows);
  for (int64_t s = 0; s < args.segments; ++s) {
    STD_TORCH_CHECK(args.image_of[s] >= 0 && args.image_of[s] < args.images, "image_of: no image ",
                    args.image_of[s]);
  }
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.causal = causal;
  args.window = std::min(window, int64_t{1} << 40);  // sums with places must not overflow
  args.dropout = dropout_of(seed, dropout_p);
  return args;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& q_offsets, const Tensor& kv_offsets,
                                     const Tensor& image_of, const std::optional<Tensor>& seed,
                                     double scale, double softcap, bool causal, int64_t window,
                                     double dropout_p) {
  AttentionArgs args = attention_args(q, k, v, q_offsets, kv_offsets, image_of, seed, scale,
                                      softcap, causal, window, dropout_p);
  Tensor out = torch::stable::new_empty(q, {args.rows, args.heads, args.dim});
  Tensor stats = torch::stable::new_empty(q, {args.rows, args.heads, 2}, ScalarType::Float);
  args.out = out.mutable_data_ptr();
  args.stats = static_cast<float*>(stats.mutable_data_ptr());
  if (args.rows > 0 && args.heads > 0) FASTVLM_KERNEL(attention)(args);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& q_offsets, const Tensor& kv_offsets, const Tensor& image_of,
    const std::optional<Tensor>& seed, double scale, double softcap, bool causal, int64_t window,
    double dropout_p, bool need_q, bool need_k, bool need_v) {
  AttentionBackwardArgs args{};
  args.forward = attention_args(q, k, v, q_offsets, kv_offsets, image_of, seed, scale, softcap,
                                causal, window, dropout_p);
  AttentionArgs& a = args.forward;
  args.grad_out = heads_of(grad_out, "grad_out", a.dtype);
  for (int64_t d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(grad_out.size(d) == q.size(d), "grad_out: expected the shape of q");
  }
  args.keys = k.size(0);
  auto gradient = [&](const Tensor& like, bool need, void** to) {
    Tensor made = need ? torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)})
                       : torch::stable::new_empty(like, {0});
    if (need) *to = made.mutable_data_ptr();
    return made;
  };
  Tensor dq = gradient(q, need_q, &args.dq);
  Tensor dk = gradient(k, need_k, &args.dk);
  Tensor dv = gradient(v, need_v, &args.dv);
  if (a.kv_heads > 0 && a.dim > 0) FASTVLM_KERNEL(attention_backward)(args);
  return {dq, dk, dv};
}

Cache cache_of(const Tensor& t, const char* name, DType dtype) {
  check(t, name, 4);
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, ": expected q's dtype");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor cached_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& lengths, const std::optional<Tensor>& ancestry, double scale,
                        double softcap, int64_t window) {
  CachedAttentionArgs args{};
  args.dtype = dtype_of(q, "q");
  args.q = heads_of(q, "q", args.dtype);
  args.k = cache_of(k_cache, "k_cache", args.dtype);
  args.v = cache_of(v_cache, "v_cache", args.dtype);
  args.rows = q.size(0);
  args.heads = q.size(1);
  args.dim = q.size(2);
  args.cache_rows = k_cache.size(0);
  args.kv_heads = k_cache.size(2);
  const int64_t positions = k_cache.size(1);
  check_heads(args.heads, args.kv_heads, args.dim, k_cache.size(3));
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(v_cache.size(d) == k_cache.size(d), "v_cache: expected the shape of k_cache");
  }
  args.lengths = indices(lengths, "lengths", 1);
  STD_TORCH_CHECK(lengths.size(0) == args.rows, "lengths: expected one per row of q");
  for (int64_t r = 0; r < args.rows; ++r) {
    STD_TORCH_CHECK(args.lengths[r] >= 0 && args.lengths[r] <= positions,
                    "lengths: ", args.lengths[r], " is not within the cache's ", positions,
                    " positions");
  }
  if (ancestry.has_value()) {
    args.ancestry = indices(*ancestry, "ancestry", 2);
    STD_TORCH_CHECK(ancestry->size(0) == args.rows && ancestry->size(1) == positions,
                    "ancestry: expected [", args.rows, ", ", positions, "]");
    args.ancestry_row_stride = ancestry->stride(0);
    args.ancestry_position_stride = ancestry->stride(1);
  } else {
    STD_TORCH_CHECK(args.rows <= args.cache_rows, "the cache has ", args.cache_rows,
                    " rows, q has ", args.rows);
  }
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.window = std::min(window, int64_t{1} << 40);  // sums with places must not overflow
  int bad_ancestor = 0;
  args.bad_ancestor = &bad_ancestor;
  Tensor out = torch::stable::new_empty(q, {args.rows, args.heads, args.dim});
  args.out = out.mutable_data_ptr();
  if (args.rows > 0 && args.heads > 0) FASTVLM_KERNEL(cached_attention)(args);
  STD_TORCH_CHECK(bad_ancestor == 0, "ancestry: names a row beyond the cache's ", args.cache_rows);
  return out;
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor kv_offsets, "
      "Tensor image_of, Tensor? seed, float scale, float softcap, bool causal, int window, "
      "float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, "
      "Tensor q_offsets, Tensor kv_offsets, Tensor image_of, Tensor? seed, float scale, "
      "float softcap, bool causal, int window, float dropout_p, bool need_q, bool need_k, "
      "bool need_v) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
      "Tensor? ancestry, float scale, float softcap, int window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastvlm::attention));
  m.impl("attention_backward", TORCH_BOX(&fastvlm::attention_backward));
  m.impl("cached_attention", TORCH_BOX(&fastvlm::cached_attention));
}

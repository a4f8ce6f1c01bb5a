// attention and cached_attention as torch ops.
#include "attention.h"

namespace fastvlm {
namespace {

// Everything of a call but where its results go.
AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& q_offsets, const Tensor& kv_offsets,
                             const Tensor& image_of, const std::optional<Tensor>& seed,
                             double scale, double softcap, bool causal, int64_t window,
                             double dropout_p, const std::optional<Tensor>& position_bias,
                             int64_t window_after) {
  AttentionArgs args{};
  args.dtype = dtype_of(q, "q");
  args.q = heads_of(q, "q", args.dtype);
  args.rows = q.size(0);
  args.heads = q.size(1);
  args.dim = q.size(2);
  set_keys(args, k, v, q_offsets, kv_offsets, image_of);
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.causal = causal;
  args.window = bounded(window);
  args.window_after = window_after > 0 ? bounded(window_after) : args.window;
  args.dropout = dropout_of(seed, dropout_p);
  args.bias = bias_of(position_bias, args.heads);
  return args;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& q_offsets, const Tensor& kv_offsets,
                                     const Tensor& image_of, const std::optional<Tensor>& seed,
                                     double scale, double softcap, bool causal, int64_t window,
                                     double dropout_p, const std::optional<Tensor>& position_bias,
                                     int64_t window_after) {
  AttentionArgs args =
      attention_args(q, k, v, q_offsets, kv_offsets, image_of, seed, scale, softcap, causal, window,
                     dropout_p, position_bias, window_after);
  Tensor out = torch::stable::new_empty(q, {args.rows, args.heads, args.dim});
  Tensor stats = torch::stable::new_empty(q, {args.rows, args.heads, 2}, ScalarType::Float);
  args.out = out.mutable_data_ptr();
  args.stats = static_cast<float*>(stats.mutable_data_ptr());
  if (args.rows > 0 && args.heads > 0) FASTVLM_KERNEL(attention)(args);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& q_offsets, const Tensor& kv_offsets, const Tensor& image_of,
    const std::optional<Tensor>& seed, double scale, double softcap, bool causal, int64_t window,
    double dropout_p, const std::optional<Tensor>& position_bias, bool need_q, bool need_k,
    bool need_v, bool need_bias, int64_t window_after, const std::optional<Tensor>& grad_lse) {
  AttentionBackwardArgs args{};
  args.forward = attention_args(q, k, v, q_offsets, kv_offsets, image_of, seed, scale, softcap,
                                causal, window, dropout_p, position_bias, window_after);
  AttentionArgs& a = args.forward;
  args.grad_out = heads_of(grad_out, "grad_out", a.dtype);
  for (int64_t d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(grad_out.size(d) == q.size(d), "grad_out: expected the shape of q");
  }
  args.keys = k.size(0);
  if (grad_lse.has_value()) {
    check(*grad_lse, "grad_lse", 2);
    STD_TORCH_CHECK(grad_lse->scalar_type() == ScalarType::Float && grad_lse->is_contiguous() &&
                        grad_lse->size(0) == a.rows && grad_lse->size(1) == a.heads,
                    "grad_lse: expected contiguous float32 [", a.rows, ", ", a.heads, "]");
    args.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
  }
  auto gradient = [&](const Tensor& like, bool need, void** to) {
    Tensor made = need ? torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)})
                       : torch::stable::new_empty(like, {0});
    if (need) *to = made.mutable_data_ptr();
    return made;
  };
  Tensor dq = gradient(q, need_q, &args.dq);
  Tensor dk = gradient(k, need_k, &args.dk);
  Tensor dv = gradient(v, need_v, &args.dv);
  Tensor dbias = torch::stable::new_empty(position_bias.value_or(q), {0});
  if (need_bias) {
    STD_TORCH_CHECK(position_bias.has_value(), "need_bias: there is no position_bias");
    const int64_t entries = position_bias->size(1);
    dbias = torch::stable::new_empty(q, {a.heads, entries}, ScalarType::Float);
    args.dbias = static_cast<float*>(dbias.mutable_data_ptr());
    std::fill_n(args.dbias, a.heads * entries, 0.0f);
  }
  if (a.kv_heads > 0 && a.dim > 0) FASTVLM_KERNEL(attention_backward)(args);
  return {dq, dk, dv, dbias};
}

// lse: where the logsumexp of each row goes, or null.
Tensor run_cached(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& lengths, const std::optional<Tensor>& ancestry, double scale,
                  double softcap, int64_t window, const std::optional<Tensor>& position_bias,
                  Tensor* lse) {
  CachedAttentionArgs args{};
  args.dtype = dtype_of(q, "q");
  args.q = heads_of(q, "q", args.dtype);
  args.rows = q.size(0);
  args.heads = q.size(1);
  args.dim = q.size(2);
  set_cache(args, k_cache, v_cache, lengths, ancestry);
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.window = bounded(window);
  args.bias = bias_of(position_bias, args.heads);
  int bad_ancestor = 0;
  args.bad_ancestor = &bad_ancestor;
  Tensor out = torch::stable::new_empty(q, {args.rows, args.heads, args.dim});
  args.out = out.mutable_data_ptr();
  if (lse != nullptr) {
    *lse = torch::stable::new_empty(q, {args.rows, args.heads}, ScalarType::Float);
    args.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  if (args.rows > 0 && args.heads > 0) FASTVLM_KERNEL(cached_attention)(args);
  STD_TORCH_CHECK(bad_ancestor == 0, "ancestry: names a row beyond the cache's ", args.cache_rows);
  return out;
}

Tensor cached_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& lengths, const std::optional<Tensor>& ancestry, double scale,
                        double softcap, int64_t window,
                        const std::optional<Tensor>& position_bias) {
  return run_cached(q, k_cache, v_cache, lengths, ancestry, scale, softcap, window, position_bias,
                    nullptr);
}

std::tuple<Tensor, Tensor> cached_attention_lse(const Tensor& q, const Tensor& k_cache,
                                                const Tensor& v_cache, const Tensor& lengths,
                                                const std::optional<Tensor>& ancestry, double scale,
                                                double softcap, int64_t window,
                                                const std::optional<Tensor>& position_bias) {
  Tensor lse = q;
  Tensor out = run_cached(q, k_cache, v_cache, lengths, ancestry, scale, softcap, window,
                          position_bias, &lse);
  return {out, lse};
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor kv_offsets, "
      "Tensor image_of, Tensor? seed, float scale, float softcap, bool causal, int window, "
      "float dropout_p, Tensor? position_bias, int window_after=0) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, "
      "Tensor q_offsets, Tensor kv_offsets, Tensor image_of, Tensor? seed, float scale, "
      "float softcap, bool causal, int window, float dropout_p, Tensor? position_bias, "
      "bool need_q, bool need_k, bool need_v, bool need_bias, int window_after=0, "
      "Tensor? grad_lse=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
      "Tensor? ancestry, float scale, float softcap, int window, Tensor? position_bias) -> Tensor");
  m.def(
      "cached_attention_lse(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
      "Tensor? ancestry, float scale, float softcap, int window, Tensor? position_bias) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastvlm::attention));
  m.impl("attention_backward", TORCH_BOX(&fastvlm::attention_backward));
  m.impl("cached_attention", TORCH_BOX(&fastvlm::cached_attention));
  m.impl("cached_attention_lse", TORCH_BOX(&fastvlm::cached_attention_lse));
}

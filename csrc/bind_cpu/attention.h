// Arguments of the attention kernels from tensors, for their own ops and for whole steps.
#pragma once

#include <algorithm>
#include <cstring>

#include "../cpu/attention.h"
#include "bind.h"

namespace fastvlm {

inline Heads heads_of(const Tensor& t, const char* name, DType dtype) {
  check(t, name, 3);
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, ": expected q's dtype");
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

inline void check_heads(int64_t heads, int64_t kv_heads, int64_t dim, int64_t kv_dim) {
  STD_TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, "q has ", heads,
                  " heads, k has ", kv_heads);
  STD_TORCH_CHECK(dim == kv_dim, "q has head dimension ", dim, ", k has ", kv_dim);
}

// entries of each head, for the distances from -reach to reach; null where there are none
inline PositionBias bias_of(const std::optional<Tensor>& t, int64_t heads) {
  if (!t.has_value()) return {};
  check(*t, "position_bias", 2);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() &&
                      t->size(0) == heads && t->size(1) % 2 == 1,
                  "position_bias: expected contiguous float32 [", heads, ", an odd number]");
  return {static_cast<const float*>(t->const_data_ptr()), t->size(1) / 2};
}

inline int64_t bounded(int64_t window) {
  return std::min(window, int64_t{1} << 40);  // sums with places must not overflow
}

inline void check_offsets(const int32_t* offsets, int64_t count, int64_t total, const char* name) {
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[count] <= total, name, ": must start at 0 and end by ",
                  total);
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(offsets[i] <= offsets[i + 1], name, ": must not decrease");
  }
}

// k and v, and who reads them, of arguments that know their q.
inline void set_keys(AttentionArgs& args, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                     const Tensor& kv_offsets, const Tensor& image_of) {
  args.k = heads_of(k, "k", args.dtype);
  args.v = heads_of(v, "v", args.dtype);
  args.kv_heads = k.size(1);
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
}

// Writes rows [R, Hkv * D] to their cache rows at a position.
inline void append(const Matrix& from, Tensor cache, int64_t position) {
  STD_TORCH_CHECK(cache.dim() == 4 && cache.is_contiguous() && cache.size(0) >= from.rows &&
                      cache.size(2) * cache.size(3) == from.cols && position >= 0 &&
                      position < cache.size(1),
                  "caches: expected contiguous [", from.rows, " or more, ", position,
                  " + 1 or more, heads, dim] of ", from.cols, " in a position");
  const int64_t size = from.dtype == DType::kFloat ? 4 : 2;
  char* to = static_cast<char*>(cache.mutable_data_ptr()) + position * from.cols * size;
  const int64_t stride = cache.stride(0) * size, bytes = from.cols * size;
  for (int64_t r = 0; r < from.rows; ++r) {
    std::memcpy(to + r * stride, static_cast<const char*>(from.data) + r * bytes, bytes);
  }
}

inline Cache cache_of(const Tensor& t, const char* name, DType dtype) {
  check(t, name, 4);
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, ": expected q's dtype");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// The cache, and what of it each row reads, of arguments that know their q.
inline void set_cache(CachedAttentionArgs& args, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& lengths, const std::optional<Tensor>& ancestry) {
  args.k = cache_of(k_cache, "k_cache", args.dtype);
  args.v = cache_of(v_cache, "v_cache", args.dtype);
  args.cache_rows = k_cache.size(0);
  args.kv_heads = k_cache.size(2);
  const int64_t positions = k_cache.size(1);
  check_heads(args.heads, args.kv_heads, args.dim, k_cache.size(3));
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(v_cache.size(d) == k_cache.size(d), "v_cache: expected the shape of k_cache");
  }
  args.lengths = indices(lengths, "lengths", 1);
  STD_TORCH_CHECK(lengths.size(0) == args.rows, "lengths: expected one per row of q");
  int64_t longest = 0;
  for (int64_t r = 0; r < args.rows; ++r) {
    STD_TORCH_CHECK(args.lengths[r] >= 0 && args.lengths[r] <= positions,
                    "lengths: ", args.lengths[r], " is not within the cache's ", positions,
                    " positions");
    longest = std::max<int64_t>(longest, args.lengths[r]);
  }
  if (!ancestry.has_value()) {
    STD_TORCH_CHECK(args.rows <= args.cache_rows, "the cache has ", args.cache_rows,
                    " rows, q has ", args.rows);
    return;
  }
  args.ancestry = indices(*ancestry, "ancestry", 2);
  STD_TORCH_CHECK(ancestry->size(0) == args.rows && ancestry->size(1) >= longest,
                  "ancestry: expected [", args.rows, ", ", longest, " or more]");
  args.ancestry_row_stride = ancestry->stride(0);
  args.ancestry_position_stride = ancestry->stride(1);
}

}  // namespace fastvlm

// Attention of few query rows as torch ops.
#include "../cuda/attention.h"

#include "arrivals.h"
#include "bind.h"

namespace fastvlm {
namespace cuda {
namespace {

const void* heads_of(const Tensor& t, const char* name, const AttentionArgs& args, int64_t dims) {
  const void* data = input(t, name, dims);
  STD_TORCH_CHECK(dtype_of(t, name) == args.dtype, name, ": expected q's dtype");
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t d = 0; d < dims - 1; ++d) fits = fits && (t.size(d) <= 1 || t.stride(d) % 8 == 0);
  STD_TORCH_CHECK(fits, name, ": every head must begin at a multiple of 16 bytes");
  return data;
}

AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, int64_t dims,
                             double inner, double outer, bool capped, int64_t splits) {
  AttentionArgs args{};
  args.dtype = dtype_of(q, "q");
  args.q = heads_of(q, "q", args, 3);
  args.k = heads_of(k, "k", args, dims);
  args.v = heads_of(v, "v", args, dims);
  args.rows = q.size(0);
  args.heads = q.size(1);
  args.dim = q.size(2);
  args.kv_heads = k.size(dims - 2);
  STD_TORCH_CHECK(args.kv_heads > 0 && args.heads % args.kv_heads == 0, "q has ", args.heads,
                  " heads, k has ", args.kv_heads);
  STD_TORCH_CHECK(args.kv_heads <= 65535, "k: too many heads");
  for (int64_t d = 0; d < dims; ++d) {
    STD_TORCH_CHECK(k.size(d) == v.size(d), "v: expected the shape of k");
  }
  STD_TORCH_CHECK(k.size(dims - 1) == args.dim, "k: expected the head dimension of q");
  STD_TORCH_CHECK(splits >= 1 && splits <= kMostSplits, "splits: expected 1 to ", kMostSplits);
  STD_TORCH_CHECK(args.rows * args.heads <= INT32_MAX, "q: too many rows");
  args.q_row = q.stride(0);
  args.q_head = q.stride(1);
  args.k_row = k.stride(0);
  args.k_head = k.stride(dims - 2);
  args.v_row = v.stride(0);
  args.v_head = v.stride(dims - 2);
  args.inner = static_cast<float>(inner);
  args.outer = static_cast<float>(outer);
  args.capped = capped;
  args.splits = splits;
  return args;
}

// Where the keys are split; the tensor must live until the launch.
Optional set_arrivals(AttentionArgs& args, const Call& call, const Tensor& q, int64_t tiles) {
  if (args.splits == 1) return std::nullopt;
  return set_arrivals(args.arrivals, call, q, tiles * args.kv_heads);
}

struct Results {
  Tensor out, stats, parts, parts_stats;
};

Results results(const Tensor& q, AttentionArgs& args, bool stats_wanted) {
  const int64_t rows = args.rows, heads = args.heads, dim = args.dim, splits = args.splits;
  Tensor out = result(q, "out", true, {rows, heads, dim}, q.scalar_type(), &args.out);
  Tensor stats = result(q, "stats", stats_wanted, {rows, heads, 2}, ScalarType::Float, &args.stats);
  Tensor parts =
      result(q, "parts", splits > 1, {splits, rows, heads, dim}, ScalarType::Float, &args.parts);
  Tensor parts_stats = result(q, "parts_stats", splits > 1, {splits, rows, heads, 2},
                              ScalarType::Float, &args.parts_stats);
  return {out, stats, parts, parts_stats};
}

std::tuple<Tensor, Tensor> cross_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& kv_offsets, const Tensor& reader_offsets,
                                           const Optional& rows_by_image, int64_t max_readers,
                                           double inner, double outer, bool capped,
                                           int64_t splits) {
  const Call call(q);
  AttentionArgs args = attention_args(q, k, v, 3, inner, outer, capped, splits);
  args.kv_offsets = indices(kv_offsets, "kv_offsets", 1);
  args.reader_offsets = indices(reader_offsets, "reader_offsets", 1);
  args.images = kv_offsets.size(0) - 1;
  STD_TORCH_CHECK(args.images >= 0 && reader_offsets.size(0) == args.images + 1,
                  "reader_offsets: expected as many as kv_offsets");
  if (rows_by_image.has_value()) {
    args.rows_by_image = static_cast<const int64_t*>(input(*rows_by_image, "rows_by_image", 1));
    STD_TORCH_CHECK(rows_by_image->scalar_type() == ScalarType::Long &&
                        rows_by_image->size(0) == args.rows && rows_by_image->is_contiguous(),
                    "rows_by_image: expected a contiguous int64 for each row");
  }
  args.row_blocks = (max_readers * (args.heads / args.kv_heads) + kQueryRows - 1) / kQueryRows;
  Results made = results(q, args, true);
  const Optional counters = set_arrivals(args, call, q, args.images * args.row_blocks);
  FASTVLM_CUDA_KERNEL(cross_attention)(args, call.stream());
  return {made.out, made.stats};
}

Tensor cached_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& lengths, const Optional& ancestry, int64_t window,
                        double inner, double outer, bool capped, int64_t splits) {
  const Call call(q);
  AttentionArgs args = attention_args(q, k_cache, v_cache, 4, inner, outer, capped, splits);
  args.k_time = k_cache.stride(1);
  args.v_time = v_cache.stride(1);
  args.lengths = indices(lengths, "lengths", 1);
  STD_TORCH_CHECK(lengths.size(0) == args.rows, "lengths: expected one for each row");
  STD_TORCH_CHECK(k_cache.size(1) <= INT32_MAX, "k_cache: too many positions");
  if (ancestry.has_value()) {
    args.ancestry = indices(*ancestry, "ancestry", 2);
    STD_TORCH_CHECK(ancestry->size(0) == args.rows && ancestry->size(1) == k_cache.size(1),
                    "ancestry: expected [rows, positions]");
    args.ancestry_row = ancestry->stride(0);
  } else {
    STD_TORCH_CHECK(k_cache.size(0) >= args.rows, "k_cache: expected a row for each of q");
  }
  args.window = window;
  args.row_blocks = (args.heads / args.kv_heads + kQueryRows - 1) / kQueryRows;
  Results made = results(q, args, false);
  const Optional counters = set_arrivals(args, call, q, args.rows * args.row_blocks);
  FASTVLM_CUDA_KERNEL(cached_attention)(args, call.stream());
  return made.out;
}

}  // namespace
}  // namespace cuda
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cuda, m) {
  m.def(
      "cross_attention(Tensor q, Tensor k, Tensor v, Tensor kv_offsets, Tensor reader_offsets, "
      "Tensor? rows_by_image, int max_readers, float inner, float outer, bool capped, int splits) "
      "-> (Tensor, Tensor)");
  m.def(
      "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
      "Tensor? ancestry, int window, float inner, float outer, bool capped, int splits) -> Tensor");
}

FASTVLM_IMPL {
  m.impl("cross_attention", TORCH_BOX(&fastvlm::cuda::cross_attention));
  m.impl("cached_attention", TORCH_BOX(&fastvlm::cuda::cached_attention));
}

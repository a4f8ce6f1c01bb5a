// Registers the CPU kernels as torch ops, checks what could touch foreign memory, and chooses the
// copy of the kernels that fits the machine. Torch's stable ABI: one library serves many versions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/kernels.h"

namespace fastvlm {

void run_tasks(int64_t tasks, TaskBody body, void* context) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min(tasks, workers());
  if (threads == 0) return;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < tasks; task = next++) body(context, task, worker);
    }
  });
}

int64_t workers() { return torch::stable::get_num_threads(); }

constexpr std::align_val_t kCacheLine{64};
void* allocate(int64_t bytes) { return ::operator new(static_cast<size_t>(bytes), kCacheLine); }
void release(void* memory) { ::operator delete(memory, kCacheLine); }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Kernels {
  const char* name;
  decltype(&DEFAULT::linear) linear;
  decltype(&DEFAULT::gelu_mlp) gelu_mlp;
  decltype(&DEFAULT::geglu_mlp) geglu_mlp;
  decltype(&DEFAULT::attention) attention;
  decltype(&DEFAULT::cached_attention) cached_attention;
};

#define FASTVLM_KERNELS(CAPABILITY)                                                  \
  Kernels {                                                                          \
    #CAPABILITY, &CAPABILITY::linear, &CAPABILITY::gelu_mlp, &CAPABILITY::geglu_mlp, \
        &CAPABILITY::attention, &CAPABILITY::cached_attention                        \
  }

// The best copy first; `wanted` (empty for any) names one of them.
Kernels choose(std::string wanted) {
  for (char& c : wanted) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
#if defined(FASTVLM_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw");
  if (avx512 && (wanted.empty() || wanted == "AVX512")) return FASTVLM_KERNELS(AVX512);
  if (avx2 && (wanted.empty() || wanted == "AVX2")) return FASTVLM_KERNELS(AVX2);
#endif
  STD_TORCH_CHECK(wanted.empty() || wanted == "DEFAULT", "FASTVLM_CPU_CAPABILITY=", wanted,
                  ": not a capability of this CPU and this build");
  return FASTVLM_KERNELS(DEFAULT);
}

const Kernels& kernels() {
  static const Kernels chosen = [] {
    const char* wanted = std::getenv("FASTVLM_CPU_CAPABILITY");
    return choose(wanted == nullptr ? "" : wanted);
  }();
  return chosen;
}

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

void check(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.dim() == dims, name, ": expected ", dims, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1, name,
                  ": the last dimension must be contiguous");
}

Matrix matrix(const Tensor& t, const char* name) {
  check(t, name, 2);
  return {t.const_data_ptr(), dtype_of(t, name), t.size(0), t.size(1), t.stride(0)};
}

Matrix weight_for(const Tensor& t, const char* name, int64_t cols, int64_t rows = -1) {
  const Matrix m = matrix(t, name);
  STD_TORCH_CHECK(m.cols == cols && (rows < 0 || m.rows == rows), name, ": shape [", m.rows, ", ",
                  m.cols, "] does not fit");
  return m;
}

Matrix bias_for(const std::optional<Tensor>& t, const char* name, int64_t size) {
  if (!t.has_value()) return {};
  check(*t, name, 1);
  STD_TORCH_CHECK(t->size(0) == size, name, ": expected ", size, " elements, got ", t->size(0));
  return {t->const_data_ptr(), dtype_of(*t, name), 1, size, size};
}

Tensor empty_rows(const Tensor& like, int64_t rows, int64_t cols) {
  return torch::stable::new_empty(like, {rows, cols});
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Matrix rows = matrix(x, "x");
  const Matrix w = weight_for(weight, "weight", rows.cols);
  const Matrix b = bias_for(bias, "bias", w.rows);
  Tensor out = empty_rows(x, rows.rows, w.rows);
  kernels().linear(rows, w, b, out.mutable_data_ptr());
  return out;
}

Tensor gelu_mlp(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                const Tensor& w2, const std::optional<Tensor>& b2, bool tanh) {
  const Matrix rows = matrix(x, "x");
  const Matrix first = weight_for(w1, "w1", rows.cols);
  const Matrix second = weight_for(w2, "w2", first.rows);
  const Matrix first_bias = bias_for(b1, "b1", first.rows);
  const Matrix second_bias = bias_for(b2, "b2", second.rows);
  Tensor out = empty_rows(x, rows.rows, second.rows);
  kernels().gelu_mlp(rows, first, first_bias, second, second_bias, tanh, out.mutable_data_ptr());
  return out;
}

Tensor geglu_mlp(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                 bool tanh) {
  const Matrix rows = matrix(x, "x");
  const Matrix gate = weight_for(w_gate, "w_gate", rows.cols);
  const Matrix up = weight_for(w_up, "w_up", rows.cols, gate.rows);
  const Matrix down = weight_for(w_down, "w_down", gate.rows);
  Tensor out = empty_rows(x, rows.rows, down.rows);
  kernels().geglu_mlp(rows, gate, up, down, tanh, out.mutable_data_ptr());
  return out;
}

const int32_t* indices(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == dims && t.scalar_type() == ScalarType::Int, name,
                  ": expected an int32 CPU tensor of ", dims, " dimensions");
  STD_TORCH_CHECK(dims > 1 || t.is_contiguous(), name, ": must be contiguous");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

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

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& q_offsets, const Tensor& kv_offsets,
                                     const Tensor& image_of, double scale, double softcap,
                                     bool causal, int64_t window) {
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
  args.window = window;
  Tensor out = torch::stable::new_empty(q, {args.rows, args.heads, args.dim});
  Tensor lse = torch::stable::new_empty(q, {args.rows, args.heads}, ScalarType::Float);
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (args.rows > 0 && args.heads > 0) kernels().attention(args);
  return {out, lse};
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
  args.window = window;
  int bad_ancestor = 0;
  args.bad_ancestor = &bad_ancestor;
  Tensor out = torch::stable::new_empty(q, {args.rows, args.heads, args.dim});
  args.out = out.mutable_data_ptr();
  if (args.rows > 0 && args.heads > 0) kernels().cached_attention(args);
  STD_TORCH_CHECK(bad_ancestor == 0, "ancestry: names a row beyond the cache's ", args.cache_rows);
  return out;
}

std::string capability() { return kernels().name; }

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY(fastvlm_cpu, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("gelu_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, bool tanh) -> Tensor");
  m.def("geglu_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, bool tanh) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor kv_offsets, "
      "Tensor image_of, float scale, float softcap, bool causal, int window) -> (Tensor, Tensor)");
  m.def(
      "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
      "Tensor? ancestry, float scale, float softcap, int window) -> Tensor");
  m.def("capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&fastvlm::linear));
  m.impl("gelu_mlp", TORCH_BOX(&fastvlm::gelu_mlp));
  m.impl("geglu_mlp", TORCH_BOX(&fastvlm::geglu_mlp));
  m.impl("attention", TORCH_BOX(&fastvlm::attention));
  m.impl("cached_attention", TORCH_BOX(&fastvlm::cached_attention));
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&fastvlm::capability));
}

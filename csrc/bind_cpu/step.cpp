// A whole decoding step in one call: the kernels of a stack's layers, one after the other, as
// fastvlm/cpu/step.py has written them down. What lies between them stays in one arena.
#include <chrono>
#include <cmath>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../cpu/merge.h"
#include "../cpu/norm.h"
#include "../cpu/rope.h"
#include "attention.h"
#include "bind.h"
#include "registers.h"
#include "weights.h"

namespace fastvlm {
namespace {

// In the order of OPS in fastvlm/cpu/step.py.
enum Op : int64_t {
  kLinear,
  kGeluMlp,
  kGegluMlp,
  kActivate,
  kResidualLayerNorm,
  kRmsNorm,
  kResidualRmsNorm,
  kRope,
  kSelfAttention,
  kCrossAttention,
  kLayerNorm,
  kMergedAttention,
  kOps
};

struct Inputs {
  const std::vector<Tensor>& tensors;
  const std::vector<Tensor>& caches;  // K and V of each layer, [rows, capacity, Hkv, D]
  int64_t start;                      // the position of the new tokens
  const Tensor& lengths;
  const std::optional<Tensor>& ancestry;
  const std::vector<Tensor>& where;     // q_offsets, kv_offsets, image_of
  const std::vector<Tensor>& rotation;  // cos and sin, once for each way to turn
};

class Step : public Registers {
 public:
  Step(const Tensor& x, const Inputs& inputs, const Tensor& numbers)
      : Registers(x, inputs.tensors, numbers), in_(inputs) {}

  void run(Reader code, double* seconds) {
    while (!code.done()) {
      const int64_t op = code.next();
      operands(code);
      const auto begin = std::chrono::steady_clock::now();
      STD_TORCH_CHECK(op >= 0 && op < kOps, "code: no op ", op);
      dispatch(static_cast<Op>(op));
      if (seconds == nullptr) continue;
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
      seconds[op] += taken.count();
    }
    check_written();
  }

 private:
  void dispatch(Op op) {
    switch (op) {
      case kLinear: return linear();
      case kGeluMlp: return gelu_mlp();
      case kGegluMlp: return geglu_mlp();
      case kActivate: return activate();
      case kResidualLayerNorm: return residual_layer_norm();
      case kRmsNorm: return rms_norm();
      case kResidualRmsNorm: return residual_rms_norm();
      case kRope: return rope();
      case kSelfAttention: return self_attention();
      case kCrossAttention: return cross_attention();
      case kLayerNorm: return layer_norm();
      case kMergedAttention: return merged_attention();
      case kOps: return;
    }
  }

  void linear() {
    const Matrix x = rows(0);
    const int64_t weights = tensors_.size / 3, parts = weights > 0 ? out_.size / weights : 0;
    STD_TORCH_CHECK(
        parts > 0 && 3 * weights == tensors_.size && parts * weights == out_.size,
        "code: linear takes three tensors for each weight, and as many results of each");
    const bool lies = transposed(0);
    products_.clear();
    for (int64_t i = 0; i < weights; ++i) {
      const std::optional<Tensor> scale = optional(3 * i + 1);
      const Tensor weight = tensor(3 * i);
      const Matrix w = scale.has_value() ? scaled_weight_for(weight, *scale, x.cols)
                                         : kept_weight_for(weight, "weight", x.cols, lies);
      const Matrix bias = bias_for(optional(3 * i + 2), "bias", w.rows);
      STD_TORCH_CHECK(w.rows % parts == 0, "code: ", w.rows, " outputs are no ", parts, " parts");
      const int64_t each = w.rows / parts;
      for (int64_t p = 0; p < parts; ++p) {
        products_.push_back(part_of(w, bias, p * each, each, write(i * parts + p, each)));
      }
    }
    FASTVLM_KERNEL(linear)(x, products_.data(), out_.size, dtype_);
  }

  void gelu_mlp() {
    const bool lies = transposed(1);
    const Matrix x = rows(0), w1 = kept_weight_for(tensor(0), "w1", x.cols, lies);
    const Matrix w2 = kept_weight_for(tensor(2), "w2", w1.rows, lies);
    const Matrix b1 = bias_for(optional(1), "b1", w1.rows);
    const Matrix b2 = bias_for(optional(3), "b2", w2.rows);
    FASTVLM_KERNEL(gelu_mlp)(x, w1, b1, w2, b2, activation(), write(0, w2.rows));
  }

  void geglu_mlp() {
    const Matrix x = rows(0), gate = weight_for(tensor(0), "w_gate", x.cols);
    const Matrix up = weight_for(tensor(1), "w_up", x.cols, gate.rows);
    const Matrix down = weight_for(tensor(2), "w_down", gate.rows);
    FASTVLM_KERNEL(geglu_mlp)(x, gate, up, down, activation(), write(0, down.rows));
  }

  void activate() {
    const Matrix pre = rows(0);
    ActivationArgs args{};
    args.dtype = dtype_;
    args.count = rows_ * pre.cols;
    args.pre = pre.data;
    if (rows_of_.size > 1) {
      const Matrix up = rows(1);
      STD_TORCH_CHECK(up.cols == pre.cols, "code: activate of rows of different lengths");
      args.up = up.data;
    }
    args.activation = activation();
    args.hidden = write(0, pre.cols);
    FASTVLM_KERNEL(activate)(args);
  }

  // What the norms share: x, whose rows are so many parts with a norm each, and a residual where
  // there are two rows.
  NormArgs norm(int64_t parts = 1) {
    const Matrix x = rows(0);
    STD_TORCH_CHECK(parts > 0 && x.cols % parts == 0 && (parts == 1 || rows_of_.size == 1),
                    "code: rows of ", x.cols, " are no ", parts, " parts with a norm each");
    NormArgs args{};
    args.dtype = dtype_;
    args.rows = rows_ * parts;
    args.cols = x.cols / parts;
    args.x = {x.data, args.cols};
    if (rows_of_.size > 1) {
      const Matrix residual = rows(1);
      STD_TORCH_CHECK(residual.cols == x.cols, "code: a residual of other rows than x");
      args.residual = {residual.data, residual.cols};
    }
    args.weight = vector_for(tensor(0), "weight", args.cols);
    args.eps = static_cast<float>(number(0));
    args.out = write(0, x.cols);
    return args;
  }

  void residual_layer_norm() {
    NormArgs args = norm();
    args.bias = vector_for(tensor(1), "bias", args.cols);
    FASTVLM_KERNEL(residual_layer_norm)(args);
  }

  // norm(x); with a residual residual + x, and the norm of that
  NormArgs norm_and_sum(int64_t parts = 1) {
    STD_TORCH_CHECK(out_.size == rows_of_.size, "code: a result more with a residual");
    NormArgs args = norm(parts);
    if (out_.size > 1) {
      args.y = args.out;
      args.out = write(1, args.cols);
    }
    return args;
  }

  void layer_norm() {
    NormArgs args = norm_and_sum();
    args.bias = vector_for(tensor(1), "bias", args.cols);
    FASTVLM_KERNEL(residual_layer_norm)(args);
  }

  // as layer_norm, of parts of the rows; with a gate residual + tanh(gate) x
  void rms_norm() {
    NormArgs args = norm_and_sum(integer(2));
    args.offset = static_cast<float>(number(1));
    args.gate = gate_for(optional(1));
    FASTVLM_KERNEL(rms_norm)(args);
  }

  void residual_rms_norm() {
    NormArgs args = norm();
    args.offset = static_cast<float>(number(1));
    const std::optional<Tensor> next = optional(2);
    STD_TORCH_CHECK(next.has_value() == (out_.size == 2), "code: two results with a next weight");
    args.gate = gate_for(optional(1));
    if (next.has_value()) {
      args.next_weight = vector_for(*next, "next_weight", args.cols);
      args.y = write(1, args.cols);
    }
    FASTVLM_KERNEL(residual_rms_norm)(args);
  }

  void rope() {
    const Matrix q = rows(0), k = rows(1);
    RopeArgs args{};
    args.dtype = dtype_;
    args.dim = integer(0);
    args.tokens = rows_;
    args.heads = heads_in(q.cols, args.dim);
    args.kv_heads = heads_in(k.cols, args.dim);
    const int64_t pair = 2 * integer_or(1, 0), tables = static_cast<int64_t>(in_.rotation.size());
    STD_TORCH_CHECK(pair >= 0 && pair + 1 < tables, "rotation: expected cos and sin at ", pair);
    args.cos = matrix(in_.rotation[pair], "cos");
    args.sin = matrix(in_.rotation[pair + 1], "sin");
    for (const Matrix& table : {args.cos, args.sin}) {
      STD_TORCH_CHECK(table.rows == rows_ && table.cols == args.cos.cols && table.cols % 2 == 0 &&
                          table.cols <= args.dim,
                      "cos, sin: expected [", rows_, ", an even number up to ", args.dim, "]");
    }
    args.q = q.data;
    args.k = k.data;
    args.q_strides[0] = q.cols;
    args.k_strides[0] = k.cols;
    args.q_strides[1] = args.k_strides[1] = args.dim;
    args.out_q = write(0, q.cols);
    args.out_k = write(1, k.cols);
    FASTVLM_KERNEL(rope)(args);
  }

  // The new token of each row against its cache, to which it is appended. lse: or null.
  void attend_cache(const std::optional<Tensor>& bias, void* out, float* lse) {
    const Matrix q = rows(0), k = rows(1), v = rows(2);
    const size_t layer = static_cast<size_t>(integer(1));
    STD_TORCH_CHECK(2 * layer + 1 < in_.caches.size(), "caches: none of layer ", layer);
    const Tensor& k_cache = in_.caches[2 * layer];
    const Tensor& v_cache = in_.caches[2 * layer + 1];
    CachedAttentionArgs args{};
    args.dtype = dtype_;
    args.dim = integer(0);
    args.rows = rows_;
    args.heads = heads_in(q.cols, args.dim);
    args.q = {q.data, q.cols, args.dim};
    set_cache(args, k_cache, v_cache, in_.lengths, in_.ancestry);
    append(k, k_cache, in_.start);
    append(v, v_cache, in_.start);
    args.window = bounded(integer(2));
    args.scale = static_cast<float>(number(3));
    args.softcap = static_cast<float>(number(4));
    args.bias = bias_of(bias, args.heads);
    int bad_ancestor = 0;
    args.bad_ancestor = &bad_ancestor;
    args.out = out;
    args.lse = lse;
    FASTVLM_KERNEL(cached_attention)(args);
    STD_TORCH_CHECK(bad_ancestor == 0, "ancestry: names a row beyond the cache's ",
                    args.cache_rows);
  }

  // The new token of each row against the image of its prompt; stats_ are then those of its heads.
  void attend_image(double scale, double softcap, void* out) {
    const Matrix q = rows(0);
    const Tensor k = tensor(0), v = tensor(1);
    STD_TORCH_CHECK(k.dim() == 3 && in_.where.size() == 3,
                    "where: expected q_offsets, kv_offsets, "
                    "image_of");
    AttentionArgs args{};
    args.dtype = dtype_;
    args.rows = rows_;
    args.dim = k.size(2);
    args.heads = heads_in(q.cols, args.dim);
    args.q = {q.data, q.cols, args.dim};
    set_keys(args, k, v, in_.where[0], in_.where[1], in_.where[2]);
    args.scale = static_cast<float>(scale);
    args.softcap = static_cast<float>(softcap);
    args.out = out;
    stats_.resize(static_cast<size_t>(2 * rows_ * args.heads));
    args.stats = stats_.data();
    FASTVLM_KERNEL(attention)(args);
  }

  void self_attention() {
    const std::optional<Tensor> bias = tensors_.size > 0 ? optional(0) : std::nullopt;
    attend_cache(bias, write(0, rows(0).cols), nullptr);
  }

  void cross_attention() { attend_image(number(0), number(1), write(0, rows(0).cols)); }

  // Both, as one softmax over the keys of the cache and of the image.
  void merged_attention() {
    const Matrix q = rows(0);
    const int64_t dim = integer(0), heads = rows_ * heads_in(q.cols, dim);
    const int64_t bytes = rows_ * q.cols * (dtype_ == DType::kFloat ? 4 : 2);
    parts_.resize(static_cast<size_t>(2 * bytes));
    lse_.resize(static_cast<size_t>(2 * heads));
    float *of_cache = lse_.data(), *of_image = lse_.data() + heads;
    attend_cache(std::nullopt, parts_.data(), of_cache);
    attend_image(number(3), number(4), parts_.data() + bytes);
    for (int64_t i = 0; i < heads; ++i) {
      of_image[i] = stats_[2 * i] * 0.693147181f + std::log(stats_[2 * i + 1]);
    }
    FASTVLM_KERNEL(merge_attention)
    ({dtype_, heads, dim, parts_.data(), parts_.data() + bytes, of_cache, of_image,
      write(0, q.cols)});
  }

  const Inputs& in_;
  std::vector<Product> products_;
  std::vector<float> stats_, lse_;
  std::vector<char> parts_;
};

// What is the same at every step. Its tensors are handed over once: to hand over a few hundred
// takes as long as a small stack computes.
struct Program {
  Tensor code, widths, numbers;
  std::vector<Tensor> tensors;
};

// The programs there are, by their numbers.
class Programs {
 public:
  int64_t put(Program program) {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_[++last_] = std::make_shared<const Program>(std::move(program));
    return last_;
  }
  std::shared_ptr<const Program> at(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = held_.find(number);
    STD_TORCH_CHECK(found != held_.end(), "program: there is no ", number);
    return found->second;
  }
  void forget(int64_t number) {
    std::shared_ptr<const Program> gone;  // destroyed after the lock: its tensors may be large
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = held_.find(number);
    if (found == held_.end()) return;
    gone = std::move(found->second);
    held_.erase(found);
  }

 private:
  std::mutex mutex_;
  int64_t last_ = 0;
  std::unordered_map<int64_t, std::shared_ptr<const Program>> held_;
};

// Never destroyed: what outlives it at the end of the process would be let go of after PyTorch.
Programs& programs() {
  static Programs* const all = new Programs;
  return *all;
}

int64_t step_program(Tensor code, Tensor widths, Tensor numbers, std::vector<Tensor> tensors) {
  return programs().put({code, widths, numbers, std::move(tensors)});
}

void forget_program(const Tensor& code, int64_t program) { programs().forget(program); }

void step(const Tensor& x, int64_t number, std::vector<Tensor> caches, int64_t start,
          const Tensor& lengths, const std::optional<Tensor>& ancestry, std::vector<Tensor> where,
          std::vector<Tensor> rotation, Tensor arena, Tensor out, std::optional<Tensor> seconds) {
  double* times = nullptr;
  if (seconds.has_value()) {
    STD_TORCH_CHECK(seconds->is_cpu() && seconds->scalar_type() == ScalarType::Double &&
                        seconds->is_contiguous() && seconds->numel() == kOps,
                    "seconds: expected ", static_cast<int64_t>(kOps), " float64 on the CPU");
    times = static_cast<double*>(seconds->mutable_data_ptr());
  }
  if (x.size(0) == 0) return;
  const std::shared_ptr<const Program> program = programs().at(number);
  const Inputs inputs{program->tensors, caches, start, lengths, ancestry, where, rotation};
  Step run(x, inputs, program->numbers);
  run.place(Reader(program->widths, "widths"), x, arena, out);
  run.run(Reader(program->code, "code"), times);
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def("step_program(Tensor code, Tensor widths, Tensor numbers, Tensor[] tensors) -> int");
  m.def("forget_program(Tensor code, int program) -> ()");
  m.def(
      "step(Tensor x, int program, Tensor(a!)[] caches, int start, Tensor lengths, "
      "Tensor? ancestry, Tensor[] where, Tensor[] rotation, Tensor(b!) arena, Tensor(c!) out, "
      "Tensor(d!)? seconds) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("step_program", TORCH_BOX(&fastvlm::step_program));
  m.impl("forget_program", TORCH_BOX(&fastvlm::forget_program));
  m.impl("step", TORCH_BOX(&fastvlm::step));
}

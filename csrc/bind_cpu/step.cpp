// A whole decoding step in one call: the kernels of a stack's layers, one after the other, as
// fastvlm/cpu/step.py has written them down. What lies between them stays in one arena.
#include <chrono>
#include <vector>

#include "../cpu/norm.h"
#include "../cpu/rope.h"
#include "attention.h"
#include "bind.h"
#include "reader.h"
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
  kOps
};

// A register: rows [R, cols] of the arena, or the step's first or last ones.
struct Register {
  void* data;
  int64_t width;  // elements a row may have
  int64_t cols;   // and has; 0 until it is written
};

struct Inputs {
  const std::vector<Tensor>& tensors;
  const std::vector<Tensor>& caches;  // K and V of each layer, [rows, capacity, Hkv, D]
  int64_t start;                      // the position of the new tokens
  const Tensor& lengths;
  const std::optional<Tensor>& ancestry;
  const std::vector<Tensor>& where;     // q_offsets, kv_offsets, image_of
  const std::vector<Tensor>& rotation;  // cos, sin
};

class Step {
 public:
  Step(const Tensor& x, const Inputs& inputs, const Tensor& numbers)
      : in_(inputs), dtype_(dtype_of(x, "x")), rows_(x.size(0)) {
    size_ = dtype_ == DType::kFloat ? 4 : 2;
    STD_TORCH_CHECK(
        numbers.is_cpu() && numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous(),
        "numbers: expected contiguous float64 on the CPU");
    numbers_ = static_cast<const double*>(numbers.const_data_ptr());
    count_ = numbers.numel();
  }

  // Register 0 is x, the last one is out, and those between lie in the arena.
  void place(Reader widths, const Tensor& x, Tensor& arena, Tensor& out) {
    check(x, "x", 2);
    check(out, "out", 2);
    STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous() && out.size(0) == rows_ &&
                        dtype_of(out, "out") == dtype_ && dtype_of(arena, "arena") == dtype_,
                    "x, arena, out: expected contiguous rows of one dtype");
    char* free = static_cast<char*>(arena.mutable_data_ptr());
    int64_t left = arena.numel();
    registers_.push_back({const_cast<void*>(x.const_data_ptr()), x.size(1), x.size(1)});
    while (!widths.done()) {
      const int64_t width = widths.next();
      STD_TORCH_CHECK(width >= 0 && width * rows_ <= left, "arena: too small");
      registers_.push_back({free, width, 0});
      free += width * rows_ * size_;
      left -= width * rows_;
    }
    registers_.push_back({out.mutable_data_ptr(), out.size(1), 0});
  }

  void run(Reader code, double* seconds) {
    while (!code.done()) {
      const int64_t op = code.next();
      out_ = code.list();
      rows_of_ = code.list();
      tensors_ = code.list();
      settings_ = code.list();
      const auto begin = std::chrono::steady_clock::now();
      STD_TORCH_CHECK(op >= 0 && op < kOps, "code: no op ", op);
      dispatch(static_cast<Op>(op));
      if (seconds == nullptr) continue;
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
      seconds[op] += taken.count();
    }
    STD_TORCH_CHECK(registers_.back().cols == registers_.back().width, "code: out is not written");
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
      case kOps: return;
    }
  }

  Register& at(int64_t index) {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(registers_.size()),
                    "code: no register ", index);
    return registers_[index];
  }
  const Register& read(int64_t i) {
    const Register& found = at(rows_of_[i]);
    STD_TORCH_CHECK(found.cols > 0, "code: register ", rows_of_[i],
                    " is read before it is written");
    return found;
  }
  Matrix rows(int64_t i) {
    const Register& r = read(i);
    return {r.data, dtype_, rows_, r.cols, r.cols};
  }
  void* write(int64_t i, int64_t cols) {
    Register& to = at(out_[i]);
    STD_TORCH_CHECK(out_[i] > 0 && cols > 0 && cols <= to.width, "code: register ", out_[i],
                    " has no room for rows of ", cols);
    to.cols = cols;
    return to.data;
  }
  std::optional<Tensor> optional(int64_t i) {
    const int64_t index = tensors_[i];
    if (index < 0) return std::nullopt;
    STD_TORCH_CHECK(index < static_cast<int64_t>(in_.tensors.size()), "code: no tensor ", index);
    return in_.tensors[index];
  }
  Tensor tensor(int64_t i) {
    const std::optional<Tensor> found = optional(i);
    STD_TORCH_CHECK(found.has_value(), "code: an instruction without its tensor ", i);
    return *found;
  }
  double number(int64_t i) {
    const int64_t index = settings_[i];
    STD_TORCH_CHECK(index >= 0 && index < count_, "code: no number ", index);
    return numbers_[index];
  }
  int64_t integer(int64_t i) { return static_cast<int64_t>(number(i)); }
  Activation activation() { return activation_of(integer(0)); }
  int64_t heads_in(int64_t cols, int64_t dim) {
    STD_TORCH_CHECK(dim > 0 && cols % dim == 0, "code: rows of ", cols, " are no heads of ", dim);
    return cols / dim;
  }

  // Whether an instruction's weights lie as [inputs, outputs], by its setting of this number.
  bool transposed(int64_t i) { return settings_.size > i && integer(i) != 0; }

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
    STD_TORCH_CHECK(in_.rotation.size() == 2, "rotation: expected cos and sin");
    args.cos = matrix(in_.rotation[0], "cos");
    args.sin = matrix(in_.rotation[1], "sin");
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

  void self_attention() {
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
    const std::optional<Tensor> bias = tensors_.size > 0 ? optional(0) : std::nullopt;
    args.bias = bias_of(bias, args.heads);
    int bad_ancestor = 0;
    args.bad_ancestor = &bad_ancestor;
    args.out = write(0, q.cols);
    FASTVLM_KERNEL(cached_attention)(args);
    STD_TORCH_CHECK(bad_ancestor == 0, "ancestry: names a row beyond the cache's ",
                    args.cache_rows);
  }

  void cross_attention() {
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
    args.scale = static_cast<float>(number(0));
    args.softcap = static_cast<float>(number(1));
    args.out = write(0, q.cols);
    stats_.resize(static_cast<size_t>(2 * rows_ * args.heads));
    args.stats = stats_.data();
    FASTVLM_KERNEL(attention)(args);
  }

  const Inputs& in_;
  DType dtype_;
  int64_t rows_, size_;
  const double* numbers_;
  int64_t count_;
  std::vector<Register> registers_;
  std::vector<Product> products_;
  std::vector<float> stats_;
  Reader::List out_{}, rows_of_{}, tensors_{}, settings_{};
};

void step(const Tensor& x, const Tensor& code, const Tensor& widths, const Tensor& numbers,
          std::vector<Tensor> tensors, std::vector<Tensor> caches, int64_t start,
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
  const Inputs inputs{tensors, caches, start, lengths, ancestry, where, rotation};
  Step run(x, inputs, numbers);
  run.place(Reader(widths, "widths"), x, arena, out);
  run.run(Reader(code, "code"), times);
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def(
      "step(Tensor x, Tensor code, Tensor widths, Tensor numbers, Tensor[] tensors, "
      "Tensor(a!)[] caches, int start, Tensor lengths, Tensor? ancestry, Tensor[] where, "
      "Tensor[] rotation, Tensor(b!) arena, Tensor(c!) out, Tensor(d!)? seconds) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) { m.impl("step", TORCH_BOX(&fastvlm::step)); }

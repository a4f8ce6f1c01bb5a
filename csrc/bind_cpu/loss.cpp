// The passes over a block of logits as torch ops; they work in place.
#include "../cpu/loss.h"

#include "bind.h"

namespace fastvlm {
namespace {

// The data of a contiguous CPU tensor of a dtype and shape.
template <class T>
T* data(const Tensor& t, const char* name, ScalarType dtype, int64_t rows, int64_t cols = -1) {
  const bool fits = cols < 0 ? t.dim() == 1 : t.dim() == 2 && t.size(1) == cols;
  STD_TORCH_CHECK(
      t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype && fits && t.size(0) == rows,
      name, ": not the dtype, or not contiguous of the shape, that the block needs");
  return static_cast<T*>(t.mutable_data_ptr());
}

LogitsBlock block_of(const Tensor& logits, const std::optional<Tensor>& bias, double softcap,
                     int64_t first) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected 2 dimensions, got ", logits.dim());
  STD_TORCH_CHECK(first >= 0, "first: expected a place in the vocabulary, got ", first);
  LogitsBlock block{};
  block.rows = logits.size(0);
  block.cols = logits.size(1);
  block.logits = data<float>(logits, "logits", ScalarType::Float, block.rows, block.cols);
  block.first = first;
  block.softcap = static_cast<float>(softcap);
  if (bias.has_value()) {
    block.bias = vector_for(*bias, "bias", block.cols);
  }
  return block;
}

void scan_logits(const Tensor& logits, const std::optional<Tensor>& bias, double softcap,
                 int64_t first, const Tensor& largest, const Tensor& total,
                 const std::optional<Tensor>& labels, const std::optional<Tensor>& picked,
                 const std::optional<Tensor>& values, const std::optional<Tensor>& indices) {
  ScanArgs args{};
  args.block = block_of(logits, bias, softcap, first);
  const int64_t rows = args.block.rows;
  args.largest = data<float>(largest, "largest", ScalarType::Float, rows);
  args.total = data<double>(total, "total", ScalarType::Double, rows);
  STD_TORCH_CHECK(labels.has_value() == picked.has_value(), "picked: goes with labels");
  if (labels.has_value()) {
    args.labels = data<int64_t>(*labels, "labels", ScalarType::Long, rows);
    args.picked = data<float>(*picked, "picked", ScalarType::Float, rows);
  }
  STD_TORCH_CHECK(values.has_value() == indices.has_value(), "indices: goes with values");
  if (values.has_value()) {
    STD_TORCH_CHECK(values->dim() == 2, "values: expected 2 dimensions, got ", values->dim());
    args.k = values->size(1);
    args.values = data<float>(*values, "values", ScalarType::Float, rows, args.k);
    args.indices = data<int64_t>(*indices, "indices", ScalarType::Long, rows, args.k);
  }
  FASTVLM_KERNEL(scan_logits)(args);
}

void logits_gradient(const Tensor& logits, const std::optional<Tensor>& bias, double softcap,
                     int64_t first, const Tensor& labels, const Tensor& parts, const Tensor& grad) {
  LogitsGradientArgs args{};
  args.block = block_of(logits, bias, softcap, first);
  const int64_t rows = args.block.rows;
  args.labels = data<int64_t>(labels, "labels", ScalarType::Long, rows);
  args.parts = data<float>(parts, "parts", ScalarType::Float, rows, 2);
  args.grad = data<float>(grad, "grad", ScalarType::Float, rows);
  FASTVLM_KERNEL(logits_gradient)(args);
}

}  // namespace
}  // namespace fastvlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_cpu, m) {
  m.def(
      "scan_logits(Tensor(a!) logits, Tensor? bias, float softcap, int first, Tensor(b!) largest, "
      "Tensor(c!) total, Tensor? labels, Tensor(d!)? picked, Tensor(e!)? values, "
      "Tensor(f!)? indices) -> ()");
  m.def(
      "logits_gradient(Tensor(a!) logits, Tensor? bias, float softcap, int first, Tensor labels, "
      "Tensor parts, Tensor grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlm_cpu, CPU, m) {
  m.impl("scan_logits", TORCH_BOX(&fastvlm::scan_logits));
  m.impl("logits_gradient", TORCH_BOX(&fastvlm::logits_gradient));
}

// What an instruction of a decoding step reads and writes: rows in registers, tensors, numbers.
#pragma once

#include <vector>

#include "bind.h"
#include "reader.h"

namespace fastvlm {

// A register: rows [R, cols] of the arena, or the step's first or last ones.
struct Register {
  void* data;
  int64_t width;  // elements a row may have
  int64_t cols;   // and has; 0 until it is written
};

class Registers {
 public:
  Registers(const Tensor& x, const std::vector<Tensor>& tensors, const Tensor& numbers)
      : dtype_(dtype_of(x, "x")), rows_(x.size(0)), all_tensors_(tensors) {
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
    const int64_t size = dtype_ == DType::kFloat ? 4 : 2;
    char* free = static_cast<char*>(arena.mutable_data_ptr());
    int64_t left = arena.numel();
    registers_.push_back({const_cast<void*>(x.const_data_ptr()), x.size(1), x.size(1)});
    while (!widths.done()) {
      const int64_t width = widths.next();
      STD_TORCH_CHECK(width >= 0 && width * rows_ <= left, "arena: too small");
      registers_.push_back({free, width, 0});
      free += width * rows_ * size;
      left -= width * rows_;
    }
    registers_.push_back({out.mutable_data_ptr(), out.size(1), 0});
  }

 protected:
  // The operands of the instruction that comes next.
  void operands(Reader& code) {
    out_ = code.list();
    rows_of_ = code.list();
    tensors_ = code.list();
    settings_ = code.list();
  }
  void check_written() const {
    STD_TORCH_CHECK(registers_.back().cols == registers_.back().width, "code: out is not written");
  }

  Matrix rows(int64_t i) {
    const Register& r = at(rows_of_[i]);
    STD_TORCH_CHECK(r.cols > 0, "code: register ", rows_of_[i], " is read before it is written");
    return {r.data, dtype_, rows_, r.cols, r.cols};
  }
  void* write(int64_t i, int64_t cols) {
    Register& to = at(out_[i]);
    STD_TORCH_CHECK(out_[i] > 0 && cols > 0 && cols <= to.width, "code: register ", out_[i],
                    " has no room for rows of ", cols);
    to.cols = cols;
    return to.data;
  }
  std::optional<Tensor> optional(int64_t i) const {
    const int64_t index = tensors_[i];
    if (index < 0) return std::nullopt;
    STD_TORCH_CHECK(index < static_cast<int64_t>(all_tensors_.size()), "code: no tensor ", index);
    return all_tensors_[index];
  }
  Tensor tensor(int64_t i) const {
    const std::optional<Tensor> found = optional(i);
    STD_TORCH_CHECK(found.has_value(), "code: an instruction without its tensor ", i);
    return *found;
  }
  double number(int64_t i) const {
    const int64_t index = settings_[i];
    STD_TORCH_CHECK(index >= 0 && index < count_, "code: no number ", index);
    return numbers_[index];
  }
  int64_t integer(int64_t i) const { return static_cast<int64_t>(number(i)); }
  // The same, of a setting that may be left out.
  int64_t integer_or(int64_t i, int64_t otherwise) const {
    return settings_.size > i ? integer(i) : otherwise;
  }
  // Whether an instruction's weights lie as [inputs, outputs], by its setting of this number.
  bool transposed(int64_t i) const { return integer_or(i, 0) != 0; }
  Activation activation() const { return activation_of(integer(0)); }
  int64_t heads_in(int64_t cols, int64_t dim) const {
    STD_TORCH_CHECK(dim > 0 && cols % dim == 0, "code: rows of ", cols, " are no heads of ", dim);
    return cols / dim;
  }

  DType dtype_;
  int64_t rows_;
  Reader::List out_{}, rows_of_{}, tensors_{}, settings_{};

 private:
  Register& at(int64_t index) {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(registers_.size()),
                    "code: no register ", index);
    return registers_[index];
  }

  const std::vector<Tensor>& all_tensors_;
  const double* numbers_;
  int64_t count_;
  std::vector<Register> registers_;
};

}  // namespace fastvlm

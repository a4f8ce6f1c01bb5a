// The code of a decoding step, as fastvlm/cpu/step.py writes it down.
#pragma once

#include "bind.h"

namespace fastvlm {

// The integers of the program, read one after the other.
class Reader {
 public:
  Reader(const Tensor& code, const char* name) {
    STD_TORCH_CHECK(code.is_cpu() && code.scalar_type() == ScalarType::Long && code.is_contiguous(),
                    name, ": expected contiguous int64 on the CPU");
    at_ = static_cast<const int64_t*>(code.const_data_ptr());
    end_ = at_ + code.numel();
  }
  bool done() const { return at_ == end_; }
  int64_t next() {
    STD_TORCH_CHECK(!done(), "code: ends within an instruction");
    return *at_++;
  }
  // A count and so many numbers after it.
  struct List {
    const int64_t* data;
    int64_t size;
    int64_t operator[](int64_t i) const {
      STD_TORCH_CHECK(i < size, "code: an instruction without its operand ", i);
      return data[i];
    }
  };
  List list() {
    const int64_t size = next();
    STD_TORCH_CHECK(size >= 0 && size <= end_ - at_, "code: ends within an instruction");
    const List found{at_, size};
    at_ += size;
    return found;
  }

 private:
  const int64_t *at_, *end_;
};

}  // namespace fastvlm

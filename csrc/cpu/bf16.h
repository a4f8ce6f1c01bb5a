// What the products in bfloat16 arithmetic take: x of any type, rounded as it is read, and weights
// of bfloat16, float32 that is rounded, or int8 with a factor for each row.
#pragma once

#include "packed.h"

namespace fastvlm {

#define FASTVLM_DECLARE(CAPABILITY)               \
  namespace CAPABILITY {                          \
  void bf16_linear(const PackedLinearArgs& args); \
  void bf16_mlp(const PackedMlpArgs& args);       \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

// What the products in int8 arithmetic take: weights of int8 with a factor for each row, and rows
// of x that are quantized as they are read.
#pragma once

#include "packed.h"

namespace fastvlm {

// How neighbours along the depth are multiplied: two of 16 bits (every CPU), or four of 8 bits
// (AVX-512 VNNI; elsewhere one by one, for tests).
enum class Int8Products { kPairs, kQuads };

struct Int8LinearArgs {
  Matrix x, weight;
  Tail tail;
  Int8Products products;
};

// The tail is that of the second product.
struct Int8MlpArgs {
  Matrix x, w1, b1, w2;
  Activation activation;
  Tail tail;
  Int8Products products;
};

#define FASTVLM_DECLARE(CAPABILITY)             \
  namespace CAPABILITY {                        \
  void int8_linear(const Int8LinearArgs& args); \
  void int8_mlp(const Int8MlpArgs& args);       \
  }
FASTVLM_FOR_EACH_CAPABILITY(FASTVLM_DECLARE)
#undef FASTVLM_DECLARE

}  // namespace fastvlm

// What every kernel takes and who runs its tasks: with the declarations in attention.h, mlp.h and
// their like the only names shared between the bindings and the copies of the kernels compiled for
// each CPU capability. Nothing of torch, and no inline function: an inline function compiled for
// AVX-512 could be the copy the linker keeps for all.
#pragma once

#include <cstdint>

// The capabilities a kernel is compiled for; each is a namespace.
#define FASTVLM_FOR_EACH_CAPABILITY(DECLARE) DECLARE(DEFAULT) DECLARE(AVX2) DECLARE(AVX512)

namespace fastvlm {

enum class DType { kFloat, kBFloat16, kHalf, kInt8 };  // kInt8: weights only

// Of an MLP, in the order of ACTIVATIONS in fastvlm/reference/mlp.py.
enum class Activation { kGelu, kGeluTanh, kRelu, kSilu };

// Rows of contiguous elements. data is null where an optional argument is absent. scale: a factor
// of each row, for the products of a weight of int8 with it; null for 1. step: between the elements
// of a row, other than 1 only for the products that take transposes.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t cols;
  int64_t stride;
  const float* scale = nullptr;
  int64_t step = 1;
};

// An element is kept where the 53 random bits of its counter are at least `threshold`, and then
// multiplied by scale. scale 0: no dropout.
struct Dropout {
  uint64_t seed;
  uint64_t threshold;
  float scale;
};

// Calls body(context, task, worker) once for each task. A worker takes a share of neighbours in
// order, so that what one task reads ahead the next one finds, and then helps with the others'.
// workers() bounds the worker number.
using TaskBody = void (*)(void* context, int64_t task, int64_t worker);
void run_tasks(int64_t tasks, TaskBody body, void* context);
int64_t workers();

// Whether the CPU multiplies bfloat16 pairs, and the AVX512 copy may use that.
bool has_bfloat16_products();

// Whether the CPU multiplies int8 four by four (AVX-512 VNNI), and the AVX512 copy may use that.
bool has_int8_quads();

// Whether the CPU multiplies tiles of bfloat16 (AMX), and the AVX512 copy may use that.
bool has_tiles();

// Aligned to a cache line; throws std::bad_alloc.
void* allocate(int64_t bytes);
void release(void* memory);

}  // namespace fastvlm

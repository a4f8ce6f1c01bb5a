// What the kernels take and who runs their tasks: the only names shared between bind_cpu.cpp and
// the copies of the kernels compiled for each CPU capability. Nothing of torch, and no inline
// function: an inline function compiled for AVX-512 could be the copy the linker keeps for all.
#pragma once

#include <cstdint>

namespace fastvlm {

enum class DType { kFloat, kBFloat16, kHalf };

// Rows of contiguous elements. data is null where an optional argument is absent.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t cols;
  int64_t stride;
};

// [rows, heads, dim], the last dimension contiguous.
struct Heads {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct AttentionArgs {
  DType dtype;
  Heads q, k, v;
  int64_t rows, heads, kv_heads, dim;
  const int32_t* q_offsets;   // [segments + 1]
  const int32_t* kv_offsets;  // [images + 1]
  const int32_t* image_of;    // [segments]
  int64_t segments, images;
  float scale, softcap;
  bool causal;
  int64_t window;
  void* out;   // [rows, heads, dim]
  float* lse;  // [rows, heads]
};

// A cache is [cache rows, positions, kv heads, dim].
struct Cache {
  const void* data;
  int64_t row_stride;
  int64_t position_stride;
  int64_t head_stride;
};

struct CachedAttentionArgs {
  DType dtype;
  Heads q;
  Cache k, v;
  int64_t rows, heads, kv_heads, dim, cache_rows;
  const int32_t* lengths;   // [rows]
  const int32_t* ancestry;  // [rows, positions] or null
  int64_t ancestry_row_stride, ancestry_position_stride;
  float scale, softcap;
  int64_t window;
  void* out;
  int* bad_ancestor;  // set to 1 where ancestry names a row the cache does not have
};

// Calls body(context, task, worker) once for each task; tasks are taken in order by whichever
// worker is free. workers() bounds the worker number.
using TaskBody = void (*)(void* context, int64_t task, int64_t worker);
void run_tasks(int64_t tasks, TaskBody body, void* context);
int64_t workers();

// Aligned to a cache line; throws std::bad_alloc.
void* allocate(int64_t bytes);
void release(void* memory);

#define FASTVLM_DECLARE_KERNELS(CAPABILITY)                                                 \
  namespace CAPABILITY {                                                                    \
  void linear(const Matrix& x, const Matrix& weight, const Matrix& bias, void* out);        \
  void gelu_mlp(const Matrix& x, const Matrix& w1, const Matrix& b1, const Matrix& w2,      \
                const Matrix& b2, bool tanh, void* out);                                    \
  void geglu_mlp(const Matrix& x, const Matrix& gate, const Matrix& up, const Matrix& down, \
                 bool tanh, void* out);                                                     \
  void attention(const AttentionArgs& args);                                                \
  void cached_attention(const CachedAttentionArgs& args);                                   \
  }

FASTVLM_DECLARE_KERNELS(DEFAULT)
FASTVLM_DECLARE_KERNELS(AVX2)
FASTVLM_DECLARE_KERNELS(AVX512)

}  // namespace fastvlm

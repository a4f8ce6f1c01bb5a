// rope: all heads of q and of k turned by the angle of their token, in one pass.
#include "rope.h"

#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTaskElements = 16384;

template <class T>
void put(T* to, int64_t n, Vec x) {
  n == kLanes ? store(to, x) : store_partial(to, x, n);
}

// One head: (a, b) -> (a cos1 - b sin1, b cos2 + a sin2) for the halves a, b of the first `rotary`
// elements, or its transpose; the rest passes through.
template <class T>
void turn(const T* x, const float* cos, const float* sin, int64_t rotary, int64_t dim, bool back,
          T* out) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = smaller(kLanes, half - i);
    const Vec a = load_some(x + i, n), b = load_some(x + half + i, n);
    const Vec cos1 = load_some(cos + i, n), cos2 = load_some(cos + half + i, n);
    const Vec sin1 = load_some(sin + i, n), sin2 = load_some(sin + half + i, n);
    put(out + i, n, back ? a * cos1 + b * sin2 : a * cos1 - b * sin1);
    put(out + half + i, n, back ? b * cos2 - a * sin1 : b * cos2 + a * sin2);
  }
  for (int64_t i = rotary; i < dim; ++i) out[i] = x[i];
}

void table_row(const Matrix& table, int64_t row, float* to) {
  with_type(table.dtype, [&](auto type) {
    using T = decltype(type);
    to_float(static_cast<const T*>(table.data) + row * table.stride, table.cols, to);
  });
}

}  // namespace

void rope(const RopeArgs& a) {
  const int64_t rotary = a.cos.cols, size = (a.heads + a.kv_heads) * a.dim;
  const int64_t block = larger(1, kTaskElements / larger(1, size));
  Scratch<float> tables(workers() * 2 * rotary);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    auto heads = [&](const void* x, const int64_t* strides, int64_t count, int64_t t,
                     const float* cos, void* out) {
      for (int64_t h = 0; h < count; ++h) {
        turn(static_cast<const T*>(x) + t * strides[0] + h * strides[1], cos, cos + rotary, rotary,
             a.dim, a.back, static_cast<T*>(out) + (t * count + h) * a.dim);
      }
    };
    auto task = [&](int64_t index, int64_t worker) {
      float* cos = tables.data() + worker * 2 * rotary;
      const int64_t end = smaller(a.tokens, (index + 1) * block);
      for (int64_t t = index * block; t < end; ++t) {
        table_row(a.cos, t, cos);
        table_row(a.sin, t, cos + rotary);
        heads(a.q, a.q_strides, a.heads, t, cos, a.out_q);
        heads(a.k, a.k_strides, a.kv_heads, t, cos, a.out_k);
      }
    };
    for_each_task(divide_up(a.tokens, block), a.tokens * size, task);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

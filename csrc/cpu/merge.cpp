// merge_attention: two attentions of the same queries as one softmax over the keys of both.
#include "merge.h"

#include <cmath>

#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTaskElements = 16384;

// The weight of the keys behind `lse` in the softmax over both; 0 where a row sees none of them.
float share(float lse, float other) {
  return lse == -INFINITY ? 0.0f : 1.0f / (1.0f + std::exp(other - lse));
}

template <class Task>
void for_each_head(const MergeArgs& a, Task task) {
  const int64_t block = larger(1, kTaskElements / larger(1, a.dim));
  auto run = [&](int64_t index, int64_t) {
    const int64_t end = smaller(a.count, (index + 1) * block);
    for (int64_t i = index * block; i < end; ++i) task(i);
  };
  for_each_task(divide_up(a.count, block), a.count * a.dim, run);
}

}  // namespace

void merge_attention(const MergeArgs& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_head(args, [&](int64_t i) {
      const T* a = static_cast<const T*>(args.a) + i * args.dim;
      const T* b = static_cast<const T*>(args.b) + i * args.dim;
      const Vec of_a = broadcast(share(args.lse_a[i], args.lse_b[i]));
      const Vec of_b = broadcast(share(args.lse_b[i], args.lse_a[i]));
      map_to(static_cast<T*>(args.out) + i * args.dim, args.dim, [&](int64_t d, int64_t n) {
        return load_some(a + d, n) * of_a + load_some(b + d, n) * of_b;
      });
    });
  });
}

void merge_attention_backward(const MergeBackwardArgs& args) {
  const MergeArgs& f = args.forward;
  with_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_head(f, [&](int64_t i) {
      const T* a = static_cast<const T*>(f.a) + i * f.dim;
      const T* b = static_cast<const T*>(f.b) + i * f.dim;
      const T* grad = static_cast<const T*>(args.grad_out) + i * f.dim;
      const float of_a = share(f.lse_a[i], f.lse_b[i]), of_b = share(f.lse_b[i], f.lse_a[i]);
      Vec products{};
      for (int64_t d = 0; d < f.dim; d += kLanes) {
        const int64_t n = smaller(kLanes, f.dim - d);
        products += load_some(grad + d, n) * (load_some(a + d, n) - load_some(b + d, n));
      }
      args.dlse[i] = of_a * of_b * sum(products);
      auto scaled = [&](float by, void* to) {
        const Vec factor = broadcast(by);
        map_to(static_cast<T*>(to) + i * f.dim, f.dim,
               [&](int64_t d, int64_t n) { return load_some(grad + d, n) * factor; });
      };
      scaled(of_a, args.da);
      scaled(of_b, args.db);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

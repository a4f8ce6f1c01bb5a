// The activations of the MLPs between two large products, forward and backward, in one pass each.
#include "activation.h"

#include "gemm.h"
#include "mlp.h"
#include "random.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTaskElements = 8192;

// Calls body(first, count) for parts of n elements; short work stays on the calling thread.
template <class Body>
void for_parts(int64_t n, Body body) {
  auto task = [&](int64_t index, int64_t) {
    const int64_t first = index * kTaskElements;
    body(first, smaller(kTaskElements, n - first));
  };
  for_each_task(divide_up(n, kTaskElements), task);
}

// An array of an argument's type at an element; null stays null.
template <class T>
const T* from(const void* data, int64_t first) {
  return static_cast<const T*>(data) + first;
}
template <class T>
T* to(void* data, int64_t first) {
  return data == nullptr ? nullptr : static_cast<T*>(data) + first;
}

template <class T>
void put(T* to, int64_t i, int64_t n, Vec x) {
  if (to == nullptr) return;
  n == kLanes ? store(to + i, x) : store_partial(to + i, x, n);
}

}  // namespace

void activate(const ActivationArgs& a) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for_parts(a.count, [&](int64_t first, int64_t count) {
      const T* pre = from<T>(a.pre, first);
      const T* up = a.up == nullptr ? nullptr : from<T>(a.up, first);
      map_to(to<T>(a.hidden, first), count, [&](int64_t i, int64_t n) {
        Vec hidden = activated(load_some(pre + i, n), a.activation);
        if (up != nullptr) hidden *= load_some(up + i, n);
        if (a.dropout.scale != 0) hidden *= keep_scale(a.dropout, first + i);
        return hidden;
      });
    });
  });
}

void activate_backward(const ActivationArgs& a) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for_parts(a.count, [&](int64_t first, int64_t count) {
      const T* pre = from<T>(a.pre, first);
      const T* up = a.up == nullptr ? nullptr : from<T>(a.up, first);
      const T* grad = from<T>(a.grad, first);
      T *dpre = to<T>(a.dpre, first), *dup = to<T>(a.dup, first), *hidden = to<T>(a.hidden, first);
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t n = smaller(kLanes, count - i);
        const Vec x = load_some(pre + i, n), act = activated(x, a.activation);
        Vec g = load_some(grad + i, n), out = act;
        if (a.dropout.scale != 0) {
          const Vec keep = keep_scale(a.dropout, first + i);
          g *= keep;
          out *= keep;
        }
        if (up != nullptr) {
          const Vec u = load_some(up + i, n);
          put(dup, i, n, g * act);
          out *= u;
          g *= u;
        }
        put(hidden, i, n, out);
        put(dpre, i, n, g * activation_slope(x, a.activation));
      }
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

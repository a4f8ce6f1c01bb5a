// Who reads which image: the query rows in image order, and the keys that each of them sees.
#pragma once

#include "attention.h"
#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

class Readers {
 public:
  explicit Readers(const AttentionArgs& a)
      : a_(a), order_(a.rows), place_(a.rows), first_(a.images + 1), next_(a.images + 1) {
    for (int64_t i = 0; i <= a.images; ++i) first_.data()[i] = 0;
    for (int64_t s = 0; s < a.segments; ++s) {
      first_.data()[a.image_of[s] + 1] += a.q_offsets[s + 1] - a.q_offsets[s];
    }
    for (int64_t i = 0; i < a.images; ++i) first_.data()[i + 1] += first_.data()[i];
    for (int64_t i = 0; i <= a.images; ++i) next_.data()[i] = first_.data()[i];
    for (int64_t s = 0; s < a.segments; ++s) {
      int64_t& to = next_.data()[a.image_of[s]];
      for (int64_t r = a.q_offsets[s]; r < a.q_offsets[s + 1]; ++r, ++to) {
        order_.data()[to] = r;
        place_.data()[to] = r - a.q_offsets[s];
      }
    }
  }

  // Where the rows of an image begin and how many there are, in image order.
  int64_t first(int64_t image) const { return first_.data()[image]; }
  int64_t count(int64_t image) const { return first(image + 1) - first(image); }
  // The row of q, and its place in its segment, of a row in image order.
  int64_t row(int64_t index) const { return order_.data()[index]; }
  int64_t place(int64_t index) const { return place_.data()[index]; }

  // The keys of its image that a row in image order sees.
  int64_t first_visible(int64_t index) const {
    return a_.window > 0 ? larger(0, place(index) - a_.window + 1) : 0;
  }
  int64_t last_visible(int64_t index, int64_t keys) const {
    if (a_.causal) return smaller(keys, place(index) + 1);
    return a_.window > 0 ? smaller(keys, place(index) + a_.window_after) : keys;
  }

 private:
  const AttentionArgs& a_;
  Scratch<int64_t> order_, place_, first_, next_;
};

// to[d][i] = k[i][d] for n keys, zeros up to `keys`, a multiple of kLanes.
template <class T>
void pack_transposed(const T* k, int64_t stride, int64_t n, int64_t dim, float* to, int64_t keys) {
  for (int64_t i = 0; i < keys; i += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t columns = smaller(kLanes, dim - d);
      Vec square[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        square[j] = i + j < n ? load_some(k + (i + j) * stride + d, columns) : Vec{};
      }
      transpose(square);
      for (int64_t j = 0; j < columns; ++j) store(to + (d + j) * keys + i, square[j]);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

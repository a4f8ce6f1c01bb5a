// What a head adds to its scores by the distance of a key from its query, for packed rows.
//
// The table ends where it no longer changes. Here it is written out to the longest distance there
// is, once a call, so that the keys of a row find theirs one after the other; gradients are added
// up at the same places, and the far ones come together at the ends.
#pragma once

#include "attention.h"
#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

class BiasRows {
 public:
  explicit BiasRows(const AttentionArgs& a)
      : bias_(a.bias),
        far_(a.bias.data == nullptr ? 0 : longest(a)),
        width_(2 * far_ + 1 + kLanes),
        data_(a.bias.data == nullptr ? 0 : a.heads * width_) {
    if (bias_.data == nullptr) return;
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* from = bias_.data + h * entries();
      for (int64_t i = 0; i < width_; ++i) data_.data()[h * width_ + i] = from[entry(i - far_)];
    }
  }

  // Of the keys from `key` on, whole vectors of them, for a head and a row in this place of its
  // segment; null without a bias.
  const float* row(int64_t head, int64_t place, int64_t key) const {
    return bias_.data == nullptr ? nullptr : data_.data() + head * width_ + far_ + key - place;
  }

  int64_t entries() const { return 2 * bias_.reach + 1; }
  // The sums of a head's gradients at all distances, and where among them a row's begin.
  int64_t width() const { return width_; }
  int64_t begin(int64_t place, int64_t key) const { return far_ + key - place; }

  // to[entries] = the sums of a head, of distances up to `reach` either way, at their entries.
  void fold(const float* sums, int64_t reach, float* to) const {
    Scratch<double> totals(entries());
    for (int64_t i = 0; i < entries(); ++i) totals.data()[i] = 0.0;
    for (int64_t d = -reach; d <= reach; ++d) totals.data()[entry(d)] += double{sums[far_ + d]};
    for (int64_t i = 0; i < entries(); ++i) to[i] = static_cast<float>(totals.data()[i]);
  }

 private:
  int64_t entry(int64_t distance) const {
    return larger(-bias_.reach, smaller(bias_.reach, distance)) + bias_.reach;
  }
  static int64_t longest(const AttentionArgs& a) {
    int64_t most = 0;
    for (int64_t s = 0; s < a.segments; ++s) {
      most = larger(most, a.q_offsets[s + 1] - a.q_offsets[s]);
    }
    for (int64_t i = 0; i < a.images; ++i) {
      most = larger(most, a.kv_offsets[i + 1] - a.kv_offsets[i]);
    }
    return most;
  }

  PositionBias bias_;
  int64_t far_, width_;
  Scratch<float> data_;
};

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

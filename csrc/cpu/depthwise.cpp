// depthwise_conv_norm: h = x + conv(x) + bias with 3 x 3 weights of each channel, y = LayerNorm(h).
//
// Channels lie together, so a vector is one place of several channels. Four places of a line share
// the weights and most of what they read; their sums stay in the first-level cache for the norm.
#include <cmath>

#include "gemm.h"
#include "vision.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int kPlaces = 4;

template <class T, class Y>
class DepthwiseNorm {
 public:
  explicit DepthwiseNorm(const DepthwiseNormArgs& args)
      : a_(args), padded_(round_up(args.channels, kLanes)), vectors_(12 * padded_) {
    for (int64_t i = 0; i < 12 * padded_; ++i) vectors_.data()[i] = 0.0f;
    with_type(a_.weight.dtype, [&](auto type) {
      using W = decltype(type);
      const W* from = static_cast<const W*>(a_.weight.data);
      for (int64_t c = 0; c < a_.channels; ++c) {
        float taps[16];
        to_float(from + c * a_.weight.stride, 9, taps);
        for (int tap = 0; tap < 9; ++tap) vectors_.data()[tap * padded_ + c] = taps[tap];
      }
    });
    // the residual is one more of the weight in the middle
    vector(a_.bias, 9);
    vector(a_.norm_weight, 10);
    vector(a_.norm_bias, 11);
  }

  void run() {
    const int64_t own = (kPlaces + 1) * padded_;
    Scratch<float> scratch(workers() * own);
    auto task = [&](int64_t index, int64_t worker) {
      float* sums = scratch.data() + worker * own;
      float* zeros = sums + kPlaces * padded_;
      for (int64_t c = 0; c < padded_; ++c) zeros[c] = 0.0f;
      const int64_t image = index / a_.height, y = index % a_.height;
      for (int64_t x = 0; x < a_.width; x += kPlaces) {
        const int64_t count = smaller(kPlaces, a_.width - x);
        convolve(image, y, x, zeros, sums);
        for (int64_t i = 0; i < count; ++i) {
          normalize(sums + i * padded_, place(image, y, x + i) * a_.channels);
        }
      }
    };
    for_each_task(a_.images * a_.height, a_.images * a_.height * a_.width * a_.channels, task);
  }

 private:
  void vector(const Matrix& from, int64_t which) {
    if (from.data == nullptr) return;
    with_type(from.dtype, [&](auto type) {
      to_float(static_cast<const decltype(type)*>(from.data), a_.channels,
               vectors_.data() + which * padded_);
    });
  }
  Vec at(int which, int64_t c) const { return load(vectors_.data() + which * padded_ + c); }
  int64_t place(int64_t image, int64_t y, int64_t x) const {
    return (image * a_.height + y) * a_.width + x;
  }

  // Sums of kPlaces places from x on; those past the end of the line are of no use.
  void convolve(int64_t image, int64_t y, int64_t x, const float* zeros, float* sums) const {
    const T* lines[3][kPlaces + 2];
    for (int dy = 0; dy < 3; ++dy) {
      for (int dx = 0; dx < kPlaces + 2; ++dx) {
        const int64_t line = y + dy - 1, column = x + dx - 1;
        const bool inside = line >= 0 && line < a_.height && column >= 0 && column < a_.width;
        lines[dy][dx] = inside
                            ? static_cast<const T*>(a_.x) + place(image, line, column) * a_.channels
                            : reinterpret_cast<const T*>(zeros);
      }
    }
    int64_t c = 0;
    for (; c + kLanes <= a_.channels; c += kLanes) vector_of_sums(lines, c, kLanes, sums);
    if (c < a_.channels) vector_of_sums(lines, c, a_.channels - c, sums);
  }

  void vector_of_sums(const T* const (&lines)[3][kPlaces + 2], int64_t c, int64_t n,
                      float* sums) const {
    Vec total[kPlaces], centre[kPlaces] = {};
    for (int i = 0; i < kPlaces; ++i) total[i] = at(9, c);
#pragma GCC unroll 3
    for (int dy = 0; dy < 3; ++dy) {
      Vec from[kPlaces + 2];
#pragma GCC unroll 8
      for (int dx = 0; dx < kPlaces + 2; ++dx) from[dx] = load_some(lines[dy][dx] + c, n);
#pragma GCC unroll 3
      for (int dx = 0; dx < 3; ++dx) {
        const Vec weight = at(3 * dy + dx, c);
#pragma GCC unroll 4
        for (int i = 0; i < kPlaces; ++i) total[i] += from[i + dx] * weight;
      }
      if (dy == 1) {
#pragma GCC unroll 4
        for (int i = 0; i < kPlaces; ++i) centre[i] = from[i + 1];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPlaces; ++i) store(sums + i * padded_ + c, total[i] + centre[i]);
  }

  // Writes a place of h and of y.
  void normalize(float* x, int64_t at_element) const {
    const int64_t n = a_.channels;
    map_to(static_cast<T*>(a_.h) + at_element, n, [&](int64_t i, int64_t) { return load(x + i); });
    Vec total[2] = {}, squares[2] = {}, rest[2] = {};
    for_vectors([&](int64_t i, int chain) { total[chain] += first_lanes(load(x + i), n - i); });
    const double count = static_cast<double>(n);
    const Vec mean = broadcast(static_cast<float>(double{sum(total[0] + total[1])} / count));
    for_vectors([&](int64_t i, int chain) {
      const Vec centred = first_lanes(load(x + i) - mean, n - i);
      squares[chain] += centred * centred;
      rest[chain] += centred;
      store(x + i, centred);
    });
    // the mean was rounded: next to a large one what is left is not small against the deviation
    const double left = double{sum(rest[0] + rest[1])} / count;
    const double variance = double{sum(squares[0] + squares[1])} / count - left * left;
    const double rstd = 1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + double{a_.eps});
    const Vec factor = broadcast(static_cast<float>(rstd));
    const Vec shift = broadcast(static_cast<float>(left * rstd));
    map_to(static_cast<Y*>(a_.y) + at_element, n, [&](int64_t i, int64_t) {
      return (load(x + i) * factor - shift) * at(10, i) + at(11, i);
    });
  }

  template <class F>
  void for_vectors(F f) const {
    int64_t i = 0;
    for (; i + 2 * kLanes <= a_.channels; i += 2 * kLanes) {
      f(i, 0);
      f(i + kLanes, 1);
    }
    for (; i < a_.channels; i += kLanes) f(i, 0);
  }
  static Vec first_lanes(Vec x, int64_t n) {
    if (n >= kLanes) return x;
    return select(lane_index() < broadcast(static_cast<float>(n)), x, Vec{});
  }

  const DepthwiseNormArgs& a_;
  int64_t padded_;
  Scratch<float> vectors_;
};

}  // namespace

void depthwise_conv_norm(const DepthwiseNormArgs& args) {
  with_type(args.dtype, [&](auto type) {
    with_type(args.y_dtype,
              [&](auto y_type) { DepthwiseNorm<decltype(type), decltype(y_type)>(args).run(); });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

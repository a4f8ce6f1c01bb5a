// window_attention: softmax attention between the tokens of each window of a map, read where the
// product of q, k and v has left them.
//
// A window that reaches over the edge of the map has padding among its keys: rows that are all the
// same, so that one more key stands for them, with the logarithm of their number added to its
// score.
#include <cmath>

#include "panel.h"
#include "vision.h"
#include "window_tiles.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kQueries = 48;  // rows of scores at a time: a multiple of the tile's six

// Turns a row of n scores, whole vectors of which are in use, into weights that are not yet
// normalized, zeros behind; gives the reciprocal of their sum.
inline float softmax(float* scores, int64_t n) {
  Vec largest = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) largest = at_least(largest, load(scores + i));
  const IVec in_use = lane_index() < broadcast(static_cast<float>(n - i));
  if (i < n) {
    largest = at_least(largest, select(in_use, load(scores + i), broadcast(-INFINITY)));
  }
  const Vec reference = broadcast(max(largest));
  Vec total{};
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const Vec p = exp_of_negative(load(scores + i) - reference);
    total += p;
    store(scores + i, p);
  }
  if (i < n) {
    const Vec p = select(in_use, exp_of_negative(load(scores + i) - reference), Vec{});
    total += p;
    store(scores + i, p);
  }
  return 1.0f / sum(total);
}

template <class T>
class WindowAttention {
 public:
  explicit WindowAttention(const WindowAttentionArgs& args)
      : a_(args),
        width_(args.heads * args.dim),
        padded_(round_up(args.dim, kLanes)),
        keys_(round_up(smaller(args.window, args.height) * smaller(args.window, args.width) + 1,
                       kLanes)),
        down_(divide_up(args.height, args.window)),
        across_(divide_up(args.width, args.window)),
        pad_(3 * width_) {
    for (int64_t i = 0; i < 3 * width_; ++i) pad_.data()[i] = 0.0f;
    if (args.pad.data == nullptr) return;
    with_type(args.pad.dtype, [&](auto type) {
      to_float(static_cast<const decltype(type)*>(args.pad.data), 3 * width_, pad_.data());
    });
  }

  void run() {
    const int64_t own = padded_ * (2 * keys_ + 2 * kQueries) + kQueries * keys_;
    Scratch<float> scratch(workers() * own);
    // all heads of a window one after the other: their rows are the same
    auto task = [&](int64_t index, int64_t worker) {
      const int64_t head = index % a_.heads, place = index / a_.heads;
      window(place / (down_ * across_), place / across_ % down_ * a_.window,
             place % across_ * a_.window, head, scratch.data() + worker * own);
    };
    for_each_task(a_.images * down_ * across_ * a_.heads, a_.images * a_.height * a_.width * width_,
                  task);
  }

 private:
  void window(int64_t image, int64_t top, int64_t left, int64_t head, float* scratch);

  const WindowAttentionArgs& a_;
  int64_t width_, padded_, keys_, down_, across_;
  Scratch<float> pad_;
};

template <class T>
void WindowAttention<T>::window(int64_t image, int64_t top, int64_t left, int64_t head,
                                float* scratch) {
  const int64_t h = smaller(a_.window, a_.height - top), w = smaller(a_.window, a_.width - left);
  const int64_t n = h * w, missing = a_.window * a_.window - n;
  const int64_t keys = n + (missing > 0 ? 1 : 0), row = 3 * width_;
  float* k = scratch;  // [dim][keys_]
  float* v = k + padded_ * keys_;
  float* q = v + keys_ * padded_;
  float* sums = q + kQueries * padded_;
  float* scores = sums + kQueries * padded_;
  // where the tokens of a line of the window begin
  auto token = [&](int64_t y) { return (image * a_.height + top + y) * a_.width + left; };
  auto place = [&](int64_t i) { return token(i / w) + i % w; };
  const T* qkv = static_cast<const T*>(a_.qkv) + head * a_.dim;
  for (int64_t i = 0; i < keys; i += kLanes) {
    for (int64_t d = 0; d < a_.dim; d += kLanes) {
      const int64_t columns = smaller(kLanes, a_.dim - d);
      Vec square[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        square[j] = i + j < n      ? load_some(qkv + place(i + j) * row + width_ + d, columns)
                    : i + j < keys ? load_some(pad_.data() + width_ + head * a_.dim + d, columns)
                                   : Vec{};
      }
      transpose(square);
      for (int64_t j = 0; j < columns; ++j) store(k + (d + j) * keys_ + i, square[j]);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    gather_row(qkv + place(i) * row + 2 * width_, a_.dim, v + i * padded_);
  }
  if (missing > 0) {
    gather_row(pad_.data() + 2 * width_ + head * a_.dim, a_.dim, v + n * padded_);
  }
  const float bias = missing > 0 ? std::log(static_cast<float>(missing)) : 0.0f;
  const Vec scale = broadcast(a_.scale);
  for (int64_t first = 0; first < n; first += kQueries) {
    const int64_t rows = smaller(kQueries, n - first);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = q + r * padded_;
      gather_row(qkv + place(first + r) * row, a_.dim, to);
      for (int64_t d = 0; d < padded_; d += kLanes) store(to + d, load(to + d) * scale);
    }
    panel_product({q, padded_, 1}, rows, k, keys_, a_.dim, false, scores, keys_,
                  round_up(keys, kLanes));
    float factors[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      if (missing > 0) scores[r * keys_ + n] += bias;
      factors[r] = softmax(scores + r * keys_, keys);
    }
    panel_product({scores, keys_, 1}, rows, v, padded_, keys, false, sums, padded_, padded_);
    for (int64_t r = 0; r < rows; ++r) {
      T* out = static_cast<T*>(a_.out) + place(first + r) * width_ + head * a_.dim;
      const Vec factor = broadcast(factors[r]);
      map_to(out, a_.dim,
             [&](int64_t d, int64_t) { return load(sums + r * padded_ + d) * factor; });
    }
  }
}

}  // namespace

void window_attention(const WindowAttentionArgs& args) {
  if (args.tiles) {
    return with_unit([&](auto unit) { WindowTiles<decltype(unit)>(args).run(); });
  }
  with_type(args.dtype, [&](auto type) { WindowAttention<decltype(type)>(args).run(); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

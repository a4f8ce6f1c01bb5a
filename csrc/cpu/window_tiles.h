// Attention between the tokens of a window in tiles of bfloat16: its scores and what its weights
// make of v are products of one or few tiles' depth, with the softmax between them in cache.
#pragma once

#include <cmath>

#include "tiles.h"
#include "vision.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

template <class Unit>
class WindowTiles {
 public:
  explicit WindowTiles(const WindowAttentionArgs& args)
      : a_(args),
        width_(args.heads * args.dim),
        depth_(round_up(args.dim, kTileDepth)),
        most_(smaller(args.window, args.height) * smaller(args.window, args.width)),
        keys_(round_up(most_ + 1, kTileDepth)),
        pad_(3 * width_) {
    for (int64_t i = 0; i < 3 * width_; ++i) pad_.data()[i] = BFloat16{0};
    if (args.pad.data == nullptr) return;
    with_type(args.pad.dtype, [&](auto type) {
      to_bfloat16(static_cast<const decltype(type)*>(args.pad.data), 3 * width_, pad_.data());
    });
  }

  void run() {
    const int64_t down = divide_up(a_.height, a_.window), across = divide_up(a_.width, a_.window);
    Scratch<BFloat16> rows(workers() * row_elements());
    Scratch<float> sums(workers() * kPair * (keys_ + depth_));
    // all heads of a window one after the other: their rows are the same
    auto task = [&](int64_t index, int64_t worker) {
      const int64_t head = index % a_.heads, place = index / a_.heads;
      Window window(*this, place / (down * across), place / across % down * a_.window,
                    place % across * a_.window, head, rows.data() + worker * row_elements(),
                    sums.data() + worker * kPair * (keys_ + depth_));
      window.run();
    };
    for_each_task(a_.images * down * across * a_.heads, a_.images * a_.height * a_.width * width_,
                  task);
  }

 private:
  class Window;

  // Of a worker: rows of q, of k and of v, panels of the latter two, and a pair of rows of weights.
  int64_t row_elements() const {
    return (round_up(most_, kPair) + 4 * keys_) * depth_ + kPair * keys_;
  }

  const WindowAttentionArgs& a_;
  int64_t width_, depth_, most_, keys_;
  Scratch<BFloat16> pad_;
};

template <class Unit>
class WindowTiles<Unit>::Window {
 public:
  Window(const WindowTiles& all, int64_t image, int64_t top, int64_t left, int64_t head,
         BFloat16* rows, float* sums)
      : all_(all),
        a_(all.a_),
        first_((image * a_.height + top) * a_.width + left),
        head_(head * a_.dim),
        columns_(smaller(a_.window, a_.width - left)),
        n_(smaller(a_.window, a_.height - top) * columns_),
        missing_(a_.window * a_.window - n_),
        used_(n_ + (missing_ > 0 ? 1 : 0)),
        keys_(round_up(used_, kTileDepth)),
        q_(rows),
        k_(q_ + round_up(all.most_, kPair) * all.depth_),
        v_(k_ + all.keys_ * all.depth_),
        k_panel_(v_ + all.keys_ * all.depth_),
        v_panel_(k_panel_ + all.keys_ * all.depth_),
        weights_(v_panel_ + all.keys_ * all.depth_),
        scores_(sums),
        out_(scores_ + kPair * all.keys_) {}

  void run() {
    gather(0, q_);
    gather(1, k_);
    gather(2, v_);
    pack();
    const int64_t depth = all_.depth_, steps = depth / kTileDepth;
    Unit::begin();
    for (int64_t first = 0; first < n_; first += kPair) {
      const int64_t rows = smaller(kPair, n_ - first);
      for (int64_t key = 0; key < keys_; key += kPair) {
        multiply(rows, q_ + first * depth, depth, k_panel_ + key * depth, steps, scores_ + key,
                 keys_);
      }
      float factors[kPair];
      for (int64_t r = 0; r < rows; ++r) factors[r] = softmax(r);
      for (int64_t d = 0; d < depth; d += kPair) {
        multiply(rows, weights_, keys_, v_panel_ + d * keys_, keys_ / kTileDepth, out_ + d, depth);
      }
      for_tokens(first, rows, [&](int64_t r, int64_t token) {
        BFloat16* to = static_cast<BFloat16*>(a_.out) + token * all_.width_ + head_;
        const float* from = out_ + r * depth;
        const Vec factor = broadcast(factors[r]);
        map_to(to, a_.dim, [&](int64_t d, int64_t n) { return load_some(from + d, n) * factor; });
      });
    }
    Unit::end();
  }

 private:
  // body(i, place in the map) for `count` tokens of the window from the first one on, line by line.
  template <class Body>
  void for_tokens(int64_t first, int64_t count, Body body) const {
    int64_t x = first % columns_, line = first_ + first / columns_ * a_.width;
    for (int64_t i = 0; i < count; ++i) {
      body(i, line + x);
      if (++x == columns_) x = 0, line += a_.width;
    }
  }

  // Rows of q (part 0), k (1) or v (2), zeros up to whole tiles; k and v with the row of padding.
  void gather(int64_t part, BFloat16* to) const {
    const int64_t offset = part * all_.width_ + head_, depth = all_.depth_;
    const auto* from = static_cast<const BFloat16*>(a_.qkv) + offset;
    auto put = [&](const BFloat16* row, int64_t i) {
      BFloat16* line = to + i * depth;
      int64_t d = 0;
      for (; d + kLanes <= a_.dim; d += kLanes) std::memcpy(line + d, row + d, sizeof(HVec));
      for (; d < depth; ++d) line[d] = d < a_.dim ? row[d] : BFloat16{0};
    };
    for_tokens(0, n_, [&](int64_t i, int64_t token) { put(from + token * 3 * all_.width_, i); });
    if (part > 0 && missing_ > 0) put(all_.pad_.data() + offset, n_);
    const int64_t used = part == 0 ? n_ : used_;
    for (int64_t i = used * depth; i < round_up(used, kTileDepth) * depth; ++i) to[i] = BFloat16{0};
  }

  void pack() const {
    const int64_t depth = all_.depth_;
    for (int64_t key = 0; key < keys_; key += kTile) {
      for (int64_t d = 0; d < depth; d += kTileDepth) {
        const int64_t pair = key / kPair * kPair * depth, half = key % kPair * kTileDepth;
        transpose_pairs(k_ + key * depth + d, depth, k_panel_ + pair + d * kPair + half,
                        kTileDepth);
      }
    }
    for (int64_t d = 0; d < depth; d += kTile) {
      for (int64_t key = 0; key < keys_; key += kTileDepth) {
        const int64_t pair = d / kPair * kPair * keys_, half = d % kPair * kTileDepth;
        join_tile(v_ + key * depth + d, depth, kTile, kTileDepth,
                  v_panel_ + pair + key * kPair + half);
      }
    }
  }

  static void multiply(int64_t rows, const BFloat16* x, int64_t x_stride, const BFloat16* panel,
                       int64_t steps, float* sums, int64_t sums_stride) {
    Nowhere ahead;
    if (rows > kTile) {
      Unit::template multiply<2>(x, x_stride, panel, steps, sums, sums_stride, ahead);
    } else {
      Unit::template multiply<1>(x, x_stride, panel, steps, sums, sums_stride, ahead);
    }
  }

  // Turns row r of the scores into weights that are not yet normalized; gives the reciprocal of
  // their sum. Of padding there is one key, with the logarithm of its number added to the score.
  float softmax(int64_t r) const {
    float* scores = scores_ + r * keys_;
    BFloat16* weights = weights_ + r * keys_;
    if (missing_ > 0) scores[n_] += std::log(static_cast<float>(missing_)) / a_.scale;
    const int64_t whole = used_ / kLanes * kLanes;
    const IVec in_use = lane_index() < broadcast(static_cast<float>(used_ - whole));
    const Vec none = broadcast(-INFINITY), scale = broadcast(a_.scale * 1.44269504f);
    Vec largest = none;
    for (int64_t i = 0; i < whole; i += kLanes) largest = at_least(largest, load(scores + i));
    if (whole < used_) largest = at_least(largest, select(in_use, load(scores + whole), none));
    const Vec reference = broadcast(max(largest)) * scale;
    auto weight = [&](int64_t i) { return rough_exp2(load(scores + i) * scale - reference); };
    auto put = [&](int64_t i, Vec p) {
      const HVec bits = Unit::narrowed(p);
      std::memcpy(weights + i, &bits, sizeof(bits));
    };
    Vec total{};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec p = weight(i);
      total += p;
      put(i, p);
    }
    if (whole < used_) {
      const Vec p = select(in_use, weight(whole), Vec{});
      total += p;
      put(whole, p);
    }
    for (int64_t i = round_up(used_, kLanes); i < keys_; i += kLanes) put(i, Vec{});
    return 1.0f / sum(total);
  }

  const WindowTiles& all_;
  const WindowAttentionArgs& a_;
  // the window's first token and this head's first channel; of the window: tokens in a line and in
  // all, those it lacks, keys, and these up to whole tiles
  const int64_t first_, head_, columns_, n_, missing_, used_, keys_;
  BFloat16 *q_, *k_, *v_, *k_panel_, *v_panel_, *weights_;
  float *scores_, *out_;
};

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

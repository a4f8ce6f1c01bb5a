// bf16_linear and bf16_mlp: products of many rows in bfloat16 arithmetic, with sums in float32.
//
// x is rounded to bfloat16 as a block of it is read, and so is what lies between the products of an
// MLP; an int8 weight is exact in bfloat16, and its factors come last. Weights become panels of two
// tiles' columns once a call. Either side may be a transpose.
#include "bf16.h"

#include "many_rows.h"
#include "tiles.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

int64_t steps_of(int64_t depth) { return divide_up(depth, kTileDepth); }

class TiledWeight {
 public:
  explicit TiledWeight(const Matrix& w)
      : rows(w.rows),
        steps(steps_of(w.cols)),
        scale(w.scale),
        data_(divide_up(w.rows, kCols) * kCols * steps * kTileDepth) {
    with_weight_type(w.dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(w.data);
      auto task = [&](int64_t index, int64_t) { pack(w, from, index * kPair); };
      // whole blocks of columns: nothing of what lies behind the last one is read before it is set
      for_each_task(divide_up(rows, kCols) * (kCols / kPair), rows * w.cols, task);
    });
  }
  // Of the columns first, first + 1, ...: [steps][2] tiles. first: a multiple of kPair.
  const BFloat16* panel(int64_t first) const { return data_.data() + first * steps * kTileDepth; }

  const int64_t rows, steps;
  const float* const scale;

 private:
  template <class T>
  void pack(const Matrix& w, const T* from, int64_t first) {
    BFloat16* to = data_.data() + first * steps * kTileDepth;
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t tile = 0; tile < 2; ++tile, to += kTileSize) {
        const int64_t row = first + tile * kTile, k = step * kTileDepth;
        const int64_t count = larger(0, smaller(kTile, w.rows - row));
        const int64_t depth = smaller(kTileDepth, w.cols - k);
        if (w.step != 1) {
          join_tile(from + k * w.step + row, w.step, count, depth, to);
        } else {
          pack_tile(from + row * w.stride + k, w.stride, count, depth, to);
        }
      }
    }
  }

  Scratch<BFloat16> data_;
};

// bfloat16 by the unit's instruction, where it has one.
template <class Unit>
struct Rounds : Stores {
  using Stores::put;
  static void put(BFloat16* to, Vec x) {
    const HVec bits = Unit::narrowed(x);
    std::memcpy(to, &bits, sizeof(bits));
  }
  static void put(BFloat16* to, Vec x, Vec next) { Unit::put(to, x, next); }
};

struct TiledRows {
  const BFloat16* data;
  int64_t stride;
};

// Room for rows of some depth as bfloat16, with zeros up to a whole tile.
template <class Unit>
class TiledBlock {
 public:
  TiledBlock(int64_t rows, int64_t depth)
      : depth_(depth), stride_(round_up(depth, kTileDepth) + kTileDepth), data_(rows * stride_) {}

  // of f(i, lanes)
  template <class F>
  void set(int64_t row, int64_t first, int64_t n, float*, F f) const {
    put_all<Rounds<Unit>>(data_.data() + row * stride_ + first, n, f);
    end_row(row, first + n);
  }
  void set(int64_t row, const Matrix& x, int64_t first, int64_t count) const {
    with_type(x.dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(x.data) + first * x.stride;
      if (x.step != 1) return set_columns(row, from, x.step, count);
      for (int64_t r = 0; r < count; ++r) set_row(row + r, 0, x.cols, from + r * x.stride);
    });
  }
  TiledRows rows(int64_t first) const { return {data_.data() + first * stride_, stride_}; }

 private:
  template <class T>
  void set_row(int64_t row, int64_t first, int64_t n, const T* from) const {
    to_bfloat16<Unit>(from, n, data_.data() + row * stride_ + first);
    end_row(row, first + n);
  }
  void end_row(int64_t row, int64_t end) const {
    BFloat16* to = data_.data() + row * stride_;
    for (int64_t i = end; i < (end == depth_ ? round_up(depth_, kTileDepth) : 0); ++i) {
      to[i] = BFloat16{0};
    }
  }

  // Of a transpose: tiles of 16 rows and as many pairs, zeros in the rows beyond the last.
  template <class T>
  void set_columns(int64_t row, const T* from, int64_t step, int64_t count) const {
    BFloat16 pairs[kTileSize];
    for (int64_t k = 0; k < depth_; k += kTileDepth) {
      for (int64_t r = 0; r < count; r += kTile) {
        const int64_t depth = smaller(kTileDepth, depth_ - k);
        join_tile(from + k * step + r, step, smaller(kTile, count - r), depth, pairs);
        transpose_pairs(pairs, kTileDepth, data_.data() + (row + r) * stride_ + k, stride_);
      }
    }
  }

  // between rows: no multiple of 4 KiB, where rows would be in each other's way in the cache
  int64_t depth_, stride_;
  Scratch<BFloat16> data_;
};

constexpr int64_t kFinished = 2 * kPair;  // columns of a block of sums that is finished

// Finishes the rows of one block of sums while tiles of the next are multiplied: a core's tiles and
// its vectors work side by side, if their instructions come mixed.
template <class Done>
class Finishing {
 public:
  Finishing(Done& done, int64_t steps, float* sums)
      : done_(done), steps_(steps * (kFinished / kPair)), sums_{sums, sums + kPair * kFinished} {}

  float* next() const { return sums_[0]; }
  // A step of the next block is done.
  void more() {
    for (due_ += kPair; due_ >= steps_ && row_ < count_; due_ -= steps_) one();
  }
  void rest() {
    while (row_ < count_) one();
  }
  // What next() points to is the block of these rows and columns now.
  void advance(int64_t first, int64_t count, int64_t col, int64_t cols) {
    rest();
    std::swap(sums_[0], sums_[1]);
    first_ = first;
    count_ = count;
    col_ = col;
    cols_ = cols;
    row_ = due_ = 0;
  }

 private:
  void one() {
    done_(first_ + row_, col_, cols_, sums_[1] + row_ * kFinished);
    ++row_;
  }

  Done& done_;
  const int64_t steps_;
  float* sums_[2];
  int64_t first_ = 0, count_ = 0, col_ = 0, cols_ = 0, row_ = 0, due_ = 0;
};

template <class Unit>
struct Bf16 : Rounds<Unit> {
  using Weight = TiledWeight;
  using Block = TiledBlock<Unit>;
  static constexpr int64_t kTileRows = kPair;

  template <class Finish>
  static void multiply(TiledRows x, int64_t rows, const TiledWeight& w, int64_t begin, int64_t end,
                       float* sums, Finish finish) {
    const float* const scale = w.scale;
    auto done = [=](int64_t row, int64_t n, int64_t cols, float* from) {
      if (scale != nullptr) {
        map_to(from, cols, [=](int64_t i, int64_t some) {
          return load_some(from + i, some) * load_some(scale + n + i, some);
        });
      }
      finish(row, n, cols, from);
    };
    using Behind = Finishing<decltype(done)>;
    Behind behind(done, w.steps, sums);
    Unit::begin();
    for (int64_t n = begin; n < end; n += kCols) {
      for (int64_t m = 0; m < rows; m += kPair) {
        const int64_t count = smaller(kPair, rows - m);
        const auto tiles = count > kTile ? &Unit::template multiply<2, Behind>
                                         : &Unit::template multiply<1, Behind>;
        for (int64_t p = n; p < smaller(n + kCols, end); p += kFinished) {
          const int64_t cols = smaller(kFinished, end - p);
          for (int64_t q = 0; q < cols; q += kPair) {
            tiles(x.data + m * x.stride, x.stride, w.panel(p + q), w.steps, behind.next() + q,
                  kFinished, behind);
          }
          behind.advance(m, count, p, cols);
        }
      }
    }
    behind.rest();
    Unit::end();
  }
};

}  // namespace

void bf16_linear(const PackedLinearArgs& args) {
  with_unit([&](auto unit) { linear_of_many<Bf16<decltype(unit)>>(args); });
}

void bf16_mlp(const PackedMlpArgs& args) {
  with_unit([&](auto unit) { mlp_of_many<Bf16<decltype(unit)>>(args); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

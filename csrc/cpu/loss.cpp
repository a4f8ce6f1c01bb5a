// The passes over a block of logits between the products of linear_cross_entropy and linear_topk.
#include "loss.h"

#include <cmath>

#include "gemm.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTaskElements = 16384;
// Of a row in one sum: short sums of short sums round less than one long one.
constexpr int64_t kPart = 64 * kLanes;

// Calls body(row) for all rows; short rows share a task.
template <class Body>
void for_rows(const LogitsBlock& block, Body body) {
  const int64_t rows = larger(1, kTaskElements / larger(1, block.cols));
  auto task = [&](int64_t index, int64_t) {
    const int64_t end = smaller(block.rows, (index + 1) * rows);
    for (int64_t row = index * rows; row < end; ++row) body(row);
  };
  for_each_task(divide_up(block.rows, rows), task);
}

// Calls body(i, n, logits, slope of the cap) for the vectors of a row.
template <class Body>
void for_logits(const LogitsBlock& block, int64_t row, Body body) {
  const float* logits = block.logits + row * block.cols;
  const Vec softcap = broadcast(block.softcap), one = broadcast(1.0f);
  const Vec inverse = broadcast(block.softcap > 0 ? 1.0f / block.softcap : 0.0f);
  with_type(block.bias.dtype, [&](auto type) {
    const auto* bias = static_cast<const decltype(type)*>(block.bias.data);
    for (int64_t i = 0; i < block.cols; i += kLanes) {
      const int64_t n = smaller(kLanes, block.cols - i);
      Vec x = load_some(logits + i, n), slope = one;
      if (bias != nullptr) x += load_some(bias + i, n);
      if (block.softcap > 0) {
        const Vec t = tanh(x * inverse);
        x = t * softcap;
        slope = one - t * t;
      }
      body(i, n, x, slope);
    }
  });
}

// Lanes from n on do not count.
Vec visible(Vec x, int64_t n) {
  if (n == kLanes) return x;
  return select(lane_index() < broadcast(static_cast<float>(n)), x, broadcast(-INFINITY));
}

// A NaN ranks first, as PyTorch has it.
bool ranks_before(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The best k so far, in order; `count` of them are there.
struct Ranking {
  float* values;
  int64_t* indices;
  int64_t k, count;

  void add(float value, int64_t index) {
    if (count == k && !ranks_before(value, values[k - 1])) return;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && ranks_before(value, values[at - 1]); --at) {
      values[at] = values[at - 1];
      indices[at] = indices[at - 1];
    }
    values[at] = value;
    indices[at] = index;
  }
};

void rank(const LogitsBlock& block, int64_t row, Ranking ranking) {
  const float* x = block.logits + row * block.cols;
  int64_t i = 0;
  for (; i < block.cols && ranking.count < ranking.k; ++i) ranking.add(x[i], block.first + i);
  for (; i < block.cols; i += kLanes) {
    const int64_t n = smaller(kLanes, block.cols - i);
    const Vec last = broadcast(ranking.values[ranking.k - 1]);
    // a NaN is not <= either, and passes on to the careful comparison
    if (max(select(load_some(x + i, n) <= last, Vec{}, broadcast(1.0f))) == 0.0f) continue;
    for (int64_t j = i; j < i + n; ++j) ranking.add(x[j], block.first + j);
  }
}

void scan_row(const ScanArgs& a, int64_t row) {
  float* x = a.block.logits + row * a.block.cols;
  Vec tops = broadcast(a.largest[row]);
  for_logits(a.block, row, [&](int64_t i, int64_t n, Vec logits, Vec) {
    tops = at_least(tops, visible(logits, n));
    n == kLanes ? store(x + i, logits) : store_partial(x + i, logits, n);
  });
  const float top = max(tops);
  const Vec reference = broadcast(top == -INFINITY ? 0.0f : top);
  Vec totals{};
  for (int64_t begin = 0; begin < a.block.cols; begin += kPart) {
    const int64_t end = smaller(a.block.cols, begin + kPart);
    Vec part{};
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t n = smaller(kLanes, end - i);
      part += exp(visible(load_some(x + i, n), n) - reference);
    }
    totals += part;
  }
  const double before = a.total[row];
  a.total[row] = (before == 0.0 ? 0.0 : before * std::exp(a.largest[row] - double{reference[0]})) +
                 double{sum(totals)};
  a.largest[row] = top;
  if (a.labels != nullptr) {
    const int64_t label = a.labels[row] - a.block.first;
    if (label >= 0 && label < a.block.cols) a.picked[row] = x[label];
  }
  if (a.k > 0) {
    const int64_t count = smaller(a.k, a.block.first);
    rank(a.block, row, {a.values + row * a.k, a.indices + row * a.k, a.k, count});
  }
}

}  // namespace

void scan_logits(const ScanArgs& a) {
  for_rows(a.block, [&](int64_t row) { scan_row(a, row); });
}

void logits_gradient(const LogitsGradientArgs& a) {
  for_rows(a.block, [&](int64_t row) {
    float* x = a.block.logits + row * a.block.cols;
    const Vec largest = broadcast(a.parts[2 * row]), rest = broadcast(a.parts[2 * row + 1]);
    const Vec grad = broadcast(a.grad[row]);
    const int64_t label = a.labels[row] - a.block.first;
    for_logits(a.block, row, [&](int64_t i, int64_t n, Vec logits, Vec slope) {
      Vec p = exp((logits - largest) - rest);
      if (label >= i && label < i + n) p[label - i] -= 1.0f;
      const Vec d = p * grad * slope;
      n == kLanes ? store(x + i, d) : store_partial(x + i, d, n);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

// cached_attention: one new token per row against the positions of its own ancestry in a cache.
#include <cmath>

#include "attention.h"
#include "softmax.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kPositions = 512;  // positions of one task; longer rows are cut and combined

template <class T>
class CachedAttention {
 public:
  CachedAttention(const CachedAttentionArgs& args, int64_t positions)
      : a_(args),
        group_(args.heads / args.kv_heads),
        blocks_(larger(1, divide_up(positions, kPositions))),
        padded_(round_up(args.dim, kLanes)) {}

  void run() {
    const int64_t bias = a_.bias.data == nullptr ? 0 : kPositions;
    const int64_t per_worker = group_ * (kPositions + padded_) + bias;
    Scratch<float> scratch(workers() * per_worker);
    Scratch<float> parts(a_.rows * a_.heads * blocks_ * padded_);
    Scratch<Running> running(a_.rows * a_.heads * blocks_);
    auto task = [&](int64_t index, int64_t worker) {
      const int64_t block = index % blocks_;
      const int64_t head = index / blocks_ % a_.kv_heads * group_;
      const int64_t row = index / blocks_ / a_.kv_heads;
      const int64_t part = (row * a_.heads + head) * blocks_ + block;
      attend(row, head, block, scratch.data() + worker * per_worker, parts.data() + part * padded_,
             running.data() + part);
    };
    for_each_task(a_.rows * a_.kv_heads * blocks_, task);
    auto finish = [&](int64_t row, int64_t worker) {
      float* sums = scratch.data() + worker * per_worker;
      for (int64_t r = row * a_.heads; r < (row + 1) * a_.heads; ++r) {
        Running result;
        combine(parts.data() + r * blocks_ * padded_, running.data() + r * blocks_, blocks_,
                padded_, sums, result);
        write_row(sums, result, a_.dim, static_cast<T*>(a_.out) + r * a_.dim);
        if (a_.lse != nullptr) a_.lse[r] = result.largest + std::log(result.total);
      }
    };
    for_each_task(a_.rows, finish);
  }

 private:
  // The query heads of one key head over one block of positions; a head's results lie `blocks_`
  // parts apart.
  void attend(int64_t row, int64_t head, int64_t block, float* scratch, float* parts,
              Running* running) {
    float* q = scratch;
    float* scores = q + group_ * padded_;
    const T* queries = static_cast<const T*>(a_.q.data) + row * a_.q.row_stride;
    for (int64_t g = 0; g < group_; ++g) {
      gather_row(queries + (head + g) * a_.q.head_stride, a_.dim, q + g * padded_);
    }
    float* bias = a_.bias.data == nullptr ? nullptr : scores + group_ * kPositions;
    int64_t k_offsets[kPositions], v_offsets[kPositions], distances[kPositions];
    const int64_t n = visible(row, block, k_offsets, v_offsets, distances);
    score_rows(q, padded_, group_,
               static_cast<const T*>(a_.k.data) + head / group_ * a_.k.head_stride, k_offsets, n,
               a_.dim, scores, kPositions);
    for (int64_t g = 0; g < group_; ++g) {
      float* sums = parts + g * blocks_ * padded_;
      for (int64_t d = 0; d < padded_; ++d) sums[d] = 0.0f;
      running[g * blocks_] = kNothingSeen;
      if (bias != nullptr) gather_bias(head + g, n, distances, bias);
      softmax_row(scores + g * kPositions, n, 0, n, {a_.scale, a_.softcap}, running[g * blocks_],
                  nullptr, 0, bias);
    }
    add_values(scores, kPositions, group_,
               static_cast<const T*>(a_.v.data) + head / group_ * a_.v.head_stride, v_offsets, n,
               a_.dim, parts, blocks_ * padded_);
  }

  void gather_bias(int64_t head, int64_t n, const int64_t* distances, float* to) const {
    const int64_t reach = a_.bias.reach;
    const float* entries = a_.bias.data + head * (2 * reach + 1);
    for (int64_t i = 0; i < n; ++i) to[i] = entries[reach + larger(-reach, distances[i])];
  }

  // Offsets of the visible positions of a block, in order, and how far behind the last of the row
  // they lie; returns how many there are.
  int64_t visible(int64_t row, int64_t block, int64_t* k_offsets, int64_t* v_offsets,
                  int64_t* distances) const {
    const int64_t length = a_.lengths[row];
    const int64_t first = a_.window > 0 ? larger(0, length - a_.window) : 0;
    const int64_t end = smaller(length, (block + 1) * kPositions);
    int64_t n = 0;
    for (int64_t t = larger(first, block * kPositions); t < end; ++t) {
      int64_t from = row;
      if (a_.ancestry != nullptr) {
        from = a_.ancestry[row * a_.ancestry_row_stride + t * a_.ancestry_position_stride];
        if (from < 0) continue;
        if (from >= a_.cache_rows) {
          __atomic_store_n(a_.bad_ancestor, 1, __ATOMIC_RELAXED);
          continue;
        }
      }
      k_offsets[n] = from * a_.k.row_stride + t * a_.k.position_stride;
      v_offsets[n] = from * a_.v.row_stride + t * a_.v.position_stride;
      distances[n] = t - (length - 1);
      ++n;
    }
    return n;
  }

  const CachedAttentionArgs& a_;
  int64_t group_, blocks_, padded_;
};

}  // namespace

void cached_attention(const CachedAttentionArgs& args) {
  int64_t positions = 0;
  for (int64_t r = 0; r < args.rows; ++r) positions = larger(positions, args.lengths[r]);
  with_type(args.dtype, [&](auto type) { CachedAttention<decltype(type)>(args, positions).run(); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

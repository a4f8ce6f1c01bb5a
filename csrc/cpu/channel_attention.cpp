// channel_attention: softmax(k^T q / sqrt(N)) of each group of channels, applied to its v.
//
// Scores are sums over the tokens: chunks of tokens are summed apart, chunk after chunk in order,
// so that the bits are the same for any number of threads. The tokens are read twice, for q and k
// and for v, where the product has left them.
#include <cmath>

#include "panel.h"
#include "vision.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTokens = 48;          // at a time, in the first-level cache
constexpr int64_t kChunk = 5 * kTokens;  // of a task, at least
constexpr int64_t kMostChunks = 64;      // of an image

template <class T>
class ChannelAttention {
 public:
  explicit ChannelAttention(const ChannelAttentionArgs& args)
      : a_(args),
        width_(args.groups * args.dim),
        padded_(round_up(args.dim, kLanes)),
        square_(args.dim * padded_),
        chunk_(larger(kChunk, round_up(divide_up(args.tokens, kMostChunks), kTokens))),
        chunks_(divide_up(args.tokens, chunk_)),
        scores_(args.images * chunks_ * args.groups * square_) {}

  void run() {
    const int64_t own = 2 * kTokens * padded_;
    Scratch<float> scratch(workers() * own);
    const int64_t elements = a_.images * a_.tokens * width_;
    auto score = [&](int64_t index, int64_t worker) {
      score_chunk(index / chunks_, index % chunks_, scratch.data() + worker * own);
    };
    for_each_task(a_.images * chunks_, elements, score);
    auto weigh = [&](int64_t index, int64_t) { weights_of(index / a_.groups, index % a_.groups); };
    for_each_task(a_.images * a_.groups, elements, weigh);
    auto apply = [&](int64_t index, int64_t worker) {
      apply_chunk(index / chunks_, index % chunks_, scratch.data() + worker * own);
    };
    for_each_task(a_.images * chunks_, elements, apply);
  }

 private:
  float* scores(int64_t image, int64_t chunk, int64_t group) const {
    return scores_.data() + ((image * chunks_ + chunk) * a_.groups + group) * square_;
  }
  // Rows of q (part 0), k (1) or v (2), as float32.
  void gather(int64_t image, int64_t first, int64_t count, int64_t part, int64_t group,
              float* to) const {
    const T* from = static_cast<const T*>(a_.qkv) + (image * a_.tokens + first) * 3 * width_ +
                    part * width_ + group * a_.dim;
    for (int64_t i = 0; i < count; ++i) {
      gather_row(from + i * 3 * width_, a_.dim, to + i * padded_);
    }
  }
  template <class Body>
  void for_tokens(int64_t chunk, Body body) const {
    const int64_t end = smaller(a_.tokens, (chunk + 1) * chunk_);
    for (int64_t first = chunk * chunk_; first < end; first += kTokens) {
      body(first, smaller(kTokens, end - first));
    }
  }

  void score_chunk(int64_t image, int64_t chunk, float* scratch) const {
    float *q = scratch, *k = scratch + kTokens * padded_;
    for_tokens(chunk, [&](int64_t first, int64_t count) {
      for (int64_t g = 0; g < a_.groups; ++g) {
        gather(image, first, count, 0, g, q);
        gather(image, first, count, 1, g, k);
        panel_product({k, 1, padded_}, a_.dim, q, padded_, count, first != chunk * chunk_,
                      scores(image, chunk, g), padded_, padded_);
      }
    });
  }

  // What the chunks have found is added up in the first one, and becomes the weights.
  void weights_of(int64_t image, int64_t group) const {
    float* s = scores(image, 0, group);
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      const float* more = scores(image, chunk, group);
      for (int64_t i = 0; i < square_; i += kLanes) store(s + i, load(s + i) + load(more + i));
    }
    const Vec scale = broadcast(1.0f / std::sqrt(static_cast<float>(a_.tokens)));
    for (int64_t d = 0; d < padded_; d += kLanes) {
      Vec largest = broadcast(-INFINITY), total{};
      for (int64_t i = 0; i < a_.dim; ++i) {
        const Vec x = load(s + i * padded_ + d) * scale;
        largest = at_least(largest, x);
        store(s + i * padded_ + d, x);
      }
      for (int64_t i = 0; i < a_.dim; ++i) {
        const Vec p = exp(load(s + i * padded_ + d) - largest);
        total += p;
        store(s + i * padded_ + d, p);
      }
      const Vec factor = broadcast(1.0f) / total;
      for (int64_t i = 0; i < a_.dim; ++i) {
        store(s + i * padded_ + d, load(s + i * padded_ + d) * factor);
      }
    }
  }

  void apply_chunk(int64_t image, int64_t chunk, float* scratch) const {
    float *v = scratch, *sums = scratch + kTokens * padded_;
    for_tokens(chunk, [&](int64_t first, int64_t count) {
      for (int64_t g = 0; g < a_.groups; ++g) {
        gather(image, first, count, 2, g, v);
        panel_product({v, padded_, 1}, count, scores(image, 0, g), padded_, a_.dim, false, sums,
                      padded_, padded_);
        T* out = static_cast<T*>(a_.out) + (image * a_.tokens + first) * width_ + g * a_.dim;
        for (int64_t i = 0; i < count; ++i) {
          map_to(out + i * width_, a_.dim,
                 [&](int64_t d, int64_t) { return load(sums + i * padded_ + d); });
        }
      }
    });
  }

  const ChannelAttentionArgs& a_;
  int64_t width_, padded_, square_, chunk_, chunks_;
  Scratch<float> scores_;
};

}  // namespace

void channel_attention(const ChannelAttentionArgs& args) {
  with_type(args.dtype, [&](auto type) { ChannelAttention<decltype(type)>(args).run(); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

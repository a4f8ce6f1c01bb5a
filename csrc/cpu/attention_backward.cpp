// attention, backward: scores and probabilities are recomputed from q and k, whole rows at a time.
//
// A panel of rows meets all keys of its image at once, so that the softmax and its gradient are
// those of plain attention: with logsumexp and out in their place (FlashAttention-2, arXiv
// 2307.08691) the rounding of both does not cancel where one key has nearly all of the weight.
// A task is a chunk of the rows of one image and key head; it owns dQ of its rows and sums dK, dV
// and the gradient of a bias over them. How many chunks there are depends on the sizes alone, so
// that any number of threads gives the same bits.
#include <cmath>

#include "panel.h"
#include "position_bias.h"
#include "random.h"
#include "readers.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kRows = 96;   // query rows of a panel
constexpr int64_t kKeys = 64;   // keys of a block
constexpr int64_t kDepth = 64;  // of the head dimension, summed in one go
constexpr int64_t kTasks = 32;  // rows of an image are cut into chunks where there are fewer tasks
constexpr int64_t kMostParts = int64_t{1} << 24;  // elements of all chunks' sums

template <class T>
class AttentionBackward {
 public:
  explicit AttentionBackward(const AttentionBackwardArgs& args)
      : b_(args),
        a_(args.forward),
        readers_(a_),
        bias_(a_),
        group_(a_.heads / a_.kv_heads),
        padded_(round_up(a_.dim, kLanes)),
        chunks_(count_chunks()),
        parts_(chunks_ == 1 ? 0 : 2 * chunks_ * a_.kv_heads * b_.keys * padded_),
        bias_parts_(b_.dbias == nullptr ? 0 : tasks() * group_ * bias_.entries()) {
    for (int64_t i = 0; i < a_.images; ++i) width_ = larger(width_, keys_of(i));
    width_ = round_up(width_, kKeys);
  }

  void run() {
    clear_unread();
    const int64_t per_worker =
        width_ * (5 * padded_ + 2 * kRows + 2) + kRows * 3 * padded_ + bias_size();
    Scratch<float> scratch(smaller(workers(), tasks()) * per_worker);
    auto chunk = [&](int64_t task, int64_t worker) {
      run_chunk(task / (a_.kv_heads * chunks_), task / chunks_ % a_.kv_heads, task % chunks_,
                scratch.data() + worker * per_worker);
    };
    for_each_task(tasks(), chunk);
    if (b_.dbias != nullptr) {
      auto add = [&](int64_t head, int64_t) { add_bias(head); };
      for_each_task(a_.heads, add);
    }
    if (chunks_ == 1) return;
    auto finish = [&](int64_t task, int64_t) { add_parts(task / a_.kv_heads, task % a_.kv_heads); };
    for_each_task(a_.images * a_.kv_heads, finish);
  }

 private:
  // The memory of a task; rows of keys are padded to whole vectors.
  struct Memory {
    float *k_transposed, *v_transposed;  // [blocks][dim][kKeys]
    float *k, *dk, *dv;                  // [width][padded]
    float *p, *ds;                       // [kRows][width]
    float *slope, *keep;                 // [width]
    float *q, *grad, *dq;                // [kRows][padded]
    float* dbias;                        // [group][all distances]
  };

  int64_t tasks() const { return a_.images * a_.kv_heads * chunks_; }
  int64_t bias_size() const { return b_.dbias == nullptr ? 0 : group_ * bias_.width(); }
  // What one task adds to the gradient of the bias of a head of its group.
  float* bias_part(int64_t image, int64_t kv_head, int64_t chunk, int64_t in_group) const {
    const int64_t task = (image * a_.kv_heads + kv_head) * chunks_ + chunk;
    return bias_parts_.data() + (task * group_ + in_group) * bias_.entries();
  }

  int64_t count_chunks() const {
    int64_t rows = 0;
    for (int64_t i = 0; i < a_.images; ++i) rows = larger(rows, readers_.count(i));
    const int64_t one = 2 * a_.kv_heads * b_.keys * padded_;  // the sums of one chunk
    int64_t chunks = divide_up(kTasks, larger(1, a_.images * a_.kv_heads));
    chunks = smaller(chunks, divide_up(rows * group_, kRows));
    return larger(1, smaller(chunks, kMostParts / larger(1, one)));
  }
  static const T* at(const Heads& x, int64_t row, int64_t head) {
    return static_cast<const T*>(x.data) + row * x.row_stride + head * x.head_stride;
  }
  int64_t keys_of(int64_t image) const { return a_.kv_offsets[image + 1] - a_.kv_offsets[image]; }
  // Chunks of the rows of an image, in whole panels; those past the last row are empty.
  int64_t chunk_rows(int64_t image) const {
    return round_up(divide_up(readers_.count(image) * group_, chunks_), kRows);
  }
  // A chunk's sum of dK (0) or dV (1) for the keys of an image and key head.
  float* part(int64_t which, int64_t chunk, int64_t image, int64_t kv_head) const {
    const int64_t heads = (which * chunks_ + chunk) * a_.kv_heads + kv_head;
    return parts_.data() + (heads * b_.keys + a_.kv_offsets[image]) * padded_;
  }

  Memory divide(float* scratch) const;
  void clear_unread();
  void run_chunk(int64_t image, int64_t kv_head, int64_t chunk, float* scratch);
  void load_keys(int64_t image, int64_t kv_head, const Memory& m);
  void run_panel(int64_t image, int64_t kv_head, int64_t begin, int64_t rows, const Memory& m);
  void score_gradients(int64_t index, int64_t head, int64_t begin, int64_t end, int64_t keys,
                       float* p, float* ds, const Memory& m) const;
  template <class Value>
  void write_keys(int64_t image, int64_t kv_head, void* to, Value value) const;
  void add_parts(int64_t image, int64_t kv_head);
  int64_t clear_bias(int64_t image, int64_t begin, int64_t end, const Memory& m) const;
  void fold_bias(int64_t image, int64_t kv_head, int64_t chunk, int64_t reach, const Memory& m);
  void add_bias(int64_t head);

  const AttentionBackwardArgs& b_;
  const AttentionArgs& a_;
  Readers readers_;
  BiasRows bias_;
  int64_t group_, padded_, chunks_, width_ = 0;
  Scratch<float> parts_;       // [dK, dV][chunks][key heads][keys][padded]
  Scratch<float> bias_parts_;  // [tasks][group][entries]
};

template <class T>
typename AttentionBackward<T>::Memory AttentionBackward<T>::divide(float* scratch) const {
  auto take = [&](int64_t count) {
    float* from = scratch;
    scratch += count;
    return from;
  };
  const int64_t keys = width_ * padded_, scores = kRows * width_, rows = kRows * padded_;
  return {take(keys),   take(keys),   take(keys),       take(keys),   take(keys),
          take(scores), take(scores), take(width_),     take(width_), take(rows),
          take(rows),   take(rows),   take(bias_size())};
}

// Rows of k and v past the last image: no task is theirs.
template <class T>
void AttentionBackward<T>::clear_unread() {
  const int64_t size = a_.kv_heads * a_.dim;
  auto clear = [&](void* gradient) {
    if (gradient == nullptr) return;
    T* to = static_cast<T*>(gradient);
    for (int64_t i = a_.kv_offsets[a_.images] * size; i < b_.keys * size; ++i) to[i] = T{};
  };
  clear(b_.dk);
  clear(b_.dv);
}

template <class T>
void AttentionBackward<T>::run_chunk(int64_t image, int64_t kv_head, int64_t chunk,
                                     float* scratch) {
  Memory m = divide(scratch);
  const int64_t keys = keys_of(image), all = readers_.count(image) * group_;
  const int64_t begin = chunk * chunk_rows(image);
  const int64_t end = smaller(begin + chunk_rows(image), all);
  const int64_t reach = clear_bias(image, begin, end, m);
  if (chunks_ > 1) {
    if (begin >= end) return fold_bias(image, kv_head, chunk, reach, m);
    m.dk = part(0, chunk, image, kv_head);
    m.dv = part(1, chunk, image, kv_head);
  }
  for (int64_t i = 0; i < keys * padded_; ++i) m.dk[i] = m.dv[i] = 0.0f;
  if (begin < end) load_keys(image, kv_head, m);
  for (int64_t r = begin; r < end; r += kRows) {
    run_panel(image, kv_head, r, smaller(kRows, end - r), m);
  }
  fold_bias(image, kv_head, chunk, reach, m);
  if (chunks_ > 1) return;
  write_keys(image, kv_head, b_.dk, [&](int64_t i) { return load(m.dk + i); });
  write_keys(image, kv_head, b_.dv, [&](int64_t i) { return load(m.dv + i); });
}

template <class T>
void AttentionBackward<T>::load_keys(int64_t image, int64_t kv_head, const Memory& m) {
  const int64_t keys = keys_of(image), first = a_.kv_offsets[image];
  for (int64_t key = 0; key < keys; key += kKeys) {
    const int64_t n = smaller(kKeys, keys - key);
    pack_transposed(at(a_.k, first + key, kv_head), a_.k.row_stride, n, a_.dim,
                    m.k_transposed + key * padded_, kKeys);
    pack_transposed(at(a_.v, first + key, kv_head), a_.v.row_stride, n, a_.dim,
                    m.v_transposed + key * padded_, kKeys);
  }
  for (int64_t j = 0; j < keys; ++j) {
    gather_row(at(a_.k, first + j, kv_head), a_.dim, m.k + j * padded_);
  }
}

template <class T>
void AttentionBackward<T>::run_panel(int64_t image, int64_t kv_head, int64_t begin, int64_t rows,
                                     const Memory& m) {
  const int64_t first = readers_.first(image), keys = keys_of(image);
  auto index_of = [&](int64_t r) { return first + (begin + r) / group_; };
  auto head_of = [&](int64_t r) { return kv_head * group_ + (begin + r) % group_; };
  int64_t from = keys, to = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = readers_.row(index_of(r));
    gather_row(at(a_.q, row, head_of(r)), a_.dim, m.q + r * padded_);
    gather_row(at(b_.grad_out, row, head_of(r)), a_.dim, m.grad + r * padded_);
    from = smaller(from, readers_.first_visible(index_of(r)));
    to = larger(to, readers_.last_visible(index_of(r), keys));
  }
  from -= from % kKeys;
  for (int64_t key = from; key < to; key += kKeys) {
    const int64_t columns = round_up(smaller(kKeys, keys - key), kLanes);
    for (int64_t d = 0; d < a_.dim; d += kDepth) {
      const int64_t depth = smaller(kDepth, a_.dim - d), b = key * padded_ + d * kKeys;
      panel_product({m.q + d, padded_, 1}, rows, m.k_transposed + b, kKeys, depth, d > 0, m.p + key,
                    width_, columns);
      panel_product({m.grad + d, padded_, 1}, rows, m.v_transposed + b, kKeys, depth, d > 0,
                    m.ds + key, width_, columns);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    score_gradients(index_of(r), head_of(r), from, to, keys, m.p + r * width_, m.ds + r * width_,
                    m);
  }
  for (int64_t key = from; key < to; key += kKeys) {
    const int64_t n = smaller(kKeys, to - key), at = key * padded_;
    if (b_.dv != nullptr) {
      panel_product({m.p + key, 1, width_}, n, m.grad, padded_, rows, true, m.dv + at, padded_,
                    padded_);
    }
    if (b_.dk != nullptr) {
      panel_product({m.ds + key, 1, width_}, n, m.q, padded_, rows, true, m.dk + at, padded_,
                    padded_);
    }
    if (b_.dq != nullptr) {
      panel_product({m.ds + key, width_, 1}, rows, m.k + at, padded_, n, key > from, m.dq, padded_,
                    padded_);
    }
  }
  if (b_.dq == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = readers_.row(index_of(r)) * a_.heads + head_of(r);
    map_to(static_cast<T*>(b_.dq) + row * a_.dim, a_.dim,
           [&](int64_t i, int64_t) { return from < to ? load(m.dq + r * padded_ + i) : Vec{}; });
  }
}

// From q.k and dOut.v of a row, keys begin to end: p becomes the probabilities as the values saw
// them, dropout included, and ds the gradient of q.k.
template <class T>
void AttentionBackward<T>::score_gradients(int64_t index, int64_t head, int64_t begin, int64_t end,
                                           int64_t keys, float* p, float* ds,
                                           const Memory& m) const {
  const uint64_t counter = static_cast<uint64_t>(readers_.row(index) * a_.heads + head) << 32;
  const bool capped = a_.softcap > 0, dropped = a_.dropout.scale != 0;
  const int64_t place = readers_.place(index);
  const float* bias = bias_.row(head, place, begin);
  const Vec scale = broadcast(capped ? a_.scale / a_.softcap : a_.scale);
  const Vec softcap = broadcast(a_.softcap), one = broadcast(1.0f);
  const Vec from = broadcast(static_cast<float>(readers_.first_visible(index) - begin));
  const Vec to = broadcast(static_cast<float>(readers_.last_visible(index, keys) - begin));
  Vec largest = broadcast(-INFINITY);
  for (int64_t i = begin; i < end; i += kLanes) {
    Vec s = load(p + i) * scale, slope = broadcast(a_.scale);
    if (capped) {
      const Vec t = tanh(s);
      s = t * softcap;
      slope *= one - t * t;
    }
    if (bias != nullptr) s += load(bias + i - begin);
    const Vec key = lane_index() + broadcast(static_cast<float>(i - begin));
    s = select((key >= from) & (key < to), s, broadcast(-INFINITY));
    largest = at_least(largest, s);
    store(p + i, s);
    store(m.slope + i, slope);
    if (dropped) {
      const Vec keep = keep_scale(a_.dropout, counter + i);
      store(m.keep + i, keep);
      store(ds + i, load(ds + i) * keep);
    }
  }
  const float top = max(largest);
  const Vec reference = broadcast(top == -INFINITY ? 0.0f : top);
  Vec totals{}, products{};
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec e = exp(load(p + i) - reference);
    totals += e;
    products += e * load(ds + i);
    store(p + i, e);
  }
  const float total = sum(totals);
  const Vec factor = broadcast(total == 0.0f ? 0.0f : 1.0f / total);
  float* dbias = b_.dbias == nullptr
                     ? nullptr
                     : m.dbias + head % group_ * bias_.width() + bias_.begin(place, begin);
  const float of_lse =
      b_.grad_lse == nullptr ? 0.0f : b_.grad_lse[readers_.row(index) * a_.heads + head];
  const Vec delta = broadcast(sum(products)) * factor - broadcast(of_lse);
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec probability = load(p + i) * factor;
    const Vec gradient = probability * (load(ds + i) - delta);
    if (dbias != nullptr) store(dbias + i - begin, load(dbias + i - begin) + gradient);
    store(ds + i, gradient * load(m.slope + i));
    store(p + i, dropped ? probability * load(m.keep + i) : probability);
  }
}

// value(i) are kLanes elements from place i of [keys of the image][padded].
template <class T>
template <class Value>
void AttentionBackward<T>::write_keys(int64_t image, int64_t kv_head, void* to, Value value) const {
  if (to == nullptr) return;
  for (int64_t j = 0; j < keys_of(image); ++j) {
    const int64_t row = (a_.kv_offsets[image] + j) * a_.kv_heads + kv_head;
    map_to(static_cast<T*>(to) + row * a_.dim, a_.dim,
           [&](int64_t i, int64_t) { return value(j * padded_ + i); });
  }
}

template <class T>
void AttentionBackward<T>::add_parts(int64_t image, int64_t kv_head) {
  const int64_t rows = chunk_rows(image);
  const int64_t chunks = rows == 0 ? 0 : divide_up(readers_.count(image) * group_, rows);
  auto add = [&](int64_t which, void* to) {
    write_keys(image, kv_head, to, [&](int64_t i) {
      Vec total{};
      for (int64_t c = 0; c < chunks; ++c) total += load(part(which, c, image, kv_head) + i);
      return total;
    });
  };
  add(0, b_.dk);
  add(1, b_.dv);
}

// The sums of a task, zero for all distances that its rows have: the largest, either way.
template <class T>
int64_t AttentionBackward<T>::clear_bias(int64_t image, int64_t begin, int64_t end,
                                         const Memory& m) const {
  if (b_.dbias == nullptr) return 0;
  int64_t reach = keys_of(image);
  for (int64_t r = begin; r < end; ++r) {
    reach = larger(reach, readers_.place(readers_.first(image) + r / group_));
  }
  for (int64_t g = 0; g < group_; ++g) {
    float* sums = m.dbias + g * bias_.width() + bias_.begin(0, 0);
    for (int64_t d = -reach; d <= reach; ++d) sums[d] = 0.0f;
  }
  return reach;
}

template <class T>
void AttentionBackward<T>::fold_bias(int64_t image, int64_t kv_head, int64_t chunk, int64_t reach,
                                     const Memory& m) {
  if (b_.dbias == nullptr) return;
  for (int64_t g = 0; g < group_; ++g) {
    bias_.fold(m.dbias + g * bias_.width(), reach, bias_part(image, kv_head, chunk, g));
  }
}

template <class T>
void AttentionBackward<T>::add_bias(int64_t head) {
  for (int64_t i = 0; i < bias_.entries(); ++i) {
    double total = 0.0;
    for (int64_t image = 0; image < a_.images; ++image) {
      for (int64_t c = 0; c < chunks_; ++c) {
        total += double{bias_part(image, head / group_, c, head % group_)[i]};
      }
    }
    b_.dbias[head * bias_.entries() + i] = static_cast<float>(total);
  }
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  with_type(args.forward.dtype, [&](auto type) { AttentionBackward<decltype(type)>(args).run(); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

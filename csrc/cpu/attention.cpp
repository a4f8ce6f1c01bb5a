// attention: query rows of any number of segments against the keys of the image they read.
//
// Rows are grouped by image, so that K and V are read once for all segments, beams and query heads
// that share them. An image with many rows is done in panels of one key head; with few rows, as in
// decoding, the keys are cut into blocks that stream through all heads and are combined after.
#include "panel.h"
#include "position_bias.h"
#include "random.h"
#include "readers.h"
#include "softmax.h"

namespace fastvlm {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kFewRows = 16;     // query rows per key head up to which keys are streamed
constexpr int64_t kPanelRows = 126;  // query rows of one task otherwise
constexpr int64_t kPanelKeys = 64;
constexpr int64_t kPanelDepth = 64;  // of the head dimension, summed in one go
constexpr int64_t kStreamKeys = 64;  // keys of one task when streaming, at most
constexpr int64_t kEvenly = 4;       // tasks come in so many, for that number of threads to share
// Of those, so many for all heads before the next: whole vectors of scores, and few streams.
constexpr int64_t kNearKeys = kLanes > 8 ? kLanes : 8;
constexpr int64_t kAhead = 2;  // groups of so many that are on their way

// What is asked of one image, and how the work on it is cut.
struct Image {
  int64_t first_row, rows;  // in Plan::order
  int64_t first_key, keys;
  int64_t first_stream, first_panel;  // the first task of each kind that is its own or comes after
  int64_t tasks;
  int64_t first_part;  // its partial results, when streamed

  // The first key of a task when streaming: as many whole vectors of keys for each as for another.
  int64_t stream_begin(int64_t task) const {
    return smaller(keys, divide_up(keys, kLanes) * task / tasks * kLanes);
  }
};

// How the work is cut; which rows there are is the readers' affair.
class Plan {
 public:
  explicit Plan(const AttentionArgs& a)
      : readers(a), group(a.heads / a.kv_heads), images_(a.images), count_(a.images) {
    for (int64_t i = 0; i < a.images; ++i) plan_image(a, i);
  }

  // The last image whose tasks start no later: images without tasks of this kind come before it.
  const Image& image_of_task(int64_t task, int64_t Image::* first_task) const {
    int64_t low = 0, high = count_;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (images_.data()[middle].*first_task <= task ? low : high) = middle;
    }
    return images_.data()[low];
  }

  Readers readers;
  int64_t group;
  int64_t stream_tasks = 0, panel_tasks = 0, parts = 0;

 private:
  void plan_image(const AttentionArgs& a, int64_t i) {
    Image& image = images_.data()[i];
    image.first_row = readers.first(i);
    image.rows = readers.count(i);
    image.first_key = a.kv_offsets[i];
    image.keys = a.kv_offsets[i + 1] - image.first_key;
    image.first_stream = stream_tasks;
    image.first_panel = panel_tasks;
    image.first_part = parts;
    if (image.rows == 0) {
      image.tasks = 0;
    } else if (image.rows * group <= kFewRows) {
      // An image without keys still has a block: the one that writes its zeros.
      const int64_t blocks = round_up(divide_up(image.keys, kStreamKeys), kEvenly);
      image.tasks = larger(1, smaller(blocks, divide_up(image.keys, kLanes)));
      stream_tasks += image.tasks;
      parts += image.tasks * a.heads * image.rows;
    } else {
      image.tasks = a.kv_heads * divide_up(image.rows * group, kPanelRows);
      panel_tasks += image.tasks;
    }
  }

  Scratch<Image> images_;
  int64_t count_;
};

template <class T>
class Attention {
 public:
  explicit Attention(const AttentionArgs& args)
      : a_(args),
        plan_(args),
        rule_{args.scale, args.softcap},
        bias_(args),
        padded_(round_up(a_.dim, kLanes)) {}

  void run() {
    if (plan_.panel_tasks > 0) run_panels();
    if (plan_.stream_tasks > 0) run_streams();
  }

 private:
  const T* query(int64_t row, int64_t head) const {
    return static_cast<const T*>(a_.q.data) + row * a_.q.row_stride + head * a_.q.head_stride;
  }
  void write(int64_t row, int64_t head, const float* sums, Running running) const {
    const int64_t at = row * a_.heads + head;
    write_row(sums, running, a_.dim, static_cast<T*>(a_.out) + at * a_.dim);
    a_.stats[2 * at] = running.largest * 1.44269504f;
    a_.stats[2 * at + 1] = running.total;
  }

  // The total of a row counts what its values lose to dropout.
  void drop(float* p, int64_t index, int64_t head, int64_t key, int64_t n) const {
    if (a_.dropout.scale == 0) return;
    const int64_t at = plan_.readers.row(index) * a_.heads + head;
    for (int64_t i = 0; i < n; i += kLanes) {
      const uint64_t counter = (static_cast<uint64_t>(at) << 32) + key + i;
      store(p + i, load(p + i) * keep_scale(a_.dropout, counter));
    }
  }

  void run_panels();
  void panel(const Image& image, int64_t kv_head, int64_t begin, int64_t rows, float* scratch);
  void run_streams();
  void stream(const Image& image, int64_t block, float* scratch, float* parts, Running* running);

  const AttentionArgs& a_;
  Plan plan_;
  ScoreRule rule_;
  BiasRows bias_;
  int64_t padded_;
};

template <class T>
void Attention<T>::panel(const Image& image, int64_t kv_head, int64_t begin, int64_t rows,
                         float* scratch) {
  float* q = scratch;
  float* sums = q + kPanelRows * padded_;
  float* k = sums + kPanelRows * padded_;
  float* v = k + kPanelKeys * padded_;
  float* scores = v + kPanelKeys * padded_;
  Running running[kPanelRows];
  int64_t from = image.keys, to = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t index = image.first_row + (begin + r) / plan_.group;
    const int64_t head = kv_head * plan_.group + (begin + r) % plan_.group;
    gather_row(query(plan_.readers.row(index), head), a_.dim, q + r * padded_);
    for (int64_t d = 0; d < padded_; ++d) sums[r * padded_ + d] = 0.0f;
    running[r] = kNothingSeen;
    from = smaller(from, plan_.readers.first_visible(index));
    to = larger(to, plan_.readers.last_visible(index, image.keys));
  }
  for (int64_t key = from; key < to; key += kPanelKeys) {
    const int64_t n = smaller(kPanelKeys, to - key);
    const int64_t row = image.first_key + key;
    pack_transposed(
        static_cast<const T*>(a_.k.data) + row * a_.k.row_stride + kv_head * a_.k.head_stride,
        a_.k.row_stride, n, a_.dim, k, kPanelKeys);
    for (int64_t j = 0; j < n; ++j) {
      gather_row(static_cast<const T*>(a_.v.data) + (row + j) * a_.v.row_stride +
                     kv_head * a_.v.head_stride,
                 a_.dim, v + j * padded_);
    }
    for (int64_t d = 0; d < a_.dim; d += kPanelDepth) {
      panel_product({q + d, padded_, 1}, rows, k + d * kPanelKeys, kPanelKeys,
                    smaller(kPanelDepth, a_.dim - d), d > 0, scores, kPanelKeys,
                    round_up(n, kLanes));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t index = image.first_row + (begin + r) / plan_.group;
      const int64_t head = kv_head * plan_.group + (begin + r) % plan_.group;
      softmax_row(scores + r * kPanelKeys, n, plan_.readers.first_visible(index) - key,
                  plan_.readers.last_visible(index, image.keys) - key, rule_, running[r],
                  sums + r * padded_, padded_, bias_.row(head, plan_.readers.place(index), key));
      drop(scores + r * kPanelKeys, index, head, key, n);
    }
    panel_product({scores, kPanelKeys, 1}, rows, v, padded_, n, true, sums, padded_, padded_);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t index = image.first_row + (begin + r) / plan_.group;
    write(plan_.readers.row(index), kv_head * plan_.group + (begin + r) % plan_.group,
          sums + r * padded_, running[r]);
  }
}

template <class T>
void Attention<T>::run_panels() {
  const int64_t per_worker = 2 * (kPanelRows + kPanelKeys) * padded_ + kPanelRows * kPanelKeys;
  Scratch<float> scratch(workers() * per_worker);
  auto task = [&](int64_t index, int64_t worker) {
    const Image& image = plan_.image_of_task(index, &Image::first_panel);
    const int64_t rows = image.rows * plan_.group;
    const int64_t panels = image.tasks / a_.kv_heads;
    const int64_t local = index - image.first_panel;
    // Equal panels, in whole tiles of six rows.
    const int64_t size = round_up(divide_up(rows, panels), 6);
    const int64_t begin = smaller(rows, local % panels * size);
    panel(image, local / panels, begin, smaller(size, rows - begin),
          scratch.data() + worker * per_worker);
  };
  for_each_task(plan_.panel_tasks, task);
}

// One block of keys for all heads and rows of an image; the sums go to parts[head, row][block].
template <class T>
void Attention<T>::stream(const Image& image, int64_t block, float* scratch, float* parts,
                          Running* running) {
  const int64_t rows = image.rows * plan_.group;
  const int64_t first = image.stream_begin(block);
  const int64_t n = image.stream_begin(block + 1) - first;
  float* q = scratch;
  float* sums = q + a_.kv_heads * rows * padded_;
  float* scores = sums + a_.kv_heads * rows * padded_;
  int64_t k_offsets[kStreamKeys], v_offsets[kStreamKeys];
  for (int64_t j = 0; j < n; ++j) {
    k_offsets[j] = (image.first_key + first + j) * a_.k.row_stride;
    v_offsets[j] = (image.first_key + first + j) * a_.v.row_stride;
  }
  // Rows are numbered [key head][row of the image][query head of the key head].
  auto index_of = [&](int64_t r) { return image.first_row + r % rows / plan_.group; };
  auto head_of = [&](int64_t r) { return r / rows * plan_.group + r % plan_.group; };
  for (int64_t r = 0; r < a_.kv_heads * rows; ++r) {
    gather_row(query(plan_.readers.row(index_of(r)), head_of(r)), a_.dim, q + r * padded_);
    for (int64_t d = 0; d < padded_; ++d) sums[r * padded_ + d] = 0.0f;
  }
  // Heads of neighbouring keys lie apart in memory, too far for the hardware to foresee. Groups of
  // keys are asked for in the order in which they are read: this block's keys, its values, and the
  // keys of the next block, which is mostly this worker's too.
  const int64_t groups = divide_up(n, kNearKeys);
  auto fetch = [&](int64_t group, int64_t h) {
    const bool values = group >= groups && group < 2 * groups;
    const Heads& x = values ? a_.v : a_.k;
    const T* head = static_cast<const T*>(x.data) + h * x.head_stride;
    int64_t key = first + (values ? group - groups : group) * kNearKeys;
    int64_t end = first + n;
    if (group >= 2 * groups) {
      key = first + n + (group - 2 * groups) * kNearKeys;
      end = image.keys;
    }
    for (end = smaller(end, key + kNearKeys); key < end; ++key) {
      const T* row = head + (image.first_key + key) * x.row_stride;
      for (int64_t d = 0; d < a_.dim; d += 64 / int64_t{sizeof(T)}) prefetch_far(row + d);
    }
  };
  for (int64_t j = 0; j < n; j += kNearKeys) {
    for (int64_t h = 0; h < a_.kv_heads; ++h) {
      fetch(j / kNearKeys + kAhead, h);
      score_rows(q + h * rows * padded_, padded_, rows,
                 static_cast<const T*>(a_.k.data) + h * a_.k.head_stride, k_offsets + j,
                 smaller(kNearKeys, n - j), a_.dim, scores + h * rows * kStreamKeys + j,
                 kStreamKeys);
    }
  }
  for (int64_t r = 0; r < a_.kv_heads * rows; ++r) {
    const int64_t index = index_of(r);
    Running& state = running[r * image.tasks + block];
    state = kNothingSeen;
    softmax_row(scores + r * kStreamKeys, n, plan_.readers.first_visible(index) - first,
                plan_.readers.last_visible(index, image.keys) - first, rule_, state, nullptr, 0,
                bias_.row(head_of(r), plan_.readers.place(index), first));
    drop(scores + r * kStreamKeys, index, head_of(r), first, n);
  }
  for (int64_t j = 0; j < n; j += kNearKeys) {
    for (int64_t h = 0; h < a_.kv_heads; ++h) {
      fetch(groups + j / kNearKeys + kAhead, h);
      add_values(scores + h * rows * kStreamKeys + j, kStreamKeys, rows,
                 static_cast<const T*>(a_.v.data) + h * a_.v.head_stride, v_offsets + j,
                 smaller(kNearKeys, n - j), a_.dim, sums + h * rows * padded_, padded_);
    }
  }
  for (int64_t r = 0; r < a_.kv_heads * rows; ++r) {
    float* part = parts + (r * image.tasks + block) * padded_;
    for (int64_t d = 0; d < padded_; d += kLanes) store(part + d, load(sums + r * padded_ + d));
  }
}

template <class T>
void Attention<T>::run_streams() {
  Scratch<float> parts(plan_.parts * padded_);
  Scratch<Running> running(plan_.parts);
  const int64_t most_rows = a_.kv_heads * kFewRows;
  const int64_t per_worker = most_rows * (2 * padded_ + kStreamKeys);
  Scratch<float> scratch(workers() * per_worker);
  auto block = [&](int64_t index, int64_t worker) {
    const Image& image = plan_.image_of_task(index, &Image::first_stream);
    stream(image, index - image.first_stream, scratch.data() + worker * per_worker,
           parts.data() + image.first_part * padded_, running.data() + image.first_part);
  };
  for_each_task(plan_.stream_tasks, block);
  auto finish = [&](int64_t index, int64_t worker) {
    const Image& image = plan_.image_of_task(index, &Image::first_stream);
    // As many tasks as blocks share the heads and rows of an image.
    const int64_t rows = image.rows * plan_.group, share = index - image.first_stream;
    float* sums = scratch.data() + worker * per_worker;
    for (int64_t r = a_.kv_heads * rows * share / image.tasks;
         r < a_.kv_heads * rows * (share + 1) / image.tasks; ++r) {
      const int64_t part = image.first_part + r * image.tasks;
      Running result;
      combine(parts.data() + part * padded_, running.data() + part, image.tasks, padded_, sums,
              result);
      write(plan_.readers.row(image.first_row + r % rows / plan_.group),
            r / rows * plan_.group + r % plan_.group, sums, result);
    }
  };
  for_each_task(plan_.stream_tasks, finish);
}

}  // namespace

void attention(const AttentionArgs& args) {
  with_type(args.dtype, [&](auto type) { Attention<decltype(type)>(args).run(); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

// Which query rows a block has and which keys they see: of an image, or of a cache with ancestry.
#pragma once

#include "attention.h"
#include "gpu.h"

namespace fastvlm {
namespace cuda {

// Row m of a tile is head m % group of the m / group-th reader: beams and the heads of a group
// read K and V once.
struct ImageKeys {
  const AttentionArgs& args;
  // in 32 bits, where division is not a subroutine: layouts have less than 2^31 rows
  int group, first_row, first_reader, readers, first_key, lo = 0, hi;

  GPU_FN ImageKeys(const AttentionArgs& a, int block) : args(a) {
    const int image = block / static_cast<int>(a.row_blocks);
    group = static_cast<int>(a.heads) / static_cast<int>(a.kv_heads);
    first_row = block % static_cast<int>(a.row_blocks) * kQueryRows;
    first_reader = a.reader_offsets[image];
    readers = a.reader_offsets[image + 1] - first_reader;
    first_key = a.kv_offsets[image];
    hi = a.kv_offsets[image + 1] - first_key;
  }

  // The query row of m, or -1.
  GPU_FN int64_t row(int m) const {
    const int place = (first_row + m) / group;
    if (place >= readers) return -1;
    return args.rows_by_image == nullptr ? first_reader + place
                                         : args.rows_by_image[first_reader + place];
  }
  GPU_FN int64_t head(int m, int64_t kv_head) const {
    return kv_head * group + (first_row + m) % group;
  }
  GPU_FN bool idle() const { return first_row >= readers * group; }
  GPU_FN bool sees(int key) const { return key < hi; }
  GPU_FN int64_t k_offset(int key) const { return int64_t{first_key + key} * args.k_row; }
  GPU_FN int64_t v_offset(int key) const { return int64_t{first_key + key} * args.v_row; }
};

// A block has the heads of a group of one row.
struct CacheKeys {
  const AttentionArgs& args;
  int group, first_row, lo, hi;
  int64_t reader;

  GPU_FN CacheKeys(const AttentionArgs& a, int block) : args(a) {
    group = static_cast<int>(a.heads) / static_cast<int>(a.kv_heads);
    reader = block / static_cast<int>(a.row_blocks);
    first_row = block % static_cast<int>(a.row_blocks) * kQueryRows;
    hi = a.lengths[reader];
    lo = a.window > 0 && hi > a.window ? hi - static_cast<int>(a.window) : 0;
  }

  GPU_FN int64_t row(int m) const { return first_row + m < group ? reader : -1; }
  GPU_FN int64_t head(int m, int64_t kv_head) const { return kv_head * group + first_row + m; }
  GPU_FN bool idle() const { return false; }
  // The cache row that holds a position below hi.
  GPU_FN int64_t holder(int key) const {
    return args.ancestry == nullptr ? reader : args.ancestry[reader * args.ancestry_row + key];
  }
  GPU_FN bool sees(int key) const { return key < hi && holder(key) >= 0; }
  GPU_FN int64_t k_offset(int key) const { return holder(key) * args.k_row + key * args.k_time; }
  GPU_FN int64_t v_offset(int key) const { return holder(key) * args.v_row + key * args.v_time; }
};

}  // namespace cuda
}  // namespace fastvlm

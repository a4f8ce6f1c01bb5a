// What the instructions of a warp do, lane by lane.
#include "cuda/gpu.h"

namespace machine {
namespace {

struct Product {
  Chunk a;
  uint32_t b[2];
  float d[4];
};

template <class T>
float element(const uint32_t* words, int index) {
  T pair[2];
  std::memcpy(pair, &words[index / 2], sizeof pair);
  return to_float(pair[index % 2]);
}

template <class T>
void products(const void* const in[32], void* const out[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& x = *static_cast<const Product*>(in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      a[g + 8 * (i / 2 % 2)][2 * t + 8 * (i / 4) + i % 2] = element<T>(x.a.word, i);
    }
    for (int i = 0; i < 4; ++i) b[2 * t + 8 * (i / 2) + i % 2][g] = element<T>(x.b, i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& x = *static_cast<const Product*>(in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
      float sum = x.d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      static_cast<float*>(out[lane])[i] = sum;
    }
  }
}

struct Row {
  const void* address;
  uint16_t elements[8];
};

template <bool transposed>
void matrices(const void* const in[32], void* const out[32]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    const void* rows[8];
    for (int r = 0; r < 8; ++r) rows[r] = static_cast<const Row*>(in[8 * matrix + r])->address;
    emulator::count_bank_conflicts(rows);
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t word = 0;
      for (int i = 0; i < 2; ++i) {
        const int row = transposed ? 2 * (lane % 4) + i : lane / 4;
        const int column = transposed ? lane / 4 : 2 * (lane % 4) + i;
        const auto& from = *static_cast<const Row*>(in[8 * matrix + row]);
        word |= uint32_t{from.elements[column]} << (16 * i);
      }
      static_cast<Chunk*>(out[lane])->word[matrix] = word;
    }
  }
}

Row row_of(const void* address) {
  emulator::read(address, 16);
  Row row{address, {}};
  std::memcpy(row.elements, address, sizeof row.elements);
  return row;
}

struct Exchange {
  uint32_t value;
  int lanes;
};

void exchange(const void* const in[32], void* const out[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Exchange*>(in[lane]);
    const auto& other = *static_cast<const Exchange*>(in[lane ^ mine.lanes]);
    std::memcpy(out[lane], &other.value, sizeof(uint32_t));
  }
}

}  // namespace

Chunk load16(const void* from) {
  emulator::read(from, 16);
  Chunk x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

Chunk load16_once(const void* from) { return load16(from); }

void store16(void* to, const Chunk& x) {
  emulator::write(to, 16);
  std::memcpy(to, &x, sizeof x);
}

uint32_t shuffle_xor_bits(uint32_t x, int lanes) {
  const Exchange in{x, lanes};
  uint32_t out = 0;
  emulator::collective("a shuffle", &in, &out, exchange);
  return out;
}

Chunk load_matrices(const void* row) {
  const Row in = row_of(row);
  Chunk out;
  emulator::collective("load_matrices", &in, &out, matrices<false>);
  return out;
}

Chunk load_matrices_transposed(const void* row) {
  const Row in = row_of(row);
  Chunk out;
  emulator::collective("load_matrices_transposed", &in, &out, matrices<true>);
  return out;
}

void multiply_add_bf16(float* d, const Chunk& a, uint32_t b0, uint32_t b1) {
  const Product in{a, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  emulator::collective("multiply_add of bfloat16", &in, d, products<bf16>);
}

void multiply_add_half(float* d, const Chunk& a, uint32_t b0, uint32_t b1) {
  const Product in{a, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  emulator::collective("multiply_add of float16", &in, d, products<half>);
}

}  // namespace machine

// linear and MLP of many rows over an arithmetic of their products, whose weights are packed once a
// call and whose rows of x are put into a block's own form.
//
// An arithmetic has: Weight, made of a Matrix; Block, room for rows in its form; Rows, a part of
// those; put, which writes numbers; and multiply(Rows, rows, Weight, begin, end, sums, finish),
// which calls finish(row, first column, columns, their products) for rows x columns [begin, end). A
// task takes a block of rows and goes over the columns while it is in cache; what lies between the
// two products of an MLP stays in its block.
#pragma once

#include "activation.h"
#include "blocks.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

// x is put into a block where it comes as a matrix; a block that is given is read as it is.
template <class Arithmetic>
void linear_of(const Matrix& x, const typename Arithmetic::Block* given,
               const typename Arithmetic::Weight& w, const Tail& tail) {
  const Cut cut(x.rows, w.rows, Arithmetic::kTileRows);
  const FloatBias bias(tail.bias, w.rows);
  const typename Arithmetic::Block own(given == nullptr ? workers() * kRows : 0, x.cols);
  Scratch<float> scratch(workers() * kRows * kCols);
  with_type(tail.dtype, [&](auto type) {
    using T = decltype(type);
    cut.run(x.rows * w.rows, [&](int64_t first, int64_t rows, int64_t begin, int64_t end,
                                 int64_t worker) {
      if (given == nullptr) own.set(worker * kRows, x, first, rows);
      Arithmetic::multiply(given == nullptr ? own.rows(worker * kRows) : given->rows(first), rows,
                           w, begin, end, scratch.data() + worker * kRows * kCols,
                           [&](int64_t r, int64_t n, int64_t count, const float* from) {
                             write<Arithmetic, T>(tail, bias, first + r, w.rows, n, count, from);
                           });
    });
  });
}

template <Activation kKind, class Block>
void activate_as(const float* bias, int64_t n, int64_t count, float* sums, const Block& to,
                 int64_t row) {
  to.set(row, n, count, sums, [=](int64_t i, int64_t some) {
    return roughly_activated(load_some(sums + i, some) + load_some(bias + i, some), kKind);
  });
}

// activation(sums + bias) of a row's columns n, n + 1, ..., into its block, which rounds it; sums
// are overwritten.
template <class Block>
void activate_row(Activation activation, const float* bias, int64_t n, int64_t count, float* sums,
                  const Block& to, int64_t row) {
  auto run = [&](auto kind) { activate_as<kind.value>(bias, n, count, sums, to, row); };
  with_activation(activation, run);
}

// An MLP whose row blocks are enough for the threads: each goes through both products.
template <class Arithmetic, class Args>
void mlp_of_blocks(const Args& args, const typename Arithmetic::Weight& w1,
                   const typename Arithmetic::Weight& w2, const FloatBias& b1) {
  using Block = typename Arithmetic::Block;
  const Cut cut(args.x.rows, 1, Arithmetic::kTileRows);
  const FloatBias b2(args.tail.bias, w2.rows);
  const Block x(workers() * kRows, args.x.cols), hidden(workers() * kRows, w1.rows);
  Scratch<float> scratch(workers() * kRows * kCols);
  with_type(args.tail.dtype, [&](auto type) {
    using T = decltype(type);
    cut.run(args.x.rows * w1.rows,
            [&](int64_t first, int64_t rows, int64_t, int64_t, int64_t worker) {
              const int64_t at = worker * kRows;
              float* sums = scratch.data() + at * kCols;
              x.set(at, args.x, first, rows);
              Arithmetic::multiply(x.rows(at), rows, w1, 0, w1.rows, sums,
                                   [&](int64_t r, int64_t n, int64_t count, float* from) {
                                     activate_row(args.activation, b1.from(n), n, count, from,
                                                  hidden, at + r);
                                   });
              Arithmetic::multiply(hidden.rows(at), rows, w2, 0, w2.rows, sums,
                                   [&](int64_t r, int64_t n, int64_t count, const float* from) {
                                     write<Arithmetic, T>(args.tail, b2, first + r, w2.rows, n,
                                                          count, from);
                                   });
            });
  });
}

// An MLP of fewer rows: the columns of each product are shared, with all of its rows between them.
template <class Arithmetic, class Args>
void mlp_of_shares(const Args& args, const typename Arithmetic::Weight& w1,
                   const typename Arithmetic::Weight& w2, const FloatBias& b1) {
  using Block = typename Arithmetic::Block;
  const Block x(workers() * kRows, args.x.cols);
  const Block hidden(round_up(args.x.rows, Arithmetic::kTileRows), w1.rows);
  const Cut cut(args.x.rows, w1.rows, Arithmetic::kTileRows);
  Scratch<float> scratch(workers() * kRows * kCols);
  cut.run(args.x.rows * w1.rows,
          [&](int64_t first, int64_t rows, int64_t begin, int64_t end, int64_t worker) {
            const int64_t at = worker * kRows;
            x.set(at, args.x, first, rows);
            Arithmetic::multiply(x.rows(at), rows, w1, begin, end, scratch.data() + at * kCols,
                                 [&](int64_t r, int64_t n, int64_t count, float* from) {
                                   activate_row(args.activation, b1.from(n), n, count, from, hidden,
                                                first + r);
                                 });
          });
  linear_of<Arithmetic>({nullptr, DType::kFloat, args.x.rows, w1.rows, 0}, &hidden, w2, args.tail);
}

template <class Arithmetic, class Args>
void linear_of_many(const Args& args) {
  if (args.x.rows == 0 || args.weight.rows == 0) return;
  linear_of<Arithmetic>(args.x, nullptr, typename Arithmetic::Weight(args.weight), args.tail);
}

template <class Arithmetic, class Args>
void mlp_of_many(const Args& args) {
  if (args.x.rows == 0 || args.w2.rows == 0) return;
  const typename Arithmetic::Weight w1(args.w1), w2(args.w2);
  const FloatBias b1(args.b1, w1.rows);
  const bool many = divide_up(args.x.rows, kRows) >= kEach * workers();
  (many ? mlp_of_blocks<Arithmetic, Args> : mlp_of_shares<Arithmetic, Args>)(args, w1, w2, b1);
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm

// Sparse rows times a packed tile: y[row][..] += sum_k values[k] * x[index[k]][..]
#pragma once

#include "read_ahead-inl.h"
#include "sweep-inl.h"

namespace sparsetrain {
namespace {

// Enough independent sums to cover the latency of an FMA: NV * chains >= 8 on two FMA pipes.
template <int NV>
constexpr int kChains = NV >= 6   ? 1
                        : NV >= 3 ? 2
                        : NV == 2 ? 4
                                  : 8;

// f(Apart): whether each operand's address gets a register of its own, see `operands`.
template <class F>
ST_INLINE void with_addresses(const F& f) {
  if (is_intel()) return f(std::true_type{});
  f(std::false_type{});
}

// One cell: out(v, y[v] + its products) for each of NV vectors.
//   index, values: `count` of them; a nonzero reads NV vectors at x + index * Unit bytes
//   bias: of this row or null; used when `first`, which starts the sums instead of loading them
template <class T, int NV, int Unit, bool Apart, class I, class Out>
ST_INLINE void spmm_sums(Indices<I, 4> at, const I* __restrict index, const T* __restrict values,
                         int64_t count, const T* __restrict x, const T* __restrict y, const T* bias,
                         bool first, const Out& out) {
  constexpr int w = kLanes<T>;
  constexpr int chains = kChains<NV>;
  Vec<T> sum[chains][NV];
  ST_UNROLL
  for (int h = 0; h < chains; h++) {
    ST_UNROLL
    for (int v = 0; v < NV; v++) sum[h][v] = Vec<T>{};
  }
  if (!first) {
    ST_UNROLL
    for (int v = 0; v < NV; v++) sum[0][v] = load<T>(y + v * w);
  } else if (bias) {
    ST_UNROLL
    for (int v = 0; v < NV; v++) sum[0][v] = broadcast<T>(*bias);
  }
  auto add = [&](Vec<T>* into, int64_t at, Vec<T> value) __attribute__((always_inline)) {
    const T* p = offset(x, at * Unit);
    if constexpr (Apart) p = operands(p);
    ST_UNROLL
    for (int v = 0; v < NV; v++) into[v] += value * load<T>(p + v * w);
  };
  auto add_one = [&](auto j, int64_t at, Vec<T> value) __attribute__((always_inline)) {
    add(sum[decltype(j)::value % chains], at, value);
  };
  for_fours<T>(at, index, values, count, add_one);
  ST_UNROLL
  for (int h = 1; h < chains; h++) {
    ST_UNROLL
    for (int v = 0; v < NV; v++) sum[0][v] += sum[h][v];
  }
  ST_UNROLL
  for (int v = 0; v < NV; v++) out(v, sum[0][v]);
}

// One cell: y[0 .. NV vectors) += its products.
template <class T, int NV, int Unit, bool Apart, class I>
ST_INLINE void spmm_cell(Indices<I, 4> at, const I* __restrict index, const T* __restrict values,
                         int64_t count, const T* __restrict x, T* __restrict y, const T* bias,
                         bool first) {
  spmm_sums<T, NV, Unit, Apart>(
      at, index, values, count, x, static_cast<const T*>(y), bias, first,
      [&](int v, Vec<T> sum) __attribute__((always_inline)) { store<T>(y + v * kLanes<T>, sum); });
}

// One column block for `rows` consecutive rows.
//   begin, end: rows entries each; row r's nonzeros inside this block are [begin[r], end[r])
//   index, values: of the whole pattern (nnz)
//   x: aligned, as is what nonzeros read
//   y: NV vectors for each of the rows, aligned, y_stride elements apart
//   bias: rows entries or null
template <class T, int NV, int Unit, bool Apart, class I>
void spmm_block(const int32_t* __restrict begin, const int32_t* __restrict end, int64_t rows,
                const I* __restrict index, const T* __restrict values, const T* __restrict x,
                T* __restrict y, int64_t y_stride, const T* bias, bool first, ReadAhead& next) {
  RowsOfIndices<I, 4> cells(begin, end, rows, index);
  for (int64_t r = 0; r < rows; r++, y += y_stride) {
    const int64_t ahead = r + kRowsAhead < rows ? r + kRowsAhead : r;
    prefetch_run(index, values, begin[ahead], end[ahead]);
    next.some_more();
    int64_t at, stop;
    const Indices<I, 4> first_ones = cells.take(&at, &stop);
    spmm_cell<T, NV, Unit, Apart>(first_ones, index + at, values + at, stop - at, x, y,
                                  bias ? bias + r : nullptr, first);
  }
}

// One sweep; x, y, bias as for spmm_block, for the rows of its unit.
template <class T, int NV, int Unit, bool Apart, class I>
void spmm_sweep(const Sweep& sweep, const I* __restrict index, const T* __restrict values,
                const T* __restrict x, T* __restrict y, int64_t y_stride, const T* bias,
                bool first) {
  constexpr int bytes = NV * SPARSETRAIN_VECTOR_BYTES;
  for_cells<T, bytes, 4>(
      sweep, index, values, static_cast<const T*>(y), y_stride,
      [&](int64_t r, Indices<I, 4> four, const I* at, const T* value, int64_t count)
          __attribute__((always_inline)) {
            if (count || first)
              spmm_cell<T, NV, Unit, Apart>(four, at, value, count, x, y + r * y_stride,
                                            bias ? bias + r : nullptr, first);
          });
}

}  // namespace
}  // namespace sparsetrain

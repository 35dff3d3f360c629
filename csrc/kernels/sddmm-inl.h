// Products of two packed tiles at the nonzeros only:
//   dvalues[k] += sum_s dy[row(k)][s] * x[index[k]][s]
#pragma once

#include "read_ahead-inl.h"
#include "sweep-inl.h"

namespace sparsetrain {
namespace {

// G nonzeros of one row at once, the next ones of `at`: G independent sums, folded together. dy
// stays in registers.
template <class T, int NV, int Unit, int G, class I>
ST_INLINE void sddmm_group(const Vec<T>* dy, Indices<I, 8>& at, const T* x, T* dvalues) {
  constexpr int w = kLanes<T>;
  // Four sums do not cover the latency of an FMA: each is made of two. 1.03-1.05 times faster; with
  // eight, 0.97.
  constexpr int chains = NV > kNarrowTile && !kManyRegisters ? 2 : 1;
  Vec<T> sum[G];
  auto product = [&](auto g) __attribute__((always_inline)) {
    const T* p = operands(offset(x, at.template get<decltype(g)::value>() * Unit));
    Vec<T> s[chains];
    ST_UNROLL
    for (int c = 0; c < chains; c++) s[c] = dy[c] * load<T>(p + c * w);
    ST_UNROLL
    for (int v = chains; v < NV; v++) s[v % chains] += dy[v] * load<T>(p + v * w);
    sum[decltype(g)::value] = chains == 2 ? s[0] + s[chains - 1] : s[0];
  };
  for_constants(product, std::make_integer_sequence<int, G>{});
  add_sums<T, G>(sum, dvalues);
}

// One cell: dvalues[0 .. count) += its products. at: the first indices
template <class T, int NV, int Unit, class I>
ST_INLINE void sddmm_cell(Indices<I, 8> at, const I* __restrict index, int64_t count,
                          const T* __restrict x, const T* __restrict dy, T* __restrict dvalues) {
  constexpr int w = kLanes<T>;
  constexpr int most = NV <= kNarrowTile || kManyRegisters ? 8 : 4;
  Vec<T> d[NV];
  ST_UNROLL
  for (int v = 0; v < NV; v++) d[v] = load<T>(dy + v * w);
  for_groups<most>(at, index, count,
                   [&](auto size, Indices<I, 8>& first, int64_t k) __attribute__((always_inline)) {
                     sddmm_group<T, NV, Unit, decltype(size)::value>(d, first, x, dvalues + k);
                   });
}

// One column block for `rows` consecutive rows.
//   begin, end, index, x, Unit: as in spmm_block
//   dy: NV vectors for each of these rows, aligned, dy_stride elements apart
//   dvalues: of the whole pattern (nnz)
template <class T, int NV, int Unit, class I>
void sddmm_block(const int32_t* __restrict begin, const int32_t* __restrict end, int64_t rows,
                 const I* __restrict index, const T* __restrict x, const T* __restrict dy,
                 int64_t dy_stride, T* __restrict dvalues, ReadAhead& next) {
  RowsOfIndices<I, 8> cells(begin, end, rows, index);
  for (int64_t r = 0; r < rows; r++, dy += dy_stride) {
    const int64_t ahead = r + kRowsAhead < rows ? r + kRowsAhead : r;
    prefetch_run(index, dvalues, begin[ahead], end[ahead]);
    next.some_more();
    int64_t at, stop;
    const Indices<I, 8> first = cells.take(&at, &stop);
    if (at != stop) sddmm_cell<T, NV, Unit>(first, index + at, stop - at, x, dy, dvalues + at);
  }
}

// One sweep; x, dy as for sddmm_block, for the rows of its unit.
template <class T, int NV, int Unit, class I>
void sddmm_sweep(const Sweep& sweep, const I* __restrict index, const T* __restrict x,
                 const T* __restrict dy, int64_t dy_stride, T* __restrict dvalues) {
  constexpr int bytes = NV * SPARSETRAIN_VECTOR_BYTES;
  for_cells<T, bytes, 8>(sweep, index, dvalues, dy, dy_stride,
                         [&](int64_t r, Indices<I, 8> first, const I* at, T* to,
                             int64_t count) __attribute__((always_inline)) {
                           if (count)
                             sddmm_cell<T, NV, Unit>(first, at, count, x, dy + r * dy_stride, to);
                         });
}

// dbias[r] += sum_s dy[r][s]
template <class T, int NV>
void sum_rows(const T* dy, int64_t rows, T* dbias) {
  constexpr int w = kLanes<T>;
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8, dy += 8 * NV * w) {
    Vec<T> sum[8];
    ST_UNROLL
    for (int g = 0; g < 8; g++) {
      sum[g] = load<T>(dy + g * NV * w);
      ST_UNROLL
      for (int v = 1; v < NV; v++) sum[g] += load<T>(dy + g * NV * w + v * w);
    }
    add_sums<T, 8>(sum, dbias + r);
  }
  for (; r < rows; r++, dy += NV * w) {
    Vec<T> sum = load<T>(dy);
    ST_UNROLL
    for (int v = 1; v < NV; v++) sum += load<T>(dy + v * w);
    dbias[r] += sum_lanes<T>(sum);
  }
}

}  // namespace
}  // namespace sparsetrain

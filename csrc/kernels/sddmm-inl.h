// Products of two packed tiles at the nonzeros only:
//   dvalues[k] += sum_s dy[row(k)][s] * x[index[k]][s]
#pragma once

#include "read_ahead-inl.h"
#include "sweep-inl.h"

namespace sparsetrain {
namespace {

// G nonzeros of one row at once: G independent sums, folded together. dy stays in registers.
template <class T, int NV, int Unit, int G, class I>
ST_INLINE void sddmm_group(const Vec<T>* dy, const I* index, const T* x, T* dvalues) {
  constexpr int w = kLanes<T>;
  // Four sums do not cover the latency of an FMA: each is made of two. 1.03-1.05 times faster; with
  // eight, 0.97.
  constexpr int chains = NV > kNarrowTile && !kManyRegisters ? 2 : 1;
  Vec<T> sum[G];
  auto product = [&](int64_t at) __attribute__((always_inline)) {
    const T* p = offset(x, at * Unit);
    Vec<T> s[chains];
    ST_UNROLL
    for (int c = 0; c < chains; c++) s[c] = dy[c] * load<T>(p + c * w);
    ST_UNROLL
    for (int v = chains; v < NV; v++) s[v % chains] += dy[v] * load<T>(p + v * w);
    return chains == 2 ? s[0] + s[chains - 1] : s[0];
  };
  if constexpr (G % 4 == 0) {
    ST_UNROLL
    for (int g = 0; g < G; g += 4) {
      FourIndices<I> at(index + g);
      sum[g] = product(at.template get<0>());
      sum[g + 1] = product(at.template get<1>());
      sum[g + 2] = product(at.template get<2>());
      sum[g + 3] = product(at.template get<3>());
    }
  } else {
    ST_UNROLL
    for (int g = 0; g < G; g++) sum[g] = product(index[g]);
  }
  add_sums<T, G>(sum, dvalues);
}

// One cell: dvalues[0 .. count) += its products.
template <class T, int NV, int Unit, class I>
ST_INLINE void sddmm_cell(const I* __restrict index, int64_t count, const T* __restrict x,
                          const T* __restrict dy, T* __restrict dvalues) {
  constexpr int w = kLanes<T>;
  Vec<T> d[NV];
  ST_UNROLL
  for (int v = 0; v < NV; v++) d[v] = load<T>(dy + v * w);
  int64_t k = 0;
  if constexpr (NV <= kNarrowTile || kManyRegisters) {
    for (; k + 8 <= count; k += 8) sddmm_group<T, NV, Unit, 8>(d, index + k, x, dvalues + k);
  }
  for (; k + 4 <= count; k += 4) sddmm_group<T, NV, Unit, 4>(d, index + k, x, dvalues + k);
  for (; k < count; k++) sddmm_group<T, NV, Unit, 1>(d, index + k, x, dvalues + k);
}

// One column block for `rows` consecutive rows.
//   begin, end, index, x, Unit: as in spmm_block
//   dy: NV vectors for each of these rows, aligned, dy_stride elements apart
//   dvalues: of the whole pattern (nnz)
template <class T, int NV, int Unit, class I>
void sddmm_block(const int32_t* __restrict begin, const int32_t* __restrict end, int64_t rows,
                 const I* __restrict index, const T* __restrict x, const T* __restrict dy,
                 int64_t dy_stride, T* __restrict dvalues, ReadAhead& next) {
  for (int64_t r = 0; r < rows; r++, dy += dy_stride) {
    const int64_t ahead = r + kRowsAhead < rows ? r + kRowsAhead : r;
    prefetch_run(index, dvalues, begin[ahead], end[ahead]);
    next.some_more();
    if (begin[r] != end[r])
      sddmm_cell<T, NV, Unit>(index + begin[r], end[r] - begin[r], x, dy, dvalues + begin[r]);
  }
}

// One sweep; x, dy as for sddmm_block, for the rows of its unit.
template <class T, int NV, int Unit, class I>
void sddmm_sweep(const Sweep& sweep, const I* __restrict index, const T* __restrict x,
                 const T* __restrict dy, int64_t dy_stride, T* __restrict dvalues) {
  constexpr int bytes = NV * SPARSETRAIN_VECTOR_BYTES;
  for_cells<T, bytes>(sweep, index, dvalues, dy, dy_stride,
                      [&](int64_t r, const I* at, T* to, int64_t count)
                          __attribute__((always_inline)) {
                            if (count)
                              sddmm_cell<T, NV, Unit>(at, count, x, dy + r * dy_stride, to);
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

// Sparse rows times a packed tile: y[row][..] += sum_k values[k] * x[index[k]][..]
#pragma once

#include "simd-inl.h"

namespace sparsetrain {
namespace {

// Enough independent sums to cover the latency of an FMA: NV * chains >= 8 on two FMA pipes.
template <int NV>
constexpr int kChains = NV >= 6   ? 1
                        : NV >= 3 ? 2
                        : NV == 2 ? 4
                                  : 8;

// One column block for `rows` consecutive rows.
//   begin, end: rows entries each; row r's nonzeros inside this block are [begin[r], end[r])
//   index, values: of the whole pattern (nnz); a nonzero reads NV vectors at x + index * Unit
//   x: aligned, as is Unit. A packed tile (see pack-inl.h) has Unit == NV * lanes and index == the
//   feature; the strip of a convolution (see conv_plan.h) has Unit == lanes
//   y: NV vectors for each of the rows, aligned, y_stride elements apart
//   bias: rows entries or null; used when `first`, which starts the sums instead of loading them
template <class T, int NV, int Unit, class I>
void spmm_block(const int32_t* __restrict begin, const int32_t* __restrict end, int64_t rows,
                const I* __restrict index, const T* __restrict values, const T* __restrict x,
                T* __restrict y, int64_t y_stride, const T* bias, bool first) {
  constexpr int w = kLanes<T>;
  constexpr int chains = kChains<NV>;
  for (int64_t r = 0; r < rows; r++, y += y_stride) {
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
      for (int v = 0; v < NV; v++) sum[0][v] = broadcast<T>(bias[r]);
    }
    const int64_t ahead = r + kRowsAhead < rows ? r + kRowsAhead : r;
    prefetch_run(index, values, begin[ahead], end[ahead]);
    int32_t k = begin[r];
    const int32_t stop = end[r];
    auto add = [&](Vec<T>* into, int64_t at, Vec<T> value) __attribute__((always_inline)) {
      const T* p = x + at * Unit;
      ST_UNROLL
      for (int v = 0; v < NV; v++) into[v] += value * load<T>(p + v * w);
    };
    for (; k + 4 <= stop; k += 4) {
      const FourIndices<I> at(index + k);
      const Four<T> value(values + k);
      add(sum[0], at.template get<0>(), value.template spread<0>());
      add(sum[1 % chains], at.template get<1>(), value.template spread<1>());
      add(sum[2 % chains], at.template get<2>(), value.template spread<2>());
      add(sum[3 % chains], at.template get<3>(), value.template spread<3>());
    }
    for (; chains < 4 && k + chains <= stop; k += chains) {
      ST_UNROLL
      for (int h = 0; h < chains; h++) {
        const T* p = x + static_cast<int64_t>(index[k + h]) * Unit;
        const Vec<T> value = broadcast<T>(values[k + h]);
        ST_UNROLL
        for (int v = 0; v < NV; v++) sum[h][v] += value * load<T>(p + v * w);
      }
    }
    for (; k < stop; k++) {
      const T* p = x + static_cast<int64_t>(index[k]) * Unit;
      const Vec<T> value = broadcast<T>(values[k]);
      ST_UNROLL
      for (int v = 0; v < NV; v++) sum[0][v] += value * load<T>(p + v * w);
    }
    ST_UNROLL
    for (int h = 1; h < chains; h++) {
      ST_UNROLL
      for (int v = 0; v < NV; v++) sum[0][v] += sum[h][v];
    }
    ST_UNROLL
    for (int v = 0; v < NV; v++) store<T>(y + v * w, sum[0][v]);
  }
}

}  // namespace
}  // namespace sparsetrain

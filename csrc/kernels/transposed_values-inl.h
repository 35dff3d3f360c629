// The values of a pattern as the products read them: in the type of the sums, and in the order of
// the transposed side.
#pragma once

#include "dense-inl.h"
#include "kernels.h"
#include "parallel-inl.h"
#include "plan.h"
#include "simd-inl.h"

namespace sparsetrain {
namespace {

// Values in the type of the sums: the given ones where that is what they are.
template <class S>
class Widened {
 public:
  typedef Sum<S> T;
  Widened(const void* values, int64_t count)
      : scratch_(sizeof(S) != sizeof(T) && values ? count : 0),
        data_(static_cast<const T*>(values)) {
    if (sizeof(S) == sizeof(T) || !values) return;
    for (int64_t k = 0; k < count; k++) scratch_.get()[k] = widen(static_cast<const S*>(values)[k]);
    data_ = scratch_.get();
  }
  const T* get() const { return data_; }

 private:
  Scratch<T> scratch_;
  const T* data_;
};

// to: where block b's values of rows [first, end) of the transposed side begin, as far as it has
// these rows.
inline void places_of_cells(const Side& transposed, int64_t b, int64_t first, int64_t end,
                            int32_t* to) {
  const int64_t rows = transposed.sweeps.unit;
  for (int64_t unit = first / rows; unit * rows < least(end, transposed.rows); unit++) {
    const Sweep sweep = transposed.sweep(b, unit);
    const uint8_t* row = sweep.row;
    int32_t at = static_cast<int32_t>(sweep.first);
    for (const CellRun* run = sweep.runs; run < sweep.end; run++) {
      for (int32_t c = 0; c < run->cells; c++, at += run->nonzeros) {
        const int64_t r = unit * rows + *row++;
        if (r >= first && r < end) to[r - first] = at;
      }
    }
  }
}

#if defined(ST_512_BITS)
constexpr int kSquare = kLanes<float>;
// Squares side by side: a line for each of their columns, 256 KiB, stays in L2.
constexpr int64_t kBands = 256;

// Dense patterns: squares of weights, each row of which is expanded from its values and each column
// compressed to values again: about 400 cycles for 16 x 16 weights, where to fetch each value from
// its place takes 3 to 5 cycles a value.
class Squares {
 public:
  Squares(const Plan& plan, const Side& transposed, const float* values, float* out)
      : pattern_(plan.pattern()),
        bits_(bits_of_row(plan, 0)),
        stride_(row_words(plan)),
        side_(transposed),
        values_(values),
        out_(out) {}
  int64_t bands() const { return ceil_div(pattern_.cols, kSquare); }

  // Columns [first * kSquare, last * kSquare).
  void transpose_bands(int64_t first, int64_t last) const {
    Scratch<int32_t> next(pattern_.rows), to(kBands * kSquare);
    __builtin_memset(to.get(), 0, sizeof(int32_t) * kBands * kSquare);
    for (int64_t r = 0; r < pattern_.rows; r++) next.get()[r] = place_of(r, first * kSquare);
    for (int64_t band = first; band < last; band += kBands) {
      const int64_t end = least(band + kBands, last);
      for (int64_t b = 0; b < side_.blocks; b++) {
        places_of_cells(side_, b, band * kSquare, end * kSquare, to.get());
        rows(side_.first_column(b), side_.first_column(b + 1), band, end, next.get(), to.get());
      }
    }
  }

 private:
  // Of row r's first nonzero from `column` on.
  int32_t place_of(int64_t r, int64_t column) const {
    int32_t low = pattern_.crow[r], high = pattern_.crow[r + 1];
    while (column && low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (pattern_.col[middle] < column) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  void rows(int64_t r0, int64_t r1, int64_t band, int64_t end, int32_t* next, int32_t* to) const {
    const int64_t whole = r0 + (r1 - r0) / kSquare * kSquare;
    for (int64_t r = r0; r < whole; r += kSquare)
      for (int64_t b = band; b < end; b++) square<true>(b, r, r1, next, to + (b - band) * kSquare);
    for (int64_t b = band; b < end && whole < r1; b++)
      square<false>(b, whole, r1, next, to + (b - band) * kSquare);
  }
  static __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }

  template <bool Whole>
  ST_INLINE void square(int64_t band, int64_t r0, int64_t r1, int32_t* next, int32_t* to) const {
    Vec<float> weights[kSquare];
    alignas(32) Bits rows[kSquare];
    ST_UNROLL
    for (int i = 0; i < kSquare; i++) {
      const bool there = Whole || r0 + i < r1;
      const int64_t r = there ? r0 + i : r0;
      const Bits set = there ? bits_[r * stride_ + band] : Bits{0};
      const int count = __builtin_popcount(set);
      const float* from = values_ + next[r];
      __builtin_prefetch(from + 2 * kSquare);
      // Not a value beyond the row's is read: there may be none.
      weights[i] = expand_cleared(set, _mm512_maskz_loadu_ps(first_lanes(count), from));
      next[r] += count;
      rows[i] = set;
    }
    transpose<float>(weights);
    const __m256i of_rows = _mm256_load_si256(reinterpret_cast<const __m256i*>(rows));
    ST_UNROLL
    for (int c = 0; c < kSquare; c++) {
      const __mmask16 set =
          _mm256_test_epi16_mask(of_rows, _mm256_set1_epi16(static_cast<int16_t>(1 << c)));
      const int count = __builtin_popcount(set);
      _mm512_mask_storeu_ps(out_ + to[c], first_lanes(count), compress_cleared(set, weights[c]));
      to[c] += count;
    }
  }

  const Pattern& pattern_;
  const Bits* bits_;
  const int64_t stride_;
  const Side& side_;
  const float* values_;
  float* out_;
};

// S: bfloat16 or float
template <class S>
bool transposed_by_squares(const Plan& plan, const Side& transposed, const S* values, float* out,
                           const Parallel& parallel) {
  if (plan.density() < kSquaresDensity || !expands_fast()) return false;
  const int64_t nnz = plan.pattern().nnz;
  const Widened<S> wide(values, nnz);
  const Squares squares(plan, transposed, wide.get(), out);
  const int workers = worth_waking(parallel, 4 * nnz);
  share(parallel, workers, workers, [&](int, int64_t i) {
    squares.transpose_bands(squares.bands() * i / workers, squares.bands() * (i + 1) / workers);
  });
  return true;
}
#endif

// f(k) for the nonzeros of each block of the transposed side that are in [k, last), with what the
// next block reads asked for: a stretch of the values, in no order.
template <class S, class F>
ST_INLINE void for_stretch(const Pattern& pattern, const Side& transposed, int64_t b,
                           const S* values, int64_t* k, int64_t last, const F& f) {
  const int64_t end = least(last, transposed.block_end(b)), size = transposed.block_end(b) - *k;
  while (*k + 16 <= end) {
    __builtin_prefetch(values + least(*k + size, pattern.nnz - 1));
    ST_UNROLL
    for (int i = 0; i < 16; i++) f(*k + i);
    *k += 16;
  }
  for (; *k < end; ++*k) f(*k);
}

// Each value from its place: Side::place16.
template <class S>
void gather_transposed(const Pattern& pattern, const Side& transposed, const S* values, Sum<S>* out,
                       const Parallel& parallel) {
  const uint16_t *place = transposed.place16.get(), *index = transposed.index16.get();
  const int workers = worth_waking(parallel, 4 * pattern.nnz);
  share(parallel, workers, workers, [&](int, int64_t i) {
    const int64_t last = pattern.nnz * (i + 1) / workers;
    int64_t k = pattern.nnz * i / workers;
    for (int64_t b = 0; b < transposed.blocks; b++) {
      const int32_t* crow = pattern.crow + transposed.first_column(b);
      const S* stretch = values + crow[0];
      if (transposed.place_in_block) {
        for_stretch(pattern, transposed, b, values, &k, last,
                    [&](int64_t at) { out[at] = widen(stretch[place[at]]); });
        continue;
      }
      for_stretch(pattern, transposed, b, values, &k, last, [&](int64_t at) {
        out[at] = widen(values[crow[index[at] >> transposed.column_shift] + place[at]]);
      });
    }
  });
}

// out: values in the order in which the transposed side reads them.
template <class S>
void values_to_transposed(const Plan& plan, const Side& transposed, const S* values, Sum<S>* out,
                          const Parallel& parallel) {
  const Pattern& pattern = plan.pattern();
  if (transposed.place16) return gather_transposed(pattern, transposed, values, out, parallel);
#if defined(ST_512_BITS)
  if constexpr (std::is_same<Sum<S>, float>::value)
    if (transposed_by_squares(plan, transposed, values, out, parallel)) return;
#endif
  // Very large layers, and dense patterns of float64: each nonzero, in order, goes to the next free
  // place of its column.
  Scratch<int32_t> to(transposed.rows);
  for (int64_t b = 0; b < transposed.blocks; b++) {
    places_of_cells(transposed, b, 0, transposed.rows, to.get());
    const int64_t end = pattern.crow[transposed.first_column(b + 1)];
    for (int64_t k = pattern.crow[transposed.first_column(b)]; k < end; k++)
      out[to.get()[pattern.col[k]]++] = widen(values[k]);
  }
}

}  // namespace
}  // namespace sparsetrain

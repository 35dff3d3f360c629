// Between the values at a pattern and the dense weight that the library's product takes.
//
// A bit per weight says where the nonzeros are (Plan::bits). Eight weights are two loads of the
// next values and one shuffle by a table: 2 cycles, whatever the density, where a scatter costs 3.5
// cycles for each nonzero. Without such a shuffle, and for other sizes than 32 bits, values are
// scattered.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "kernels.h"
#include "parallel-inl.h"
#include "plan.h"
#include "simd-inl.h"

namespace sparsetrain {
namespace {

// Weights that one worker converts at a time.
constexpr int64_t kDenseRun = 16384;

// f(row, end of the values that may be touched) for the given rows, shared out in runs.
template <class F>
void for_rows(const Pattern& p, int64_t first, int64_t last, const Parallel& parallel, const F& f) {
  const int64_t run = kDenseRun / (p.cols + 1) + 1;
  const int workers = worth_waking(parallel, (last - first) * p.cols);
  share(parallel, workers, ceil_div(last - first, run), [&](int, int64_t i) {
    const int64_t begin = first + i * run, end = least(begin + run, last);
    for (int64_t r = begin; r < end; r++) f(r, p.crow[end]);
  });
}

ST_INLINE void convert(bf16 x, float* out) { *out = widen(x); }
template <class T>
ST_INLINE void convert(T x, T* out) {
  *out = x;
}

// One row, which is in the L1 cache when it is filled.
template <class S, class U>
void scatter_row(const Pattern& p, int64_t r, const S* values, U* row) {
  __builtin_memset(row, 0, sizeof(U) * p.cols);
  for (int64_t k = p.crow[r]; k < p.crow[r + 1]; k++) convert(values[k], &row[p.col[k]]);
}
template <class U>
void gather_row(const Pattern& p, int64_t r, const U* row, U* values) {
  for (int64_t k = p.crow[r]; k < p.crow[r + 1]; k++) values[k] = row[p.col[k]];
}

#if defined(__AVX2__)
// For each byte of bits. expand, in bytes and by halves of four weights, as _mm256_shuffle_epi8
// takes them: which of the half's values goes to each place, zero where none does; a permutation
// across halves and a blend with zero take 1.25 times as long. compress: the places that hold a
// value, in order; there two halves, which are two stores, take 1.3 times as long as a permutation.
struct ByteTables {
  alignas(32) uint8_t expand[256][32];
  uint8_t compress[256][8];
  constexpr ByteTables() : expand(), compress() {
    for (int bits = 0; bits < 256; bits++) {
      int count = 0, of_half = 0;
      for (int i = 0; i < 8; i++) {
        const bool set = bits >> i & 1;
        if (i == 4) of_half = 0;
        for (int byte = 0; byte < 4; byte++)
          expand[bits][4 * i + byte] = static_cast<uint8_t>(set ? 4 * of_half + byte : 0x80);
        if (set) compress[bits][count] = static_cast<uint8_t>(i);
        count += set;
        of_half += set;
      }
    }
  }
};
constexpr ByteTables kByteTables;

// Eight weights from their values, of which eight may be read. *values: moves on to the next ones.
ST_INLINE __m256 expand_eight(uint8_t set, const float** values) {
  const int low = __builtin_popcount(set & 15);
  const __m256 halves = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(*values)),
                                             _mm_loadu_ps(*values + low), 1);
  *values += __builtin_popcount(set);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(
      _mm256_castps_si256(halves),
      _mm256_load_si256(reinterpret_cast<const __m256i*>(kByteTables.expand[set]))));
}

// The values among eight weights, in front; the rest is arbitrary.
ST_INLINE __m256 compress_eight(uint8_t set, __m256 weights) {
  const __m256i from = _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteTables.compress[set])));
  return _mm256_permutevar8x32_ps(weights, from);
}

// values: reads eight at a time, but none from `end` on.
inline void expand_row(const Pattern& p, const uint8_t* bits, int64_t r, int64_t end,
                       const float* values, float* row) {
  int64_t c = 0;
  const float *from = values + p.crow[r], *const last = values + end;
  for (; c + 8 <= p.cols && last - from >= 8; c += 8)
    _mm256_storeu_ps(row + c, expand_eight(bits[c >> 3], &from));
  for (; c < p.cols; c++) row[c] = bits[c >> 3] >> (c & 7) & 1 ? *from++ : 0.0f;
}

// values: writes eight at a time, but none from `end` on.
inline void compress_row(const Pattern& p, const uint8_t* bits, int64_t r, int64_t end,
                         const float* row, float* values) {
  int64_t k = p.crow[r], c = 0;
  for (; c + 8 <= p.cols && k + 8 <= end; c += 8) {
    const uint8_t set = bits[c >> 3];
    _mm256_storeu_ps(values + k, compress_eight(set, _mm256_loadu_ps(row + c)));
    k += __builtin_popcount(set);
  }
  for (; c < p.cols; c++)
    if (bits[c >> 3] >> (c & 7) & 1) values[k++] = row[c];
}
#endif

// S: type of the values; U: type of the weight.
template <class S, class U>
void values_to_dense_as(const DenseRows& a) {
  const Pattern& p = a.plan->pattern();
  const S* values = static_cast<const S*>(a.values);
  U* weight = static_cast<U*>(a.weight);
#if defined(__AVX2__)
  if constexpr (std::is_same<S, float>::value && std::is_same<U, float>::value) {
    const uint8_t* bits = a.plan->bits();
    const int64_t stride = ceil_div(p.cols, 8);
    for_rows(p, a.first, a.last, a.parallel, [&](int64_t r, int64_t) {
      // Reading beyond the run is harmless, beyond the values it is not.
      expand_row(p, bits + r * stride, r, p.nnz, values, weight + (r - a.first) * p.cols);
    });
    return;
  }
#endif
  for_rows(p, a.first, a.last, a.parallel,
           [&](int64_t r, int64_t) { scatter_row(p, r, values, weight + (r - a.first) * p.cols); });
}

template <class U>
void dense_to_values_as(const DenseRows& a) {
  const Pattern& p = a.plan->pattern();
  const U* weight = static_cast<const U*>(a.weight);
  U* values = static_cast<U*>(a.values);
#if defined(__AVX2__)
  if constexpr (std::is_same<U, float>::value) {
    const uint8_t* bits = a.plan->bits();
    const int64_t stride = ceil_div(p.cols, 8);
    for_rows(p, a.first, a.last, a.parallel, [&](int64_t r, int64_t end) {
      compress_row(p, bits + r * stride, r, end, weight + (r - a.first) * p.cols, values);
    });
    return;
  }
#endif
  for_rows(p, a.first, a.last, a.parallel,
           [&](int64_t r, int64_t) { gather_row(p, r, weight + (r - a.first) * p.cols, values); });
}

inline void values_to_dense_any(const DenseRows& a) {
  if (a.values_dtype == DType::f32) return values_to_dense_as<float, float>(a);
  if (a.values_dtype == DType::f64) return values_to_dense_as<double, double>(a);
  if (a.weight_dtype == DType::f32) return values_to_dense_as<bf16, float>(a);
  return values_to_dense_as<bf16, bf16>(a);
}

inline void dense_to_values_any(const DenseRows& a) {
  if (a.weight_dtype == DType::f32) return dense_to_values_as<float>(a);
  if (a.weight_dtype == DType::f64) return dense_to_values_as<double>(a);
  return dense_to_values_as<bf16>(a);
}

}  // namespace
}  // namespace sparsetrain

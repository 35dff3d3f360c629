// Between the values at a pattern and the dense weight that the library's product takes.
//
// A bit per weight says where the nonzeros are (Plan::bits). A vector of weights is a load of the
// next values and a shuffle: 2 cycles, whatever the density, where a scatter costs 3.5 cycles for
// each nonzero. A table says where each value goes. Without such a shuffle, and for other sizes
// than 32 bits, values are scattered.
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
#if defined(ST_512_BITS)
typedef uint16_t Bits __attribute__((may_alias));  // of the weights of one vector
#else
typedef uint8_t Bits;
#endif

// For each byte of bits.
//   expand: in bytes and by halves of four weights, as _mm256_shuffle_epi8 takes them: which of the
//     half's values goes to each place, zero where none does. A permutation across halves and a
//     blend with zero take 1.25 times as long.
//   place: which value goes to each place that has one.
//   compress: the places that hold a value, in order; there two halves, which are two stores, take
//     1.3 times as long as a permutation.
struct ByteTables {
  alignas(32) uint8_t expand[256][32];
  uint8_t place[256][8], compress[256][8];
  alignas(16) uint8_t second_half[9][16];  // 0 eight times, then `count` eight times
  constexpr ByteTables() : expand(), place(), compress(), second_half() {
    for (int bits = 0; bits < 256; bits++) {
      int count = 0, of_half = 0;
      for (int i = 0; i < 8; i++) {
        const bool set = bits >> i & 1;
        if (i == 4) of_half = 0;
        for (int byte = 0; byte < 4; byte++)
          expand[bits][4 * i + byte] = static_cast<uint8_t>(set ? 4 * of_half + byte : 0x80);
        place[bits][i] = static_cast<uint8_t>(count);
        if (set) compress[bits][count] = static_cast<uint8_t>(i);
        count += set;
        of_half += set;
      }
    }
    for (int count = 0; count <= 8; count++)
      for (int i = 8; i < 16; i++) second_half[count][i] = static_cast<uint8_t>(count);
  }
};
constexpr ByteTables kByteTables;

// f(ByTable): whether vectors are expanded and compressed by the tables above, or by instructions
// of their own where there are any.
template <class F>
ST_INLINE void with_tables(const F& f) {
#if defined(ST_512_BITS)
  if (expands_fast()) return f(std::false_type{});
#endif
  f(std::true_type{});
}

#if defined(ST_512_BITS)
// vexpandps and vcompressps wait for what was in their target, though none of it stays. Cleared, it
// is nothing to wait for: 1.3 to 2 times faster (AMD).
ST_INLINE Vec<float> expand_cleared(__mmask16 set, __m512 values) {
  Vec<float> to;
  __asm__("vpxord %0, %0, %0\n\tvexpandps %2, %0%{%1%}" : "=&v"(to) : "Yk"(set), "v"(values));
  return to;
}
ST_INLINE __m512 compress_cleared(__mmask16 set, Vec<float> weights) {
  __m512 to;
  __asm__("vpxord %0, %0, %0\n\tvcompressps %2, %0%{%1%}" : "=&v"(to) : "Yk"(set), "v"(weights));
  return to;
}

ST_INLINE Vec<float> expand_by_table(Bits set, const float* from) {
  const uint8_t low = static_cast<uint8_t>(set), high = static_cast<uint8_t>(set >> 8);
  const __m128i places = _mm_unpacklo_epi64(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteTables.place[low])),
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteTables.place[high])));
  const __m128i second = _mm_load_si128(
      reinterpret_cast<const __m128i*>(kByteTables.second_half[__builtin_popcount(low)]));
  return reinterpret_cast<Vec<float>>(_mm512_maskz_permutexvar_ps(
      set, _mm512_maskz_cvtepu8_epi32(0xffff, _mm_add_epi8(places, second)),
      _mm512_loadu_ps(from)));
}
#else
ST_INLINE Vec<float> expand_by_table(Bits set, const float* from) {
  const __m256 halves = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)),
                                             _mm_loadu_ps(from + __builtin_popcount(set & 15)), 1);
  return reinterpret_cast<Vec<float>>(_mm256_shuffle_epi8(
      _mm256_castps_si256(halves),
      _mm256_load_si256(reinterpret_cast<const __m256i*>(kByteTables.expand[set]))));
}
#endif

// The weights of one vector from their values, of which a vector may be read. *values: moves on to
// the next ones.
template <bool ByTable>
ST_INLINE Vec<float> expand(Bits set, const float** values) {
  const float* from = *values;
  *values += __builtin_popcount(set);
#if defined(ST_512_BITS)
  if constexpr (!ByTable) return expand_cleared(set, _mm512_loadu_ps(from));
#endif
  return expand_by_table(set, from);
}

ST_INLINE __m256 compress_eight(uint8_t set, __m256 weights) {
  const __m256i from = _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteTables.compress[set])));
  return _mm256_permutevar8x32_ps(weights, from);
}
// Writes the values among the weights of one vector, and something behind them: a vector in all at
// most. Returns their number.
template <bool ByTable>
ST_INLINE int compress(Bits set, Vec<float> weights, float* to) {
#if defined(ST_512_BITS)
  if constexpr (ByTable) {
    const uint8_t low = static_cast<uint8_t>(set), high = static_cast<uint8_t>(set >> 8);
    const __m512 all = reinterpret_cast<__m512>(weights);
    _mm256_storeu_ps(to, compress_eight(low, _mm512_castps512_ps256(all)));
    _mm256_storeu_ps(to + __builtin_popcount(low),
                     compress_eight(high, _mm512_maskz_extractf32x8_ps(0xff, all, 1)));
  } else {
    _mm512_storeu_ps(to, compress_cleared(set, weights));
  }
#else
  _mm256_storeu_ps(to, compress_eight(set, reinterpret_cast<__m256>(weights)));
#endif
  return __builtin_popcount(set);
}

ST_INLINE const Bits* bits_of_row(const Plan& plan, int64_t r) {
  return reinterpret_cast<const Bits*>(plan.bits() + r * plan.bits_stride());
}
// From one row's bits to the next one's.
ST_INLINE int64_t row_words(const Plan& plan) {
  return plan.bits_stride() / static_cast<int64_t>(sizeof(Bits));
}

// values: reads a vector at a time, but none from `end` on.
template <bool ByTable>
void expand_row(const Pattern& p, const Bits* bits, int64_t r, int64_t end, const float* values,
                float* row) {
  constexpr int w = kLanes<float>;
  int64_t c = 0;
  const float *from = values + p.crow[r], *const last = values + end;
  for (; c + w <= p.cols && last - from >= w; c += w)
    storeu<float>(row + c, expand<ByTable>(bits[c / w], &from));
  for (; c < p.cols; c++) row[c] = bits[c / w] >> (c % w) & 1 ? *from++ : 0.0f;
}

// values: writes a vector at a time, but none from `end` on.
template <bool ByTable>
void compress_row(const Pattern& p, const Bits* bits, int64_t r, int64_t end, const float* row,
                  float* values) {
  constexpr int w = kLanes<float>;
  int64_t k = p.crow[r], c = 0;
  for (; c + w <= p.cols && k + w <= end; c += w)
    k += compress<ByTable>(bits[c / w], loadu<float>(row + c), values + k);
  for (; c < p.cols; c++)
    if (bits[c / w] >> (c % w) & 1) values[k++] = row[c];
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
    with_tables([&](auto tables) {
      for_rows(p, a.first, a.last, a.parallel, [&](int64_t r, int64_t) {
        // Reading beyond the run is harmless, beyond the values it is not.
        expand_row<decltype(tables)::value>(p, bits_of_row(*a.plan, r), r, p.nnz, values,
                                            weight + (r - a.first) * p.cols);
      });
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
    with_tables([&](auto tables) {
      for_rows(p, a.first, a.last, a.parallel, [&](int64_t r, int64_t end) {
        compress_row<decltype(tables)::value>(p, bits_of_row(*a.plan, r), r, end,
                                              weight + (r - a.first) * p.cols, values);
      });
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

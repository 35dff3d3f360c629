// Vectors of the instruction set this translation unit is compiled for. GCC/Clang vector
// extensions only, so that one source serves SSE2, AVX2, AVX-512 and NEON.
//
// SPARSETRAIN_HALF_VECTORS: AVX-512's instructions and registers, with vectors of 256 bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && !defined(SPARSETRAIN_HALF_VECTORS)
#define ST_512_BITS
#define SPARSETRAIN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SPARSETRAIN_VECTOR_BYTES 32
#else
#define SPARSETRAIN_VECTOR_BYTES 16
#endif

#define ST_INLINE inline __attribute__((always_inline))
#define ST_UNROLL _Pragma("GCC unroll 16")

namespace sparsetrain {
namespace {

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(SPARSETRAIN_VECTOR_BYTES), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(SPARSETRAIN_VECTOR_BYTES), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int kLanes = SPARSETRAIN_VECTOR_BYTES / static_cast<int>(sizeof(T));

// Vectors of lanes in a tile. With four, two chains of sums each fill 8 registers; eight are for
// dense patterns, where reading the pattern itself is what costs.
constexpr int kNarrowTile = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 of them
constexpr int kWideTile = 8;
#else
constexpr bool kManyRegisters = false;
constexpr int kWideTile = 4;
#endif

template <class T>
ST_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 keeps -0.0; gcc turns it into one broadcast
}

// Four values that follow each other, each spread over a vector by `spread`. One load instead of
// four: a vector load and the spreading one cannot use the same bank of L1 in one cycle, so that
// every load besides those of the operand counts (256-bit vectors: 1.3 times faster).
template <class T>
struct Four {
  explicit ST_INLINE Four(const T* p) : p(p) {}
  template <int J>
  ST_INLINE Vec<T> spread() const {
    return broadcast<T>(p[J]);
  }
  const T* p;
};
#if defined(ST_512_BITS)
template <int J, int... I>
ST_INLINE Vec<float> spread_in_fours(Vec<float> v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I & ~3) + J)...);
}
template <>
struct Four<float> {
  explicit ST_INLINE Four(const float* p)
      : all(reinterpret_cast<Vec<float>>(_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(p)))) {}
  template <int J>
  ST_INLINE Vec<float> spread() const {
    return spread_in_fours<J>(all, std::make_integer_sequence<int, 16>{});
  }
  Vec<float> all;
};
#elif defined(__AVX2__)
template <>
struct Four<float> {
  explicit ST_INLINE Four(const float* p)
      : all(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))) {}
  template <int J>
  ST_INLINE Vec<float> spread() const {
    return reinterpret_cast<Vec<float>>(_mm256_permute_ps(all, J * 0x55));
  }
  __m256 all;
};
#endif

// N indices that follow each other, by as few loads; to be taken in order.
template <class I, int N>
struct Indices {
  Indices() = default;
  explicit ST_INLINE Indices(const I* p) { __builtin_memcpy(words, p, sizeof words); }
  template <int J>
  ST_INLINE int64_t get() {
    uint64_t& word = words[J * sizeof(I) / 8];
    const I index = static_cast<I>(word);
    word >>= 8 * sizeof(I);
    __asm__("" : "+r"(word));  // else a copy, a shift and a mask for each
    return index;
  }
  // In registers from here on, not read where they are used.
  ST_INLINE void keep() {
    for (uint64_t& word : words) __asm__("" : "+r"(word));
  }
  uint64_t words[N * sizeof(I) / 8];
};
template <class F, int... J>
ST_INLINE void for_constants(const F& f, std::integer_sequence<int, J...>) {
  (f(std::integral_constant<int, J>{}), ...);
}

// The cells of rows, one after the other: row r's is [begin[r], end[r]). The next one's first
// indices are read while one is used.
template <class I, int N>
class RowsOfIndices {
 public:
  RowsOfIndices(const int32_t* begin, const int32_t* end, int64_t rows, const I* index)
      : begin_(begin), end_(end), left_(rows), index_(index) {
    if (rows > 0) read();
  }
  // The next row's cell and its first indices. (A struct of them all would be copied in halves and
  // read as a whole, which takes longer than the cell.)
  ST_INLINE Indices<I, N> take(int64_t* begin, int64_t* end) {
    *begin = next_begin_;
    *end = next_end_;
    const Indices<I, N> first = first_;
    if (--left_ > 0) {
      begin_++;
      end_++;
      read();
    }
    return first;
  }

 private:
  ST_INLINE void read() {
    next_begin_ = *begin_;
    next_end_ = *end_;
    first_ = Indices<I, N>(index_ + next_begin_);
    first_.keep();
  }
  const int32_t* begin_;
  const int32_t* end_;
  int64_t left_;
  const I* index_;
  int64_t next_begin_ = 0, next_end_ = 0;
  Indices<I, N> first_;
};

// f(J, index, value in all lanes) for the nonzeros of a cell, four at a time, J = 0 .. 3 being a
// constant. Indices are read four ahead of their use, the first ones (`at`) in the cell before:
// loads of operands queue up by the dozen, and what waits for an index that queued behind them
// starts too late (1.3 times faster where L1 is the limit).
template <class T, class I, class F>
ST_INLINE void for_fours(Indices<I, 4> at, const I* index, const T* values, int64_t count,
                         const F& f) {
  for (; count >= 4; count -= 4) {
    index += 4;
    Indices<I, 4> next(index);
    next.keep();
    const Four<T> value(values);
    values += 4;
    f(std::integral_constant<int, 0>{}, at.template get<0>(), value.template spread<0>());
    f(std::integral_constant<int, 1>{}, at.template get<1>(), value.template spread<1>());
    f(std::integral_constant<int, 2>{}, at.template get<2>(), value.template spread<2>());
    f(std::integral_constant<int, 3>{}, at.template get<3>(), value.template spread<3>());
    at = next;
  }
  if (count == 0) return;
  f(std::integral_constant<int, 0>{}, at.template get<0>(), broadcast<T>(values[0]));
  if (count == 1) return;
  f(std::integral_constant<int, 1>{}, at.template get<1>(), broadcast<T>(values[1]));
  if (count == 2) return;
  f(std::integral_constant<int, 2>{}, at.template get<2>(), broadcast<T>(values[2]));
}

// f(G, first, k) for groups of G nonzeros of a cell of `count`, from the k-th on: Most at a time,
// then what is left. Their indices are `at` and those after it, read a group ahead; f takes them in
// order.
template <int Most, class I, class F>
ST_INLINE void for_groups(Indices<I, 8> at, const I* index, int64_t count, const F& f) {
  int64_t k = 0;
  auto group = [&](auto size) __attribute__((always_inline)) {
    Indices<I, 8> next(index + k + decltype(size)::value);
    next.keep();
    f(size, at, k);
    at = next;
    k += decltype(size)::value;
  };
  while (k + Most <= count) group(std::integral_constant<int, Most>{});
  if (Most == 8 && k + 4 <= count) group(std::integral_constant<int, 4>{});
  if (k + 2 <= count) group(std::integral_constant<int, 2>{});
  while (k < count) group(std::integral_constant<int, 1>{});
}

// An address that several operands are read from, in a register of its own. Where it is the sum of
// two, Intel's CPUs split each FMA that reads it into two operations, and take 6 in a cycle: with
// the register they are 1.05 to 1.2 times faster. AMD's products of rows and tiles are 0.95-0.98
// times as fast with it, their gradients of the values 1.0-1.02.
template <class T>
ST_INLINE const T* operands(const T* p) {
  __asm__("" : "+r"(p));
  return p;
}
template <class T>
ST_INLINE const T* offset(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}
template <class T>
ST_INLINE Vec<T> load(const T* p) {  // p: aligned to the vector
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
ST_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
// Past the caches, where the instruction set can: for outputs too large to stay in them.
// p: aligned to the vector.
template <class T>
ST_INLINE void stream(T* p, Vec<T> v) {
#if defined(ST_512_BITS)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
  store<T>(p, v);
#endif
}
ST_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
template <class T>
ST_INLINE Vec<T> loadu(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
ST_INLINE void storeu(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Asks for a run of nonzeros some rows ahead of its use. Runs of one column block lie apart in
// memory, too short for the hardware's own prefetching: 1.2-1.4 times faster at 50-90 %.
constexpr int64_t kRowsAhead = 4;
template <class I, class T>
ST_INLINE void prefetch_run(const I* index, const T* values, int64_t begin, int64_t end) {
  do {
    __builtin_prefetch(index + begin);
    __builtin_prefetch(values + begin);
    __builtin_prefetch(values + begin + 16);
    begin += 32;
  } while (begin < end);
}

// ---- shuffles: stage D of a butterfly over lanes -------------------------------------------
// lo takes from a the lanes with bit D clear and puts b's beside them; hi the lanes with it set.
// On 32-bit lanes D == 1 is the in-lane unpack, one instruction everywhere; D == 2 undoes its
// odd order, so a D=1, D=2 pair is exact for transposes and sums alike.
template <class T, int D>
constexpr int lo_index(int i) {
  constexpr int w = kLanes<T>;
  if (sizeof(T) == 4 && D == 1) return (i & ~3) + ((i & 2) >> 1) + ((i & 1) ? w : 0);
  return (i & D) ? w + i - D : i;
}
template <class T, int D>
constexpr int hi_index(int i) {
  constexpr int w = kLanes<T>;
  if (sizeof(T) == 4 && D == 1) return lo_index<T, D>(i) + 2;
  return (i & D) ? w + i : i + D;
}
template <class T, int D, int... I>
ST_INLINE Vec<T> lo_impl(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, lo_index<T, D>(I)...);
}
template <class T, int D, int... I>
ST_INLINE Vec<T> hi_impl(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, hi_index<T, D>(I)...);
}
template <class T, int D>
ST_INLINE Vec<T> lo(Vec<T> a, Vec<T> b) {
  return lo_impl<T, D>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}
template <class T, int D>
ST_INLINE Vec<T> hi(Vec<T> a, Vec<T> b) {
  return hi_impl<T, D>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}
template <class T, int H, int... I>
ST_INLINE Vec<T> swap_impl(Vec<T> a, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, a, (I ^ H)...);
}

template <class T, int... I>
ST_INLINE Vec<T> evens_impl(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}
// Every second lane of a, then of b.
template <class T>
ST_INLINE Vec<T> evens(Vec<T> a, Vec<T> b) {
  return evens_impl<T>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

template <class T, int H, int... I>
ST_INLINE Vec<T> zip_impl(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int w = kLanes<T>;
  return __builtin_shufflevector(a, b, (H * w / 2 + I / 2 + (I % 2) * w)...);
}
// Lanes of a and b in turn: the first half of them (H == 0), or the second.
template <class T, int H>
ST_INLINE Vec<T> zip(Vec<T> a, Vec<T> b) {
  return zip_impl<T, H>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// In-place transpose of a square of kLanes<T> vectors.
template <class T, int D = 1>
ST_INLINE void transpose(Vec<T>* r) {
  constexpr int w = kLanes<T>;
  if constexpr (D < w) {
    // After the 32-bit unpack rows i and i + 1 hold columns (0, 1) and (2, 3) of a 4 x 4 square,
    // so the next stage pairs them differently from the plain butterfly.
    constexpr bool unpacked = sizeof(T) == 4 && D == 2;
    ST_UNROLL
    for (int i = 0; i < w; i++) {
      if (i & D) continue;
      Vec<T> a = r[i], b = r[i + D];
      r[i] = lo<T, D>(a, b);
      r[i + D] = hi<T, D>(a, b);
    }
    if constexpr (unpacked) {
      ST_UNROLL
      for (int i = 0; i < w; i += 4) {
        Vec<T> t = r[i + 1];
        r[i + 1] = r[i + 2];
        r[i + 2] = t;
      }
    }
    transpose<T, D * 2>(r);
  }
}

// Sums over lanes of G vectors at once: returns them in the low lanes of ceil(G / lanes) vectors.
template <class T, int G, int D = 1>
ST_INLINE void fold(Vec<T>* a) {
  constexpr int w = kLanes<T>;
  if constexpr (D < G && D < w) {
    ST_UNROLL
    for (int i = 0; i < G / D / 2; i++) {
      Vec<T> x = a[2 * i], y = a[2 * i + 1];
      a[i] = lo<T, D>(x, y) + hi<T, D>(x, y);
    }
    fold<T, G, D * 2>(a);
  } else if constexpr (D < w) {
    // The 32-bit unpack leaves the partner of lane i at i ^ 2 when only one stage has run.
    a[0] = a[0] + swap_impl<T, D>(a[0], std::make_integer_sequence<int, w>{});
    fold<T, G, D * 2>(a);
  }
}
template <class T>
ST_INLINE T sum_lanes(Vec<T> v) {
  fold<T, 1>(&v);
  return v[0];
}
// out[i] += sum of the lanes of a[i], i < G
template <class T, int G>
ST_INLINE void add_sums(Vec<T>* a, T* out) {
  fold<T, G>(a);
  constexpr int w = kLanes<T>;
  constexpr int n = G < w ? G : w;
  ST_UNROLL
  for (int i = 0; i * n < G; i++) {
    if constexpr (n == w) {
      storeu<T>(out + i * n, loadu<T>(out + i * n) + a[i]);
    } else {
      typedef T Part __attribute__((vector_size(n * sizeof(T)), may_alias));
      Part part, old;
      __builtin_memcpy(&part, &a[i], sizeof part);
      __builtin_memcpy(&old, out + i * n, sizeof old);
      old += part;
      __builtin_memcpy(out + i * n, &old, sizeof old);
    }
  }
}

// ---- storage types: widened to the type of the sums on load, rounded to nearest on store -----
struct bf16 {
  uint16_t bits;
};
template <class S>
struct SumOf {
  typedef S type;
};
template <>
struct SumOf<bf16> {
  typedef float type;
};
template <class S>
using Sum = typename SumOf<S>::type;

ST_INLINE float widen(float x) { return x; }
ST_INLINE double widen(double x) { return x; }
ST_INLINE float widen(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, sizeof f);
  return f;
}
ST_INLINE void narrow(float x, float* out) { *out = x; }
ST_INLINE void narrow(double x, double* out) { *out = x; }
ST_INLINE void narrow(float x, bf16* out) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(nan ? (u >> 16) | 0x40u : rounded);
}

ST_INLINE Vec<float> load_widened(const float* p) { return loadu<float>(p); }
ST_INLINE Vec<double> load_widened(const double* p) { return loadu<double>(p); }
ST_INLINE Vec<float> load_widened(const bf16* p) {
  float t[kLanes<float>];
  ST_UNROLL
  for (int i = 0; i < kLanes<float>; i++) t[i] = widen(p[i]);
  return loadu<float>(t);
}
// The first n < lanes elements, then zeros. Nothing beyond them is touched.
template <class S>
ST_INLINE Vec<Sum<S>> load_widened_some(const S* p, int n) {
#if defined(ST_512_BITS)
  if constexpr (sizeof(S) == 4)
    return reinterpret_cast<Vec<Sum<S>>>(
        _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
#endif
  Sum<S> t[kLanes<Sum<S>>] = {};
  for (int i = 0; i < n; i++) t[i] = widen(p[i]);
  return loadu<Sum<S>>(t);
}
// Whether load_where is there.
template <class T>
struct LoadsWhere : std::false_type {};
#if defined(__AVX2__)
template <>
struct LoadsWhere<float> : std::true_type {};
// Lane i of p where bit i of `set` is set, else zero. Other lanes are not touched.
ST_INLINE Vec<float> load_where(uint32_t set, const float* p) {
#if defined(ST_512_BITS)
  return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(set), p));
#else
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i all = _mm256_set1_epi32(static_cast<int>(set));
  return reinterpret_cast<Vec<float>>(
      _mm256_maskload_ps(p, _mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane)));
#endif
}
#endif
// The first n <= lanes elements, rounded.
template <class S>
ST_INLINE void store_narrowed(S* p, Vec<Sum<S>> v, int n) {
  constexpr int w = kLanes<Sum<S>>;
  if constexpr (sizeof(S) == sizeof(Sum<S>)) {
    if (n == w) return storeu<S>(p, v);
  }
#if defined(ST_512_BITS)
  if constexpr (sizeof(S) == 4)
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1),
                                 reinterpret_cast<__m512>(v));
#endif
  Sum<S> t[w];
  storeu<Sum<S>>(t, v);
  if (n == w) {
    S full[w];
    ST_UNROLL
    for (int i = 0; i < w; i++) narrow(t[i], &full[i]);
    __builtin_memcpy(p, full, sizeof full);
    return;
  }
  for (int i = 0; i < n; i++) narrow(t[i], p + i);
}

}  // namespace
}  // namespace sparsetrain

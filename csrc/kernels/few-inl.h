// The linear layer for a few samples and a pattern that is not very sparse.
//
// One sample's product does little but read, and at half of the weights nonzero their column
// numbers cost as much as what is left out. So the bits of Plan::bits say where nonzeros are, a
// byte for eight weights; a shuffle by a table puts values to their places, and whole vectors of x
// take part: two to three cycles for eight weights, whatever the density. Nothing is transposed.
#pragma once

#include "dense-inl.h"
#include "kernels.h"
#include "parallel-inl.h"
#include "plan.h"
#include "simd-inl.h"

namespace sparsetrain {
namespace {

// Most samples that are computed like this.
constexpr int64_t kFewSamples = 8;

#if defined(__AVX2__)
// Gradients of the input are summed per group of rows and the groups added in order: the same
// result for any number of threads.
constexpr int64_t kFewGroupWeights = 1 << 18;
constexpr int64_t kFewGroups = 8;

typedef __m256 Eight;

// Calls f(B) with the smallest compiled number of samples of at least `samples`.
template <class F>
ST_INLINE void with_samples(int64_t samples, const F& f) {
  if (samples > 4) return f(std::integral_constant<int, 8>{});
  if (samples > 2) return f(std::integral_constant<int, 4>{});
  if (samples > 1) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}

// Columns in eights: eight of each sample, then the next eight. Zeros beyond columns and samples.
template <int B>
void pack_few(const Matrix& x, float* packed) {
  const int64_t whole = x.cols / 8, eights = ceil_div(x.cols, 8);
  for (int64_t b = 0; b < B; b++, packed += 8) {
    const bool there = b < x.rows;
    const float* from = static_cast<const float*>(x.data) + (there ? b * x.row_stride : 0);
    if (!there || whole < eights) {
      for (int64_t c = there ? whole : 0; c < eights; c++)
        _mm256_store_ps(packed + c * 8 * B, _mm256_setzero_ps());
    }
    if (!there) continue;
    for (int64_t c = 0; c < whole; c++)
      _mm256_store_ps(packed + c * 8 * B, _mm256_loadu_ps(from + 8 * c));
    __builtin_memcpy(packed + whole * 8 * B, from + 8 * whole,
                     sizeof(float) * (x.cols - 8 * whole));
  }
}

// The values of each row, of which eight at a time may be read, up to seven beyond the row's end.
class RowValues {
 public:
  RowValues(const Pattern& p, const float* values)
      : pattern_(p), values_(values), safe_(p.rows), tail_(tail(p) + 8) {
    const int32_t from = p.crow[safe_];
    __builtin_memcpy(tail_.get(), values + from, sizeof(float) * (p.nnz - from));
    __builtin_memset(tail_.get() + (p.nnz - from), 0, sizeof(float) * 8);
  }
  const float* operator()(int64_t r) const {
    const int32_t k = pattern_.crow[r];
    return r < safe_ ? values_ + k : tail_.get() + (k - pattern_.crow[safe_]);
  }

 private:
  int64_t tail(const Pattern& p) {
    while (safe_ > 0 && p.crow[safe_] + 8 > p.nnz) safe_--;
    return p.nnz - p.crow[safe_];
  }
  const Pattern& pattern_;
  const float* values_;
  int64_t safe_;  // rows below it read nothing beyond the values
  Scratch<float> tail_;
};

ST_INLINE float sum_eight(Eight v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Asks for what the R rows after these read at the same place, about `ahead` bytes on: where rows
// are short, the hardware's own prefetching is late (768 -> 3072: 1.3 to 1.6 times faster).
ST_INLINE void prefetch_ahead(const float* values, uintptr_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(values) + ahead));
}
ST_INLINE uintptr_t bytes_of_rows(const Pattern& p, int64_t r, int64_t rows) {
  return sizeof(float) * static_cast<uintptr_t>(p.crow[r + rows] - p.crow[r]);
}

// R rows of y for B samples. bits: of the first row; values: of each.
template <int B, int R>
ST_INLINE void few_outputs(const uint8_t* bits, int64_t stride, const float* const* values,
                           uintptr_t ahead, const float* x, float (*sums)[B]) {
  Eight sum[R][B];
  const float* from[R];
  ST_UNROLL
  for (int r = 0; r < R; r++) {
    from[r] = values[r];
    ST_UNROLL
    for (int b = 0; b < B; b++) sum[r][b] = _mm256_setzero_ps();
  }
  for (int64_t c = 0; c < stride; c++, x += 8 * B) {
    ST_UNROLL
    for (int r = 0; r < R; r++) {
      if (R > 1) prefetch_ahead(from[r], ahead);
      const Eight weight = expand_eight(bits[r * stride + c], &from[r]);
      ST_UNROLL
      for (int b = 0; b < B; b++)
        sum[r][b] = _mm256_fmadd_ps(weight, _mm256_load_ps(x + 8 * b), sum[r][b]);
    }
  }
  ST_UNROLL
  for (int r = 0; r < R; r++) {
    ST_UNROLL
    for (int b = 0; b < B; b++) sums[r][b] = sum_eight(sum[r][b]);
  }
}

template <int B>
void few_forward(const LinearForward& a) {
  constexpr int R = B == 1 ? 4 : B == 2 ? 2 : 1;
  const Pattern& p = a.plan->pattern();
  const uint8_t* bits = a.plan->bits();
  const int64_t stride = ceil_div(p.cols, 8), run = R * (kDenseRun / (p.cols + 1) / R + 1);
  const float* bias = static_cast<const float*>(a.bias);
  const RowValues values(p, static_cast<const float*>(a.values));
  Scratch<float> x(stride * 8 * B);
  pack_few<B>(a.x, x.get());
  const int workers = worth_waking(a.parallel, p.rows * p.cols);
  share(a.parallel, workers, ceil_div(p.rows, run), [&](int, int64_t i) {
    const int64_t end = least((i + 1) * run, p.rows);
    float sums[R][B];
    auto put = [&](int64_t r, int n) {
      for (int j = 0; j < n; j++)
        for (int64_t b = 0; b < a.x.rows; b++)
          static_cast<float*>(a.y)[b * p.rows + r + j] = sums[j][b] + (bias ? bias[r + j] : 0.0f);
    };
    int64_t r = i * run;
    for (; r + R <= end; r += R) {
      const float* from[R];
      for (int j = 0; j < R; j++) from[j] = values(r + j);
      few_outputs<B, R>(bits + r * stride, stride, from, bytes_of_rows(p, r, R), x.get(), sums);
      put(r, R);
    }
    for (; r < end; r++) {
      const float* from = values(r);
      few_outputs<B, 1>(bits + r * stride, stride, &from, 0, x.get(), sums);
      put(r, 1);
    }
  });
}

// Adds R rows' share to dx, packed as pack_few does. dy: each element in eight places.
template <int B, int R>
ST_INLINE void few_grad_input(const uint8_t* bits, int64_t stride, const float* const* values,
                              uintptr_t ahead, const float (*dy)[B][8], float* dx) {
  const float* from[R];
  ST_UNROLL
  for (int r = 0; r < R; r++) from[r] = values[r];
  for (int64_t c = 0; c < stride; c++, dx += 8 * B) {
    Eight weight[R];
    ST_UNROLL
    for (int r = 0; r < R; r++) {
      if (R > 1) prefetch_ahead(from[r], ahead);
      weight[r] = expand_eight(bits[r * stride + c], &from[r]);
    }
    ST_UNROLL
    for (int b = 0; b < B; b++) {
      Eight sum = _mm256_load_ps(dx + 8 * b);
      ST_UNROLL
      for (int r = 0; r < R; r++) sum = _mm256_fmadd_ps(weight[r], _mm256_load_ps(dy[r][b]), sum);
      _mm256_store_ps(dx + 8 * b, sum);
    }
  }
}

// A row of dvalues. Writes eight at a time, but none from `end` on.
template <int B>
ST_INLINE void few_grad_values(const uint8_t* bits, int64_t stride, const float (*dy)[8],
                               const float* x, float* dvalues, const float* end) {
  Eight factor[B];
  ST_UNROLL
  for (int b = 0; b < B; b++) factor[b] = _mm256_load_ps(dy[b]);
  for (int64_t c = 0; c < stride; c++, x += 8 * B) {
    const uint8_t set = bits[c];
    const int count = __builtin_popcount(set);
    Eight sum = _mm256_mul_ps(factor[0], _mm256_load_ps(x));
    ST_UNROLL
    for (int b = 1; b < B; b++) sum = _mm256_fmadd_ps(factor[b], _mm256_load_ps(x + 8 * b), sum);
    const Eight moved = compress_eight(set, sum);
    if (dvalues + 8 <= end) {
      _mm256_storeu_ps(dvalues, moved);
    } else {
      float last[8];
      _mm256_storeu_ps(last, moved);
      __builtin_memcpy(dvalues, last, sizeof(float) * count);
    }
    dvalues += count;
  }
}

// dy of one row in eight places each, zero where there is no sample. Returns its sum.
template <int B>
ST_INLINE float spread_few(const Matrix& dy, int64_t r, float (*to)[8]) {
  float sum = 0;
  for (int64_t b = 0; b < dy.rows; b++) {
    const float one = static_cast<const float*>(dy.data)[b * dy.row_stride + r];
    for (int i = 0; i < 8; i++) to[b][i] = one;
    sum += one;
  }
  return sum;
}

// The sums of `groups`, each packed as pack_few does and `size` long, to a contiguous matrix.
template <int B>
void unpack_sums(const float* sums, int64_t groups, int64_t size, int64_t rows, int64_t cols,
                 float* out) {
  for (int64_t b = 0; b < rows; b++, sums += 8, out += cols) {
    auto sum = [&](int64_t c) {
      Eight all = _mm256_load_ps(sums + c * B);
      for (int64_t g = 1; g < groups; g++)
        all = _mm256_add_ps(all, _mm256_load_ps(sums + c * B + g * size));
      return all;
    };
    int64_t c = 0;
    for (; c + 8 <= cols; c += 8) _mm256_storeu_ps(out + c, sum(c));
    if (c < cols) {
      alignas(32) float last[8];
      _mm256_store_ps(last, sum(c));
      __builtin_memcpy(out + c, last, sizeof(float) * (cols - c));
    }
  }
}

template <int B>
void few_grad_input(const LinearBackward& a) {
  constexpr int R = 4;
  const Pattern& p = a.plan->pattern();
  const uint8_t* bits = a.plan->bits();
  const int64_t stride = ceil_div(p.cols, 8), size = stride * 8 * B;
  const RowValues values(p, static_cast<const float*>(a.values));
  const int64_t groups = least(kFewGroups, least(p.rows, p.rows * p.cols / kFewGroupWeights) + 1);
  Scratch<float> sums(size * groups);
  const int workers = worth_waking(a.parallel, p.rows * p.cols);
  share(a.parallel, workers, groups, [&](int, int64_t g) {
    float* dx = sums.get() + g * size;
    __builtin_memset(dx, 0, sizeof(float) * size);
    alignas(32) float dy[R][B][8] = {};
    const int64_t end = p.rows * (g + 1) / groups;
    const float* from[R];
    for (int64_t r = p.rows * g / groups; r < end; r += R) {
      const int n = static_cast<int>(least(R, end - r));
      for (int j = 0; j < n; j++) {
        from[j] = values(r + j);
        spread_few<B>(a.dy, r + j, dy[j]);
      }
      if (n == R) {
        few_grad_input<B, R>(bits + r * stride, stride, from, bytes_of_rows(p, r, R), dy, dx);
      } else {
        for (int j = 0; j < n; j++)
          few_grad_input<B, 1>(bits + (r + j) * stride, stride, from + j, 0, dy + j, dx);
      }
    }
  });
  unpack_sums<B>(sums.get(), groups, size, a.dy.rows, p.cols, static_cast<float*>(a.dx));
}

template <int B>
void few_grad_values(const LinearBackward& a) {
  const Pattern& p = a.plan->pattern();
  const uint8_t* bits = a.plan->bits();
  const int64_t stride = ceil_div(p.cols, 8);
  float* dvalues = static_cast<float*>(a.dvalues);
  float* dbias = static_cast<float*>(a.dbias);
  Scratch<float> x(stride * 8 * B);
  pack_few<B>(a.x, x.get());
  for_rows(p, 0, p.rows, a.parallel, [&](int64_t r, int64_t end) {
    alignas(32) float dy[B][8] = {};
    const float sum = spread_few<B>(a.dy, r, dy);
    if (dbias) dbias[r] = sum;
    few_grad_values<B>(bits + r * stride, stride, dy, x.get(), dvalues + p.crow[r], dvalues + end);
  });
}

// Nanoseconds of a product, fitted on a CPU with AVX2 (Zen 3): as here, for each weight and for
// each weight and sample; by nonzeros, for each nonzero and for each row of the result.
struct FewCost {
  double weight, sample, nonzero, row;
  bool less(const Pattern& p, int64_t rows, int64_t batch) const {
    const double weights = static_cast<double>(p.rows) * static_cast<double>(p.cols);
    const double by_nonzeros =
        nonzero * static_cast<double>(p.nnz) + row * static_cast<double>(rows);
    return batch > 0 && batch <= kFewSamples && p.nnz > 0 &&
           weights * (weight + sample * static_cast<double>(batch)) < by_nonzeros;
  }
};
constexpr FewCost kFewForward = {0.115, 0.024, 1.2, 17};
constexpr FewCost kFewGradInput = {0.11, 0.024, 2.2, 21};
constexpr FewCost kFewGradValues = {0.155, 0.023, 1.5, 15};

// Each computes its product and returns true, if it is faster than by nonzeros.
inline bool few_forward(const LinearForward& a) {
  const Pattern& p = a.plan->pattern();
  if (!kFewForward.less(p, p.rows, a.x.rows)) return false;
  with_samples(a.x.rows, [&](auto b) { few_forward<decltype(b)::value>(a); });
  return true;
}
inline bool few_grad_values(const LinearBackward& a) {
  const Pattern& p = a.plan->pattern();
  if (!kFewGradValues.less(p, p.rows, a.dy.rows)) return false;
  with_samples(a.dy.rows, [&](auto b) { few_grad_values<decltype(b)::value>(a); });
  return true;
}
inline bool few_grad_input(const LinearBackward& a) {
  const Pattern& p = a.plan->pattern();
  if (!kFewGradInput.less(p, p.cols, a.dy.rows)) return false;
  with_samples(a.dy.rows, [&](auto b) { few_grad_input<decltype(b)::value>(a); });
  return true;
}
#endif

// Takes off `a` what few samples compute faster from a bit for each weight.
template <class S>
bool few_forward_if_faster(const LinearForward& a) {
#if defined(__AVX2__)
  if constexpr (std::is_same<S, float>::value) return few_forward(a);
#endif
  (void)a;
  return false;
}
template <class S>
LinearBackward without_few(LinearBackward a) {
#if defined(__AVX2__)
  if constexpr (std::is_same<S, float>::value) {
    if (a.dx && few_grad_input(a)) a.dx = nullptr;
    if (a.dvalues && few_grad_values(a)) a.dvalues = a.dbias = nullptr;
  }
#endif
  return a;
}

}  // namespace
}  // namespace sparsetrain

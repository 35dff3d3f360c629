// The linear layer for a few samples and a pattern that is not very sparse.
//
// One sample's product does little but read, and at half of the weights nonzero their column
// numbers cost as much as what is left out. So the bits of Plan::bits say where nonzeros are; a
// shuffle puts a vector's values to their places, and whole vectors of x take part: two to three
// cycles for each, whatever the density. Nothing is transposed.
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

constexpr int kWidth = kLanes<float>;  // weights of a vector

// Calls f(B, ByTable) with the smallest compiled number of samples of at least `samples`.
template <class F>
ST_INLINE void with_samples(int64_t samples, const F& f) {
  with_tables([&](auto tables) {
    if (samples > 4) return f(std::integral_constant<int, 8>{}, tables);
    if (samples > 2) return f(std::integral_constant<int, 4>{}, tables);
    if (samples > 1) return f(std::integral_constant<int, 2>{}, tables);
    f(std::integral_constant<int, 1>{}, tables);
  });
}

// Columns in `vectors`: one of each sample, then the next ones. Zeros beyond columns and samples.
template <int B>
void pack_few(const Matrix& x, int64_t vectors, float* packed) {
  constexpr int w = kWidth;
  const int64_t whole = x.cols / w;
  for (int64_t b = 0; b < B; b++, packed += w) {
    const bool there = b < x.rows;
    const float* from = static_cast<const float*>(x.data) + (there ? b * x.row_stride : 0);
    for (int64_t c = there ? whole : 0; c < vectors; c++)
      store<float>(packed + c * w * B, Vec<float>{});
    if (!there) continue;
    for (int64_t c = 0; c < whole; c++)
      store<float>(packed + c * w * B, loadu<float>(from + w * c));
    if (whole * w < x.cols)
      __builtin_memcpy(packed + whole * w * B, from + w * whole,
                       sizeof(float) * (x.cols - w * whole));
  }
}

// The values of each row, of which a vector at a time may be read, also beyond the row's end.
class RowValues {
 public:
  RowValues(const Pattern& p, const float* values)
      : pattern_(p), values_(values), safe_(p.rows), tail_(tail(p) + kWidth) {
    const int32_t from = p.crow[safe_];
    __builtin_memcpy(tail_.get(), values + from, sizeof(float) * (p.nnz - from));
    __builtin_memset(tail_.get() + (p.nnz - from), 0, sizeof(float) * kWidth);
  }
  const float* operator()(int64_t r) const {
    const int32_t k = pattern_.crow[r];
    return r < safe_ ? values_ + k : tail_.get() + (k - pattern_.crow[safe_]);
  }

 private:
  int64_t tail(const Pattern& p) {
    while (safe_ > 0 && p.crow[safe_] + kWidth > p.nnz) safe_--;
    return p.nnz - p.crow[safe_];
  }
  const Pattern& pattern_;
  const float* values_;
  int64_t safe_;  // rows below it read nothing beyond the values
  Scratch<float> tail_;
};

// Asks for what the R rows after these read at the same place, about `ahead` bytes on: where rows
// are short, the hardware's own prefetching is late (768 -> 3072: 1.3 to 1.6 times faster).
ST_INLINE void prefetch_ahead(const float* values, uintptr_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(values) + ahead));
}
ST_INLINE uintptr_t bytes_of_rows(const Pattern& p, int64_t r, int64_t rows) {
  return sizeof(float) * static_cast<uintptr_t>(p.crow[r + rows] - p.crow[r]);
}

// R rows of y for B samples. bits: of the first row; values: of each.
template <int B, int R, bool ByTable>
ST_INLINE void few_outputs(const Bits* bits, int64_t stride, const float* const* values,
                           uintptr_t ahead, const float* x, float (*sums)[B]) {
  Vec<float> sum[R][B];
  const float* from[R];
  ST_UNROLL
  for (int r = 0; r < R; r++) {
    from[r] = values[r];
    ST_UNROLL
    for (int b = 0; b < B; b++) sum[r][b] = Vec<float>{};
  }
  for (int64_t c = 0; c < stride; c++, x += kWidth * B) {
    ST_UNROLL
    for (int r = 0; r < R; r++) {
      if (R > 1) prefetch_ahead(from[r], ahead);
      const Vec<float> weight = expand<ByTable>(bits[r * stride + c], &from[r]);
      ST_UNROLL
      for (int b = 0; b < B; b++) sum[r][b] += weight * load<float>(x + kWidth * b);
    }
  }
  ST_UNROLL
  for (int r = 0; r < R; r++) {
    ST_UNROLL
    for (int b = 0; b < B; b++) sums[r][b] = sum_lanes<float>(sum[r][b]);
  }
}

template <int B, bool ByTable>
void few_forward(const LinearForward& a) {
  constexpr int most = kManyRegisters ? 16 : 4;  // sums
  constexpr int R = 4 * B <= most ? 4 : B <= most ? most / B : 1;
  const Pattern& p = a.plan->pattern();
  const Bits* bits = bits_of_row(*a.plan, 0);
  const int64_t stride = row_words(*a.plan), run = R * (kDenseRun / (p.cols + 1) / R + 1);
  const float* bias = static_cast<const float*>(a.bias);
  const RowValues values(p, static_cast<const float*>(a.values));
  Scratch<float> x(stride * kWidth * B);
  pack_few<B>(a.x, stride, x.get());
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
      few_outputs<B, R, ByTable>(bits + r * stride, stride, from, bytes_of_rows(p, r, R), x.get(),
                                 sums);
      put(r, R);
    }
    for (; r < end; r++) {
      const float* from = values(r);
      few_outputs<B, 1, ByTable>(bits + r * stride, stride, &from, 0, x.get(), sums);
      put(r, 1);
    }
  });
}

// Adds R rows' share to dx, packed as pack_few does. dy: each element in every lane.
template <int B, int R, bool ByTable>
ST_INLINE void few_grad_input(const Bits* bits, int64_t stride, const float* const* values,
                              uintptr_t ahead, const float (*dy)[B][kWidth], float* dx) {
  const float* from[R];
  ST_UNROLL
  for (int r = 0; r < R; r++) from[r] = values[r];
  for (int64_t c = 0; c < stride; c++, dx += kWidth * B) {
    Vec<float> weight[R];
    ST_UNROLL
    for (int r = 0; r < R; r++) {
      if (R > 1) prefetch_ahead(from[r], ahead);
      weight[r] = expand<ByTable>(bits[r * stride + c], &from[r]);
    }
    ST_UNROLL
    for (int b = 0; b < B; b++) {
      Vec<float> sum = load<float>(dx + kWidth * b);
      ST_UNROLL
      for (int r = 0; r < R; r++) sum += weight[r] * load<float>(dy[r][b]);
      store<float>(dx + kWidth * b, sum);
    }
  }
}

// A row of dvalues. Writes a vector at a time, but none from `end` on.
template <int B, bool ByTable>
ST_INLINE void few_grad_values(const Bits* bits, int64_t stride, const float (*dy)[kWidth],
                               const float* x, float* dvalues, const float* end) {
  Vec<float> factor[B];
  ST_UNROLL
  for (int b = 0; b < B; b++) factor[b] = load<float>(dy[b]);
  for (int64_t c = 0; c < stride; c++, x += kWidth * B) {
    Vec<float> sum = factor[0] * load<float>(x);
    ST_UNROLL
    for (int b = 1; b < B; b++) sum += factor[b] * load<float>(x + kWidth * b);
    if (dvalues + kWidth <= end) {
      dvalues += compress<ByTable>(bits[c], sum, dvalues);
    } else {
      float last[kWidth];
      const int count = compress<ByTable>(bits[c], sum, last);
      __builtin_memcpy(dvalues, last, sizeof(float) * count);
      dvalues += count;
    }
  }
}

// dy of one row in every lane, zero where there is no sample. Returns its sum.
template <int B>
ST_INLINE float spread_few(const Matrix& dy, int64_t r, float (*to)[kWidth]) {
  float sum = 0;
  for (int64_t b = 0; b < dy.rows; b++) {
    const float one = static_cast<const float*>(dy.data)[b * dy.row_stride + r];
    for (int i = 0; i < kWidth; i++) to[b][i] = one;
    sum += one;
  }
  return sum;
}

// The sums of `groups`, each packed as pack_few does and `size` long, to a contiguous matrix.
template <int B>
void unpack_sums(const float* sums, int64_t groups, int64_t size, int64_t rows, int64_t cols,
                 float* out) {
  constexpr int w = kWidth;
  for (int64_t b = 0; b < rows; b++, sums += w, out += cols) {
    auto sum = [&](int64_t c) {
      Vec<float> all = load<float>(sums + c * B);
      for (int64_t g = 1; g < groups; g++) all += load<float>(sums + c * B + g * size);
      return all;
    };
    int64_t c = 0;
    for (; c + w <= cols; c += w) storeu<float>(out + c, sum(c));
    if (c < cols) {
      float last[w];
      storeu<float>(last, sum(c));
      __builtin_memcpy(out + c, last, sizeof(float) * (cols - c));
    }
  }
}

template <int B, bool ByTable>
void few_grad_input(const LinearBackward& a) {
  constexpr int R = 4;
  const Pattern& p = a.plan->pattern();
  const Bits* bits = bits_of_row(*a.plan, 0);
  const int64_t stride = row_words(*a.plan), size = stride * kWidth * B;
  const RowValues values(p, static_cast<const float*>(a.values));
  const int64_t groups = least(kFewGroups, least(p.rows, p.rows * p.cols / kFewGroupWeights) + 1);
  Scratch<float> sums(size * groups);
  const int workers = worth_waking(a.parallel, p.rows * p.cols);
  share(a.parallel, workers, groups, [&](int, int64_t g) {
    float* dx = sums.get() + g * size;
    __builtin_memset(dx, 0, sizeof(float) * size);
    alignas(sizeof(Vec<float>)) float dy[R][B][kWidth] = {};
    const int64_t end = p.rows * (g + 1) / groups;
    const float* from[R];
    for (int64_t r = p.rows * g / groups; r < end; r += R) {
      const int n = static_cast<int>(least(R, end - r));
      for (int j = 0; j < n; j++) {
        from[j] = values(r + j);
        spread_few<B>(a.dy, r + j, dy[j]);
      }
      if (n == R) {
        few_grad_input<B, R, ByTable>(bits + r * stride, stride, from, bytes_of_rows(p, r, R), dy,
                                      dx);
      } else {
        for (int j = 0; j < n; j++)
          few_grad_input<B, 1, ByTable>(bits + (r + j) * stride, stride, from + j, 0, dy + j, dx);
      }
    }
  });
  unpack_sums<B>(sums.get(), groups, size, a.dy.rows, p.cols, static_cast<float*>(a.dx));
}

template <int B, bool ByTable>
void few_grad_values(const LinearBackward& a) {
  const Pattern& p = a.plan->pattern();
  const Bits* bits = bits_of_row(*a.plan, 0);
  const int64_t stride = row_words(*a.plan);
  float* dvalues = static_cast<float*>(a.dvalues);
  float* dbias = static_cast<float*>(a.dbias);
  Scratch<float> x(stride * kWidth * B);
  pack_few<B>(a.x, stride, x.get());
  for_rows(p, 0, p.rows, a.parallel, [&](int64_t r, int64_t end) {
    alignas(sizeof(Vec<float>)) float dy[B][kWidth] = {};
    const float sum = spread_few<B>(a.dy, r, dy);
    if (dbias) dbias[r] = sum;
    few_grad_values<B, ByTable>(bits + r * stride, stride, dy, x.get(), dvalues + p.crow[r],
                                dvalues + end);
  });
}

// Nanoseconds of a product: as here, for each weight (of whole vectors), for each weight and
// sample, and for each row and sample; by nonzeros, for each nonzero, and for each row and column
// of what the product is computed by. Only their ratios count.
struct FewCost {
  double weight, sample, sum;
  double nonzero, row, column;
  bool less(const Pattern& p, int64_t rows, int64_t cols, int64_t batch) const {
    if (batch <= 0 || batch > kFewSamples || !p.nnz) return false;
    const double weights = static_cast<double>(p.rows * ceil_div(p.cols, kWidth) * kWidth);
    const double samples = static_cast<double>(batch);
    const double by_nonzeros = nonzero * static_cast<double>(p.nnz) +
                               row * static_cast<double>(rows) + column * static_cast<double>(cols);
    return weights * (weight + sample * samples) + sum * samples * static_cast<double>(p.rows) <
           by_nonzeros;
  }
};
struct FewCosts {
  FewCost forward, grad_input, grad_values;
};
#if defined(ST_512_BITS)
// AMD family 25, model 17
constexpr FewCosts kByTables = {
    {0.095, 0.02, 0, 0.415, 28, 0}, {0.09, 0.0125, 0, 1.04, 10, 0}, {0.1, 0.022, 0, 0.74, 32, 0}};
// AMD family 26, model 2; family 25, model 17 chooses well by it too
constexpr FewCosts kByInstructions = {{0.0385, 0.0085, 2, 0.41, 5.9, 4.5},
                                      {0.05, 0.006, 1.6, 0.82, 6.2, 4.1},
                                      {0.055, 0.012, 2.4, 0.58, 6.6, 5.3}};
#else
// AMD family 25, model 1
constexpr FewCosts kByTables = {
    {0.115, 0.024, 0, 1.2, 17, 0}, {0.11, 0.024, 0, 2.2, 21, 0}, {0.155, 0.023, 0, 1.5, 15, 0}};
constexpr FewCosts kByInstructions = kByTables;
#endif
ST_INLINE const FewCosts& few_costs() { return expands_fast() ? kByInstructions : kByTables; }

// Each computes its product and returns true, if it is faster than by nonzeros.
inline bool few_forward(const LinearForward& a) {
  const Pattern& p = a.plan->pattern();
  if (!few_costs().forward.less(p, p.rows, p.cols, a.x.rows)) return false;
  with_samples(a.x.rows, [&](auto b, auto tables) {
    few_forward<decltype(b)::value, decltype(tables)::value>(a);
  });
  return true;
}
inline bool few_grad_values(const LinearBackward& a) {
  const Pattern& p = a.plan->pattern();
  if (!few_costs().grad_values.less(p, p.rows, p.cols, a.dy.rows)) return false;
  with_samples(a.dy.rows, [&](auto b, auto tables) {
    few_grad_values<decltype(b)::value, decltype(tables)::value>(a);
  });
  return true;
}
inline bool few_grad_input(const LinearBackward& a) {
  const Pattern& p = a.plan->pattern();
  if (!few_costs().grad_input.less(p, p.cols, p.rows, a.dy.rows)) return false;
  with_samples(a.dy.rows, [&](auto b, auto tables) {
    few_grad_input<decltype(b)::value, decltype(tables)::value>(a);
  });
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

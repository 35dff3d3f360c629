// The gradient of the input where a sample is a pixel (see conv_columns-inl.h): that of the
// unfolded input, a few channels at a time, and of each pixel the sum of what the kernel positions
// that see it have.
#pragma once

#include "conv_plan.h"
#include "linear-inl.h"
#include "pixel_runs-inl.h"

namespace sparsetrain {
namespace {

// to[i * step] += lane i of v, for n lanes; others are zero. Touches two vectors from `to` on.
template <int Step, class T>
ST_INLINE void add_pixels(Vec<T> v, int n, int64_t step, T* to) {
  constexpr int w = kLanes<T>;
  if constexpr (Step == 1) {
    storeu<T>(to, loadu<T>(to) + v);
  } else if constexpr (Step == 2) {
    storeu<T>(to, loadu<T>(to) + zip<T, 0>(v, Vec<T>{}));
    storeu<T>(to + w, loadu<T>(to + w) + zip<T, 1>(v, Vec<T>{}));
  } else {
    T lanes[w];
    storeu<T>(lanes, v);
    for (int i = 0; i < n; i++) to[i * step] += lanes[i];
  }
}

// Gradients of the unfolded input, a row of `stride` lanes for each feature, from feature `first`
// on.
template <class S>
struct ColumnsOut {
  Sum<S>* data;
  int64_t stride, first;

  Sum<S>* row(int64_t feature) const { return data + (feature - first) * stride; }

  // Results are made where they belong.
  Place<Sum<S>> place(const Tiling<Sum<S>>& tiling, int64_t t, int64_t r, int64_t, Sum<S>*) const {
    return {row(r) + tiling.first(t), stride};
  }
  template <int NV>
  void put(const Tiling<Sum<S>>&, int64_t, int64_t, int64_t, const Sum<S>*) const {}
};

// Sums of what the unfolded gradient has of each pixel, into dx.
template <class S>
class Fold {
 public:
  typedef Sum<S> T;
  Fold(const ConvShape& s, const Tiling<T>& tiling, const PixelRuns<T>& runs, S* dx)
      : s_(s),
        tiling_(tiling),
        runs_(runs),
        dx_(dx),
        plane_(s.in_size[0] * s.in_size[1]),
        taps_(s.kernel[0] * s.kernel[1]),
        shifted_(PixelRuns<T>::are_shifted(s.in_size, s.out_size, s.stride)),
        where_(shifted_ ? vectors() * taps_ : 0),
        shift_(shifted_ ? taps_ : 0) {
    for (int64_t tap = 0; shifted_ && tap < taps_; tap++) list_seen(tap);
  }

  // Channels [c0, c1), whose features `columns` have.
  void channels(const ColumnsOut<S>& columns, int64_t c0, int64_t c1,
                const Parallel& parallel) const {
    const int64_t room = room_of_sums();
    const int workers = worth_waking(parallel, (c1 - c0) * taps_ * columns.stride / 8);
    Scratch<T> sums(shifted_ ? 0 : room * workers);
    Scratch<const T*> rows(taps_ * workers);
    share(parallel, workers, c1 - c0, [&](int worker, int64_t i) {
      if (shifted_) return from_shifted(columns, c0 + i, rows.get() + worker * taps_);
      from_runs(columns, c0 + i, sums.get() + worker * room);
    });
  }

 private:
  static constexpr int64_t w = kLanes<T>;
  int64_t vectors() const { return ceil_div(plane_, w); }
  int64_t room_of_sums() const { return ceil_div(s_.batch * plane_, w) * w + 2 * w; }
  S* plane_of(int64_t n, int64_t c) const { return dx_ + (n * s_.in_channels + c) * plane_; }

  // Which pixels of each vector kernel position `tap` sees, and where from.
  void list_seen(int64_t tap) {
    Shift shift(s_.kernel, s_.padding, s_.dilation, tap);
    shift.i = -shift.i, shift.j = -shift.j;
    shift_.get()[tap] = shift.pixels(s_.in_size);
    for (int64_t v = 0; v < vectors(); v++) {
      uint32_t set = 0;
      for (int64_t p = v * w; p < least((v + 1) * w, plane_); p++)
        if (shift.inside(s_.in_size, p / s_.in_size[1], p % s_.in_size[1]))
          set |= 1u << (p - v * w);
      where_.get()[v * taps_ + tap] = set;
    }
  }
  // A pixel reads what the kernel positions have of it: sums stay in registers. rows: scratch
  void from_shifted(const ColumnsOut<S>& columns, int64_t c, const T** rows) const {
    if constexpr (LoadsWhere<T>::value) {
      for (int64_t tap = 0; tap < taps_; tap++)
        rows[tap] = columns.row(c * taps_ + tap) + shift_.get()[tap];
      for (int64_t n = 0; n < s_.batch; n++) {
        for (int64_t v = 0; v < vectors(); v++) {
          Vec<T> sum{};
          for (int64_t tap = 0; tap < taps_; tap++)
            sum += load_where(where_.get()[v * taps_ + tap], rows[tap] + n * plane_ + v * w);
          store_narrowed<S>(plane_of(n, c) + v * w, sum,
                            static_cast<int>(least(w, plane_ - v * w)));
        }
      }
    }
  }
  void from_runs(const ColumnsOut<S>& columns, int64_t c, T* sums) const {
    __builtin_memset(sums, 0, sizeof(T) * room_of_sums());
    with_step(runs_.step, [&](auto step) { add_taps(step, columns, c, sums); });
    for (int64_t n = 0; n < s_.batch; n++)
      for (int64_t p = 0; p < plane_; p += w)
        store_narrowed<S>(plane_of(n, c) + p, loadu<T>(sums + n * plane_ + p),
                          static_cast<int>(least(w, plane_ - p)));
  }
  template <class Step>
  void add_taps(Step, const ColumnsOut<S>& columns, int64_t c, T* sums) const {
    for (int64_t tap = 0; tap < taps_; tap++) {
      const T* row = columns.row(c * taps_ + tap);
      for (int64_t t = 0; t < tiling_.count; t++)
        runs_.each(t, tap, [&](const PixelRun& run) {
          const T* from = row + tiling_.first(t) + run.lane;
          const Vec<T> v = run.count == w ? loadu<T>(from) : load_widened_some(from, run.count);
          add_pixels<Step::value>(v, run.count, runs_.step, sums + run.image * plane_ + run.pixel);
        });
    }
  }

  const ConvShape& s_;
  const Tiling<T>& tiling_;
  const PixelRuns<T>& runs_;
  S* dx_;
  const int64_t plane_, taps_;
  const bool shifted_;
  Scratch<uint32_t> where_;
  Scratch<int64_t> shift_;
};

// Rows of the unfolded input's gradient that are made before they are folded: as many as stay in
// L2, but whole units.
ST_INLINE int64_t rows_at_once(const Side& side, int64_t row_bytes) {
  const int64_t units = cache_bytes(2) / 2 / row_bytes / side.sweeps.unit;
  return least(side.rows, most(1, units) * side.sweeps.unit);
}
// Lanes from one row to the next: an odd number of cache lines, so that a column of tiles spreads
// over L1's sets.
template <class T>
int64_t row_stride(const Tiling<T>& tiling) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(tiling.count * tiling.lanes, line) | 1) * line;
}

// dx = fold(dy side^T), side being the transposed one.
template <class S>
void fold_product(const ConvShape& s, const Side& side, const Tiling<Sum<S>>& tiling,
                  const Sum<S>* values, const PackedTiles<S>& dy, const PixelRuns<Sum<S>>& runs,
                  S* dx, const Parallel& parallel) {
  typedef Sum<S> T;
  const int64_t stride = row_stride(tiling), unit = side.sweeps.unit, before = runs.taps - 1;
  const int64_t together = rows_at_once(side, stride * static_cast<int64_t>(sizeof(T)));
  const int workers = worth_waking(parallel, (side.nnz + side.rows) * tiling.batch);
  const int64_t step = shared_evenly(tiling.count, workers) ? together : unit;
  Scratch<T> rows((before + together) * stride);
  T* const begin = rows.get() + before * stride;
  const Fold<S> fold(s, tiling, runs, dx);
  for (int64_t r0 = 0, folded = 0; r0 < side.rows; r0 += together) {
    const int64_t r1 = least(r0 + together, side.rows), parts = ceil_div(r1 - r0, step);
    const ColumnsOut<S> columns{begin, stride, r0};
    const Product<S, ColumnsOut<S>> product{side, tiling, values, nullptr, columns};
    share(parallel, workers, tiling.count * parts, [&](int, int64_t i) {
      const int64_t t = i / parts, r = r0 + i % parts * step;
      product.rows(t, dy.tile(tiling, t), r, least(r + step, r1), nullptr);
    });
    fold.channels(columns, folded, r1 / runs.taps, parallel);
    folded = r1 / runs.taps;
    // The next channel may begin with the last rows of these.
    for (int64_t r = folded * runs.taps; r < r1; r++)
      __builtin_memcpy(columns.row(r - together), columns.row(r), sizeof(T) * stride);
  }
}

}  // namespace
}  // namespace sparsetrain

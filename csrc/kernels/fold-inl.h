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
  Fold(const ConvShape& s, const Tiling<T>& tiling, const PixelRuns<T>& runs, S* dx, int workers)
      : s_(s),
        tiling_(tiling),
        runs_(runs),
        dx_(dx),
        plane_(s.in_size[0] * s.in_size[1]),
        taps_(s.kernel[0] * s.kernel[1]),
        shifted_(PixelRuns<T>::are_shifted(s.in_size, s.out_size, s.stride)),
        where_(shifted_ ? vectors() * taps_ : 0),
        shift_(shifted_ ? taps_ : 0),
        sums_(shifted_ ? 0 : room_of_sums() * workers),
        rows_(taps_ * workers) {
    for (int64_t tap = 0; shifted_ && tap < taps_; tap++) list_seen(tap);
  }

  // Channel c, all of whose features `columns` have.
  void channel(const ColumnsOut<S>& columns, int64_t c, int worker) const {
    if (shifted_) return from_shifted(columns, c, rows_.get() + worker * taps_);
    from_runs(columns, c, sums_.get() + worker * room_of_sums());
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
  Scratch<T> sums_;         // room_of_sums() for each worker
  Scratch<const T*> rows_;  // taps for each worker
};

// Rows of the unfolded input's gradient that a worker makes before it folds them: as many as stay
// in L2, but whole units, and no more than leave work for the others.
ST_INLINE int64_t rows_at_once(const Side& side, int64_t row_bytes, int workers) {
  const int64_t unit = side.sweeps.unit;
  const int64_t most_units = most(1, cache_bytes(2) / 2 / row_bytes / unit);
  const int64_t groups = ceil_div(ceil_div(side.rows, most_units * unit), workers) * workers;
  return ceil_div(side.rows, groups * unit) * unit;
}
// Lanes from one row to the next: an odd number of cache lines, so that a column of tiles spreads
// over L1's sets.
template <class T>
int64_t row_stride(const Tiling<T>& tiling) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(tiling.count * tiling.lanes, line) | 1) * line;
}

// dx = fold(dy side^T), side being the transposed one. Workers take groups of rows, and fold the
// channels that these have whole; the rows of a channel that a group's end cuts are kept, and the
// few such channels folded last.
template <class S>
class FoldProduct {
 public:
  typedef Sum<S> T;
  FoldProduct(const ConvShape& s, const Side& side, const Tiling<T>& tiling,
              const PixelRuns<T>& runs, S* dx, const Parallel& parallel)
      : side_(side),
        tiling_(tiling),
        parallel_(parallel),
        taps_(runs.taps),
        stride_(row_stride(tiling)),
        workers_(workers_for(parallel, side, tiling)),
        together_(rows_at_once(side, stride_ * static_cast<int64_t>(sizeof(T)), workers_)),
        groups_(ceil_div(side.rows, together_)),
        cut_(groups_ * taps_ * stride_),
        fold_(s, tiling, runs, dx, workers_) {}

  void run(const T* values, const PackedTiles<S>& dy) const {
    Scratch<T> rows(together_ * stride_ * workers_);
    share(parallel_, workers_, groups_, [&](int worker, int64_t g) {
      group(g, values, dy, rows.get() + worker * together_ * stride_, worker);
    });
    share(parallel_, workers_, groups_ - 1, [&](int worker, int64_t g) {
      const int64_t c = (g + 1) * together_ / taps_;
      if (group_of(c) == g && c * taps_ < (g + 1) * together_)
        fold_.channel(rows_of_cut(c), c, worker);
    });
  }

 private:
  // The group with the channel's first row.
  int64_t group_of(int64_t channel) const { return channel * taps_ / together_; }
  ColumnsOut<S> rows_of_cut(int64_t channel) const {
    return {cut_.get() + group_of(channel) * taps_ * stride_, stride_, channel * taps_};
  }
  void group(int64_t g, const T* values, const PackedTiles<S>& dy, T* rows, int worker) const {
    const int64_t r0 = g * together_, r1 = least(r0 + together_, side_.rows);
    const ColumnsOut<S> columns{rows, stride_, r0};
    const Product<S, ColumnsOut<S>> product{side_, tiling_, values, nullptr, columns};
    for (int64_t t = 0; t < tiling_.count; t++)
      product.rows(t, dy.tile(tiling_, t), r0, r1, nullptr);
    const int64_t c0 = ceil_div(r0, taps_), c1 = most(c0, r1 / taps_);
    for (int64_t c = c0; c < c1; c++) fold_.channel(columns, c, worker);
    keep(columns, r0, least(c0 * taps_, r1));
    keep(columns, c1 * taps_, r1);
  }
  // Of rows [begin, end), which belong to one channel.
  void keep(const ColumnsOut<S>& columns, int64_t begin, int64_t end) const {
    if (begin >= end) return;
    const ColumnsOut<S> to = rows_of_cut(begin / taps_);
    for (int64_t r = begin; r < end; r++)
      __builtin_memcpy(to.row(r), columns.row(r), sizeof(T) * tiling_.count * tiling_.lanes);
  }

  const Side& side_;
  const Tiling<T>& tiling_;
  const Parallel& parallel_;
  const int64_t taps_, stride_;
  const int workers_;
  const int64_t together_, groups_;
  Scratch<T> cut_;  // rows of a channel that begins in a group and does not end there
  const Fold<S> fold_;
};

}  // namespace
}  // namespace sparsetrain

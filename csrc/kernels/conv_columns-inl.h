// Convolutions of few pixels as the linear layer of the unfolded input: a sample is a pixel of the
// result, of any image, and a feature what one kernel position sees of one channel. Lanes are
// filled whatever the size of the image (7 x 7: 49 of 64, where rows of pixels fill 7 of 16), and
// values and their gradient stay in the order of the pattern. What is packed is as many times
// larger than the input as the kernel has positions, so that pixels must be few for the nonzeros.
#pragma once

#include "conv_plan.h"
#include "linear-inl.h"
#include "planes-inl.h"

namespace sparsetrain {
namespace {

// Pixels of one image that one vector's lanes (or some of them) read or write, `step` apart.
struct PixelRun {
  int32_t lane, count;  // lanes [lane, lane + count) of a tile, at most a vector
  int32_t image, pixel;
};
// The same where the result is as wide as the input and the stride is 1: what a kernel position
// sees of pixels side by side lies side by side too, but for what is outside the image. Lane
// lane + i of a tile sees pixel + i of an image, for each bit i of `where`.
struct ShiftedRun {
  int32_t lane, image, pixel;
  bool first;  // of its vector
  uint32_t where;
};

// Where a kernel position sees a pixel, from the pixel of the result (times the stride).
struct Shift {
  int64_t i, j;
  Shift(const int64_t* kernel, const int64_t* padding, const int64_t* dilation, int64_t tap)
      : i(tap / kernel[1] * dilation[0] - padding[0]),
        j(tap % kernel[1] * dilation[1] - padding[1]) {}
  // Whether that is inside a plane of this size, with stride 1.
  bool inside(const int64_t* size, int64_t y, int64_t x) const {
    return y + i >= 0 && y + i < size[0] && x + j >= 0 && x + j < size[1];
  }
  int64_t pixels(const int64_t* size) const { return i * size[1] + j; }
};

// Which pixel of a channel's planes each lane of a tile sees at each kernel position. Lanes that
// see none are in no run.
template <class T>
class PixelRuns {
 public:
  // `size`: of the planes; `grid`: of the pixels that are lanes; `masked`: shifted runs, if they
  // do.
  PixelRuns(const Tiling<T>& tiling, const int64_t* size, const int64_t* grid,
            const int64_t* kernel, const int64_t* stride, const int64_t* padding,
            const int64_t* dilation, bool masked)
      : taps(kernel[0] * kernel[1]),
        step(stride[1]),
        shifted(masked && are_shifted(size, grid, stride)),
        runs_(shifted
                  ? 0
                  : taps * (tiling.count + ceil_div(tiling.batch, grid[1]) * most_of_row(grid[1]))),
        shifted_runs_(shifted ? taps * 2 * (tiling.count + ceil_div(tiling.batch, w)) : 0),
        begin_(taps * tiling.count + 1) {
    int64_t n = 0;
    for (int64_t t = 0; t < tiling.count; t++) {
      for (int64_t tap = 0; tap < taps; tap++) {
        begin_.get()[t * taps + tap] = static_cast<int32_t>(n);
        const Shift shift(kernel, padding, dilation, tap);
        n += shifted ? list_shifted(tiling.first(t), tiling.samples(t), size, shift,
                                    shifted_runs_.get() + n)
                     : list(tiling.first(t), tiling.samples(t), size, grid, stride, shift.i,
                            shift.j, runs_.get() + n);
      }
    }
    begin_.get()[taps * tiling.count] = static_cast<int32_t>(n);
  }
  const int64_t taps, step;
  const bool shifted;

  // Shifted runs need a vector of pixels in each image, so that two make one at most.
  static bool are_shifted(const int64_t* size, const int64_t* grid, const int64_t* stride) {
    return LoadsWhere<T>::value && stride[0] == 1 && stride[1] == 1 && size[0] == grid[0] &&
           size[1] == grid[1] && size[0] * size[1] >= w;
  }
  // f(run) for what tile t sees at kernel position `tap`, in ascending order of lanes.
  template <class F>
  ST_INLINE void each(int64_t t, int64_t tap, const F& f) const {
    const int32_t* begin = begin_.get() + t * taps + tap;
    for (int32_t i = begin[0]; i < begin[1]; i++) f(runs_.get()[i]);
  }
  // The same of shifted runs, of which each vector with a pixel has one.
  template <class F>
  ST_INLINE void each_shifted(int64_t t, int64_t tap, const F& f) const {
    const int32_t* begin = begin_.get() + t * taps + tap;
    for (int32_t i = begin[0]; i < begin[1]; i++) f(shifted_runs_.get()[i]);
  }

 private:
  static constexpr int64_t w = kLanes<T>;
  static int64_t most_of_row(int64_t width) { return ceil_div(width, w) + 1; }

  // Lanes are pixels first, first + 1, ... of the grids of all images; pixel (y, x) sees
  // (y * stride + i, x * stride + j).
  static int64_t list(int64_t first, int64_t count, const int64_t* size, const int64_t* grid,
                      const int64_t* stride, int64_t i, int64_t j, PixelRun* out) {
    const int64_t x_begin = j < 0 ? ceil_div(-j, stride[1]) : 0;
    const int64_t x_end = j < size[1] ? least(ceil_div(size[1] - j, stride[1]), grid[1]) : 0;
    const PixelRun* begin = out;
    const PixelRun* last = nullptr;
    for (int64_t at = first; at < first + count;) {
      const int64_t x = at % grid[1], row = at / grid[1],
                    end = least(grid[1], x + first + count - at);
      const int64_t y = row % grid[0] * stride[0] + i;
      const int64_t lane = at - first - x, image = row / grid[0];
      at += end - x;
      if (y < 0 || y >= size[0]) continue;
      for (int64_t from = most(x, x_begin); from < least(end, x_end);) {
        const int64_t pixel = y * size[1] + from * stride[1] + j;
        const int64_t left = least(end, x_end) - from;
        int64_t n = least(left, w);
        // Rows that follow each other fill vectors together.
        const bool follows = last && stride[1] == 1 && last->image == image && last->count < w &&
                             last->lane + last->count == lane + from &&
                             last->pixel + last->count == pixel;
        if (follows) {
          n = least(left, w - last->count);
          out[-1].count += static_cast<int32_t>(n);
        } else {
          *out = {static_cast<int32_t>(lane + from), static_cast<int32_t>(n),
                  static_cast<int32_t>(image), static_cast<int32_t>(pixel)};
          last = out++;
        }
        from += n;
      }
    }
    return out - begin;
  }

  // Lanes are pixels first, first + 1, ... of the planes of all images.
  static int64_t list_shifted(int64_t first, int64_t count, const int64_t* size, const Shift& shift,
                              ShiftedRun* out) {
    const int64_t plane = size[0] * size[1];
    const ShiftedRun* begin = out;
    for (int64_t lane = 0; lane < count; lane += w) {
      for (int64_t l = 0; l < least(w, count - lane);) {  // each image of this vector
        const int64_t at = first + lane + l, image = at / plane, pixel = at % plane;
        const int64_t n = least(least(w, count - lane) - l, plane - pixel);
        uint32_t where = 0;
        for (int64_t i = 0; i < n; i++)
          if (shift.inside(size, (pixel + i) / size[1], (pixel + i) % size[1]))
            where |= 1u << (l + i);
        *out++ = {static_cast<int32_t>(lane), static_cast<int32_t>(image),
                  static_cast<int32_t>(pixel - l + shift.pixels(size)), l == 0, where};
        l += n;
      }
    }
    return out - begin;
  }

  Scratch<PixelRun> runs_;
  Scratch<ShiftedRun> shifted_runs_;
  Scratch<int32_t> begin_;
};

// f(step) with the distance of pixels as a constant, where it is one that vectors know; else 0.
template <class F>
ST_INLINE void with_step(int64_t step, const F& f) {
  if (step == 1) return f(std::integral_constant<int, 1>{});
  if (step == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 0>{});
}

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

// A contiguous (batch, channels, size) tensor as samples of channels * taps features.
template <class S>
struct Columns {
  const S* data;
  int64_t channels, plane;
  const PixelRuns<Sum<S>>& runs;
};

// A column of tile t by shifted runs. planes: of its channel.
template <class S>
ST_INLINE void pack_shifted(const Columns<S>& x, const S* planes, int64_t t, int64_t tap,
                            int64_t width, Sum<S>* row) {
  if constexpr (LoadsWhere<S>::value) {
    constexpr int64_t w = kLanes<S>;
    int64_t written = 0;
    x.runs.each_shifted(t, tap, [&](const ShiftedRun& run) {
      Vec<S> v = load_where(run.where, planes + run.image * x.channels * x.plane + run.pixel);
      if (!run.first) v += load<S>(row + run.lane);
      store<S>(row + run.lane, v);
      written = run.lane + w;
    });
    for (; written < width; written += w) store<S>(row + written, Vec<S>{});
  }
}

// Columns [c0, c1) of tile t: the `pack` that linear-inl.h asks for.
template <class S>
void pack(const Tiling<Sum<S>>& tiling, const Columns<S>& x, int64_t t, int64_t c0, int64_t c1,
          Sum<S>* tile) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  const int64_t width = tile_lanes<T>(tiling.vectors(t)), taps = x.runs.taps;
  with_step(x.runs.step, [&](auto step) {
    T* row = tile + c0 * width;
    for (int64_t c = c0, channel = c0 / taps, tap = c0 % taps; c < c1; c++, row += width) {
      const S* planes = x.data + channel * x.plane;
      if (x.runs.shifted) {
        pack_shifted(x, planes, t, tap, width, row);
        if (++tap == taps) tap = 0, channel++;
        continue;
      }
      for (int64_t i = 0; i < width; i += w) store<T>(row + i, Vec<T>{});
      x.runs.each(t, tap, [&](const PixelRun& run) {
        const Vec<T> v = load_pixels<decltype(step)::value>(
            planes + run.image * x.channels * x.plane + run.pixel, run.count, x.runs.step);
        // Zeros behind, where later runs come; but not beyond the row.
        const int64_t room = width - run.lane;
        store_narrowed<T>(row + run.lane, v, room < w ? static_cast<int>(room) : w);
      });
      if (++tap == taps) tap = 0, channel++;
    }
  });
}

// Results as planes: a contiguous (batch, channels, size) tensor whose pixels are the samples.
template <class S>
struct PlanesOut {
  S* data;
  int64_t channels, plane;

  template <int NV>
  void put(const Tiling<Sum<S>>& tiling, int64_t t, int64_t r0, int64_t r1,
           const Sum<S>* chunk) const {
    typedef Sum<S> T;
    constexpr int64_t w = kLanes<T>;
    const int64_t first = tiling.first(t), end = first + tiling.samples(t);
    for (int64_t at = first, next; at < end; at = next) {  // each image
      next = least(end, (at / plane + 1) * plane);
      const T* from = chunk + (at - first);
      S* to = data + (at / plane * channels + r0) * plane + at % plane;
      for (int64_t r = r0; r < r1; r++, from += NV * w, to += plane) {
        for (int64_t i = 0; i < next - at; i += w)
          store_narrowed<S>(to + i, loadu<T>(from + i), static_cast<int>(least(w, next - at - i)));
      }
    }
  }
};

// Gradients of the unfolded input, a row of `lanes` lanes for each feature.
template <class S>
struct ColumnsOut {
  Sum<S>* data;
  int64_t lanes;

  template <int NV>
  void put(const Tiling<Sum<S>>& tiling, int64_t t, int64_t r0, int64_t r1,
           const Sum<S>* chunk) const {
    typedef Sum<S> T;
    constexpr int w = kLanes<T>;
    const int64_t vectors = tiling.vectors(t);
    T* to = data + r0 * lanes + tiling.first(t);
    for (int64_t r = r0; r < r1; r++, chunk += NV * w, to += lanes)
      for (int64_t i = 0; i < vectors * w; i += w) store<T>(to + i, load<T>(chunk + i));
  }

  // Each pixel of dx becomes the sum of what the kernel positions that see it have.
  void fold(const ConvShape& s, const Tiling<Sum<S>>& tiling, const PixelRuns<Sum<S>>& runs, S* dx,
            const Parallel& parallel) const {
    if (PixelRuns<Sum<S>>::are_shifted(s.in_size, s.out_size, s.stride)) {
      fold_shifted(s, dx, parallel);
    } else {
      fold_runs(s, tiling, runs, dx, parallel);
    }
  }

 private:
  // A pixel reads what the kernel positions have of it: sums stay in registers.
  void fold_shifted(const ConvShape& s, S* dx, const Parallel& parallel) const {
    typedef Sum<S> T;
    if constexpr (LoadsWhere<T>::value) {
      constexpr int64_t w = kLanes<T>;
      const int64_t taps = s.kernel[0] * s.kernel[1], plane = s.in_size[0] * s.in_size[1];
      const int64_t vectors = ceil_div(plane, w);
      Scratch<uint32_t> where(vectors * taps);
      Scratch<int64_t> from(taps);
      for (int64_t tap = 0; tap < taps; tap++) {
        Shift shift(s.kernel, s.padding, s.dilation, tap);
        shift.i = -shift.i, shift.j = -shift.j;
        from.get()[tap] = tap * lanes + shift.pixels(s.in_size);
        for (int64_t v = 0; v < vectors; v++) {
          uint32_t set = 0;
          for (int64_t p = v * w; p < least((v + 1) * w, plane); p++)
            if (shift.inside(s.in_size, p / s.in_size[1], p % s.in_size[1]))
              set |= 1u << (p - v * w);
          where.get()[v * taps + tap] = set;
        }
      }
      const int workers = worth_waking(parallel, s.in_channels * taps * lanes / 8);
      share(parallel, workers, s.in_channels, [&](int, int64_t c) {
        for (int64_t n = 0; n < s.batch; n++) {
          for (int64_t v = 0; v < vectors; v++) {
            const T* rows = data + c * taps * lanes + n * plane + v * w;
            Vec<T> sum{};
            for (int64_t tap = 0; tap < taps; tap++)
              sum += load_where(where.get()[v * taps + tap], rows + from.get()[tap]);
            store_narrowed<S>(dx + (n * s.in_channels + c) * plane + v * w, sum,
                              static_cast<int>(least(w, plane - v * w)));
          }
        }
      });
    }
  }
  void fold_runs(const ConvShape& s, const Tiling<Sum<S>>& tiling, const PixelRuns<Sum<S>>& runs,
                 S* dx, const Parallel& parallel) const {
    typedef Sum<S> T;
    constexpr int64_t w = kLanes<T>, channels = 8;
    const int64_t plane = s.in_size[0] * s.in_size[1], room = round_up(s.batch * plane) + 2 * w;
    const int workers = worth_waking(parallel, s.in_channels * runs.taps * lanes / 8);
    Scratch<T> sums(room * workers);
    share(parallel, workers, ceil_div(s.in_channels, channels), [&](int worker, int64_t i) {
      T* own = sums.get() + worker * room;
      for (int64_t c = i * channels; c < least((i + 1) * channels, s.in_channels); c++) {
        __builtin_memset(own, 0, sizeof(T) * room);
        with_step(runs.step, [&](auto step) { add_taps(step, c, plane, tiling, runs, own); });
        for (int64_t n = 0; n < s.batch; n++)
          for (int64_t p = 0; p < plane; p += w)
            store_narrowed<S>(dx + (n * s.in_channels + c) * plane + p,
                              loadu<T>(own + n * plane + p), static_cast<int>(least(w, plane - p)));
      }
    });
  }

  static int64_t round_up(int64_t n) { return ceil_div(n, kLanes<Sum<S>>) * kLanes<Sum<S>>; }

  template <class Step>
  void add_taps(Step, int64_t channel, int64_t plane, const Tiling<Sum<S>>& tiling,
                const PixelRuns<Sum<S>>& runs, Sum<S>* sums) const {
    typedef Sum<S> T;
    const T* row = data + channel * runs.taps * lanes;
    for (int64_t tap = 0; tap < runs.taps; tap++, row += lanes)
      for (int64_t t = 0; t < tiling.count; t++)
        runs.each(t, tap, [&](const PixelRun& run) {
          const T* from = row + tiling.first(t) + run.lane;
          const Vec<T> v =
              run.count == kLanes<T> ? loadu<T>(from) : load_widened_some(from, run.count);
          add_pixels<Step::value>(v, run.count, runs.step, sums + run.image * plane + run.pixel);
        });
  }
};

// masked: whether to list shifted runs, if there are such.
template <class T>
PixelRuns<T> seen_pixels(const ConvShape& s, const Tiling<T>& tiling, bool masked) {
  return PixelRuns<T>(tiling, s.in_size, s.out_size, s.kernel, s.stride, s.padding, s.dilation,
                      masked);
}
// Of dy: every pixel is a sample.
template <class T>
PixelRuns<T> own_pixels(const ConvShape& s, const Tiling<T>& tiling, bool masked) {
  constexpr int64_t one[2] = {1, 1}, none[2] = {0, 0};
  return PixelRuns<T>(tiling, s.out_size, s.out_size, one, one, none, one, masked);
}
ST_INLINE int64_t pixels_of(const ConvShape& s) { return s.batch * s.out_size[0] * s.out_size[1]; }

template <class S>
void columns_forward(const ConvForward& a) {
  typedef Sum<S> T;
  const ConvShape& s = a.shape;
  const Side& side = a.plan->forward(kTiles);
  const Tiling<T> tiling(pixels_of(s), side.wide);
  const Widened<S> values(a.values, side.nnz), bias(a.bias, side.rows);
  const PixelRuns<T> runs = seen_pixels(s, tiling, LoadsWhere<S>::value);
  const Columns<S> x{static_cast<const S*>(a.x), s.in_channels, s.in_size[0] * s.in_size[1], runs};
  const PlanesOut<S> y{static_cast<S*>(a.y), s.out_channels, s.out_size[0] * s.out_size[1]};
  spmm(Product<S, PlanesOut<S>>{side, tiling, values.get(), bias.get(), y}, x, a.parallel);
}

// dbias only together with dvalues.
template <class S>
void columns_backward(const ConvBackward& a) {
  typedef Sum<S> T;
  const ConvShape& s = a.shape;
  const Side& side = a.plan->forward(kTiles);
  const Tiling<T> tiling(pixels_of(s), side.wide);
  constexpr bool masked = LoadsWhere<S>::value;
  const PixelRuns<T> runs = seen_pixels(s, tiling, masked), own = own_pixels(s, tiling, masked);
  const Columns<S> x{static_cast<const S*>(a.x), s.in_channels, s.in_size[0] * s.in_size[1], runs};
  const Columns<S> dy{static_cast<const S*>(a.dy), s.out_channels, s.out_size[0] * s.out_size[1],
                      own};
  const int64_t lanes = tiling.count * tiling.lanes;
  Scratch<T> columns(a.dx ? side.cols * lanes : 0);
  const ColumnsOut<S> dx{columns.get(), lanes};
  gradients<S>(a, tiling, dy, x, dx);
  if (a.dx) dx.fold(s, tiling, runs, static_cast<S*>(a.dx), a.parallel);
}

}  // namespace
}  // namespace sparsetrain

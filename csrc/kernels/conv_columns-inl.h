// Convolutions as the linear layer of the unfolded input: a sample is a pixel of the result, of any
// image, and a feature what one kernel position sees of one channel. Lanes are filled whatever the
// size of the image (28 x 28: 49 whole vectors of 16, where rows of pixels fill 28 of 32 lanes; 7 x
// 7: 49 of 64, where they fill 7 of 16), and values and their gradient stay in the order of the
// pattern. Each pixel is moved once for each kernel position, which takes enough nonzeros to pay:
// samples_are_pixels.
#pragma once

#include "conv_plan.h"
#include "fold-inl.h"
#include "linear-inl.h"
#include "pixel_runs-inl.h"
#include "planes-inl.h"

namespace sparsetrain {
namespace {

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

  Place<Sum<S>> place(const Tiling<Sum<S>>&, int64_t, int64_t, int64_t width, Sum<S>* chunk) const {
    return {chunk, width};
  }
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
  const ForwardValues<S> values(a.values, side, tiling, a.parallel);
  const Widened<S> bias(a.bias, side.rows);
  const PixelRuns<T> runs = seen_pixels(s, tiling, LoadsWhere<S>::value);
  const Columns<S> x{static_cast<const S*>(a.x), s.in_channels, s.in_size[0] * s.in_size[1], runs};
  const PlanesOut<S> y{static_cast<S*>(a.y), s.out_channels, s.out_size[0] * s.out_size[1]};
  const Product<S, PlanesOut<S>> product{side,       tiling, values.get(),
                                         bias.get(), y,      values.in_order()};
  spmm(product, x, a.parallel);
}

// All tiles of dy.
template <class S>
void pack_all(const Tiling<Sum<S>>& tiling, const Columns<S>& dy, Sum<S>* tiles,
              const Parallel& parallel) {
  constexpr int64_t channels = 16;
  const int64_t parts = ceil_div(dy.channels, channels);
  const int workers = worth_waking(parallel, dy.channels * tiling.batch / 8);
  share(parallel, workers, tiling.count * parts, [&](int, int64_t i) {
    const int64_t t = i / parts, c = i % parts * channels;
    pack<S>(tiling, dy, t, c, least(c + channels, dy.channels),
            tiles + dy.channels * tiling.first(t));
  });
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
  const Product<S>* none = nullptr;
  auto take_dvalues = [&](const auto& dy) {
    grad_values(side, tiling, none, dy, x, static_cast<S*>(a.dvalues), static_cast<S*>(a.dbias),
                a.parallel);
  };
  if (!a.dx) return take_dvalues(dy);
  Scratch<T> tiles(s.out_channels * tiling.count * tiling.lanes);
  pack_all(tiling, dy, tiles.get(), a.parallel);
  const PackedTiles<S> packed{tiles.get(), s.out_channels};
  {
    const Side& transposed = a.plan->transposed(kTiles);
    Scratch<T> values(side.nnz);
    values_to_transposed(*a.plan, transposed, static_cast<const S*>(a.values), values.get(),
                         a.parallel);
    FoldProduct<S>(s, transposed, tiling, runs, static_cast<S*>(a.dx), a.parallel)
        .run(values.get(), packed);
  }
  if (a.dvalues) take_dvalues(packed);
}

}  // namespace
}  // namespace sparsetrain

// Which pixels the lanes of a tile see, where a sample is a pixel (see conv_columns-inl.h).
#pragma once

#include "conv_plan.h"
#include "linear-inl.h"

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

}  // namespace
}  // namespace sparsetrain

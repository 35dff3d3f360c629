// Planes of a convolution into the copies that its strips of pixels read, and results back (see
// conv_plan.h).
#pragma once

#include "conv_plan.h"
#include "linear-inl.h"
#include "read_ahead-inl.h"

namespace sparsetrain {
namespace {

// A contiguous (batch, channels, size) tensor, seen as planes of every step-th row and column.
template <class S>
struct Planes {
  const S* data;
  int64_t batch, channels;
  const int64_t* size;
  const int64_t* step;
};

// n <= a vector's elements, `step` apart, widened; zeros behind them.
template <int Step, class S>
ST_INLINE Vec<Sum<S>> load_pixels(const S* from, int n, int64_t step) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  if constexpr (Step == 1) {
    return n == w ? load_widened(from) : load_widened_some(from, n);
  } else if constexpr (Step == 2) {
    const int all = 2 * n - 1;  // what lies beyond is not ours
    const Vec<T> a = all >= w ? load_widened(from) : load_widened_some(from, all);
    return evens<T>(a, all > w ? load_widened_some(from + w, all - w) : Vec<T>{});
  } else {
    T lanes[w];
    ST_UNROLL
    for (int i = 0; i < w; i++) lanes[i] = i < n ? widen(from[i * step]) : 0;
    return loadu<T>(lanes);
  }
}

// n elements, step apart, widened, then zeros up to the next whole vector.
template <class S>
ST_INLINE void copy_row(const S* from, int64_t step, int64_t n, Sum<S>* to) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  int64_t i = 0;
  if (step == 1) {
    for (; i + w <= n; i += w) storeu<T>(to + i, load_widened(from + i));
    if (i < n) storeu<T>(to + i, load_widened_some(from + i, static_cast<int>(n - i)));
    return;
  }
  if (step == 2) {
    for (; i + w < n; i += w)
      storeu<T>(to + i, evens<T>(load_widened(from + 2 * i), load_widened(from + 2 * i + w)));
    if (i < n) storeu<T>(to + i, load_pixels<2>(from + 2 * i, static_cast<int>(n - i), step));
    return;
  }
  for (; i < n; i += w) {
    const int left = static_cast<int>(n - i < w ? n - i : w);
    storeu<T>(to + i, load_pixels<0>(from + i * step, left, step));
  }
}
// Zeros from `from` on, up to a vector beyond `to`.
template <class T>
ST_INLINE void zero_lanes(T* from, T* to) {
  for (; from < to; from += kLanes<T>) storeu<T>(from, Vec<T>{});
}

// Lanes [from, to) of one plane, moved by `shift` columns: `channel` of the images of `group`, in
// phase `phase`. Lanes that are no pixel become zero. Rows (and `from`) may lie outside the plane.
// Writes up to a vector too far: copies keep that much apart.
template <class S>
void fill_lanes(const ConvSide& s, const Planes<S>& p, int64_t channel, const int64_t* phase,
                int64_t shift, int64_t group, int64_t from, int64_t to, Sum<S>* out) {
  const int64_t plane = p.size[0] * p.size[1];
  auto count = [&](int d) { return ceil_div(p.size[d] - phase[d], p.step[d]); };
  auto pixel = [&](int64_t n, int64_t y, int64_t x) {
    return p.data + (n * p.channels + channel) * plane + (y * p.step[0] + phase[0]) * p.size[1] +
           x * p.step[1] + phase[1];
  };
  // Everything in ascending order: the last vector of a run may reach into the next one's place.
  Sum<S>* end = out + (to - from);
  if (s.flat) {
    int64_t n = from / s.pitch, y = from % s.pitch / s.grid[1], x = from % s.grid[1];
    for (int64_t at = from; at < to; y++, x = 0) {
      if (y == s.grid[0]) n++, y = 0;
      if (n >= p.batch) return zero_lanes(out + at - from, end);
      const int64_t run = least(to - at, s.grid[1] - x);
      copy_row(pixel(n, y, x), p.step[1], run, out + at - from);
      at += run;
    }
    return;
  }
  const int64_t rows = count(0), images = least(s.images, p.batch - group * s.images);
  const int64_t first = least(shift < 0 ? -shift : 0, s.grid[1]);  // lanes with a pixel
  const int64_t last = least(count(1) - shift, s.grid[1]);
  constexpr int64_t w = kLanes<Sum<S>>;
  const int64_t covered = first + ceil_div(last - first, w) * w;  // what copy_row writes
  int64_t y = from / s.pitch - (from < 0 && from % s.pitch ? 1 : 0);
  for (int64_t at = from; at < to; at += s.pitch, y++) {  // both are whole rows here
    Sum<S>* row = out + at - from;
    if (at < 0 || y >= rows || first >= last) {
      zero_lanes(row, row + s.pitch);
      continue;
    }
    const S* image = pixel(group * s.images, y, first + shift);
    Sum<S>* place = row;
    for (int64_t g = 0; g < images; g++, image += p.channels * plane, place += s.grid[1]) {
      if (first) zero_lanes(place, place + first);
      copy_row(image, p.step[1], last - first, place + first);
      if (covered < s.grid[1]) zero_lanes(place + covered, place + s.grid[1]);
    }
    zero_lanes(place, row + s.pitch);
  }
}

// fill_lanes of channels [c0, c1) of a flat side whose planes are whole: each run of pixels of one
// image for all channels, so that nothing but an address changes from one to the next. Channel c
// goes to out + c * stride, if wanted(c).
template <class S, class F>
void fill_runs(const ConvSide& s, const Planes<S>& p, int64_t c0, int64_t c1, int64_t from,
               int64_t to, Sum<S>* out, int64_t stride, const F& wanted) {
  constexpr int64_t line = 64 / sizeof(S);
  int64_t n = from / s.pitch, in = from % s.pitch;
  for (int64_t at = from; at < to; n++, in = 0) {
    const int64_t run = least(to - at, s.pitch - in);
    if (n >= p.batch) {
      for (int64_t c = c0; c < c1; c++) {
        Sum<S>* begin = out + c * stride;
        zero_lanes(begin + at - from, begin + to - from);
      }
      return;
    }
    const S* pixels = p.data + (n * p.channels + c0) * s.pitch + in;
    for (int64_t c = c0; c < c1; c++, pixels += s.pitch) {
      // The hardware's own prefetching stops at each run's end.
      if (c + 1 < p.channels && wanted(c + 1))
        for (int64_t i = 0; i < run; i += line) __builtin_prefetch(pixels + s.pitch + i);
      if (wanted(c)) copy_row(pixels, 1, run, out + c * stride + at - from);
    }
    at += run;
  }
}

// Asks for what fill_lanes will read. The hardware's own prefetching stops at each plane's end.
template <class S>
void prefetch_lanes(const ConvSide& s, const Planes<S>& p, int64_t channel, int64_t group,
                    int64_t from, int64_t to) {
  constexpr int64_t line = 64 / sizeof(S);
  const int64_t plane = p.size[0] * p.size[1];
  if (s.flat) {
    int64_t n = from / s.pitch, y = from % s.pitch / s.grid[1];
    for (int64_t at = from; at < to; at += s.grid[1], y++) {
      if (y == s.grid[0]) n++, y = 0;
      if (n >= p.batch) return;
      const S* row = p.data + (n * p.channels + channel) * plane + y * p.step[0] * p.size[1];
      for (int64_t i = 0; i < p.size[1]; i += line) __builtin_prefetch(row + i);
    }
    return;
  }
  const int64_t y0 = least(from < 0 ? 0 : from / s.pitch * p.step[0], p.size[0]);
  const int64_t y1 = least(to / s.pitch * p.step[0], p.size[0]);
  for (int64_t n = group * s.images; n < least((group + 1) * s.images, p.batch); n++) {
    const S* image = p.data + (n * p.channels + channel) * plane;
    for (const S* at = image + y0 * p.size[1]; at < image + y1 * p.size[1]; at += line)
      __builtin_prefetch(at);
  }
}

// What is read of the image of lane `from` of a flat side, up to lane `to`.
template <class S>
Stretch image_of(const ConvSide& s, const Planes<S>& p, int64_t from, int64_t to) {
  const int64_t size = sizeof(S), plane = p.size[0] * p.size[1] * size;
  const int64_t n = from / s.pitch, in = from % s.pitch, lanes = least(to - from, s.pitch - in);
  if (n >= p.batch || lanes <= 0) return {};
  const char* image = reinterpret_cast<const char*>(p.data) + n * p.channels * plane;
  if (p.step[0] == 1 && p.step[1] == 1)
    return {image + in * size, lanes * size, 1, 0, p.channels, plane};
  const int64_t y0 = in / s.grid[1], y1 = ceil_div(in + lanes, s.grid[1]), row = p.size[1] * size;
  return {image + y0 * p.step[0] * row, row, y1 - y0, p.step[0] * row, p.channels, plane};
}
// What will be read for a strip of a flat side: of its first two images, which mostly are all.
// Nothing for small planes: their runs are short, and their tensors near already (14 x 14: 0.97).
template <class S>
Stretches strip_of(const ConvSide& s, const Planes<S>& p, int64_t strip) {
  constexpr int64_t kLeastPlane = 2 << 10;
  const int64_t plane = p.size[0] * p.size[1] * static_cast<int64_t>(sizeof(S));
  if (!s.flat || strip >= s.strips || plane < kLeastPlane) return {};
  const int64_t from = s.strip_begin(strip), to = s.strip_end(strip);
  return {image_of(s, p, from, to), image_of(s, p, (from / s.pitch + 1) * s.pitch, to)};
}

// All copies that are used of channels [c0, c1) for one strip. copies: source_channels x kinds x
// copy_lanes.
template <class S>
void fill_copies(const ConvSide& s, const Planes<S>& p, int64_t group, int64_t strip, int64_t c0,
                 int64_t c1, Sum<S>* copies) {
  const int64_t kinds = static_cast<int64_t>(s.kinds.size());
  const int64_t from = s.strip_begin(strip) + s.first_shift * s.pitch;
  const int64_t to = s.strip_end(strip) + (s.first_shift + s.span) * s.pitch;
  if (s.flat && p.step[0] == 1 && p.step[1] == 1)
    return fill_runs(s, p, c0, c1, from, to, copies, s.copy_lanes,
                     [&](int64_t c) { return s.used[c] != 0; });
  for (int64_t c = c0; c < c1; c++) {
    if (!s.used[c]) continue;
    if (c + 1 < p.channels && s.used[c + 1]) prefetch_lanes(s, p, c + 1, group, from, to);
    for (int64_t k = 0; k < kinds; k++)
      fill_lanes(s, p, c, s.kinds[k].phase, s.kinds[k].shift, group, from, to,
                 copies + (c * kinds + k) * s.copy_lanes);
  }
}

// A run of lanes of a tile that are pixels of one row of one image.
struct Run {
  int32_t lane, count;
  int64_t image, y, x;
};

// Writes rows of results to their places in a contiguous (batch, channels, size) tensor.
template <class S>
struct Placer {
  typedef Sum<S> T;
  const ConvSide& side;
  int64_t batch;
  S* out;
  bool past_caches;

  // Streaming pays if planes are whole cache lines; else it halves the speed (and at 7 x 7 or
  // 14 x 14 is 2 to 4 times slower).
  Placer(const ConvSide& side, int64_t batch, S* out) : side(side), batch(batch), out(out) {
    const int64_t plane =
        side.result_size[0] * side.result_size[1] * static_cast<int64_t>(sizeof(S));
    past_caches = plane % 64 == 0 && batch * side.result_channels * plane >= kStreamBytes;
  }

  // The runs of lanes [from, from + lanes) of a group; runs has room for `lanes`.
  int list(int64_t group, int64_t from, int64_t lanes, Run* runs) const {
    const bool whole = side.flat && side.result_step[0] == 1 && side.result_step[1] == 1;
    const int64_t width = whole ? side.pitch : side.grid[1];
    int n = 0;
    for (int64_t at = from; at < from + lanes;) {
      const int64_t row = at / side.pitch, in = at % side.pitch;
      const int64_t step = least(width - in % width, side.pitch - in);
      const int64_t x = in % width, part = in / width;
      const int64_t count = least(step, from + lanes - at);
      const int64_t image = side.flat ? row : group * side.images + part;
      const bool there = side.flat ? row < batch : part < side.images && image < batch;
      if (count > 0 && there)
        runs[n++] = {static_cast<int32_t>(at - from), static_cast<int32_t>(count), image,
                     side.flat ? part : row, x};
      at += step;
    }
    return n;
  }

  bool in_pairs() const { return side.result_step[0] <= 2 && side.result_step[1] == 2; }
  // Whether every pixel is written, also those that no kernel position reaches.
  bool covers() const {
    const int64_t all = side.result_step[0] * side.result_step[1];
    return in_pairs() || static_cast<int64_t>(side.phases.size()) == all;
  }

  // chunk: rows [r0, r1) of the side, `stride` lanes each; both are multiples of the phases.
  // line: scratch for the pixels of `stride` lanes and two vectors.
  void place(const Run* runs, int n, int64_t r0, int64_t r1, const T* chunk, int64_t stride,
             T* line) const {
    const int64_t phases = static_cast<int64_t>(side.phases.size());
    const int64_t plane = side.result_size[0] * side.result_size[1];
    for (int64_t r = r0; r < r1; r += phases, chunk += phases * stride) {
      S* channel = out + r / phases * plane;
      if (side.result_step[0] == 1 && side.result_step[1] == 1) {
        place_plain(runs, n, chunk, line, channel);
      } else if (in_pairs()) {
        place_pairs(runs, n, chunk, stride, line, channel);
      } else {
        for (int64_t f = 0; f < phases; f++) place_phase(runs, n, f, chunk, stride, channel);
      }
    }
  }

  // Runs that follow each other in memory are gathered in `line` first, so that they can be
  // streamed: 25 % faster at 56 x 56.
  void place_plain(const Run* runs, int n, const T* from, T* line, S* channel) const {
    const int64_t plane = side.result_size[0] * side.result_size[1];
    const int64_t image = side.result_channels * plane;
    for (int i = 0; i < n;) {
      const int64_t to = runs[i].image * image + runs[i].y * side.result_size[1] + runs[i].x;
      int64_t count = runs[i].count;
      auto follows = [&](int j) {
        return runs[j].image * image + runs[j].y * side.result_size[1] + runs[j].x == to + count;
      };
      if (!past_caches || i + 1 == n || !follows(i + 1)) {
        put(from + runs[i].lane, count, channel + to);
        i++;
        continue;
      }
      count = 0;
      do {
        for (int64_t j = 0; j < runs[i].count; j += kLanes<T>)
          storeu<T>(line + count + j, loadu<T>(from + runs[i].lane + j));
        count += runs[i].count;
        i++;
      } while (i < n && follows(i));
      put(line, count, channel + to);
    }
  }

  // Phase f of one channel; rows of phases lie `stride` apart from `from` on.
  void place_phase(const Run* runs, int n, int64_t f, const T* from, int64_t stride,
                   S* channel) const {
    const int64_t* size = side.result_size;
    const int64_t* step = side.result_step;
    const int64_t* phase = side.phases[f].phase;
    from += f * stride;
    for (int i = 0; i < n; i++) {
      const Run& run = runs[i];
      const int64_t y = run.y * step[0] + phase[0];
      if (y >= size[0]) continue;
      S* to = channel + run.image * side.result_channels * size[0] * size[1] + y * size[1] +
              run.x * step[1] + phase[1];
      const int64_t count = least(run.count, ceil_div(size[1] - phase[1], step[1]) - run.x);
      for (int64_t j = 0; j < count; j++) narrow(from[run.lane + j], to + j * step[1]);
    }
  }
  // A column step of 2, and of at most 2 rows: both phases of a row in turn, zeros for one that no
  // kernel position reaches. The rows of a run, and runs that follow, are gathered in `line`.
  void place_pairs(const Run* runs, int n, const T* from, int64_t stride, T* line,
                   S* channel) const {
    const int64_t height = side.result_size[0], width = side.result_size[1];
    const int64_t step = side.result_step[0];
    const T* row_of[2][2] = {};
    for (size_t f = 0; f < side.phases.size(); f++)
      row_of[side.phases[f].phase[0]][side.phases[f].phase[1]] =
          from + static_cast<int64_t>(f) * stride;
    for (int i = 0; i < n;) {
      S* to = channel + runs[i].image * side.result_channels * height * width +
              runs[i].y * step * width + 2 * runs[i].x;
      int64_t gathered = 0;
      bool whole = true;
      do {
        const Run& run = runs[i];
        whole = run.count == side.grid[1];
        const int64_t pixels = least(2 * run.count, width - 2 * run.x);
        for (int64_t p = 0; p < least(step, height - run.y * step); p++) {
          zip_rows(row_of[p][0], row_of[p][1], run.lane, pixels, line + gathered);
          if (whole) {
            gathered += pixels;
          } else {
            put(line, pixels, to + p * width);
          }
        }
        i++;
      } while (whole && i < n && runs[i].count == side.grid[1] &&
               runs[i].image == runs[i - 1].image && runs[i].y == runs[i - 1].y + 1);
      if (gathered) put(line, gathered, to);
    }
  }
  // n lanes of a and b in turn, from `lane` on; null: zeros. Writes up to two vectors too far.
  static ST_INLINE void zip_rows(const T* a, const T* b, int64_t lane, int64_t n, T* to) {
    constexpr int w = kLanes<T>;
    for (int64_t i = 0; i < n; i += 2 * w, lane += w) {
      const Vec<T> x = a ? loadu<T>(a + lane) : Vec<T>{}, y = b ? loadu<T>(b + lane) : Vec<T>{};
      storeu<T>(to + i, zip<T, 0>(x, y));
      storeu<T>(to + i + w, zip<T, 1>(x, y));
    }
  }
  ST_INLINE void put(const T* from, int64_t n, S* to) const {
    constexpr int w = kLanes<T>;
    int64_t i = 0;
    if constexpr (sizeof(S) == sizeof(T)) {
      const int64_t off = reinterpret_cast<uintptr_t>(to) % sizeof(Vec<T>) / sizeof(T);
      if (past_caches && n >= 4 * w) {
        if (off) {
          i = w - off;
          store_narrowed<S>(to, loadu<T>(from), static_cast<int>(i));
        }
        for (; i + w <= n; i += w) stream<S>(to + i, loadu<T>(from + i));
      }
    }
    for (; i + w <= n; i += w) store_narrowed<S>(to + i, loadu<T>(from + i), w);
    if (i < n) store_narrowed<S>(to + i, loadu<T>(from + i), static_cast<int>(n - i));
  }
};

}  // namespace
}  // namespace sparsetrain

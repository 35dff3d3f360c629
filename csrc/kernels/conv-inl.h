// Convolutions: strips of pixels (see conv_plan.h) through the same sparse products as the linear
// layer's tiles.
#pragma once

#include "conv_plan.h"
#include "conv_samples-inl.h"
#include "kernels.h"
#include "linear-inl.h"

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
    for (; i < n; i += w) {  // the last one: what lies beyond is not ours
      const int left = static_cast<int>(2 * (n - i) - 1);
      const Vec<T> a =
          left >= w ? load_widened(from + 2 * i) : load_widened_some(from + 2 * i, left);
      const Vec<T> b = left > w ? load_widened_some(from + 2 * i + w, left - w) : Vec<T>{};
      storeu<T>(to + i, evens<T>(a, b));
    }
  }
  T rest[w];
  for (; i < n; i += w) {
    ST_UNROLL
    for (int j = 0; j < w; j++) rest[j] = i + j < n ? widen(from[(i + j) * step]) : 0;
    storeu<T>(to + i, loadu<T>(rest));
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

// f(NV, first lane) over a strip, cut into tiles of about equal width.
template <class T, class F>
ST_INLINE void for_tiles(const ConvSide& s, int64_t strip, const F& f) {
  const int64_t vectors = (s.strip_end(strip) - s.strip_begin(strip)) / kLanes<T>;
  const int64_t tiles = ceil_div(vectors * kLanes<T>, s.tile_lanes);
  for (int64_t t = 0, at = 0; t < tiles; t++) {
    const int64_t end = vectors * (t + 1) / tiles;
    while (at < end) {  // one tile, unless no kernel has just that width
      const int nv = tile_at_most(static_cast<int>(end - at));
      with_vectors(nv, [&](auto n) { f(n, at * kLanes<T>); });
      at += nv;
    }
  }
}

// result = source * side^T + bias, from the copies of one strip.
template <class S>
struct ConvProduct {
  typedef Sum<S> T;
  const ConvSide& conv;
  const T* values;
  const T* bias;  // result_channels, or null
  Placer<S> placer;

  // Results wait for a whole strip, so that they are written in long runs.
  int64_t chunk_rows() const {
    const int64_t fit = kChunkBytes / (conv.strip_lanes * static_cast<int64_t>(sizeof(T)));
    const int64_t phases = static_cast<int64_t>(conv.phases.size());
    return (fit < 16 ? 16 : fit) / phases * phases + (phases > 16 ? phases : 0);
  }
  // Room to gather the pixels of a row too, and what last vectors may reach beyond.
  int64_t chunk_size() const {
    const int64_t pixels = placer.in_pairs() ? 2 * conv.result_step[0] : 1;
    return (chunk_rows() + pixels) * conv.strip_lanes + 4 * kLanes<T>;
  }

  // Rows [r0, r1) of one strip. chunk: chunk_size() of scratch; runs: strip_lanes.
  void rows(int64_t group, int64_t strip, const T* copies, int64_t r0, int64_t r1, T* chunk,
            Run* runs) const {
    const Side& side = conv.side;
    const int64_t from = conv.strip_begin(strip), lanes = conv.strip_end(strip) - from;
    const int count = placer.list(group, from, lanes, runs);
    if (!count) return;
    for (int64_t r = r0; r < r1; r += chunk_rows()) {
      const int64_t end = least(r + chunk_rows(), r1);
      for_tiles<T>(conv, strip, [&](auto n, int64_t lane) {
        constexpr int NV = decltype(n)::value;
        with_index(side, [&](auto* index) {
          for (int64_t b = 0; b < side.blocks; b++)
            spmm_block<T, NV, kLanes<T>>(side.begin_of(b) + r, side.begin_of(b + 1) + r, end - r,
                                         index, values, copies + lane, chunk + lane,
                                         conv.strip_lanes, bias ? bias + r : nullptr, b == 0);
        });
      });
      placer.place(runs, count, r, end, chunk, conv.strip_lanes,
                   chunk + chunk_rows() * conv.strip_lanes + kLanes<T>);
    }
  }
};

template <class T>
ConvVectors conv_vectors() {
  return {kLanes<T>, sizeof(T), kNarrowTile, kWideTile};
}

template <class S>
int64_t copies_size(const ConvSide& s) {
  return s.source_channels * static_cast<int64_t>(s.kinds.size()) * s.copy_lanes;
}

// Rows that a worker takes at a time: whole channels.
ST_INLINE int64_t row_step(const ConvSide& s, int64_t items, int workers) {
  const int64_t least_rows = 16 * static_cast<int64_t>(s.phases.size());
  return ceil_div(ceil_div(s.side.rows * items, 4 * workers), least_rows) * least_rows;
}

template <class S>
void conv_product(const ConvProduct<S>& product, const Planes<S>& source,
                  const Parallel& parallel) {
  typedef Sum<S> T;
  const ConvSide& s = product.conv;
  const int64_t strips = s.groups * s.strips;
  if (!strips || !s.side.rows) return;
  const int workers = worth_waking(parallel, (s.side.nnz + s.side.rows) * s.lanes * s.groups);
  const int64_t size = copies_size<S>(s), chunk = product.chunk_size();
  Scratch<T> chunks(chunk * workers);
  Scratch<Run> runs(s.strip_lanes * workers);

  if (workers == 1 || strips >= 4 * workers || strips % workers == 0) {
    Scratch<T> copies(size * workers);
    share(parallel, workers, strips, [&](int worker, int64_t i) {
      T* own = copies.get() + worker * size;
      fill_copies(s, source, i / s.strips, i % s.strips, 0, s.source_channels, own);
      product.rows(i / s.strips, i % s.strips, own, 0, s.side.rows, chunks.get() + worker * chunk,
                   runs.get() + worker * s.strip_lanes);
    });
    return;
  }
  // Few strips: all are filled first, then workers share out their rows.
  Scratch<T> copies(size * strips);
  const int64_t channels = 16, parts = ceil_div(s.source_channels, channels);
  share(parallel, workers, strips * parts, [&](int, int64_t i) {
    const int64_t at = i / parts, c = i % parts * channels;
    fill_copies(s, source, at / s.strips, at % s.strips, c, least(c + channels, s.source_channels),
                copies.get() + at * size);
  });
  const int64_t step = row_step(s, strips, workers);
  const int64_t pieces = ceil_div(s.side.rows, step);
  share(parallel, workers, strips * pieces, [&](int worker, int64_t i) {
    const int64_t at = i / pieces, r = i % pieces * step;
    product.rows(at / s.strips, at % s.strips, copies.get() + at * size, r,
                 least(r + step, s.side.rows), chunks.get() + worker * chunk,
                 runs.get() + worker * s.strip_lanes);
  });
}

// dvalues, in the order of the transposed side: rows are (phase, input channel), operands dy.
template <class S>
struct ConvGradient {
  typedef Sum<S> T;
  const ConvSide& conv;
  T* dvalues;  // nnz

  // Adds the share of one strip, for rows [r0, r1). copies: of dy; centre: of x, side.rows x
  // centre_lanes.
  void rows(int64_t strip, const T* copies, const T* centre, int64_t r0, int64_t r1) const {
    const Side& side = conv.side;
    for_tiles<T>(conv, strip, [&](auto n, int64_t lane) {
      constexpr int NV = decltype(n)::value;
      with_index(side, [&](auto* index) {
        for (int64_t b = 0; b < side.blocks; b++)
          sddmm_block<T, NV, kLanes<T>>(
              side.begin_of(b) + r0, side.begin_of(b + 1) + r0, r1 - r0, index, copies + lane,
              centre + r0 * conv.centre_lanes + lane, conv.centre_lanes, dvalues);
      });
    });
  }
};

// product may be null (dx not wanted). See backward() of the linear layer.
template <class S>
void conv_gradients(const ConvProduct<S>* product, const ConvGradient<S>& gradient,
                    const Planes<S>& dy, const Planes<S>& x, const Parallel& parallel) {
  typedef Sum<S> T;
  const ConvSide& s = gradient.conv;
  const int64_t strips = s.groups * s.strips, rows = s.side.rows;
  __builtin_memset(gradient.dvalues, 0, sizeof(T) * s.side.nnz);
  if (!strips || !rows) return;
  const int workers = worth_waking(parallel, (s.side.nnz + rows) * s.lanes * s.groups);
  const int64_t together = workers == 1 ? 1 : least(strips, 2 * workers);
  const int64_t size = copies_size<S>(s), centre_size = rows * s.centre_lanes;
  const int64_t chunk = product ? product->chunk_size() : 0;
  Scratch<T> copies(size * together), centres(centre_size * together), chunks(chunk * workers);
  Scratch<Run> runs(product ? s.strip_lanes * workers : 0);
  const int64_t channels = 16, dy_parts = ceil_div(s.source_channels, channels);
  const int64_t x_parts = ceil_div(s.result_channels, channels);
  const int64_t step = workers == 1 ? rows : row_step(s, 1, workers);
  const int64_t row_items = ceil_div(rows, step);

  for (int64_t first = 0; first < strips; first += together) {
    const int64_t n = least(strips - first, together);
    auto fill_dy = [&](int64_t i) {
      const int64_t t = i / dy_parts, c = i % dy_parts * channels, at = first + t;
      fill_copies(s, dy, at / s.strips, at % s.strips, c, least(c + channels, s.source_channels),
                  copies.get() + t * size);
    };
    auto fill_x = [&](int64_t i) {
      const int64_t t = i / x_parts, at = first + t, strip = at % s.strips;
      const int64_t begin = s.strip_begin(strip), end = s.strip_end(strip);
      const int64_t phases = static_cast<int64_t>(s.phases.size());
      const int64_t c0 = i % x_parts * channels, c1 = least(c0 + channels, s.result_channels);
      Sum<S>* to = centres.get() + t * centre_size;
      auto wanted = [&](int64_t c) { return any_nonzeros(s.side, c * phases, (c + 1) * phases); };
      if (s.flat && x.step[0] == 1 && x.step[1] == 1)
        return fill_runs(s, x, c0, c1, begin, end, to, s.centre_lanes, wanted);
      for (int64_t c = c0; c < c1; c++) {
        if (!wanted(c)) continue;
        if (c + 1 < s.result_channels && wanted(c + 1))
          prefetch_lanes(s, x, c + 1, at / s.strips, begin, end);
        for (int64_t f = 0; f < phases; f++)
          fill_lanes(s, x, c, s.phases[f].phase, 0, at / s.strips, begin, end,
                     to + (c * phases + f) * s.centre_lanes);
      }
    };
    auto take_dx = [&](int worker, int64_t t) {
      const int64_t at = first + t;
      product->rows(at / s.strips, at % s.strips, copies.get() + t * size, 0, rows,
                    chunks.get() + worker * chunk, runs.get() + worker * s.strip_lanes);
    };
    auto take_dvalues = [&](int64_t i) {
      for (int64_t t = 0; t < n; t++)
        gradient.rows((first + t) % s.strips, copies.get() + t * size,
                      centres.get() + t * centre_size, i * step, least((i + 1) * step, rows));
    };
    share(parallel, workers, n * (dy_parts + x_parts), [&](int, int64_t i) {
      if (i < n * dy_parts) return fill_dy(i);
      fill_x(i - n * dy_parts);
    });
    const int64_t dx_items = product ? n : 0;
    share(parallel, workers, dx_items + row_items, [&](int worker, int64_t i) {
      if (i < dx_items) return take_dx(worker, i);
      take_dvalues(i - dx_items);
    });
  }
}

// f(place in the transposed order, place in the pattern's order) for every nonzero.
template <class F>
void for_transposed(const Plan& plan, const ConvShape& shape, const ConvSide& s, const F& f) {
  const Pattern& p = plan.pattern();
  Scratch<int32_t> next(s.side.rows);
  __builtin_memcpy(next.get(), s.side.row_begin, sizeof(int32_t) * s.side.rows);
  const int64_t out_per_group = shape.out_channels / shape.groups;
  const int64_t rows_per_group = s.side.rows / shape.groups;
  Scratch<int32_t> row_of(p.cols);
  s.fill_row_of_column(p.cols, row_of.get());
  const int32_t* row_of_column = row_of.get();
  for (int64_t o = 0; o < p.rows; o++) {
    int32_t* at = next.get() + o / out_per_group * rows_per_group;
    for (int32_t k = p.crow[o]; k < p.crow[o + 1]; k++) f(at[row_of_column[p.col[k]]]++, k);
  }
}

template <class S>
Samples<S> in_samples(const ConvShape& s, S* data) {
  return {data, s.batch, s.in_channels, {s.in_size[0], s.in_size[1]}};
}
template <class S>
Samples<S> out_samples(const ConvShape& s, S* data) {
  return {data, s.batch, s.out_channels, {s.out_size[0], s.out_size[1]}};
}

template <class S>
void conv_forward(const ConvForward& a) {
  typedef Sum<S> T;
  if (!a.shape.batch) return;
  const ConvHandle s(*a.plan, a.shape, false, conv_vectors<T>());
  const Widened<S> values(a.values, s->side.nnz), bias(a.bias, a.shape.out_channels);
  if (s->samples) {
    const SampleTables tables(*s, kLanes<T>);
    const SampleProduct<S> product{*s, tables, values.get(), bias.get(),
                                   SampleWriter<S>(out_samples(a.shape, static_cast<S*>(a.y)))};
    return sample_product(product, in_samples(a.shape, static_cast<const S*>(a.x)), a.parallel);
  }
  const ConvProduct<S> product{*s, values.get(), bias.get(),
                               Placer<S>(*s, a.shape.batch, static_cast<S*>(a.y))};
  conv_product(product,
               Planes<S>{static_cast<const S*>(a.x), a.shape.batch, a.shape.in_channels,
                         s->source_size, s->source_step},
               a.parallel);
}

// dbias[o] = sum of dy over images and pixels
template <class S>
void sum_planes(const ConvShape& shape, const S* dy, S* dbias, const Parallel& parallel) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  const int64_t plane = shape.out_size[0] * shape.out_size[1];
  const int workers = worth_waking(parallel, shape.batch * shape.out_channels * plane / 8);
  share(parallel, workers, shape.out_channels, [&](int, int64_t o) {
    Vec<T> sum[4] = {};
    T rest = 0;
    for (int64_t n = 0; n < shape.batch; n++) {
      const S* p = dy + (n * shape.out_channels + o) * plane;
      int64_t i = 0;
      for (; i + 4 * w <= plane; i += 4 * w) {
        ST_UNROLL
        for (int v = 0; v < 4; v++) sum[v] += load_widened(p + i + v * w);
      }
      for (; i < plane; i++) rest += widen(p[i]);
    }
    narrow(sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest, dbias + o);
  });
}

// dvalues where lanes are samples; and dx by `product`, unless it is null.
template <class S>
void sample_dvalues(const ConvBackward& a, const SampleProduct<S>* product) {
  typedef Sum<S> T;
  const Samples<const S> dy = out_samples(a.shape, static_cast<const S*>(a.dy));
  const Samples<const S> x = in_samples(a.shape, static_cast<const S*>(a.x));
  const ConvHandle side(*a.plan, a.shape, false, conv_vectors<T>());
  S* dvalues = static_cast<S*>(a.dvalues);
  constexpr bool narrower = sizeof(S) != sizeof(T);
  Scratch<T> sums(narrower ? side->side.nnz : 0);
  const SampleGradient<S> gradient{*side, narrower ? sums.get() : reinterpret_cast<T*>(dvalues)};
  if (product && !gradient.shares_dy(product->conv)) {
    sample_product(*product, dy, a.parallel);
    product = nullptr;
  }
  sample_gradients(product, gradient, x, dy, a.parallel);
  if constexpr (narrower)
    for (int64_t k = 0; k < side->side.nnz; k++) narrow(sums.get()[k], dvalues + k);
}

// Both gradients where lanes are samples: dx by the transposed side, dvalues by the other.
template <class S>
void sample_backward(const ConvBackward& a) {
  typedef Sum<S> T;
  if (!a.dx) {
    if (a.dvalues) sample_dvalues<S>(a, nullptr);
    return;
  }
  const ConvHandle s(*a.plan, a.shape, true, conv_vectors<T>());
  Scratch<T> values(s->side.nnz);
  const S* given = static_cast<const S*>(a.values);
  for_transposed(*a.plan, a.shape, *s,
                 [&](int32_t to, int32_t from) { values.get()[to] = widen(given[from]); });
  const SampleTables tables(*s, kLanes<T>);
  const SampleProduct<S> product{*s, tables, values.get(), nullptr,
                                 SampleWriter<S>(in_samples(a.shape, static_cast<S*>(a.dx)))};
  if (a.dvalues) return sample_dvalues(a, &product);
  sample_product(product, out_samples(a.shape, static_cast<const S*>(a.dy)), a.parallel);
}

template <class S>
void conv_backward(const ConvBackward& a) {
  typedef Sum<S> T;
  const ConvShape& shape = a.shape;
  if (!shape.batch) {
    if (a.dvalues) __builtin_memset(a.dvalues, 0, sizeof(S) * a.plan->pattern().nnz);
    if (a.dbias) __builtin_memset(a.dbias, 0, sizeof(S) * shape.out_channels);
    return;
  }
  if (lanes_are_samples(shape, conv_vectors<T>())) {
    if (a.dbias)
      sum_planes(shape, static_cast<const S*>(a.dy), static_cast<S*>(a.dbias), a.parallel);
    return sample_backward<S>(a);
  }
  const ConvHandle s(*a.plan, shape, true, conv_vectors<T>());
  const Planes<S> dy{static_cast<const S*>(a.dy), shape.batch, shape.out_channels, s->source_size,
                     s->source_step};
  const Planes<S> x{static_cast<const S*>(a.x), shape.batch, shape.in_channels, s->result_size,
                    s->result_step};
  if (a.dbias) sum_planes(shape, dy.data, static_cast<S*>(a.dbias), a.parallel);

  Scratch<T> values(a.dx ? s->side.nnz : 0), dvalues(a.dvalues ? s->side.nnz : 0);
  const S* given = static_cast<const S*>(a.values);
  if (a.dx) {
    for_transposed(*a.plan, shape, *s,
                   [&](int32_t to, int32_t from) { values.get()[to] = widen(given[from]); });
  }
  const ConvProduct<S> product{*s, values.get(), nullptr,
                               Placer<S>(*s, shape.batch, static_cast<S*>(a.dx))};
  if (a.dx && !product.placer.covers())
    __builtin_memset(
        a.dx, 0, sizeof(S) * shape.batch * shape.in_channels * shape.in_size[0] * shape.in_size[1]);
  if (!a.dvalues) {
    if (a.dx) conv_product(product, dy, a.parallel);
    return;
  }
  conv_gradients(a.dx ? &product : nullptr, ConvGradient<S>{*s, dvalues.get()}, dy, x, a.parallel);
  for_transposed(*a.plan, shape, *s, [&](int32_t from, int32_t to) {
    narrow(dvalues.get()[from], static_cast<S*>(a.dvalues) + to);
  });
}

}  // namespace
}  // namespace sparsetrain

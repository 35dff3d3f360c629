// Convolutions whose lanes are samples (see conv_plan.h): a vector is one pixel of as many images
// as it has lanes, a group. A nonzero reads a tile of pixels at a constant distance from the tile
// of results.
#pragma once

#include <type_traits>

#include "conv_plan.h"
#include "kernels.h"
#include "linear-inl.h"

namespace sparsetrain {
namespace {

// A contiguous (batch, channels, pixels) tensor, seen by the groups of its samples.
template <class S>
struct Samples {
  static constexpr int64_t w = kLanes<Sum<std::remove_const_t<S>>>;
  S* data;
  int64_t batch, channels, size[2];

  int64_t pixels() const { return size[0] * size[1]; }
  int64_t stride() const { return channels * pixels(); }  // from one sample to the next
  int64_t groups() const { return ceil_div(batch, w); }
  S* plane(int64_t group, int64_t channel) const {
    return data + (group * w * channels + channel) * pixels();
  }
  int count(int64_t group) const { return static_cast<int>(least(batch - group * w, w)); }
};

// f(p) for blocks of a vector's width that cover pixels [from, to). The last one reaches back over
// pixels already done, rather than being short, unless there are too few pixels for that.
template <class T, class F>
ST_INLINE void for_pixels(int64_t from, int64_t to, const F& f) {
  constexpr int w = kLanes<T>;
  for (int64_t p = from; p < to; p += w) {
    if (to - p < w && to - from >= w) p = to - w;
    f(p, static_cast<int>(least(to - p, w)));
  }
}

// Pixels [from, to) of one plane of a group: vector (pixel - from) goes to slots[pixel - from], or
// nowhere if that is negative; without slots, to its own place. Missing samples become zero.
template <class S>
void pack_pixels(const Samples<const S>& m, int64_t group, int64_t channel, int64_t from,
                 int64_t to, const int32_t* slots, Sum<S>* out) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  const S* plane = m.plane(group, channel);
  const int64_t stride = m.stride();
  const int samples = m.count(group);
  for_pixels<T>(from, to, [&](int64_t p, int n) {
    Vec<T> r[w];
    if (samples == w && n == w) {
      ST_UNROLL
      for (int i = 0; i < w; i++) r[i] = load_widened(plane + i * stride + p);
    } else {
      for (int i = 0; i < w; i++)
        r[i] = i >= samples ? Vec<T>{}
               : n == w     ? load_widened(plane + i * stride + p)
                            : load_widened_some(plane + i * stride + p, n);
    }
    transpose<T>(r);
    if (!slots) {
      for (int i = 0; i < n; i++) store<T>(out + (p - from + i) * w, r[i]);
    } else if (n == w) {
      ST_UNROLL
      for (int i = 0; i < w; i++) {
        const int64_t slot = slots[p - from + i];
        if (slot >= 0) store<T>(out + slot * w, r[i]);
      }
    } else {
      for (int i = 0; i < n; i++)
        if (slots[p - from + i] >= 0) store<T>(out + slots[p - from + i] * w, r[i]);
    }
  });
}

// Asks for what pack_pixels will read.
template <class S>
ST_INLINE void prefetch_pixels(const Samples<const S>& m, int64_t group, int64_t channel,
                               int64_t from, int64_t to) {
  constexpr int64_t line = 64 / sizeof(S);
  const S* plane = m.plane(group, channel);
  for (int i = 0; i < m.count(group); i++, plane += m.stride())
    for (int64_t p = from; p < to; p += line) __builtin_prefetch(plane + p);
}

// The way back: pixel p of the plane from vector places[p - from] of `rows`, zero where that is
// negative; without places, from its own place.
template <class S>
void unpack_pixels(const Samples<S>& m, int64_t group, int64_t channel, int64_t from, int64_t to,
                   const int32_t* places, const Sum<S>* rows) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  S* plane = m.plane(group, channel);
  const int64_t stride = m.stride();
  const int samples = m.count(group);
  for_pixels<T>(from, to, [&](int64_t p, int n) {
    Vec<T> r[w];
    if (!places) {
      ST_UNROLL
      for (int i = 0; i < w; i++) r[i] = i < n ? load<T>(rows + (p - from + i) * w) : Vec<T>{};
    } else {
      for (int i = 0; i < w; i++) {
        const int64_t place = i < n ? places[p - from + i] : -1;
        r[i] = place >= 0 ? load<T>(rows + place * w) : Vec<T>{};
      }
    }
    transpose<T>(r);
    if (samples == w && n == w) {
      ST_UNROLL
      for (int i = 0; i < w; i++) store_narrowed<S>(plane + i * stride + p, r[i], w);
    } else {
      for (int i = 0; i < samples; i++) store_narrowed<S>(plane + i * stride + p, r[i], n);
    }
  });
}

// Rows of the grid in one strip of a side.
struct StripRows {
  int64_t from, to;
  StripRows(const ConvSide& s, int64_t strip)
      : from(strip * s.strip_rows), to(least(from + s.strip_rows, s.grid[0])) {}
};

template <class S>
int64_t sample_copies_size(const ConvSide& s) {
  return s.source_channels * static_cast<int64_t>(s.kinds.size()) * s.copy_lanes;
}

// Planes of channels [c0, c1) for one strip, with zeros around them. fresh: the buffer was not
// filled for another strip of this side before.
template <class S>
void fill_samples(const ConvSide& s, const SampleTables& tables, const Samples<const S>& m,
                  int64_t group, int64_t strip, int64_t c0, int64_t c1, bool fresh,
                  Sum<S>* copies) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  const int64_t width = m.size[1];
  const int64_t top = (strip * s.strip_rows + s.first_shift) * s.source_step[0];
  const int64_t rows = (s.strip_rows + s.span) * s.source_step[0];
  const int64_t y0 = top < 0 ? least(-top, rows) : 0;  // the rows that are inside the image
  const int64_t y1 = top + rows > m.size[0] ? (m.size[0] > top ? m.size[0] - top : 0) : rows;
  const int32_t* slots = tables.slots.data();
  auto zero = [&](int64_t from, int64_t to, T* out) {
    for (int64_t i = from * width; i < to * width; i++)
      if (slots[i] >= 0) store<T>(out + slots[i] * w, Vec<T>{});
  };
  const int64_t size = static_cast<int64_t>(s.kinds.size()) * s.copy_lanes;
  for (int64_t c = c0; c < c1; c++) {
    T* out = copies + c * size;
    if (fresh)
      for (const int32_t gap : tables.gaps) store<T>(out + static_cast<int64_t>(gap) * w, Vec<T>{});
    if (y0 >= y1) {
      zero(0, rows, out);
      continue;
    }
    if (c + 1 < m.channels)
      prefetch_pixels(m, group, c + 1, (top + y0) * width, (top + y1) * width);
    zero(0, y0, out);
    pack_pixels(m, group, c, (top + y0) * width, (top + y1) * width, slots + y0 * width, out);
    zero(y1, rows, out);
  }
}

// One column block for `rows` consecutive rows of results, for RH x NV pixels.
//   begin, end, index, values, bias, first: as in spmm_block; an index counts vectors
//   x: what index 0 reads for the first pixel; its rows are x_pitch elements apart
//   y: the first pixel's result; rows of pixels y_pitch and rows of results y_stride elements apart
template <class T, int RH, int NV, class I>
void spmm_pixels(const int32_t* __restrict begin, const int32_t* __restrict end, int64_t rows,
                 const I* __restrict index, const T* __restrict values, const T* __restrict x,
                 int64_t x_pitch, T* __restrict y, int64_t y_pitch, int64_t y_stride, const T* bias,
                 bool first) {
  constexpr int w = kLanes<T>;
  constexpr int chains = kChains<RH * NV>;
  for (int64_t r = 0; r < rows; r++, y += y_stride) {
    Vec<T> sum[chains][RH][NV];
    ST_UNROLL
    for (int c = 0; c < chains; c++) ST_UNROLL
    for (int h = 0; h < RH; h++) ST_UNROLL
    for (int v = 0; v < NV; v++) sum[c][h][v] = Vec<T>{};
    if (!first) {
      ST_UNROLL
      for (int h = 0; h < RH; h++) ST_UNROLL
      for (int v = 0; v < NV; v++) sum[0][h][v] = load<T>(y + h * y_pitch + v * w);
    } else if (bias) {
      ST_UNROLL
      for (int h = 0; h < RH; h++) ST_UNROLL
      for (int v = 0; v < NV; v++) sum[0][h][v] = broadcast<T>(bias[r]);
    }
    const int64_t ahead = r + kRowsAhead < rows ? r + kRowsAhead : r;
    prefetch_run(index, values, begin[ahead], end[ahead]);
    int32_t k = begin[r];
    const int32_t stop = end[r];
    for (; k + chains <= stop; k += chains) {
      ST_UNROLL
      for (int c = 0; c < chains; c++) {
        const T* p = x + static_cast<int64_t>(index[k + c]) * w;
        const Vec<T> value = broadcast<T>(values[k + c]);
        ST_UNROLL
        for (int h = 0; h < RH; h++) ST_UNROLL
        for (int v = 0; v < NV; v++) sum[c][h][v] += value * load<T>(p + h * x_pitch + v * w);
      }
    }
    if constexpr (chains > 1) {
      for (; k < stop; k++) {
        const T* p = x + static_cast<int64_t>(index[k]) * w;
        const Vec<T> value = broadcast<T>(values[k]);
        ST_UNROLL
        for (int h = 0; h < RH; h++) ST_UNROLL
        for (int v = 0; v < NV; v++) sum[0][h][v] += value * load<T>(p + h * x_pitch + v * w);
      }
    }
    ST_UNROLL
    for (int c = 1; c < chains; c++) ST_UNROLL
    for (int h = 0; h < RH; h++) ST_UNROLL
    for (int v = 0; v < NV; v++) sum[0][h][v] += sum[c][h][v];
    ST_UNROLL
    for (int h = 0; h < RH; h++) ST_UNROLL
    for (int v = 0; v < NV; v++) store<T>(y + h * y_pitch + v * w, sum[0][h][v]);
  }
}

// dvalues[0..count) += the products of a tile of dy and of what each of `count` <= G nonzeros reads
// of x. Sums stay in registers for the whole tile, dy passes by.
template <class T, int G, class I>
ST_INLINE void sddmm_pixels_group(const T* dy, int64_t dy_pitch, const I* index, const T* x,
                                  int64_t x_pitch, int64_t height, int64_t width, T* dvalues,
                                  int count) {
  constexpr int w = kLanes<T>;
  Vec<T> sum[G];
  const T* p[G];
  ST_UNROLL
  for (int g = 0; g < G; g++) {
    sum[g] = Vec<T>{};
    p[g] = x + static_cast<int64_t>(index[g < count ? g : 0]) * w;
  }
  for (int64_t h = 0; h < height; h++, dy += dy_pitch) {
    for (int64_t i = 0; i < width * w; i += w) {
      const Vec<T> d = load<T>(dy + i);
      ST_UNROLL
      for (int g = 0; g < G; g++) sum[g] += d * load<T>(p[g] + i);
    }
    ST_UNROLL
    for (int g = 0; g < G; g++) p[g] += x_pitch;
  }
  if (count == G) return add_sums<T, G>(sum, dvalues);
  T sums[G] = {};
  add_sums<T, G>(sum, sums);
  for (int g = 0; g < count; g++) dvalues[g] += sums[g];
}

// One column block for `rows` rows; arguments as for spmm_pixels, dy in the place of y.
template <class T, class I>
void sddmm_pixels(const int32_t* __restrict begin, const int32_t* __restrict end, int64_t rows,
                  const I* __restrict index, const T* __restrict x, int64_t x_pitch,
                  const T* __restrict dy, int64_t dy_pitch, int64_t dy_stride, int64_t height,
                  int64_t width, T* __restrict dvalues) {
  for (int64_t r = 0; r < rows; r++, dy += dy_stride) {
    const int64_t ahead = r + kRowsAhead < rows ? r + kRowsAhead : r;
    prefetch_run(index, dvalues, begin[ahead], end[ahead]);
    int32_t k = begin[r];
    const int32_t stop = end[r];
    auto group = [&](auto n, int count) {
      sddmm_pixels_group<T, decltype(n)::value>(dy, dy_pitch, index + k, x, x_pitch, height, width,
                                                dvalues + k, count);
      k += count;
    };
    while (k + 8 <= stop) group(std::integral_constant<int, 8>{}, 8);
    // What is left: a group that is not full beats one or two smaller ones.
    if (k + 4 < stop) group(std::integral_constant<int, 8>{}, stop - k);
    if (k + 2 < stop) group(std::integral_constant<int, 4>{}, stop - k);
    if (k + 2 == stop) group(std::integral_constant<int, 2>{}, 2);
    if (k < stop) group(std::integral_constant<int, 1>{}, 1);
  }
}

// f(y, x, height, width) over rows [from, to) of the grid, cut into tiles of about equal width.
template <class F>
ST_INLINE void for_pixel_tiles(const ConvSide& s, int64_t from, int64_t to, const F& f) {
  const int64_t tiles = ceil_div(s.grid[1], kTileColumns);
  for (int64_t y = from; y < to; y += kTileRows) {
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t x = s.grid[1] * t / tiles;
      f(y, x, least(to - y, kTileRows), s.grid[1] * (t + 1) / tiles - x);
    }
  }
}
// f(height, width) as constants
template <class F>
ST_INLINE void with_pixels(int64_t height, int64_t width, const F& f) {
  auto with_width = [&](auto h) {
    switch (width) {
      case 1: return f(h, std::integral_constant<int, 1>{});
      case 2: return f(h, std::integral_constant<int, 2>{});
      case 3: return f(h, std::integral_constant<int, 3>{});
      case 4: return f(h, std::integral_constant<int, 4>{});
      case 5: return f(h, std::integral_constant<int, 5>{});
      case 6: return f(h, std::integral_constant<int, 6>{});
      default: return f(h, std::integral_constant<int, 7>{});
    }
  };
  static_assert(kTileRows == 2 && kTileColumns == 7, "");
  if (height == 2) return with_width(std::integral_constant<int, 2>{});
  with_width(std::integral_constant<int, 1>{});
}

// result = source * side^T + bias, from the copies of one strip.
template <class S>
struct SampleProduct {
  typedef Sum<S> T;
  const ConvSide& conv;
  const SampleTables& tables;
  const T* values;
  const T* bias;  // result_channels, or null
  Samples<S> result;

  int64_t phases() const { return static_cast<int64_t>(conv.phases.size()); }
  int64_t row_size() const { return conv.band_rows * conv.grid[1] * kLanes<T>; }
  int64_t chunk_size(int64_t rows) const { return rows * row_size(); }

  // Rows [r0, r1) of one strip, whole channels. chunk: chunk_size(r1 - r0) of scratch.
  void rows(int64_t group, int64_t strip, const T* copies, int64_t r0, int64_t r1, T* chunk) const {
    const StripRows y(conv, strip);
    for (int64_t from = y.from; from < y.to; from += conv.band_rows) {
      const int64_t to = least(from + conv.band_rows, y.to);
      band(copies, from, to, y.from, r0, r1, chunk);
      place(group, from, to, r0, r1, chunk);
    }
  }
  void band(const T* copies, int64_t from, int64_t to, int64_t top, int64_t r0, int64_t r1,
            T* chunk) const {
    constexpr int w = kLanes<T>;
    const Side& side = conv.side;
    for_pixel_tiles(conv, from, to, [&](int64_t y, int64_t x, int64_t height, int64_t width) {
      const T* source = copies + ((y - top) * conv.pitch + x) * w;
      T* out = chunk + ((y - from) * conv.grid[1] + x) * w;
      with_pixels(height, width, [&](auto h, auto v) {
        with_index(side, [&](auto* index) {
          for (int64_t b = 0; b < side.blocks; b++)
            spmm_pixels<T, decltype(h)::value, decltype(v)::value>(
                side.begin_of(b) + r0, side.begin_of(b + 1) + r0, r1 - r0, index, values, source,
                conv.pitch * w, out, conv.grid[1] * w, row_size(), bias ? bias + r0 : nullptr,
                b == 0);
        });
      });
    });
  }
  void place(int64_t group, int64_t from, int64_t to, int64_t r0, int64_t r1,
             const T* chunk) const {
    const int64_t step = conv.result_step[0], width = result.size[1];
    const int64_t first = from * step * width;
    const int64_t last = least(to * step, result.size[0]) * width;
    for (int64_t r = r0; r < r1; r += phases(), chunk += phases() * row_size())
      unpack_pixels(result, group, r / phases(), first, last,
                    tables.places.empty() ? nullptr : tables.places.data(), chunk);
  }
};

// Rows that a worker takes at a time: whole channels. Not too few: they share what they fetch into
// L1.
ST_INLINE int64_t sample_row_step(const ConvSide& s, int64_t pieces) {
  const int64_t phases = static_cast<int64_t>(s.phases.size());
  return ceil_div(ceil_div(s.side.rows, pieces), 16 * phases) * 16 * phases;
}

template <class S>
void sample_product(const SampleProduct<S>& product, const Samples<const S>& source,
                    const Parallel& parallel) {
  typedef Sum<S> T;
  const ConvSide& s = product.conv;
  const SampleTables& tables = product.tables;
  const int64_t strips = source.groups() * s.strips, rows = s.side.rows;
  const int64_t pixels = s.grid[0] * s.grid[1];
  const int workers = worth_waking(parallel, (s.side.nnz + rows) * pixels * source.batch);
  const int64_t size = sample_copies_size<S>(s);

  if (workers == 1 || strips >= 8 * workers) {
    const int64_t chunk = product.chunk_size(rows);
    Scratch<T> copies(size * workers), chunks(chunk * workers);
    Scratch<bool> filled(workers);
    for (int i = 0; i < workers; i++) filled.get()[i] = false;
    share(parallel, workers, strips, [&](int worker, int64_t i) {
      T* own = copies.get() + worker * size;
      fill_samples<S>(s, tables, source, i / s.strips, i % s.strips, 0, s.source_channels,
                      !filled.get()[worker], own);
      filled.get()[worker] = true;
      product.rows(i / s.strips, i % s.strips, own, 0, rows, chunks.get() + worker * chunk);
    });
    return;
  }
  // Few strips: all are filled first, then workers share out their rows.
  const int64_t step = sample_row_step(s, ceil_div(8 * workers, strips)),
                pieces = ceil_div(rows, step);
  const int64_t channels = 16, parts = ceil_div(s.source_channels, channels);
  const int64_t chunk = product.chunk_size(step);
  Scratch<T> copies(size * strips), chunks(chunk * workers);
  share(parallel, workers, strips * parts, [&](int, int64_t i) {
    const int64_t at = i / parts, c = i % parts * channels;
    fill_samples<S>(s, tables, source, at / s.strips, at % s.strips, c,
                    least(c + channels, s.source_channels), true, copies.get() + at * size);
  });
  share(parallel, workers, strips * pieces, [&](int worker, int64_t i) {
    const int64_t at = i / pieces, r = i % pieces * step;
    product.rows(at / s.strips, at % s.strips, copies.get() + at * size, r, least(r + step, rows),
                 chunks.get() + worker * chunk);
  });
}

// dvalues, in the pattern's order, from copies of x and packed rows of dy.
template <class S>
struct SampleGradient {
  typedef Sum<S> T;
  const ConvSide& conv;
  T* dvalues;  // nnz

  int64_t row_size() const { return conv.strip_rows * conv.grid[1] * kLanes<T>; }

  // Rows [c0, c1) of dy for one strip.
  void fill_dy(const Samples<const S>& dy, int64_t group, int64_t strip, int64_t c0, int64_t c1,
               T* packed) const {
    const StripRows y(conv, strip);
    const int64_t from = y.from * conv.grid[1], to = y.to * conv.grid[1];
    for (int64_t c = c0; c < c1; c++) {
      if (c + 1 < dy.channels) prefetch_pixels(dy, group, c + 1, from, to);
      pack_pixels(dy, group, c, from, to, nullptr, packed + c * row_size());
    }
  }
  // Adds the share of one strip, for rows [r0, r1).
  void rows(int64_t strip, const T* copies, const T* dy, int64_t r0, int64_t r1) const {
    constexpr int w = kLanes<T>;
    const Side& side = conv.side;
    const StripRows strip_rows(conv, strip);
    const int64_t height = strip_rows.to - strip_rows.from;
    for_pixel_tiles(conv, 0, height, [&](int64_t y, int64_t x, int64_t tall, int64_t wide) {
      const T* from = dy + r0 * row_size() + (y * conv.grid[1] + x) * w;
      const T* source = copies + (y * conv.pitch + x) * w;
      with_index(side, [&](auto* index) {
        for (int64_t b = 0; b < side.blocks; b++)
          sddmm_pixels<T>(side.begin_of(b) + r0, side.begin_of(b + 1) + r0, r1 - r0, index, source,
                          conv.pitch * w, from, conv.grid[1] * w, row_size(), tall, wide, dvalues);
      });
    });
  }
};

template <class S>
void sample_gradient(const SampleGradient<S>& gradient, const Samples<const S>& x,
                     const Samples<const S>& dy, const Parallel& parallel) {
  typedef Sum<S> T;
  const ConvSide& s = gradient.conv;
  const SampleTables tables(s, kLanes<T>);
  const int64_t strips = x.groups() * s.strips, rows = s.side.rows;
  const int64_t pixels = s.grid[0] * s.grid[1];
  __builtin_memset(gradient.dvalues, 0, sizeof(T) * s.side.nnz);
  const int workers = worth_waking(parallel, (s.side.nnz + rows) * pixels * x.batch);
  const int64_t together = workers == 1 ? 1 : least(strips, 2 * workers);
  const int64_t size = sample_copies_size<S>(s), dy_size = rows * gradient.row_size();
  Scratch<T> copies(size * together), packed(dy_size * together);
  const int64_t channels = 16, x_parts = ceil_div(s.source_channels, channels);
  const int64_t dy_parts = ceil_div(rows, channels);
  const int64_t step = workers == 1 ? rows : sample_row_step(s, 2 * workers);
  const int64_t row_items = ceil_div(rows, step);

  for (int64_t first = 0; first < strips; first += together) {
    const int64_t n = least(strips - first, together);
    share(parallel, workers, n * (x_parts + dy_parts), [&](int, int64_t i) {
      const bool of_x = i < n * x_parts;
      const int64_t parts = of_x ? x_parts : dy_parts, j = of_x ? i : i - n * x_parts;
      const int64_t t = j / parts, c = j % parts * channels;
      const int64_t group = (first + t) / s.strips, strip = (first + t) % s.strips;
      if (of_x)
        fill_samples<S>(s, tables, x, group, strip, c, least(c + channels, s.source_channels),
                        first == 0, copies.get() + t * size);
      else
        gradient.fill_dy(dy, group, strip, c, least(c + channels, rows),
                         packed.get() + t * dy_size);
    });
    share(parallel, workers, row_items, [&](int, int64_t i) {
      for (int64_t t = 0; t < n; t++)
        gradient.rows((first + t) % s.strips, copies.get() + t * size, packed.get() + t * dy_size,
                      i * step, least((i + 1) * step, rows));
    });
  }
}

}  // namespace
}  // namespace sparsetrain

// Convolutions whose lanes are samples (see conv_plan.h): a vector is one pixel of as many images
// as it has lanes, a group. A nonzero reads a tile of pixels at a constant distance from the tile
// of results.
#pragma once

#include "conv_plan.h"
#include "kernels.h"
#include "linear-inl.h"
#include "sample_planes-inl.h"

namespace sparsetrain {
namespace {

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
  RowsOfIndices<I, 4> cells(begin, end, rows, index);
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
    auto add = [&](Vec<T>(*into)[NV], int64_t at, Vec<T> value) __attribute__((always_inline)) {
      const T* p = x + at * w;
      ST_UNROLL
      for (int h = 0; h < RH; h++, p += x_pitch) {
        p = operands(p);  // else as many offsets in registers as there are vectors, too
        ST_UNROLL
        for (int v = 0; v < NV; v++) into[h][v] += value * load<T>(p + v * w);
      }
    };
    auto add_one = [&](auto j, int64_t at, Vec<T> value) __attribute__((always_inline)) {
      add(sum[decltype(j)::value % chains], at, value);
    };
    int64_t at, stop;
    const Indices<I, 4> four = cells.take(&at, &stop);
    for_fours<T>(four, index + at, values + at, stop - at, add_one);
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
// of x; at: theirs come first. Sums stay in registers for the whole tile, dy passes by. H x W
// pixels, or, if zero, height x width.
template <class T, int G, int H, int W, class I>
ST_INLINE void sddmm_pixels_group(const T* dy, int64_t dy_pitch, Indices<I, 8> at, const T* x,
                                  int64_t x_pitch, int64_t height, int64_t width, T* dvalues,
                                  int count) {
  constexpr int w = kLanes<T>;
  Vec<T> sum[G];
  const T* p[G];
  auto begin = [&](auto g) __attribute__((always_inline)) {
    constexpr int J = decltype(g)::value;
    sum[J] = Vec<T>{};
    const T* own = x + at.template get<J>() * w;
    p[J] = J < count ? own : p[0];
  };
  for_constants(begin, std::make_integer_sequence<int, G>{});
  if constexpr (H > 0) {
    ST_UNROLL
    for (int h = 0; h < H; h++) {
      ST_UNROLL
      for (int v = 0; v < W; v++) {
        const Vec<T> d = load<T>(dy + h * dy_pitch + v * w);
        ST_UNROLL
        for (int g = 0; g < G; g++) sum[g] += d * load<T>(p[g] + v * w);
      }
      ST_UNROLL
      for (int g = 0; g < G && h + 1 < H; g++) p[g] = operands(p[g] + x_pitch);
    }
  } else {
    for (int64_t h = 0; h < height; h++, dy += dy_pitch) {
      for (int64_t i = 0; i < width * w; i += w) {
        const Vec<T> d = load<T>(dy + i);
        ST_UNROLL
        for (int g = 0; g < G; g++) sum[g] += d * load<T>(p[g] + i);
      }
      ST_UNROLL
      for (int g = 0; g < G; g++) p[g] += x_pitch;
    }
  }
  if (count == G) return add_sums<T, G>(sum, dvalues);
  T sums[G] = {};
  add_sums<T, G>(sum, sums);
  for (int g = 0; g < count; g++) dvalues[g] += sums[g];
}

// One column block for `rows` rows; arguments as for spmm_pixels, dy in the place of y.
template <class T, int H, int W, class I>
void sddmm_pixels(const int32_t* __restrict begin, const int32_t* __restrict end, int64_t rows,
                  const I* __restrict index, const T* __restrict x, int64_t x_pitch,
                  const T* __restrict dy, int64_t dy_pitch, int64_t dy_stride, int64_t height,
                  int64_t width, T* __restrict dvalues) {
  RowsOfIndices<I, 8> cells(begin, end, rows, index);
  for (int64_t r = 0; r < rows; r++, dy += dy_stride) {
    const int64_t ahead = r + kRowsAhead < rows ? r + kRowsAhead : r;
    prefetch_run(index, dvalues, begin[ahead], end[ahead]);
    int64_t k, stop;
    Indices<I, 8> at = cells.take(&k, &stop);
    auto group = [&](auto n, int count) __attribute__((always_inline)) {
      constexpr int G = decltype(n)::value;
      Indices<I, 8> next(index + k + G);
      next.keep();
      sddmm_pixels_group<T, G, H, W>(dy, dy_pitch, at, x, x_pitch, height, width, dvalues + k,
                                     count);
      at = next;
      k += G;
    };
    while (k + 8 <= stop) group(std::integral_constant<int, 8>{}, 8);
    // What is left: a group that is not full beats one or two smaller ones.
    if (k + 4 < stop) group(std::integral_constant<int, 8>{}, static_cast<int>(stop - k));
    if (k + 2 < stop) group(std::integral_constant<int, 4>{}, static_cast<int>(stop - k));
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
  SampleWriter<S> result;

  int64_t phases() const { return static_cast<int64_t>(conv.phases.size()); }
  int64_t row_size() const { return conv.band_rows * conv.grid[1] * kLanes<T>; }
  // Results of a band, and room to gather one channel of it.
  int64_t chunk_size(int64_t rows) const {
    return (rows + conv.result_step[0] * conv.result_step[1]) * row_size();
  }

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
  void place(int64_t group, int64_t from, int64_t to, int64_t r0, int64_t r1, T* chunk) const {
    const int64_t step = conv.result_step[0], width = result.out.size[1];
    const int64_t first = from * step * width;
    const int64_t last = least(to * step, result.out.size[0]) * width;
    T* gathered = chunk + (r1 - r0) * row_size();
    for (int64_t r = r0; r < r1; r += phases(), chunk += phases() * row_size())
      result.put(group, r / phases(), first, last,
                 tables.places.empty() ? nullptr : tables.places.data(), chunk, gathered);
  }
};

// Rows that a worker takes at a time: whole channels. Not too few: they share what they fetch into
// L1.
ST_INLINE int64_t sample_row_step(const ConvSide& s, int64_t pieces) {
  const int64_t phases = static_cast<int64_t>(s.phases.size());
  return ceil_div(ceil_div(s.side.rows, pieces), 16 * phases) * 16 * phases;
}

// Into how many runs the strips of a group are cut for `workers`: the more, the evener the shares.
ST_INLINE int64_t strip_runs(const ConvSide& s, int64_t groups, int workers) {
  return workers == 1 ? 1 : least(s.strips, ceil_div(8 * workers, groups));
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

  // Each worker takes some strips of one group in a row: each shares rows with the one before.
  const int64_t runs = strip_runs(s, source.groups(), workers), items = source.groups() * runs;
  if (shared_evenly(items, workers)) {
    const int64_t chunk = product.chunk_size(rows);
    Scratch<T> copies(size * workers), chunks(chunk * workers);
    Scratch<bool> filled(workers);
    for (int i = 0; i < workers; i++) filled.get()[i] = false;
    share(parallel, workers, items, [&](int worker, int64_t i) {
      T* own = copies.get() + worker * size;
      const int64_t group = i / runs, first = s.strips * (i % runs) / runs;
      for (int64_t t = first; t < s.strips * (i % runs + 1) / runs; t++) {
        const Held held = held_by(t > first, filled.get()[worker]);
        fill_samples<S>(s, tables, source, group, t, 0, s.source_channels, held, own);
        filled.get()[worker] = true;
        product.rows(group, t, own, 0, rows, chunks.get() + worker * chunk);
      }
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
                    least(c + channels, s.source_channels), Held::nothing,
                    copies.get() + at * size);
  });
  share(parallel, workers, strips * pieces, [&](int worker, int64_t i) {
    const int64_t at = i / pieces, r = i % pieces * step;
    product.rows(at / s.strips, at % s.strips, copies.get() + at * size, r, least(r + step, rows),
                 chunks.get() + worker * chunk);
  });
}

// Rows of dy for one strip: pixel (y, x) of row r at data + r * stride + y * pitch + x * lanes.
template <class T>
struct DyRows {
  const T* data;
  int64_t stride, pitch;
};

// dvalues, in the pattern's order, from copies of x and rows of dy.
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
      if (!any_nonzeros(conv.side, c, c + 1)) continue;
      const bool more = c + 1 < dy.channels && any_nonzeros(conv.side, c + 1, c + 2);
      pack_pixels(dy, group, c, from, to, nullptr, packed + c * row_size(),
                  more ? dy.plane(group, c + 1) : nullptr);
    }
  }
  DyRows<T> packed_rows(const T* packed) const {
    return {packed, row_size(), conv.grid[1] * kLanes<T>};
  }
  // Whether the copies of dy that `other`, the transposed side, makes for a strip hold the rows of
  // dy that this side needs for its strip of the same number. Not where they are as much zeros:
  // 512ch/7 is 1.03-1.06 times faster without at 80-95 % (98 %: 0.95), larger planes 0.85-1.02.
  bool shares_dy(const ConvSide& other) const {
    return 5 * other.copy_lanes <= 8 * row_size() && other.kinds.size() == 1 &&
           other.source_step[0] == 1 && other.source_step[1] == 1 &&
           other.grid[0] == conv.grid[0] && other.grid[1] == conv.grid[1] &&
           other.strip_rows == conv.strip_rows && other.first_shift <= 0 &&
           other.first_shift + other.span >= 0 && other.first_column <= 0 &&
           other.pitch + other.first_column >= conv.grid[1];
  }
  static DyRows<T> shared_rows(const ConvSide& other, const T* copies) {
    constexpr int w = kLanes<T>;
    return {copies - (other.first_shift * other.pitch + other.first_column) * w, other.copy_lanes,
            other.pitch * w};
  }
  // Adds the share of one strip, for rows [r0, r1), to `sums` (nnz).
  void rows(int64_t strip, const T* copies, const DyRows<T>& dy, int64_t r0, int64_t r1,
            T* sums) const {
    constexpr int w = kLanes<T>;
    const Side& side = conv.side;
    const StripRows strip_rows(conv, strip);
    const int64_t height = strip_rows.to - strip_rows.from;
    for_pixel_tiles(conv, 0, height, [&](int64_t y, int64_t x, int64_t tall, int64_t wide) {
      const T* from = dy.data + r0 * dy.stride + y * dy.pitch + x * w;
      const T* source = copies + (y * conv.pitch + x) * w;
      with_index(side, [&](auto* index) {
        auto blocks = [&](auto h, auto v) {
          for (int64_t b = 0; b < side.blocks; b++)
            sddmm_pixels<T, decltype(h)::value, decltype(v)::value>(
                side.begin_of(b) + r0, side.begin_of(b + 1) + r0, r1 - r0, index, source,
                conv.pitch * w, from, dy.pitch, dy.stride, tall, wide, sums);
        };
        if (tall == kTileRows && wide == kTileColumns)
          return blocks(std::integral_constant<int, kTileRows>{},
                        std::integral_constant<int, kTileColumns>{});
        if (tall == 1 && wide == kTileColumns)
          return blocks(std::integral_constant<int, 1>{},
                        std::integral_constant<int, kTileColumns>{});
        blocks(std::integral_constant<int, 0>{}, std::integral_constant<int, 0>{});
      });
    });
  }
};

// Both gradients from the strips of groups of samples. Each group's sums of the gradient of the
// values are made apart and added to the others in order: the same whoever does what.
template <class S>
struct SampleGradients {
  typedef Sum<S> T;
  const SampleProduct<S>* product;  // dx from the same strips of dy, or null
  const SampleGradient<S>& gradient;
  const Samples<const S>&x, &dy;
  const Parallel& parallel;
  int workers;
  const SampleTables& tables;

  const ConvSide& conv() const { return gradient.conv; }
  int64_t rows() const { return conv().side.rows; }
  int64_t size() const { return sample_copies_size<S>(conv()); }
  int64_t dy_size() const {
    return product ? sample_copies_size<S>(product->conv) : rows() * gradient.row_size();
  }
  int64_t dx_rows() const { return product ? product->conv.side.rows : 0; }
  int64_t chunk() const { return product ? product->chunk_size(dx_rows()) : 0; }

  void fill_dy(int64_t group, int64_t strip, int64_t c0, int64_t c1, Held held, T* to) const {
    if (!product) return gradient.fill_dy(dy, group, strip, c0, c1, to);
    fill_samples<S>(product->conv, product->tables, dy, group, strip, c0, c1, held, to);
  }
  void fill_x(int64_t group, int64_t strip, int64_t c0, int64_t c1, Held held, T* to) const {
    fill_samples<S>(conv(), tables, x, group, strip, c0, c1, held, to);
  }
  void take_dvalues(int64_t strip, const T* copies, const T* dy_copies, int64_t r0, int64_t r1,
                    T* dvalues) const {
    gradient.rows(
        strip, copies,
        product ? gradient.shared_rows(product->conv, dy_copies) : gradient.packed_rows(dy_copies),
        r0, r1, dvalues);
  }
  template <class F>
  void sum_groups(int makers, const F& group) const {
    sum_pieces(parallel, makers, x.groups(), conv().side.nnz, gradient.dvalues, group);
  }

  // A worker has a group to itself.
  void by_groups() const {
    Scratch<T> copies(size() * workers), dy_copies(dy_size() * workers), chunks(chunk() * workers);
    Scratch<bool> filled(workers);
    for (int i = 0; i < workers; i++) filled.get()[i] = false;
    sum_groups(workers, [&](int worker, int64_t g, T* dvalues) {
      T* own = copies.get() + worker * size();
      T* own_dy = dy_copies.get() + worker * dy_size();
      for (int64_t t = 0; t < conv().strips; t++) {
        const Held held = held_by(t > 0, filled.get()[worker]);
        fill_dy(g, t, 0, rows(), held, own_dy);
        if (product) product->rows(g, t, own_dy, 0, dx_rows(), chunks.get() + worker * chunk());
        fill_x(g, t, 0, conv().source_channels, held, own);
        take_dvalues(t, own, own_dy, 0, rows(), dvalues);
        filled.get()[worker] = true;
      }
    });
  }

  // Workers share the strips of one group, then of the next.
  void by_strips() const {
    const int64_t together = least(conv().strips, 2 * workers);
    Scratch<T> copies(size() * together), dy_copies(dy_size() * together);
    Scratch<T> chunks(chunk() * workers);
    sum_groups(1, [&](int, int64_t g, T* dvalues) {
      for (int64_t first = 0; first < conv().strips; first += together)
        strips(g, first, least(conv().strips - first, together), g || first, copies.get(),
               dy_copies.get(), chunks.get(), dvalues);
    });
  }

 private:
  void strips(int64_t g, int64_t first, int64_t n, bool filled, T* copies, T* dy_copies, T* chunks,
              T* dvalues) const {
    const Held held = filled ? Held::another : Held::nothing;
    const int64_t channels = 16, x_parts = ceil_div(conv().source_channels, channels);
    const int64_t dy_parts = ceil_div(rows(), channels);
    const int64_t step = sample_row_step(conv(), 2 * workers);
    auto some_dy = [&](int64_t i) {
      const int64_t t = i / dy_parts, c = i % dy_parts * channels;
      fill_dy(g, first + t, c, least(c + channels, rows()), held, dy_copies + t * dy_size());
    };
    auto some_x = [&](int64_t i) {
      const int64_t t = i / x_parts, c = i % x_parts * channels;
      fill_x(g, first + t, c, least(c + channels, conv().source_channels), held,
             copies + t * size());
    };
    const int64_t dy_items = n * dy_parts, x_items = n * x_parts;
    share(parallel, workers, dy_items + (product ? 0 : x_items), [&](int, int64_t i) {
      if (i < dy_items) return some_dy(i);
      some_x(i - dy_items);
    });
    if (product)
      share(parallel, workers, n + x_items, [&](int worker, int64_t i) {
        if (i >= n) return some_x(i - n);
        product->rows(g, first + i, dy_copies + i * dy_size(), 0, dx_rows(),
                      chunks + worker * chunk());
      });
    share(parallel, workers, ceil_div(rows(), step), [&](int, int64_t i) {
      for (int64_t t = 0; t < n; t++)
        take_dvalues(first + t, copies + t * size(), dy_copies + t * dy_size(), i * step,
                     least((i + 1) * step, rows()), dvalues);
    });
  }
};

template <class S>
void sample_gradients(const SampleProduct<S>* product, const SampleGradient<S>& gradient,
                      const Samples<const S>& x, const Samples<const S>& dy,
                      const Parallel& parallel) {
  const ConvSide& s = gradient.conv;
  const int workers =
      worth_waking(parallel, (s.side.nnz + s.side.rows) * s.grid[0] * s.grid[1] * x.batch);
  const SampleTables tables(s, kLanes<Sum<S>>);
  const SampleGradients<S> gradients{product, gradient, x, dy, parallel, workers, tables};
  if (shared_evenly(x.groups(), workers)) return gradients.by_groups();
  gradients.by_strips();
}

}  // namespace
}  // namespace sparsetrain

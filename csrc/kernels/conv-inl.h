// Convolutions: strips of pixels (see conv_plan.h) through the same sparse products as the linear
// layer's tiles.
#pragma once

#include "conv_columns-inl.h"
#include "conv_plan.h"
#include "conv_samples-inl.h"
#include "kernels.h"
#include "linear-inl.h"
#include "planes-inl.h"
#include "pointwise-inl.h"

namespace sparsetrain {
namespace {

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

  // Rows [r0, r1) of one strip. chunk: chunk_size() of scratch; runs: strip_lanes. next: what to
  // ask for meanwhile.
  void rows(int64_t group, int64_t strip, const T* copies, int64_t r0, int64_t r1, T* chunk,
            Run* runs, ReadAhead next = {}) const {
    const Side& side = conv.side;
    const int64_t from = conv.strip_begin(strip), lanes = conv.strip_end(strip) - from;
    const int count = placer.list(group, from, lanes, runs);
    if (!count) return;
    for (int64_t r = r0; r < r1; r += chunk_rows()) {
      const int64_t end = least(r + chunk_rows(), r1);
      for_tiles<T>(conv, strip, [&](auto n, int64_t lane) {
        constexpr int NV = decltype(n)::value;
        with_index(side, [&](auto* index) {
          with_addresses([&](auto apart) {
            for (int64_t b = 0; b < side.blocks; b++)
              spmm_block<T, NV, SPARSETRAIN_VECTOR_BYTES, decltype(apart)::value>(
                  side.begin_of(b) + r, side.begin_of(b + 1) + r, end - r, index, values,
                  copies + lane, chunk + lane, conv.strip_lanes, bias ? bias + r : nullptr, b == 0,
                  next);
          });
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

// Calls of ReadAhead::some_more for `rows` rows of a strip.
ST_INLINE int64_t visits(const ConvSide& s, int64_t rows) {
  return s.side.blocks * rows * ceil_div(s.strip_lanes, s.tile_lanes);
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

  if (shared_evenly(strips, workers)) {
    Scratch<T> copies(size * workers);
    share(parallel, workers, strips, [&](int worker, int64_t i) {
      T* own = copies.get() + worker * size;
      fill_copies(s, source, i / s.strips, i % s.strips, 0, s.source_channels, own);
      const ReadAhead next(strip_of(s, source, i + workers), visits(s, s.side.rows));
      product.rows(i / s.strips, i % s.strips, own, 0, s.side.rows, chunks.get() + worker * chunk,
                   runs.get() + worker * s.strip_lanes, next);
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

  // Adds the share of one strip, for rows [r0, r1), to `sums` (nnz). copies: of dy; centre: of x,
  // side.rows x centre_lanes; next: what to ask for meanwhile.
  void rows(int64_t strip, const T* copies, const T* centre, int64_t r0, int64_t r1, ReadAhead next,
            T* sums) const {
    const Side& side = conv.side;
    for_tiles<T>(conv, strip, [&](auto n, int64_t lane) {
      constexpr int NV = decltype(n)::value;
      with_index(side, [&](auto* index) {
        for (int64_t b = 0; b < side.blocks; b++)
          sddmm_block<T, NV, SPARSETRAIN_VECTOR_BYTES>(
              side.begin_of(b) + r0, side.begin_of(b + 1) + r0, r1 - r0, index, copies + lane,
              centre + r0 * conv.centre_lanes + lane, conv.centre_lanes, sums, next);
      });
    });
  }
};

// Both gradients from strips. Strips fall into pieces; a piece's sums of the gradient of the values
// are made apart and added to the others in order: the same whoever does what.
template <class S>
struct ConvGradients {
  typedef Sum<S> T;
  const ConvProduct<S>* product;  // null: dx is not wanted
  const ConvGradient<S>& gradient;
  const Planes<S>&dy, &x;
  const Parallel& parallel;
  int workers;

  const ConvSide& conv() const { return gradient.conv; }
  int64_t strips() const { return conv().groups * conv().strips; }
  // Lanes enough in each that adding its sums is a small part: with 8 pieces at 7 x 7, 4 %.
  int64_t pieces() const {
    constexpr int64_t kLeastLanes = 512;
    int64_t n = kMostGroups;
    while (n > 1 && (n > strips() || strips() * conv().strip_lanes < n * kLeastLanes)) n /= 2;
    return n;
  }
  int64_t first_strip(int64_t piece) const { return strips() * piece / pieces(); }
  int64_t size() const { return copies_size<S>(conv()); }
  int64_t centre_size() const { return conv().side.rows * conv().centre_lanes; }
  int64_t chunk() const { return product ? product->chunk_size() : 0; }

  template <class F>
  void sum_pieces(int makers, const F& piece) const {
    sparsetrain::sum_pieces(parallel, makers, pieces(), conv().side.nnz, gradient.dvalues, piece);
  }

  // A worker has a piece to itself.
  void by_pieces() const {
    const int64_t lanes = conv().strip_lanes;
    Scratch<T> copies(size() * workers), centres(centre_size() * workers);
    Scratch<T> chunks(chunk() * workers);
    Scratch<Run> runs(product ? lanes * workers : 0);
    sum_pieces(workers, [&](int worker, int64_t i, T* dvalues) {
      T* own = copies.get() + worker * size();
      T* centre = centres.get() + worker * centre_size();
      for (int64_t at = first_strip(i); at < first_strip(i + 1); at++) {
        fill_dy(at, 0, conv().source_channels, own);
        fill_x(at, 0, conv().result_channels, centre);
        if (product)
          take_dx(at, own, at + 1, chunks.get() + worker * chunk(), runs.get() + worker * lanes);
        take_dvalues(at, own, centre, 0, conv().side.rows, at + 1, dvalues);
      }
    });
  }

  // Workers share the strips of one piece, then of the next.
  void by_strips() const {
    const int64_t together = 2 * workers;
    Scratch<T> copies(size() * together), centres(centre_size() * together);
    Scratch<T> chunks(chunk() * workers);
    Scratch<Run> runs(product ? conv().strip_lanes * workers : 0);
    sum_pieces(1, [&](int, int64_t i, T* dvalues) {
      for (int64_t at = first_strip(i); at < first_strip(i + 1); at += together)
        some_strips(at, least(first_strip(i + 1) - at, together), copies.get(), centres.get(),
                    chunks.get(), runs.get(), dvalues);
    });
  }

 private:
  void fill_dy(int64_t at, int64_t c0, int64_t c1, T* to) const {
    fill_copies(conv(), dy, at / conv().strips, at % conv().strips, c0, c1, to);
  }
  void fill_x(int64_t at, int64_t c0, int64_t c1, T* to) const {
    const ConvSide& s = conv();
    const int64_t strip = at % s.strips, begin = s.strip_begin(strip), end = s.strip_end(strip);
    const int64_t phases = static_cast<int64_t>(s.phases.size());
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
  }
  // next: the strip to ask for meanwhile
  void take_dx(int64_t at, const T* copies, int64_t next, T* chunk, Run* runs) const {
    const ConvSide& s = conv();
    product->rows(at / s.strips, at % s.strips, copies, 0, s.side.rows, chunk, runs,
                  ReadAhead(strip_of(s, x, next), visits(s, s.side.rows)));
  }
  void take_dvalues(int64_t at, const T* copies, const T* centre, int64_t r0, int64_t r1,
                    int64_t next, T* dvalues) const {
    const ConvSide& s = conv();
    const ReadAhead ahead(r0 ? Stretches{} : strip_of(s, dy, next), visits(s, r1));
    gradient.rows(at % s.strips, copies, centre, r0, r1, ahead, dvalues);
  }
  void some_strips(int64_t first, int64_t n, T* copies, T* centres, T* chunks, Run* runs,
                   T* dvalues) const {
    const ConvSide& s = conv();
    const int64_t channels = 16, dy_parts = ceil_div(s.source_channels, channels);
    const int64_t x_parts = ceil_div(s.result_channels, channels), step = row_step(s, 1, workers);
    share(parallel, workers, n * (dy_parts + x_parts), [&](int, int64_t i) {
      const bool of_dy = i < n * dy_parts;
      if (!of_dy) i -= n * dy_parts;
      const int64_t parts = of_dy ? dy_parts : x_parts, t = i / parts, c = i % parts * channels;
      if (of_dy)
        return fill_dy(first + t, c, least(c + channels, s.source_channels), copies + t * size());
      fill_x(first + t, c, least(c + channels, s.result_channels), centres + t * centre_size());
    });
    const int64_t dx_items = product ? n : 0;
    share(parallel, workers, dx_items + ceil_div(s.side.rows, step), [&](int worker, int64_t i) {
      if (i < dx_items)
        return take_dx(first + i, copies + i * size(), first + i + n, chunks + worker * chunk(),
                       runs + worker * s.strip_lanes);
      const int64_t r0 = (i - dx_items) * step, r1 = least(r0 + step, s.side.rows);
      for (int64_t t = 0; t < n; t++)
        take_dvalues(first + t, copies + t * size(), centres + t * centre_size(), r0, r1,
                     first + t + n, dvalues);
    });
  }
};

// product may be null (dx not wanted).
template <class S>
void conv_gradients(const ConvProduct<S>* product, const ConvGradient<S>& gradient,
                    const Planes<S>& dy, const Planes<S>& x, const Parallel& parallel) {
  const ConvSide& s = gradient.conv;
  const int workers = worth_waking(parallel, (s.side.nnz + s.side.rows) * s.lanes * s.groups);
  const ConvGradients<S> gradients{product, gradient, dy, x, parallel, workers};
  if (!gradients.strips() || !s.side.rows) {
    __builtin_memset(gradient.dvalues, 0, sizeof(*gradient.dvalues) * s.side.nnz);
    return;
  }
  if (shared_evenly(gradients.pieces(), workers)) return gradients.by_pieces();
  gradients.by_strips();
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
  if (samples_are_pixels(a.plan->pattern().nnz, a.shape, conv_vectors<T>()))
    return columns_forward<S>(a);
  const PointwiseBy by = pointwise_by(a, kLanes<T>, kPointwiseBytes);
  if (by != PointwiseBy::none) return pointwise_forward<S>(a, by);
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
  if (samples_are_pixels(a.plan->pattern().nnz, shape, conv_vectors<T>()))
    return columns_backward<S>(a);
  const PointwiseBy by = pointwise_by(a, kLanes<T>, kPointwiseBytes);
  if (by != PointwiseBy::none) return pointwise_backward<S>(a, by);
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

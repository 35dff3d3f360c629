// One tile of pixels of a 1x1 convolution (see pointwise_plan.h).
#pragma once

#include "linear-inl.h"
#include "pointwise_plan.h"
#include "read_ahead-inl.h"

namespace sparsetrain {
namespace {

constexpr int kPointwiseTile = 4;  // vectors
// Memory is asked for by groups of tiles: in runs of 128 bytes it gives 10 GB/s, of 512 14.
constexpr int64_t kPointwiseGroup = 4;
constexpr int64_t kPointwiseBytes = kPointwiseTile * SPARSETRAIN_VECTOR_BYTES;

// Tiles of the pixels of all images, one after the other. The last vector of an image ends with it:
// where it overlaps the one before, both compute the same pixels, and sums leave them out. Both are
// of one tile, so that no two threads write the same pixel.
template <class T>
struct PixelTiles {
  int64_t plane, vectors_per_image, per_image, count, group;

  PixelTiles(int64_t batch, int64_t plane)
      : plane(plane),
        vectors_per_image(ceil_div(plane, kLanes<T>)),
        per_image(ceil_div(vectors_per_image, kPointwiseTile)),
        count(batch * per_image),
        group(least(per_image, kPointwiseGroup)) {}
  static constexpr int64_t lanes() { return kPointwiseTile * kLanes<T>; }
  // First vector of an image's tile, and the end of the last one: not one vector alone.
  int64_t vector_of(int64_t tile) const {
    if (tile == per_image) return vectors_per_image;
    const bool alone = tile > 0 && tile + 1 == per_image;
    return tile * kPointwiseTile - (alone && vectors_per_image % kPointwiseTile == 1);
  }
  int vectors(int64_t i) const {
    const int64_t tile = i % per_image;
    return static_cast<int>(vector_of(tile + 1) - vector_of(tile));
  }
  // Lanes of the last vector of tile i that another one has.
  int64_t overlap(int64_t i) const {
    return i % per_image + 1 == per_image ? vectors_per_image * kLanes<T> - plane : 0;
  }
  // Where tile i begins, in the first of `channels` planes of its image.
  int64_t first(int64_t i, int64_t channels) const {
    return i / per_image * channels * plane + vector_of(i % per_image) * kLanes<T>;
  }
  // Tiles come in groups that belong to one image each.
  int64_t place_in_group(int64_t i) const { return i % per_image % group; }
  int64_t next_group(int64_t i) const {  // its first tile
    const int64_t in = i % per_image;
    return i - in + least((in / group + 1) * group, per_image);
  }
  // Pixels of the group that begins with tile i.
  int64_t group_lanes(int64_t i) const {
    return least(group * lanes(), plane - vector_of(i % per_image) * kLanes<T>);
  }
};

// A contiguous (batch, channels, pixels) tensor; or none.
template <class S>
struct PointwisePlanes {
  S* data;
  int64_t channels;

  template <class T>
  S* tile(const PixelTiles<T>& tiles, int64_t i) const {
    return data + tiles.first(i, channels);
  }
  template <class T>
  bool past_caches(const PixelTiles<T>& tiles, int64_t batch) const {
    const int64_t plane = tiles.plane * static_cast<int64_t>(sizeof(S));
    return sizeof(S) == sizeof(T) && plane % 64 == 0 &&
           reinterpret_cast<uintptr_t>(data) % 64 == 0 && batch * channels * plane >= kStreamBytes;
  }
};

template <class S>
ST_INLINE void put_pixels(S* to, Vec<Sum<S>> v, bool past_caches) {
  if constexpr (sizeof(S) == sizeof(Sum<S>)) {
    if (past_caches) return stream<S>(to, v);
  }
  store_narrowed<S>(to, v, kLanes<Sum<S>>);
}

// Rows that are read: of this tile, of the next one, and of the next group; or null.
template <class S>
struct RowsAhead {
  const S *now = nullptr, *then = nullptr, *later = nullptr;
  int64_t place = 0, group = 1;  // of the tile in its group, and tiles of that
};

// Both passes over one tile. The tile that is kept has kPointwiseBytes for each channel.
template <class S, int NV>
class PointwiseTile {
 public:
  typedef Sum<S> T;
  static constexpr int w = kLanes<T>;

  // overlap: lanes of the last vector that another one has; ahead: what else to ask for.
  PointwiseTile(const PointwiseSide& side, int64_t plane, int64_t overlap, const RowsAhead<S>& rows,
                const ReadAhead& ahead)
      : side_(side), plane_(plane), overlap_(overlap), rows_(rows), ahead_(ahead) {
    for (int i = 0; i < w; i++) own_lanes_[i] = i < overlap ? 0 : 1;
  }

  // once: without the lanes that another tile or vector has.
  void pack(const S* from, int64_t channels, bool once, T* kept) const {
    const Vec<T> own = loadu<T>(own_lanes_);
    for (int64_t c = 0; c < channels; c++, from += plane_, kept += kPointwiseTile * w) {
      ST_UNROLL
      for (int v = 0; v < NV; v++) store<T>(kept + v * w, load_widened(from + place(v)));
      if (once && overlap_) store<T>(last(kept), only(own, load<T>(last(kept))));
    }
  }
  // bias may be null.
  void fill(const T* bias, int64_t channels, T* kept) const {
    for (int64_t c = 0; c < channels; c++, kept += kPointwiseTile * w) {
      const Vec<T> b = bias ? broadcast<T>(bias[c]) : Vec<T>{};
      ST_UNROLL
      for (int v = 0; v < NV; v++) store<T>(kept + v * w, b);
    }
  }
  void unpack(const T* kept, int64_t channels, S* to, bool past_caches) const {
    for (int64_t c = 0; c < channels; c++, to += plane_, kept += kPointwiseTile * w) {
      ST_UNROLL
      for (int v = 0; v < NV; v++) put_pixels<S>(to + place(v), load<T>(kept + v * w), past_caches);
    }
  }
  // sums[c] += the pixels of channel c, lane by lane.
  void sum_kept(const T* kept, int64_t channels, T* sums) const {
    const Vec<T> own = loadu<T>(own_lanes_);
    for (int64_t c = 0; c < channels; c++, kept += kPointwiseTile * w) {
      Vec<T> row[NV];
      ST_UNROLL
      for (int v = 0; v < NV; v++) row[v] = load<T>(kept + v * w);
      add_row(own, row, sums + c * w);
    }
  }

  // to: rows of results, each of its products with the kept x.
  void gather(const T* values, const T* bias, const T* kept, S* to, bool past_caches) {
    with_addresses([&](auto apart) {
      each_row<4>(true, [&](int64_t row, Indices<uint16_t, 4> ones, int64_t at, int64_t count)
                            __attribute__((always_inline)) {
                              S* out = to + row * plane_;
                              spmm_sums<T, NV, 8, decltype(apart)::value>(
                                  ones, side_.index.get() + at, values + at, count, kept,
                                  static_cast<const T*>(nullptr), bias ? bias + row : nullptr, true,
                                  [&](int v, Vec<T> sum) __attribute__((always_inline)) {
                                    put_pixels<S>(out + place(v), sum, past_caches);
                                  });
                            });
    });
  }
  // Each row of x adds its products to the kept results.
  void scatter(const T* values, T* kept) {
    each_row<4>(false, [&](int64_t row, Indices<uint16_t, 4> ones, int64_t at,
                           int64_t count) __attribute__((always_inline)) {
      Vec<T> x[NV];
      load_row(row, x);
      for_fours<T>(ones, side_.index.get() + at, values + at, count,
                   [&](auto, int64_t to, Vec<T> value)
                       __attribute__((always_inline)) { add_to(kept, to, value, x); });
    });
  }
  // Rows are of x; dy is kept. values, dvalues: in the order of visits.
  template <bool Dx, bool Dvalues>
  void gather_gradients(const T* values, const T* dy, T* dvalues, S* dx, bool past_caches) {
    each_row<8>(Dx, [&](int64_t row, Indices<uint16_t, 8> ones, int64_t at,
                        int64_t count) __attribute__((always_inline)) {
      Vec<T> x[NV] = {}, sum[NV] = {};
      if (Dvalues && count) {
        load_row(row, x);
        if (overlap_) x[NV - 1] = only(loadu<T>(own_lanes_), x[NV - 1]);
      }
      each_group<Dvalues>(ones, at, count, dvalues,
                          [&](int64_t from, int64_t k) __attribute__((always_inline)) {
                            const T* p = operands(offset(dy, from * 8));
                            Vec<T> value{}, dot{};
                            if constexpr (Dx) value = broadcast<T>(values[k]);
                            ST_UNROLL
                            for (int v = 0; v < NV; v++) {
                              const Vec<T> d = load<T>(p + v * w);
                              if constexpr (Dx) sum[v] += value * d;
                              if constexpr (Dvalues) dot = v ? dot + x[v] * d : x[v] * d;
                            }
                            return dot;
                          });
      if constexpr (Dx) {
        S* out = dx + row * plane_;
        ST_UNROLL
        for (int v = 0; v < NV; v++) put_pixels<S>(out + place(v), sum[v], past_caches);
      }
    });
  }
  // Rows are of dy; x is kept, and so is dx. dbias: see sum_kept; or null.
  template <bool Dx, bool Dvalues>
  void scatter_gradients(const T* values, const T* x, T* dvalues, T* dx, T* dbias) {
    each_row<8>(dbias, [&](int64_t row, Indices<uint16_t, 8> ones, int64_t at,
                           int64_t count) __attribute__((always_inline)) {
      Vec<T> dy[NV];
      load_row(row, dy);
      if (dbias) add_row(loadu<T>(own_lanes_), dy, dbias + row * w);
      each_group<Dvalues>(
          ones, at, count, dvalues, [&](int64_t from, int64_t k) __attribute__((always_inline)) {
            Vec<T> dot{};
            if constexpr (Dvalues) {
              const T* p = operands(offset(x, from * 8));
              ST_UNROLL
              for (int v = 0; v < NV; v++)
                dot = v ? dot + dy[v] * load<T>(p + v * w) : dy[v] * load<T>(p + v * w);
            }
            if constexpr (Dx) add_to(dx, from, broadcast<T>(values[k]), dy);
            return dot;
          });
    });
  }

 private:
  // Where vector v begins, from the tile's first pixel.
  ST_INLINE int64_t place(int v) const { return v * w - (v == NV - 1 ? overlap_ : 0); }
  static ST_INLINE T* last(T* row) { return row + (NV - 1) * w; }
  // The lanes of v where `own` is one, else zero.
  static ST_INLINE Vec<T> only(Vec<T> own, Vec<T> v) { return own != 0 ? v : Vec<T>{}; }
  static ST_INLINE void add_row(Vec<T> own, const Vec<T>* row, T* sums) {
    Vec<T> all = only(own, row[NV - 1]);
    ST_UNROLL
    for (int v = 0; v < NV - 1; v++) all += row[v];
    store<T>(sums, load<T>(sums) + all);
  }
  static ST_INLINE void add_to(T* kept, int64_t place, Vec<T> value, const Vec<T>* row) {
    T* p = const_cast<T*>(operands(offset(static_cast<const T*>(kept), place * 8)));
    ST_UNROLL
    for (int v = 0; v < NV; v++) store<T>(p + v * w, load<T>(p + v * w) + value * row[v]);
  }
  ST_INLINE void load_row(int64_t row, Vec<T>* to) const {
    const S* from = rows_.now + row * plane_;
    ST_UNROLL
    for (int v = 0; v < NV; v++) to[v] = load_widened(from + place(v));
  }
  // f(row, its first N indices, place of its first nonzero, count), of empty rows if `empty`.
  template <int N, class F>
  ST_INLINE void each_row(bool empty, const F& f) {
    const int32_t* row = side_.row.get();
    const uint16_t* index = side_.index.get();
    int64_t at = 0, left = side_.rows;
    Indices<uint16_t, N> following(index);
    const int32_t* later =
        row + side_.empty + rows_.place * (side_.rows - side_.empty) / rows_.group;
    int64_t part = 0;
    auto ask = [&](auto near, const S* p) __attribute__((always_inline)) {
      ST_UNROLL
      for (int j = 0; j < NV * w * static_cast<int>(sizeof(S)); j += 64)
        __builtin_prefetch(p + j / sizeof(S), 0, decltype(near)::value ? 3 : 2);
    };
    for (int64_t i = 0; i < side_.run_count; i++) {
      const int64_t count = side_.runs[i].nonzeros;
      if (!count && !empty) {
        row += side_.runs[i].cells;
        left -= side_.runs[i].cells;
        continue;
      }
      for (int64_t c = side_.runs[i].cells; c > 0; c--, row++, left--, at += count) {
        if (rows_.now && count) {
          ask(std::true_type{},
              (left > kPointwiseAhead ? rows_.now : rows_.then) + row[kPointwiseAhead] * plane_);
          if (rows_.later) {
            ask(std::false_type{}, rows_.later + *later * plane_ + part * NV * w);
            if (++part == rows_.group) part = 0, later++;
          }
        }
        ahead_.some_more();
        const Indices<uint16_t, N> ones = following;
        following = Indices<uint16_t, N>(index + at + count);
        following.keep();
        f(*row, ones, at, count);
      }
    }
  }
  // product(place of the operand, number) of each nonzero of a row; the sums of their lanes are
  // added to dvalues.
  template <bool Dvalues, class F>
  ST_INLINE void each_group(Indices<uint16_t, 8> ones, int64_t at, int64_t count, T* dvalues,
                            const F& product) const {
    constexpr int most = kManyRegisters ? 8 : 4;
    for_groups<most>(ones, side_.index.get() + at, count,
                     [&](auto size, Indices<uint16_t, 8>& first, int64_t k)
                         __attribute__((always_inline)) {
                           constexpr int G = decltype(size)::value;
                           Vec<T> sum[G];
                           for_constants(
                               [&](auto j) __attribute__((always_inline)) {
                                 constexpr int J = decltype(j)::value;
                                 sum[J] = product(first.template get<J>(), at + k + J);
                               },
                               std::make_integer_sequence<int, G>{});
                           if constexpr (Dvalues) add_sums<T, G>(sum, dvalues + at + k);
                         });
  }

  const PointwiseSide& side_;
  const int64_t plane_, overlap_;
  T own_lanes_[w];  // ones; zeros where the last vector overlaps another
  const RowsAhead<S> rows_;
  ReadAhead ahead_;
};

}  // namespace
}  // namespace sparsetrain

// Planes of images into vectors of one pixel each, zero-padded, and results back (see conv_plan.h).
#pragma once

#include <type_traits>

#include "conv_plan.h"
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
// nowhere if that is negative; without slots, to its own place. Missing samples become zero. next:
// the plane that will be packed after this one, asked for meanwhile (into L2: it may not fit
// L1, 1.0 to 1.05 times faster), or null.
template <class S>
void pack_pixels(const Samples<const S>& m, int64_t group, int64_t channel, int64_t from,
                 int64_t to, const int32_t* slots, Sum<S>* out, const S* next = nullptr) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  const S* plane = m.plane(group, channel);
  const int64_t stride = m.stride();
  const int samples = m.count(group);
  for_pixels<T>(from, to, [&](int64_t p, int n) {
    if (next && ((p - from) / w) % (64 / (w * sizeof(S))) == 0)
      for (int i = 0; i < samples; i++) __builtin_prefetch(next + i * stride + p, 0, 2);
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

// The way back: pixel p of the plane from vector places[p - from] of `rows`, zero where that is
// negative; without places, from its own place. Sample i's pixel p goes to out[i * stride + p].
template <class S>
void unpack_pixels(int64_t from, int64_t to, const int32_t* places, const Sum<S>* rows, int samples,
                   int64_t stride, S* out) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
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
      for (int i = 0; i < w; i++) store_narrowed<S>(out + i * stride + p, r[i], w);
    } else {
      for (int i = 0; i < samples; i++) store_narrowed<S>(out + i * stride + p, r[i], n);
    }
  });
}

// Where results of samples are written, past the caches where that pays. Then the pixels of each
// sample are gathered first: written in turns, the lines of a vector's samples would each be
// written in two halves.
template <class S>
struct SampleWriter {
  typedef Sum<S> T;
  static constexpr int64_t line = 64 / sizeof(S);
  Samples<S> out;
  bool past_caches;

  explicit SampleWriter(const Samples<S>& out) : out(out) {
    past_caches = std::is_same<S, T>::value && out.pixels() % line == 0 &&
                  reinterpret_cast<uintptr_t>(out.data) % 64 == 0 &&
                  out.batch * out.stride() * static_cast<int64_t>(sizeof(S)) >= kStreamBytes;
  }
  // Pixels [from, to) of one plane of a group; gathered: scratch for as many vectors.
  void put(int64_t group, int64_t channel, int64_t from, int64_t to, const int32_t* places,
           const T* rows, T* gathered) const {
    S* plane = out.plane(group, channel);
    const int samples = out.count(group);
    if constexpr (std::is_same<S, T>::value) {
      if (past_caches && from % line == 0 && to % line == 0) {
        const int64_t run = to - from;
        unpack_pixels<S>(0, run, places, rows, samples, run, gathered);
        for (int i = 0; i < samples; i++) {
          S* to_sample = plane + i * out.stride() + from;
          for (int64_t p = 0; p < run; p += kLanes<T>)
            stream<S>(to_sample + p, load<S>(gathered + i * run + p));
        }
        return;
      }
    }
    unpack_pixels<S>(from, to, places, rows, samples, out.stride(), plane);
  }
};

ST_INLINE bool any_nonzeros(const Side& side, int64_t first_row, int64_t end_row) {
  return side.row_begin[first_row] != side.row_begin[end_row];
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

// What a buffer for the copies of a strip holds.
enum class Held { nothing, another, one_before };  // one_before: of this side and group

ST_INLINE Held held_by(bool follows, bool filled) {
  return follows ? Held::one_before : filled ? Held::another : Held::nothing;
}

// The rows that the strip before shares with this one, from the end of each plane to its beginning.
template <class T>
ST_INLINE void move_shared_rows(const ConvSide& s, T* planes) {
  const int64_t row = s.pitch * kLanes<T>;
  for (size_t k = 0; k < s.kinds.size(); k++, planes += s.copy_lanes)
    __builtin_memmove(planes, planes + s.strip_rows * row, sizeof(T) * s.span * row);
}

// Planes of channels [c0, c1) for one strip, with zeros around them.
template <class S>
void fill_samples(const ConvSide& s, const SampleTables& tables, const Samples<const S>& m,
                  int64_t group, int64_t strip, int64_t c0, int64_t c1, Held held, Sum<S>* copies) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  const int64_t width = m.size[1];
  const int64_t top = (strip * s.strip_rows + s.first_shift) * s.source_step[0];
  const int64_t rows = (s.strip_rows + s.span) * s.source_step[0];
  const int64_t done = held == Held::one_before ? s.span * s.source_step[0] : 0;
  // the rows that are inside the image
  const int64_t y0 = most(top < 0 ? least(-top, rows) : 0, done);
  const int64_t y1 = top + rows > m.size[0] ? (m.size[0] > top ? m.size[0] - top : 0) : rows;
  const int32_t* slots = tables.slots.data();
  auto zero = [&](int64_t from, int64_t to, T* out) {
    for (int64_t i = from * width; i < to * width; i++)
      if (slots[i] >= 0) store<T>(out + slots[i] * w, Vec<T>{});
  };
  const int64_t size = static_cast<int64_t>(s.kinds.size()) * s.copy_lanes;
  for (int64_t c = c0; c < c1; c++) {
    if (!s.used[c]) continue;
    T* out = copies + c * size;
    if (held == Held::nothing)
      for (const int32_t gap : tables.gaps) store<T>(out + static_cast<int64_t>(gap) * w, Vec<T>{});
    if (done) move_shared_rows(s, out);
    if (y0 >= y1) {
      zero(done, rows, out);
      continue;
    }
    zero(done, y0, out);
    pack_pixels(m, group, c, (top + y0) * width, (top + y1) * width, slots + y0 * width, out,
                c + 1 < m.channels && s.used[c + 1] ? m.plane(group, c + 1) : nullptr);
    zero(y1, rows, out);
  }
}

}  // namespace
}  // namespace sparsetrain

// 1x1 convolutions of stride 1, tile by tile of pixels (see pointwise_plan.h).
#pragma once

#include "conv_plan.h"
#include "pointwise_tile-inl.h"

namespace sparsetrain {
namespace {

// f(number in the pattern, place in the order of visits) for every nonzero.
template <class F>
void for_visited(const Pattern& p, const PointwiseSide& s, const F& f) {
  if (!s.by_input) {
    for (int64_t o = 0; o < p.rows; o++)
      for (int32_t k = p.crow[o], at = s.first[o]; k < p.crow[o + 1]; k++) f(k, at++);
    return;
  }
  Scratch<int32_t> next(s.rows);
  __builtin_memcpy(next.get(), s.first.get(), sizeof(int32_t) * s.rows);
  for (int32_t k = 0; k < p.nnz; k++) f(k, next.get()[p.col[k]]++);
}

// Values in the order of visits; none where they are not given.
template <class S>
class VisitedValues {
 public:
  VisitedValues(const Pattern& p, const PointwiseSide& side, const void* given)
      : values_(given ? side.nnz : 0) {
    if (!given) return;
    for_visited(p, side, [&](int32_t k, int32_t at) {
      values_.get()[at] = widen(static_cast<const S*>(given)[k]);
    });
  }
  const Sum<S>* get() const { return values_.get(); }

 private:
  Scratch<Sum<S>> values_;
};

// One call, forward or backward. `rows` are passed over, of `kept` a tile is.
template <class S>
struct PointwisePass {
  typedef Sum<S> T;
  const PointwiseSide& side;
  const PixelTiles<T> tiles;
  const T* values;  // in the order of visits

  // What is kept of the next group, a part of it with each tile.
  ReadAhead ahead(const PointwisePlanes<const S>& kept, int64_t i) const {
    const int64_t next = tiles.next_group(i), in = tiles.place_in_group(i), size = sizeof(S);
    if (!kept.data || next >= tiles.count) return {};
    const int64_t first = kept.channels * in / tiles.group;
    const int64_t end = kept.channels * (in + 1) / tiles.group;
    const Stretch part{reinterpret_cast<const char*>(kept.tile(tiles, next) + first * tiles.plane),
                       tiles.group_lanes(next) * size,
                       1,
                       0,
                       end - first,
                       tiles.plane * size};
    return ReadAhead({part, {}}, side.rows - side.empty);
  }
  RowsAhead<S> rows_ahead(const PointwisePlanes<const S>& rows, int64_t i) const {
    if (!rows.data) return {};
    const int64_t group = tiles.next_group(i);
    const int64_t next = i + 1 < tiles.count ? i + 1 : i;
    return {rows.tile(tiles, i), rows.tile(tiles, next),
            group < tiles.count ? rows.tile(tiles, group) : nullptr, tiles.place_in_group(i),
            tiles.group};
  }
  // f(tile) with all that it needs, as a class of its width.
  template <class F>
  void at(int64_t i, const PointwisePlanes<const S>& rows, const PointwisePlanes<const S>& kept,
          const F& f) const {
    with_vectors(tiles.vectors(i), [&](auto n) {
      constexpr int NV = decltype(n)::value;
      if constexpr (NV <= kPointwiseTile)
        f(PointwiseTile<S, NV>(side, tiles.plane, tiles.overlap(i), rows_ahead(rows, i),
                               ahead(kept, i)));
    });
  }
  int64_t tile_size(int64_t channels) const { return channels * tiles.lanes(); }
};

ST_INLINE const PointwiseSide& pointwise_side(const Plan& plan, PointwiseBy by) {
  return plan.pointwise(by == PointwiseBy::input, SPARSETRAIN_VECTOR_BYTES, kPointwiseBytes);
}

template <class S>
void pointwise_forward(const ConvForward& a, PointwiseBy by) {
  typedef Sum<S> T;
  const ConvShape& shape = a.shape;
  const PointwiseSide& side = pointwise_side(*a.plan, by);
  const VisitedValues<S> values(a.plan->pattern(), side, a.values);
  const Widened<S> bias(a.bias, shape.out_channels);
  const PixelTiles<T> tiles(shape.batch, shape.in_size[0] * shape.in_size[1]);
  const PointwisePass<S> pass{side, tiles, values.get()};
  const PointwisePlanes<const S> x{static_cast<const S*>(a.x), shape.in_channels}, none{nullptr, 0};
  const PointwisePlanes<S> y{static_cast<S*>(a.y), shape.out_channels};
  const bool past_caches = y.past_caches(tiles, shape.batch);
  const int workers = worth_waking(a.parallel, (side.nnz + side.rows) * tiles.plane * shape.batch);
  const int64_t size = pass.tile_size(side.kept);
  Scratch<T> kept(size * workers);
  const int64_t together = most(1, least(16, tiles.count / (4 * workers)));
  share(a.parallel, workers, ceil_div(tiles.count, together), [&](int worker, int64_t part) {
    T* own = kept.get() + worker * size;
    for (int64_t i = part * together; i < least((part + 1) * together, tiles.count); i++) {
      if (side.by_input) {
        pass.at(i, x, none, [&](auto tile) {
          tile.fill(bias.get(), side.kept, own);
          tile.scatter(values.get(), own);
          tile.unpack(own, side.kept, y.tile(tiles, i), past_caches);
        });
      } else {
        pass.at(i, none, x, [&](auto tile) {
          tile.pack(x.tile(tiles, i), side.kept, false, own);
          tile.gather(values.get(), bias.get(), own, y.tile(tiles, i), past_caches);
        });
      }
    }
  });
}

// The gradients that are wanted: of x, of the values, of the bias.
template <class S>
struct PointwiseGradients {
  typedef Sum<S> T;
  const PointwisePass<S>& pass;
  const PointwisePlanes<const S>&x, &dy;
  const PointwisePlanes<S>& dx;
  bool with_dvalues, past_caches;

  int64_t kept_size() const { return pass.tile_size(pass.side.kept); }

  // Tile i. kept: two of kept_size(); dbias: of each output channel, lane by lane, or null.
  void tile(int64_t i, T* kept, T* dvalues, T* dbias) const {
    if (!dx.data) return any<false, true>(i, kept, dvalues, dbias);
    if (!with_dvalues) return any<true, false>(i, kept, dvalues, dbias);
    any<true, true>(i, kept, dvalues, dbias);
  }

 private:
  template <bool Dx, bool Dvalues>
  void any(int64_t i, T* kept, T* dvalues, T* dbias) const {
    const PixelTiles<T>& tiles = pass.tiles;
    const int64_t channels = pass.side.kept;
    const PointwisePlanes<const S> none{nullptr, 0};
    if (pass.side.by_input) {
      pass.at(i, Dvalues ? x : none, dy, [&](auto tile) {
        tile.pack(dy.tile(tiles, i), channels, false, kept);
        if (dbias) tile.sum_kept(kept, channels, dbias);
        tile.template gather_gradients<Dx, Dvalues>(pass.values, kept, dvalues,
                                                    Dx ? dx.tile(tiles, i) : nullptr, past_caches);
      });
      return;
    }
    T* sums = kept + kept_size();
    pass.at(i, dy, Dvalues ? x : none, [&](auto tile) {
      if constexpr (Dvalues) tile.pack(x.tile(tiles, i), channels, true, kept);
      if constexpr (Dx) tile.fill(nullptr, channels, sums);
      tile.template scatter_gradients<Dx, Dvalues>(pass.values, kept, dvalues, sums, dbias);
      if constexpr (Dx) tile.unpack(sums, channels, dx.tile(tiles, i), past_caches);
    });
  }
};

template <class S>
void pointwise_backward(const ConvBackward& a, PointwiseBy by) {
  typedef Sum<S> T;
  const ConvShape& shape = a.shape;
  const PointwiseSide& side = pointwise_side(*a.plan, by);
  const Pattern& p = a.plan->pattern();
  const VisitedValues<S> values(p, side, a.dx ? a.values : nullptr);
  const PixelTiles<T> tiles(shape.batch, shape.in_size[0] * shape.in_size[1]);
  const PointwisePass<S> pass{side, tiles, values.get()};
  const PointwisePlanes<const S> x{static_cast<const S*>(a.x), shape.in_channels};
  const PointwisePlanes<const S> dy{static_cast<const S*>(a.dy), shape.out_channels};
  const PointwisePlanes<S> dx{static_cast<S*>(a.dx), shape.in_channels};
  const PointwiseGradients<S> gradients{
      pass, x, dy, dx, a.dvalues != nullptr, a.dx && dx.past_caches(tiles, shape.batch)};
  const int workers = worth_waking(a.parallel, (side.nnz + side.rows) * tiles.plane * shape.batch);
  const int64_t size = 2 * gradients.kept_size();
  Scratch<T> kept(size * workers);
  // Sums of a piece of the tiles are made apart and added to the others in order: the same whoever
  // does what. Tiles enough in each that adding them is a small part.
  constexpr int64_t kMostPieces = 64, kLeastLanes = 128;
  int64_t pieces = kMostPieces;
  while (pieces > 1 && tiles.count * tiles.lanes() < pieces * kLeastLanes) pieces /= 2;
  const int64_t lanes = kLanes<T>;
  const int64_t dbias_size = a.dbias ? shape.out_channels * lanes : 0;
  // Whole vectors, so that every worker's are aligned.
  const int64_t sums_size = dbias_size + ceil_div(a.dvalues ? side.nnz : 0, lanes) * lanes;
  Scratch<T> total(sums_size);
  sum_pieces(
      a.parallel, workers, pieces, sums_size, total.get(), [&](int worker, int64_t piece, T* sums) {
        for (int64_t i = tiles.count * piece / pieces; i < tiles.count * (piece + 1) / pieces; i++)
          gradients.tile(i, kept.get() + worker * size, sums + dbias_size,
                         a.dbias ? sums : nullptr);
      });
  for (int64_t o = 0; a.dbias && o < shape.out_channels; o++)
    narrow(sum_lanes<T>(load<T>(total.get() + o * lanes)), static_cast<S*>(a.dbias) + o);
  if (a.dvalues)
    for_visited(p, side, [&](int32_t k, int32_t at) {
      narrow(total.get()[dbias_size + at], static_cast<S*>(a.dvalues) + k);
    });
}

}  // namespace
}  // namespace sparsetrain

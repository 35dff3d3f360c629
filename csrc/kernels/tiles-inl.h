// Tiles of samples: how a batch falls into them, and how they are packed.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "pack-inl.h"
#include "parallel-inl.h"
#include "plan.h"
#include "simd-inl.h"

namespace sparsetrain {
namespace {

// Bytes of y's tile (or dy's) that stay in L2 while the column blocks pass. Large, since the tile
// of x streams by once for each chunk of rows: 768 rows rather than 128 were 1.05-1.2 times faster.
constexpr int64_t kChunkBytes = 192 << 10;
// Columns of a long row that are packed at a time, so that what is written stays in L1 until its
// lines are full. Only where streams may be short (is_intel).
constexpr int64_t kPackedColumns = 192;

#if defined(__AVX512F__) || defined(__aarch64__)
// Wide tiles from 15 % on: 1.03-1.05 times faster at 80 %, 0.97 at 90 %.
constexpr TileRule kTiles = {4, 8, 0.15, 192, 96, 7.5, 7.5, SPARSETRAIN_VECTOR_BYTES};
#else
// 8 vectors of 256 bits instead of 4: forward at 80 / 90 / 95 % 1.15 / 1.10 / 0.97 times as fast,
// backward 1.04 / 1.04 / 0.93. 18 nonzeros in a row of a block instead of 7.5: 95 %, 1.15-1.3.
constexpr TileRule kTiles = {4, 8, 0.08, 192, 96, 18, 12.8, SPARSETRAIN_VECTOR_BYTES};
#endif

// How `batch` samples fall into tiles: full ones, and a last one of fewer vectors.
template <class T>
struct Tiling {
  Tiling(int64_t batch, bool wide)
      : batch(batch),
        lanes((wide ? kTiles.wide : kTiles.narrow) * kLanes<T>),
        count(ceil_div(batch, lanes)),
        chunk_rows(kChunkBytes / (lanes * static_cast<int64_t>(sizeof(T))) / kMostUnit *
                   kMostUnit) {
    static_assert(kChunkBytes / (kTiles.wide * SPARSETRAIN_VECTOR_BYTES) >= kMostUnit, "");
  }
  int samples(int64_t t) const {
    const int64_t left = batch - first(t);
    return static_cast<int>(left < lanes ? left : lanes);
  }
  int vectors(int64_t t) const { return static_cast<int>(ceil_div(samples(t), kLanes<T>)); }
  int64_t first(int64_t t) const { return t * lanes; }
  // Whether workers that take whole tiles end at about the same time.
  bool shared_evenly(int64_t workers) const {
    const int64_t full = batch / lanes, last = batch % lanes, rounds = full / workers;
    const int64_t longest = full % workers ? (rounds + 1) * lanes : rounds * lanes + last;
    return workers == 1 || longest * workers <= batch + batch / 8;
  }
  int64_t batch, lanes, count, chunk_rows;
};

// f(NV) with the smallest compiled tile of at least nv vectors.
template <class F>
ST_INLINE void with_vectors(int nv, const F& f) {
  if (nv > 6) return f(std::integral_constant<int, 8>{});
  if (nv > 4) return f(std::integral_constant<int, 6>{});
  if (nv == 4) return f(std::integral_constant<int, 4>{});
  if (nv == 3) return f(std::integral_constant<int, 3>{});
  if (nv == 2) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}
// The widest compiled tile of at most nv vectors.
ST_INLINE int tile_at_most(int nv) {
  if (nv >= 8 && kWideTile == 8) return 8;
  if (nv >= 6 && kWideTile == 8) return 6;
  return nv < 4 ? nv : 4;
}
// Samples that such a tile has room for.
template <class T>
ST_INLINE int64_t tile_lanes(int nv) {
  int64_t lanes = 0;
  with_vectors(nv, [&](auto n) { lanes = decltype(n)::value * kLanes<T>; });
  return lanes;
}

// Columns [c0, c1) of tile t of m. tile: m.cols x lanes. sums: of each of m.cols, to be added to;
// or null.
template <class S>
void pack(const Tiling<Sum<S>>& tiling, const Matrix& m, int64_t t, int64_t c0, int64_t c1,
          Sum<S>* tile, Sum<S>* sums = nullptr) {
  const S* from = static_cast<const S*>(m.data) + tiling.first(t) * m.row_stride;
  const int64_t piece = is_intel() ? kPackedColumns : c1 - c0;
  const bool far = m.rows * m.row_stride * static_cast<int64_t>(sizeof(S)) > cache_bytes(2);
  with_vectors(tiling.vectors(t), [&](auto n) {
    constexpr int NV = decltype(n)::value;
    for (int64_t c = c0; c < c1; c += piece)
      pack_tile<S, NV>(from + c, m.row_stride, tiling.samples(t), least(piece, c1 - c),
                       tile + c * NV * kLanes<Sum<S>>, sums ? sums + c : nullptr, far);
  });
}

// Tiles that are packed already, one after the other, with all of their `cols` columns.
template <class S>
struct PackedTiles {
  const Sum<S>* data;
  int64_t cols;

  const Sum<S>* tile(const Tiling<Sum<S>>& tiling, int64_t t) const {
    return data + cols * tiling.first(t);
  }
};
template <class S, class X>
constexpr bool is_packed = std::is_same<X, PackedTiles<S>>::value;

// Tile t with columns [c0, c1) packed, into `scratch` unless it is packed already.
template <class S, class X>
ST_INLINE const Sum<S>* packed_tile(const Tiling<Sum<S>>& tiling, const X& x, int64_t t, int64_t c0,
                                    int64_t c1, Sum<S>* scratch) {
  if constexpr (is_packed<S, X>) {
    return x.tile(tiling, t);
  } else {
    pack<S>(tiling, x, t, c0, c1, scratch);
    return scratch;
  }
}

// Packs block b of tile t at the beginning of `scratch`, which then stays in L1 or L2.
template <class S, class X>
ST_INLINE void pack_block(const Tiling<Sum<S>>& tiling, const X& x, int64_t t, const Side& side,
                          int64_t b, Sum<S>* scratch) {
  const int64_t first = side.first_column(b);
  const int64_t begin = first * tile_lanes<Sum<S>>(tiling.vectors(t));
  pack<S>(tiling, x, t, first, side.first_column(b + 1), scratch - begin);
}

}  // namespace
}  // namespace sparsetrain

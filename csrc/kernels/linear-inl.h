// The linear layer: packs a tile of samples, sweeps the column blocks, unpacks. A tile is packed
// right before its use, so that it is still in L2.
#pragma once

#include <type_traits>

#include "few-inl.h"
#include "kernels.h"
#include "pack-inl.h"
#include "parallel-inl.h"
#include "plan.h"
#include "sddmm-inl.h"
#include "simd-inl.h"
#include "spmm-inl.h"
#include "transposed_values-inl.h"

namespace sparsetrain {
namespace {

// Bytes of y's tile (or dy's) that stay in L2 while the column blocks pass. Large, since the tile
// of x streams by once for each chunk of rows: 768 rows rather than 128 were 1.05-1.2 times faster.
constexpr int64_t kChunkBytes = 192 << 10;
// Samples whose gradients of the values are summed apart, so that workers need not share: as few
// as make adding the sums up cheap (1 of about 128 loads of a nonzero), and groups at most.
constexpr int64_t kGroupSamples = 256;
constexpr int64_t kMostGroups = 8;
// Columns of a long row that are packed at a time, so that what is written stays in L1 until its
// lines are full. Only where streams may be short (is_intel).
constexpr int64_t kPackedColumns = 192;
// Outputs from this size on are written past the caches.
constexpr int64_t kStreamBytes = 4 << 20;

#if defined(__AVX512F__) || defined(__aarch64__)
// Wide tiles from 15 % on: 1.03-1.05 times faster at 80 %, 0.97 at 90 %.
constexpr TileRule kTiles = {4, 8, 0.15, 192, 96, 7.5, SPARSETRAIN_VECTOR_BYTES};
#else
// 8 vectors of 256 bits instead of 4: forward at 80 / 90 / 95 % 1.15 / 1.10 / 0.97 times as fast,
// backward 1.04 / 1.04 / 0.93. 18 nonzeros in a row of a block instead of 7.5: 95 %, 1.15-1.3.
constexpr TileRule kTiles = {4, 8, 0.08, 192, 96, 18, SPARSETRAIN_VECTOR_BYTES};
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
template <class F>
ST_INLINE void with_index(const Side& side, const F& f) {
  if (side.index16) return f(static_cast<const uint16_t*>(side.index16.get()));
  return f(side.index32);
}

// f(NV, bytes that an index counts) for tiles of a linear layer: see Side::index16.
template <class F>
ST_INLINE void with_tile(const Side& side, int nv, const F& f) {
  with_vectors(nv, [&](auto n) {
    constexpr int NV = decltype(n)::value;
    if (side.wide) return f(n, std::integral_constant<int, 8 * NV / kTiles.wide>{});
    if constexpr (NV <= kTiles.narrow) f(n, std::integral_constant<int, 8 * NV / kTiles.narrow>{});
  });
}
// f(unit, its first row) for the units of rows [r0, r1), which begins with one.
template <class F>
ST_INLINE void for_units(const Side& side, int64_t r0, int64_t r1, const F& f) {
  const int64_t rows = side.sweeps.unit;
  for (int64_t unit = r0 / rows; unit * rows < r1; unit++) f(unit, unit * rows);
}

// Columns [c0, c1) of tile t of m. tile: m.cols x lanes.
template <class S>
void pack(const Tiling<Sum<S>>& tiling, const Matrix& m, int64_t t, int64_t c0, int64_t c1,
          Sum<S>* tile) {
  const S* from = static_cast<const S*>(m.data) + tiling.first(t) * m.row_stride;
  const int64_t piece = is_intel() ? kPackedColumns : c1 - c0;
  with_vectors(tiling.vectors(t), [&](auto n) {
    constexpr int NV = decltype(n)::value;
    for (int64_t c = c0; c < c1; c += piece)
      pack_tile<S, NV>(from + c, m.row_stride, tiling.samples(t), least(piece, c1 - c),
                       tile + c * NV * kLanes<Sum<S>>);
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
// Tile t with columns [c0, c1) packed, into `scratch` unless it is packed already.
template <class S, class X>
ST_INLINE const Sum<S>* packed_tile(const Tiling<Sum<S>>& tiling, const X& x, int64_t t, int64_t c0,
                                    int64_t c1, Sum<S>* scratch) {
  if constexpr (std::is_same<X, PackedTiles<S>>::value) {
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

// Where results of a tile are made, a row of them for each feature, `stride` elements apart.
template <class T>
struct Place {
  T* data;
  int64_t stride;
};

// Results as rows of samples: a contiguous (batch, features) tensor.
template <class S>
struct RowsOut {
  S* data;
  int64_t batch, features;

  // For features from r0 on. chunk: scratch, rows of `width` elements.
  Place<Sum<S>> place(const Tiling<Sum<S>>&, int64_t, int64_t, int64_t width, Sum<S>* chunk) const {
    return {chunk, width};
  }
  // Features [r0, r1) of tile t, from its chunk of results.
  template <int NV>
  void put(const Tiling<Sum<S>>& tiling, int64_t t, int64_t r0, int64_t r1,
           const Sum<S>* chunk) const {
    const bool past_caches = batch * features * static_cast<int64_t>(sizeof(S)) >= kStreamBytes;
    unpack_tile<S, NV>(chunk, tiling.samples(t), r1 - r0, data + tiling.first(t) * features + r0,
                       features, past_caches);
  }
};

// y = x side^T + bias for either orientation, from packed tiles. Samples come from an X, a Matrix
// or another type with a `pack`; results go to an Out, RowsOut or another type with `place` and
// `put`.
template <class S, class Out = RowsOut<S>>
struct Product {
  typedef Sum<S> T;
  const Side& side;
  const Tiling<T>& tiling;
  const T* values;
  const T* bias;  // side.rows, or null
  Out y;          // batch x side.rows

  // y[.., begin:end] of tile t, from the packed tile. chunk: chunk_rows x lanes of scratch.
  void rows(int64_t t, const T* tile, int64_t begin, int64_t end, T* chunk) const {
    for (int64_t r = begin; r < end; r += tiling.chunk_rows)
      chunk_of_rows(t, r, least(r + tiling.chunk_rows, end), chunk, [&](int64_t b) {
        return tile + side.first_column(b) * tile_lanes<T>(tiling.vectors(t));
      });
  }
  // All of tile t, from x. Blocks of x are packed right before their only use, where there is one.
  // tile: side.cols x lanes of scratch.
  template <class X>
  void all(int64_t t, const X& x, T* tile, T* chunk) const {
    if (side.rows > tiling.chunk_rows) {
      pack<S>(tiling, x, t, 0, side.cols, tile);
      return rows(t, tile, 0, side.rows, chunk);
    }
    chunk_of_rows(t, 0, side.rows, chunk, [&](int64_t b) {
      pack_block<S>(tiling, x, t, side, b, tile);
      return tile;
    });
  }

 private:
  // operand(b): where the packed block b is.
  template <class F>
  ST_INLINE void chunk_of_rows(int64_t t, int64_t r0, int64_t r1, T* chunk,
                               const F& operand) const {
    with_tile(side, tiling.vectors(t), [&](auto n, auto bytes) {
      constexpr int NV = decltype(n)::value;
      const Place<T> to = y.place(tiling, t, r0, NV * kLanes<T>, chunk);
      for (int64_t b = 0; b < side.blocks; b++) {
        const T* x = operand(b);
        with_addresses([&](auto apart) {
          for_units(side, r0, r1, [&](int64_t unit, int64_t r) {
            spmm_sweep<T, NV, decltype(bytes)::value, decltype(apart)::value>(
                side.sweep(b, unit), side.index16.get(), values, x, to.data + (r - r0) * to.stride,
                to.stride, bias ? bias + r : nullptr, b == 0);
          });
        });
      }
      y.template put<NV>(tiling, t, r0, r1, chunk);
    });
  }
};

// First row of part p of `parts` of about equal cost; begins a unit. (sum_rows groups rows by 8,
// and the groups must be the same however rows are shared out.)
ST_INLINE int64_t part_begin(const Side& side, int64_t p, int64_t parts) {
  if (p == parts) return side.rows;
  auto cost = [&](int64_t r) { return side.row_begin[r] + 4 * r; };
  const int64_t wanted = cost(side.rows) * p / parts;
  const int64_t unit = side.sweeps.unit;
  int64_t low = 0, high = side.rows / unit;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cost(unit * middle) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return unit * low;
}

template <class S, class Out, class X>
void spmm(const Product<S, Out>& product, const X& x, const Parallel& parallel) {
  typedef Sum<S> T;
  const Side& side = product.side;
  const Tiling<T>& tiling = product.tiling;
  if (!tiling.count || !side.rows) return;
  const int64_t tile_size = side.cols * tiling.lanes, chunk_size = tiling.chunk_rows * tiling.lanes;
  const int workers = worth_waking(parallel, (side.nnz + side.rows) * tiling.batch);
  Scratch<T> tiles(tile_size * workers), chunks(chunk_size * workers);
  auto tile = [&](int worker) { return tiles.get() + worker * tile_size; };
  auto chunk = [&](int worker) { return chunks.get() + worker * chunk_size; };

  if (shared_evenly(tiling.count, workers)) {
    share(parallel, workers, tiling.count,
          [&](int worker, int64_t t) { product.all(t, x, tile(worker), chunk(worker)); });
    return;
  }
  // Few tiles: each is cut into as many parts of its rows as there are workers, and every worker
  // takes as many parts in a row. Two may pack the same tile: cheaper than to wait for each other
  // and to read what another core has written.
  share(parallel, workers, workers, [&](int worker, int64_t share) {
    int64_t packed = -1;
    for (int64_t i = share * tiling.count; i < (share + 1) * tiling.count; i++) {
      const int64_t t = i / workers, p = i % workers;
      if (t != packed) pack<S>(tiling, x, packed = t, 0, side.cols, tile(worker));
      product.rows(t, tile(worker), part_begin(side, p, workers), part_begin(side, p + 1, workers),
                   chunk(worker));
    }
  });
}

// dvalues and dbias, row by row, from packed tiles of dy and x.
template <class S>
struct Gradient {
  typedef Sum<S> T;
  const Side& side;
  const Tiling<T>& tiling;
  T* dvalues;  // nnz, in CSR order
  T* dbias;    // side.rows, or null

  // Adds tile t's share for rows [begin, end) to `values` (nnz, in the order of the side) and
  // `bias` (side.rows). dy: the packed tile; x_tile: side.cols x lanes of scratch. Blocks of x are
  // packed right before their only use, where there is one.
  template <class X>
  void rows(int64_t t, const T* dy, const X& x, T* x_tile, int64_t begin, int64_t end, T* values,
            T* bias) const {
    const bool once = end - begin <= tiling.chunk_rows;
    if (!once) pack<S>(tiling, x, t, 0, side.cols, x_tile);
    for (int64_t r = begin; r < end; r += tiling.chunk_rows) {
      const int64_t rows = least(tiling.chunk_rows, end - r);
      with_tile(side, tiling.vectors(t), [&](auto n, auto bytes) {
        constexpr int NV = decltype(n)::value;
        constexpr int64_t width = NV * kLanes<T>;
        if (bias) sum_rows<T, NV>(dy + r * width, rows, bias + r);
        for (int64_t b = 0; b < side.blocks; b++) {
          if (once) pack_block<S>(tiling, x, t, side, b, x_tile);
          const T* operand = once ? x_tile : x_tile + side.first_column(b) * width;
          for_units(side, r, r + rows, [&](int64_t unit, int64_t first) {
            sddmm_sweep<T, NV, decltype(bytes)::value>(side.sweep(b, unit), side.index16.get(),
                                                       operand, dy + first * width, width, values);
          });
        }
      });
    }
  }
};

// How the sums of the backward pass are cut. Tiles of samples fall into groups; a group's sums are
// made apart and added to the others in order, so that workers share nothing, and the result is the
// same whoever does what. So the number of groups must not depend on the workers.
struct Grouping {
  int64_t groups, parts;  // parts of the rows, where there are more workers than groups

  Grouping(int64_t batch, int64_t tiles, int workers) : groups(1) {
    while (groups < kMostGroups && groups * 2 <= tiles && batch >= groups * 2 * kGroupSamples)
      groups *= 2;
    parts = ceil_div(workers, groups);
  }
};

// The backward pass: for each group of tiles, and each part of the rows, dvalues and dbias, and a
// share of dx. product may be null (dx not wanted).
template <class S, class Dy, class X>
struct Backward {
  typedef Sum<S> T;
  const Product<S>* product;
  const Gradient<S>& gradient;
  const Dy& dy;
  const X& x;

  void run(const Parallel& parallel) const {
    const Side& side = gradient.side;
    const Tiling<T>& tiling = gradient.tiling;
    if (!tiling.count) return clear(gradient.dvalues, gradient.dbias, 0, side.rows);
    const int workers = worth_waking(parallel, (side.nnz + side.rows) * tiling.batch);
    const Grouping cut(tiling.batch, tiling.count, workers);
    const bool apart = cut.groups > 1;
    const int64_t x_size = side.cols * tiling.lanes, dy_size = side.rows * tiling.lanes;
    const int64_t chunk_size = product ? tiling.chunk_rows * tiling.lanes : 0;
    Scratch<T> x_tiles(x_size * workers), dy_tiles(dy_size * workers), chunks(chunk_size * workers);
    Scratch<T> values(apart ? side.nnz * workers : 0), bias(apart ? side.rows * workers : 0);
    OneByOne order(cut.parts);
    share(parallel, workers, cut.groups * cut.parts, [&](int worker, int64_t i) {
      const int64_t g = i / cut.parts, p = i % cut.parts;
      const int64_t r0 = part_begin(side, p, cut.parts), r1 = part_begin(side, p + 1, cut.parts);
      T* dvalues = g ? values.get() + worker * side.nnz : gradient.dvalues;
      T* dbias = !gradient.dbias ? nullptr : g ? bias.get() + worker * side.rows : gradient.dbias;
      clear(dvalues, dbias, r0, r1);
      const int64_t end = tiling.count * (g + 1) / cut.groups;
      for (int64_t t = tiling.count * g / cut.groups; t < end; t++)
        tile(t, dx_rows(t, p, cut), r0, r1, x_tiles.get() + worker * x_size,
             dy_tiles.get() + worker * dy_size, chunks.get() + worker * chunk_size, dvalues, dbias);
      order.wait(p, g);
      if (g) add(dvalues, dbias, r0, r1);
      order.done(p, g);
    });
  }

 private:
  struct Rows {
    int64_t begin, end;
  };
  // Rows of dx of tile t that part p makes: all of every parts-th tile, or its part of each.
  Rows dx_rows(int64_t t, int64_t p, const Grouping& cut) const {
    if (!product) return {0, 0};
    const int64_t all = product->side.rows;
    if (shared_evenly(gradient.tiling.count / cut.groups, static_cast<int>(cut.parts)))
      return {0, t % cut.parts == p ? all : 0};
    return {part_begin(product->side, p, cut.parts), part_begin(product->side, p + 1, cut.parts)};
  }
  void tile(int64_t t, Rows dx, int64_t r0, int64_t r1, T* x_tile, T* dy_tile, T* chunk, T* dvalues,
            T* dbias) const {
    const Side& side = gradient.side;
    const Tiling<T>& tiling = gradient.tiling;
    const bool some = dx.begin < dx.end;
    const T* packed = packed_tile<S>(tiling, dy, t, some ? 0 : r0, some ? side.rows : r1, dy_tile);
    if (some) product->rows(t, packed, dx.begin, dx.end, chunk);
    // x is packed only when it is needed: both tiles may not fit L2
    gradient.rows(t, packed, x, x_tile, r0, r1, dvalues, dbias);
  }
  void clear(T* dvalues, T* dbias, int64_t r0, int64_t r1) const {
    const int32_t* begin = gradient.side.row_begin;
    __builtin_memset(dvalues + begin[r0], 0, sizeof(T) * (begin[r1] - begin[r0]));
    if (dbias) __builtin_memset(dbias + r0, 0, sizeof(T) * (r1 - r0));
  }
  void add(const T* dvalues, const T* dbias, int64_t r0, int64_t r1) const {
    const int32_t* begin = gradient.side.row_begin;
    for (int64_t k = begin[r0]; k < begin[r1]; k++) gradient.dvalues[k] += dvalues[k];
    for (int64_t r = r0; dbias && r < r1; r++) gradient.dbias[r] += dbias[r];
  }
};

// dvalues and dbias (or null) in the type of the storage, and dx by `product`, unless it is null.
template <class S, class Dy, class X>
void grad_values(const Side& side, const Tiling<Sum<S>>& tiling, const Product<S>* product,
                 const Dy& dy, const X& x, S* dvalues, S* dbias, const Parallel& parallel) {
  typedef Sum<S> T;
  auto run = [&](T* values, T* bias) {
    const Gradient<S> gradient{side, tiling, values, bias};
    Backward<S, Dy, X>{product, gradient, dy, x}.run(parallel);
  };
  if constexpr (sizeof(S) == sizeof(T)) {
    run(dvalues, dbias);
  } else {
    Scratch<T> values(side.nnz), bias(dbias ? side.rows : 0);
    run(values.get(), dbias ? bias.get() : nullptr);
    for (int64_t k = 0; k < side.nnz; k++) narrow(values.get()[k], dvalues + k);
    for (int64_t r = 0; dbias && r < side.rows; r++) narrow(bias.get()[r], dbias + r);
  }
}

template <class S>
void linear_forward(const LinearForward& a) {
  typedef Sum<S> T;
  if (few_forward_if_faster<S>(a)) return;
  const Side& side = a.plan->forward(kTiles);
  const Tiling<T> tiling(a.x.rows, side.wide);
  const Widened<S> values(a.values, side.nnz), bias(a.bias, side.rows);
  const RowsOut<S> y{static_cast<S*>(a.y), a.x.rows, side.rows};
  spmm(Product<S>{side, tiling, values.get(), bias.get(), y}, a.x, a.parallel);
}

template <class S>
void linear_backward(const LinearBackward& all) {
  typedef Sum<S> T;
  const LinearBackward a = without_few<S>(all);
  if (!a.dx && !a.dvalues) return;
  const Side& side = a.plan->forward(kTiles);
  const Tiling<T> tiling(a.dy.rows, side.wide);
  auto take_dvalues = [&](const Product<S>* product) {
    grad_values(side, tiling, product, a.dy, a.x, static_cast<S*>(a.dvalues),
                static_cast<S*>(a.dbias), a.parallel);
  };
  if (!a.dx) return take_dvalues(nullptr);
  Scratch<T> values(side.nnz);
  const Side& transposed = a.plan->transposed(kTiles);
  values_to_transposed(*a.plan, transposed, static_cast<const S*>(a.values), values.get(),
                       a.parallel);
  const RowsOut<S> dx{static_cast<S*>(a.dx), a.dy.rows, side.cols};
  const Product<S> product{transposed, tiling, values.get(), nullptr, dx};
  if (!a.dvalues) return spmm(product, a.dy, a.parallel);
  take_dvalues(&product);
}

}  // namespace
}  // namespace sparsetrain

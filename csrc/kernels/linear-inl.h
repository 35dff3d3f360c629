// The linear layer: packs a tile of samples, sweeps the column blocks, unpacks. A tile is packed
// right before its use, so that it is still in L2.
#pragma once

#include "kernels.h"
#include "pack-inl.h"
#include "parallel-inl.h"
#include "plan.h"
#include "sddmm-inl.h"
#include "simd-inl.h"
#include "spmm-inl.h"

namespace sparsetrain {
namespace {

// Bytes of y's tile (or dy's) that stay in L2 while the column blocks pass. Large, since the tile
// of x streams by once for each chunk of rows: 768 rows rather than 128 were 1.05-1.2 times faster.
constexpr int64_t kChunkBytes = 192 << 10;
// Columns packed by one worker at a time, when several share a tile.
constexpr int64_t kPackColumns = 128;
// Tiles per worker that are shared between two barriers (about 2 us each). Few, so that what one
// worker packs is still near when another reads it.
constexpr int64_t kSharedTiles = 2;
// Outputs from this size on are written past the caches.
constexpr int64_t kStreamBytes = 4 << 20;

// How `batch` samples fall into tiles: full ones, and a last one of fewer vectors.
template <class T>
struct Tiling {
  Tiling(int64_t batch, bool wide)
      : batch(batch),
        lanes((wide ? kWideTile : kNarrowTile) * kLanes<T>),
        count(ceil_div(batch, lanes)),
        chunk_rows(kChunkBytes / (lanes * static_cast<int64_t>(sizeof(T)))) {
    // sum_rows groups rows by 8: the groups must be the same however rows are shared out.
    static_assert(kChunkBytes / (kWideTile * SPARSETRAIN_VECTOR_BYTES) % 16 == 0, "");
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
  if constexpr (kWideTile == 8) {
    if (nv > 6) return f(std::integral_constant<int, 8>{});
    if (nv > 4) return f(std::integral_constant<int, 6>{});
  }
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

// Values in the type of the sums: the given ones where that is what they are.
template <class S>
class Widened {
 public:
  typedef Sum<S> T;
  Widened(const void* values, int64_t count)
      : scratch_(sizeof(S) != sizeof(T) && values ? count : 0),
        data_(static_cast<const T*>(values)) {
    if (sizeof(S) == sizeof(T) || !values) return;
    for (int64_t k = 0; k < count; k++) scratch_.get()[k] = widen(static_cast<const S*>(values)[k]);
    data_ = scratch_.get();
  }
  const T* get() const { return data_; }

 private:
  Scratch<T> scratch_;
  const T* data_;
};

// out: values in the order of the transposed side.
template <class S>
void values_to_transposed(const Plan& plan, const S* values, Sum<S>* out,
                          const Parallel& parallel) {
  const Side& side = plan.forward();
  const Side& transposed = plan.transposed();
  if (const uint16_t* place = transposed.place16.get()) {
    const uint16_t* row = transposed.index16.get();
    const int workers = worth_waking(parallel, 4 * side.nnz);
    share(parallel, workers, workers, [&](int, int64_t i) {
      const int64_t end = side.nnz * (i + 1) / workers;
      for (int64_t k = side.nnz * i / workers; k < end; k++)
        out[k] = widen(values[side.row_begin[row[k]] + place[k]]);
    });
    return;
  }
  // Very large layers: each nonzero, in order, goes to the next free place of its column.
  Scratch<int32_t> next(side.cols);
  __builtin_memcpy(next.get(), transposed.row_begin, sizeof(int32_t) * side.cols);
  with_index(side, [&](auto* index) {
    for (int64_t k = 0; k < side.nnz; k++) out[next.get()[index[k]]++] = widen(values[k]);
  });
}

// Columns [c0, c1) of tile t of m. tile: m.cols x lanes.
template <class S>
void pack(const Tiling<Sum<S>>& tiling, const Matrix& m, int64_t t, int64_t c0, int64_t c1,
          Sum<S>* tile) {
  const S* from = static_cast<const S*>(m.data) + tiling.first(t) * m.row_stride + c0;
  with_vectors(tiling.vectors(t), [&](auto n) {
    constexpr int NV = decltype(n)::value;
    pack_tile<S, NV>(from, m.row_stride, tiling.samples(t), c1 - c0,
                     tile + c0 * NV * kLanes<Sum<S>>);
  });
}

// y = x side^T + bias for either orientation, from packed tiles.
template <class S>
struct Product {
  typedef Sum<S> T;
  const Side& side;
  const Tiling<T>& tiling;
  const T* values;
  const T* bias;  // side.rows, or null
  S* y;           // batch x side.rows

  // y[.., r0:r1] of tile t. chunk: (r1 - r0) x lanes of scratch.
  void rows(int64_t t, const T* tile, int64_t r0, int64_t r1, T* chunk) const {
    const bool past_caches =
        tiling.batch * side.rows * static_cast<int64_t>(sizeof(S)) >= kStreamBytes;
    S* out = y + tiling.first(t) * side.rows + r0;
    with_vectors(tiling.vectors(t), [&](auto n) {
      constexpr int NV = decltype(n)::value;
      with_index(side, [&](auto* index) {
        for (int64_t b = 0; b < side.blocks; b++)
          spmm_block<T, NV, NV * kLanes<T>>(side.begin_of(b) + r0, side.begin_of(b + 1) + r0,
                                            r1 - r0, index, values, tile, chunk, NV * kLanes<T>,
                                            bias ? bias + r0 : nullptr, b == 0);
      });
      unpack_tile<S, NV>(chunk, tiling.samples(t), r1 - r0, out, side.rows, past_caches);
    });
  }
  void all_rows(int64_t t, const T* tile, T* chunk) const {
    for (int64_t r = 0; r < side.rows; r += tiling.chunk_rows)
      rows(t, tile, r, least(r + tiling.chunk_rows, side.rows), chunk);
  }
};

template <class S>
void spmm(const Product<S>& product, const Matrix& x, const Parallel& parallel) {
  typedef Sum<S> T;
  const Side& side = product.side;
  const Tiling<T>& tiling = product.tiling;
  if (!tiling.count || !side.rows) return;
  const int64_t tile_size = side.cols * tiling.lanes, chunk_size = tiling.chunk_rows * tiling.lanes;
  const int workers = worth_waking(parallel, (side.nnz + side.rows) * x.rows);
  Scratch<T> chunks(chunk_size * workers);

  if (workers == 1 || tiling.count >= 4 * workers || tiling.count % workers == 0) {
    // Enough tiles: a worker packs and finishes its own; nothing is shared.
    Scratch<T> tiles(tile_size * workers);
    share(parallel, workers, tiling.count, [&](int worker, int64_t t) {
      T* tile = tiles.get() + worker * tile_size;
      pack<S>(tiling, x, t, 0, side.cols, tile);
      product.all_rows(t, tile, chunks.get() + worker * chunk_size);
    });
    return;
  }
  // Few tiles: all are packed first, then workers share out their rows.
  int64_t step = ceil_div(side.rows * tiling.count, 4 * workers);
  step = least(ceil_div(step, 16) * 16, tiling.chunk_rows);
  Scratch<T> tiles(tile_size * tiling.count);
  const int64_t parts = ceil_div(side.cols, kPackColumns);
  share(parallel, workers, tiling.count * parts, [&](int, int64_t i) {
    const int64_t t = i / parts, c = i % parts * kPackColumns;
    pack<S>(tiling, x, t, c, least(c + kPackColumns, side.cols), tiles.get() + t * tile_size);
  });
  const int64_t groups = ceil_div(side.rows, step);
  share(parallel, workers, tiling.count * groups, [&](int worker, int64_t i) {
    const int64_t t = i / groups, r = i % groups * step;
    product.rows(t, tiles.get() + t * tile_size, r, least(r + step, side.rows),
                 chunks.get() + worker * chunk_size);
  });
}

// dvalues and dbias, row by row, from packed tiles of dy and x.
template <class S>
struct Gradient {
  typedef Sum<S> T;
  const Side& side;
  const Tiling<T>& tiling;
  T* dvalues;  // nnz
  T* dbias;    // side.rows, or null

  // Adds tile t's share for rows [r0, r1). dy: their rows of the packed dy; x: the packed x.
  void rows(int64_t t, const T* dy, const T* x, int64_t r0, int64_t r1) const {
    with_vectors(tiling.vectors(t), [&](auto n) {
      constexpr int NV = decltype(n)::value;
      if (dbias) sum_rows<T, NV>(dy, r1 - r0, dbias + r0);
      with_index(side, [&](auto* index) {
        for (int64_t b = 0; b < side.blocks; b++)
          sddmm_block<T, NV, NV * kLanes<T>>(side.begin_of(b) + r0, side.begin_of(b + 1) + r0,
                                             r1 - r0, index, x, dy, NV * kLanes<T>, dvalues);
      });
    });
  }
  void clear() const {
    __builtin_memset(dvalues, 0, sizeof(T) * side.nnz);
    if (dbias) __builtin_memset(dbias, 0, sizeof(T) * side.rows);
  }
};

// The backward pass. dy is packed once for both products. Samples go in groups of tiles: all
// workers pack, then each takes tiles of dx and rows of dvalues, so that no sum is ever shared.
// product may be null (dx not wanted).
template <class S>
void backward(const Product<S>* product, const Gradient<S>& gradient, const Matrix& dy,
              const Matrix& x, const Parallel& parallel) {
  typedef Sum<S> T;
  const Side& side = gradient.side;
  const Tiling<T>& tiling = gradient.tiling;
  gradient.clear();
  if (!tiling.count) return;
  const int workers = worth_waking(parallel, (side.nnz + side.rows) * x.rows);
  const int64_t group = workers == 1 ? 1 : least(tiling.count, kSharedTiles * workers);
  const int64_t x_size = side.cols * tiling.lanes, dy_size = side.rows * tiling.lanes;
  const int64_t chunk_size = tiling.chunk_rows * tiling.lanes;
  Scratch<T> x_tiles(x_size * group), dy_tiles(dy_size * group);
  Scratch<T> chunks(product ? chunk_size * workers : 0);
  int64_t step = tiling.chunk_rows;
  if (workers > 1) step = least(step, ceil_div(ceil_div(side.rows, 4 * workers), 16) * 16);
  const int64_t x_parts = ceil_div(side.cols, kPackColumns);
  const int64_t dy_parts = ceil_div(side.rows, kPackColumns);
  const int64_t row_items = ceil_div(side.rows, step);

  for (int64_t t0 = 0; t0 < tiling.count; t0 += group) {
    const int64_t n = least(tiling.count - t0, group);
    auto pack_dy = [&](int64_t i) {
      const int64_t t = i / dy_parts, c = i % dy_parts * kPackColumns;
      pack<S>(tiling, dy, t0 + t, c, least(c + kPackColumns, side.rows),
              dy_tiles.get() + t * dy_size);
    };
    auto pack_x = [&](int64_t i) {
      const int64_t t = i / x_parts, c = i % x_parts * kPackColumns;
      pack<S>(tiling, x, t0 + t, c, least(c + kPackColumns, side.cols), x_tiles.get() + t * x_size);
    };
    auto take_dx = [&](int worker, int64_t t) {
      product->all_rows(t0 + t, dy_tiles.get() + t * dy_size, chunks.get() + worker * chunk_size);
    };
    auto take_dvalues = [&](int64_t i) {
      const int64_t r = i * step, end = least(r + step, side.rows);
      for (int64_t t = 0; t < n; t++) {
        const int64_t width = tile_lanes<T>(tiling.vectors(t0 + t));
        gradient.rows(t0 + t, dy_tiles.get() + t * dy_size + r * width, x_tiles.get() + t * x_size,
                      r, end);
      }
    };
    const int64_t dx_items = product ? n : 0;
    if (workers == 1) {  // x is packed only when it is needed: both tiles may not fit L2
      pack<S>(tiling, dy, t0, 0, side.rows, dy_tiles.get());
      if (product) take_dx(0, 0);
      pack<S>(tiling, x, t0, 0, side.cols, x_tiles.get());
      for (int64_t i = 0; i < row_items; i++) take_dvalues(i);
      continue;
    }
    share(parallel, workers, n * (dy_parts + x_parts), [&](int, int64_t i) {
      if (i < n * dy_parts) return pack_dy(i);
      pack_x(i - n * dy_parts);
    });
    share(parallel, workers, dx_items + row_items, [&](int worker, int64_t i) {
      if (i < dx_items) return take_dx(worker, i);
      take_dvalues(i - dx_items);
    });
  }
}

template <class S>
void linear_forward(const LinearForward& a) {
  typedef Sum<S> T;
  const Side& side = a.plan->forward();
  const Tiling<T> tiling(a.x.rows, side.wide);
  const Widened<S> values(a.values, side.nnz), bias(a.bias, side.rows);
  spmm<S>({side, tiling, values.get(), bias.get(), static_cast<S*>(a.y)}, a.x, a.parallel);
}

template <class S>
void grad_values(const LinearBackward& a, const Tiling<Sum<S>>& tiling, const Product<S>* product) {
  typedef Sum<S> T;
  const Side& side = a.plan->forward();
  S* dvalues = static_cast<S*>(a.dvalues);
  S* dbias = static_cast<S*>(a.dbias);
  if constexpr (sizeof(S) == sizeof(T)) {
    backward<S>(product, {side, tiling, dvalues, dbias}, a.dy, a.x, a.parallel);
  } else {
    Scratch<T> values(side.nnz), bias(dbias ? side.rows : 0);
    backward<S>(product, {side, tiling, values.get(), dbias ? bias.get() : nullptr}, a.dy, a.x,
                a.parallel);
    for (int64_t k = 0; k < side.nnz; k++) narrow(values.get()[k], dvalues + k);
    for (int64_t r = 0; dbias && r < side.rows; r++) narrow(bias.get()[r], dbias + r);
  }
}

// dx alone, dvalues alone, or both.
template <class S>
void linear_backward(const LinearBackward& a) {
  typedef Sum<S> T;
  const Side& side = a.plan->forward();
  const Tiling<T> tiling(a.dy.rows, side.wide);
  if (!a.dx) return grad_values<S>(a, tiling, nullptr);
  const Side& transposed = a.plan->transposed();
  Scratch<T> values(side.nnz);
  values_to_transposed<S>(*a.plan, static_cast<const S*>(a.values), values.get(), a.parallel);
  const Product<S> product{transposed, tiling, values.get(), nullptr, static_cast<S*>(a.dx)};
  if (!a.dvalues) return spmm<S>(product, a.dy, a.parallel);
  grad_values<S>(a, tiling, &product);
}

}  // namespace
}  // namespace sparsetrain

// The linear layer: packs a tile of samples, sweeps the column blocks, unpacks. A tile is packed
// right before its use, so that it is still in L2.
#pragma once

#include "few-inl.h"
#include "kernels.h"
#include "ordered_values-inl.h"
#include "parallel-inl.h"
#include "plan.h"
#include "sddmm-inl.h"
#include "simd-inl.h"
#include "spmm-inl.h"
#include "tiles-inl.h"
#include "transposed_values-inl.h"

namespace sparsetrain {
namespace {

// Samples whose gradients of the values are summed apart, so that workers need not share: as few
// as make adding the sums up cheap (1 of about 128 loads of a nonzero), and groups at most.
constexpr int64_t kGroupSamples = 256;
constexpr int64_t kMostGroups = 8;
// Outputs from this size on are written past the caches.
constexpr int64_t kStreamBytes = 4 << 20;

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
  const T* bias;          // side.rows, or null
  Out y;                  // batch x side.rows
  bool in_order = false;  // values lie in the order of the sweeps; a transposed side's always do

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
                sweep_of(side, b, unit, in_order), side.index16.get(), values, x,
                to.data + (r - r0) * to.stride, to.stride, bias ? bias + r : nullptr, b == 0);
          });
        });
      }
      y.template put<NV>(tiling, t, r0, r1, chunk);
    });
  }
};

// For the products of a side with all samples.
template <class T>
int workers_for(const Parallel& parallel, const Side& side, const Tiling<T>& tiling) {
  return worth_waking(parallel, (side.nnz + side.rows) * tiling.batch);
}

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
  const int workers = workers_for(parallel, side, tiling);
  const int64_t tile_size = side.cols * tiling.lanes, chunk_size = tiling.chunk_rows * tiling.lanes;
  Scratch<T> tiles(tile_size * workers), chunks(chunk_size * workers);
  auto tile = [&](int worker) { return tiles.get() + worker * tile_size; };
  auto chunk = [&](int worker) { return chunks.get() + worker * chunk_size; };

  if (tiling.shared_evenly(workers)) {
    share(parallel, workers, tiling.count,
          [&](int worker, int64_t t) { product.all(t, x, tile(worker), chunk(worker)); });
    return;
  }
  // Few tiles: each worker takes as many vectors of samples in a row, of its first and last tile a
  // part of the rows. Two may pack the same tile: cheaper than to wait for each other and to read
  // what another core has written.
  share(parallel, workers, workers, [&](int worker, int64_t share) {
    const int64_t all = ceil_div(tiling.batch, kLanes<T>);
    for (int64_t t = 0, first = 0; t < tiling.count; first += tiling.vectors(t++) * workers) {
      const int64_t parts = tiling.vectors(t) * workers;
      const int64_t p0 = most(all * share - first, 0), p1 = least(all * (share + 1) - first, parts);
      if (p0 >= p1) continue;
      pack<S>(tiling, x, t, 0, side.cols, tile(worker));
      product.rows(t, tile(worker), part_begin(side, p0, parts), part_begin(side, p1, parts),
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
  T* dvalues;     // nnz, in the order of the sweeps or of the pattern
  T* dbias;       // side.rows, or null
  bool in_order;  // of the sweeps

  // Adds tile t's share for rows [begin, end) to `values` (nnz, as dvalues) and
  // `bias` (side.rows, or null). dy(r, end): rows from r on of the packed tile. x_tile: side.cols x
  // lanes of scratch. Blocks of x are packed right before their only use, where there is one.
  template <class Dy, class X>
  void rows(int64_t t, const Dy& dy, const X& x, T* x_tile, int64_t begin, int64_t end, T* values,
            T* bias) const {
    const bool once = end - begin <= tiling.chunk_rows;
    if (!once) pack<S>(tiling, x, t, 0, side.cols, x_tile);
    for (int64_t r = begin; r < end; r += tiling.chunk_rows) {
      const int64_t rows = least(tiling.chunk_rows, end - r);
      const T* dy_rows = dy(r, r + rows);
      with_tile(side, tiling.vectors(t), [&](auto n, auto bytes) {
        constexpr int NV = decltype(n)::value;
        constexpr int64_t width = NV * kLanes<T>;
        if (bias) sum_rows<T, NV>(dy_rows, rows, bias + r);
        for (int64_t b = 0; b < side.blocks; b++) {
          if (once) pack_block<S>(tiling, x, t, side, b, x_tile);
          const T* operand = once ? x_tile : x_tile + side.first_column(b) * width;
          for_units(side, r, r + rows, [&](int64_t unit, int64_t first) {
            sddmm_sweep<T, NV, decltype(bytes)::value>(
                sweep_of(side, b, unit, in_order), side.index16.get(), operand,
                dy_rows + (first - r) * width, width, values);
          });
        }
      });
    }
  }
};

// How the sums of the backward pass are cut. Tiles of samples fall into groups; a group's sums are
// made apart and added to the others in order, so that workers share nothing, and the result is the
// same whoever does what. So the number of groups must not depend on the workers; only one group
// may as well be as many as it has tiles, since the sums of a tile are added in order in any case.
struct Grouping {
  int64_t groups = 1, parts;  // parts of the rows, where there are more workers than groups

  template <class T>
  Grouping(const Side& side, const Tiling<T>& tiling, int workers) {
    while (groups < kMostGroups && groups * 2 <= tiling.count &&
           tiling.batch >= groups * 2 * kGroupSamples)
      groups *= 2;
    if (groups == 1 && add_up_fast(side, tiling, workers)) groups = tiling.count;
    parts = ceil_div(workers, groups);
  }

 private:
  // Whether workers with a tile each add up the sums of a tile sooner than workers with a part of
  // the rows each would pack all of the columns. Another core's sums are read: they must be few.
  template <class T>
  static bool add_up_fast(const Side& side, const Tiling<T>& tiling, int workers) {
    const int64_t bytes = 2 * side.nnz * static_cast<int64_t>(sizeof(T));
    return workers > 1 && tiling.count <= workers && tiling.shared_evenly(workers) &&
           5 * side.nnz <= 4 * side.cols * tiling.lanes && bytes <= cache_bytes(2) / 2;
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
    const int workers = workers_for(parallel, side, tiling);
    const Grouping cut(side, tiling, workers);
    const bool apart = cut.groups > 1;
    const int64_t x_size = side.cols * tiling.lanes;
    const int64_t dy_size = is_packed<S, Dy> ? 0 : side.rows * tiling.lanes;
    const int64_t chunk_size = product ? tiling.chunk_rows * tiling.lanes : 0;
    Scratch<T> x_tiles(x_size * workers), dy_tiles(dy_size * workers), chunks(chunk_size * workers);
    Scratch<T> values(apart ? side.nnz * workers : 0), bias(apart ? side.rows * workers : 0);
    Scratch<T> sums(gradient.dbias ? side.rows * workers : 0);
    OneByOne order(cut.parts);
    share(parallel, workers, cut.groups * cut.parts, [&](int worker, int64_t i) {
      const int64_t g = i / cut.parts, p = i % cut.parts;
      Room room{{part_begin(side, p, cut.parts), part_begin(side, p + 1, cut.parts)},
                x_tiles.get() + worker * x_size,
                dy_tiles.get() + worker * dy_size,
                chunks.get() + worker * chunk_size,
                sums.get() + worker * side.rows,
                gradient.dvalues,
                gradient.dbias};
      if (g) {
        room.dvalues = values.get() + worker * side.nnz;
        if (gradient.dbias) room.dbias = bias.get() + worker * side.rows;
      }
      clear(room.dvalues, room.dbias, room.part.begin, room.part.end);
      const int64_t end = tiling.count * (g + 1) / cut.groups;
      for (int64_t t = tiling.count * g / cut.groups; t < end; t++)
        tile(t, dx_rows(t, p, cut), room);
      order.wait(p, g);
      if (g) add(room.dvalues, room.dbias, room.part.begin, room.part.end);
      order.done(p, g);
    });
  }

 private:
  struct Rows {
    int64_t begin, end;
  };
  struct Room {  // of a worker, for its part of the rows
    Rows part;
    T *x, *dy, *chunk, *sums;
    T *dvalues, *dbias;  // dbias may be null
  };
  // Rows of dx of tile t that part p makes: all of every parts-th tile, or its part of each.
  Rows dx_rows(int64_t t, int64_t p, const Grouping& cut) const {
    if (!product) return {0, 0};
    const int64_t all = product->side.rows;
    if (shared_evenly(gradient.tiling.count / cut.groups, static_cast<int>(cut.parts)))
      return {0, t % cut.parts == p ? all : 0};
    return {part_begin(product->side, p, cut.parts), part_begin(product->side, p + 1, cut.parts)};
  }
  void tile(int64_t t, Rows dx, const Room& room) const {
    const int64_t width = tile_lanes<T>(gradient.tiling.vectors(t));
    const T* packed = nullptr;
    if (dx.begin < dx.end) {
      packed = pack_dy(t, {0, gradient.side.rows}, room.dy, room);
      product->rows(t, packed, dx.begin, dx.end, room.chunk);
    }
    // x is packed only when it is needed: both tiles may not fit L2. So is dy, if only this needs
    // it.
    auto dy_rows = [&](int64_t r, int64_t end) {
      if (packed) return packed + r * width;
      return pack_dy(t, {r, end}, room.dy - r * width, room) + r * width;
    };
    gradient.rows(t, dy_rows, x, room.x, room.part.begin, room.part.end, room.dvalues,
                  kSumsWhilePacked ? nullptr : room.dbias);
  }
  static constexpr bool kSumsWhilePacked = std::is_same<Dy, Matrix>::value;
  // Packs those rows of dy's tile t at `tile`, where all are if they are packed already: says
  // where. The sums of those of the part are added to dbias, if packing makes them.
  const T* pack_dy(int64_t t, Rows rows, T* tile, const Room& room) const {
    const Tiling<T>& tiling = gradient.tiling;
    if constexpr (!kSumsWhilePacked) {
      return packed_tile<S>(tiling, dy, t, rows.begin, rows.end, tile);
    } else {
      if (!room.dbias) return pack<S>(tiling, dy, t, rows.begin, rows.end, tile), tile;
      // A tile's sums are made apart, whether they are a group's only ones or not.
      __builtin_memset(room.sums + rows.begin, 0, sizeof(T) * (rows.end - rows.begin));
      pack<S>(tiling, dy, t, rows.begin, rows.end, tile, room.sums);
      const int64_t end = least(rows.end, room.part.end);
      for (int64_t r = most(rows.begin, room.part.begin); r < end; r++)
        room.dbias[r] += room.sums[r];
      return tile;
    }
  }
  // f(begin, end) for where values of rows [r0, r1) lie, which is a part of the rows.
  template <class F>
  void for_values(int64_t r0, int64_t r1, const F& f) const {
    const Side& side = gradient.side;
    if (!gradient.in_order) return f(side.row_begin[r0], side.row_begin[r1]);
    for (int64_t b = 0; b < side.blocks; b++)
      f(place_in_order(side, b, r0), place_in_order(side, b, r1));
  }
  void clear(T* dvalues, T* dbias, int64_t r0, int64_t r1) const {
    for_values(r0, r1, [&](int64_t begin, int64_t end) {
      __builtin_memset(dvalues + begin, 0, sizeof(T) * (end - begin));
    });
    if (dbias) __builtin_memset(dbias + r0, 0, sizeof(T) * (r1 - r0));
  }
  void add(const T* dvalues, const T* dbias, int64_t r0, int64_t r1) const {
    for_values(r0, r1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++) gradient.dvalues[k] += dvalues[k];
    });
    for (int64_t r = r0; dbias && r < r1; r++) gradient.dbias[r] += dbias[r];
  }
};

// dvalues and dbias (or null) in the type of the storage, and dx by `product`, unless it is null.
template <class S, class Dy, class X>
void grad_values(const Side& side, const Tiling<Sum<S>>& tiling, const Product<S>* product,
                 const Dy& dy, const X& x, S* dvalues, S* dbias, const Parallel& parallel) {
  typedef Sum<S> T;
  constexpr bool same = std::is_same<S, T>::value;
  const bool in_order = worth_ordering(tiling);
  Scratch<T> values(same && !in_order ? 0 : side.nnz), bias(!same && dbias ? side.rows : 0);
  auto run = [&](T* to_values, T* to_bias) {
    const Gradient<S> gradient{side, tiling, to_values, to_bias, in_order};
    Backward<S, Dy, X>{product, gradient, dy, x}.run(parallel);
  };
  if constexpr (same) {
    run(in_order ? values.get() : dvalues, dbias);
  } else {
    run(values.get(), dbias ? bias.get() : nullptr);
    for (int64_t r = 0; dbias && r < side.rows; r++) narrow(bias.get()[r], dbias + r);
    for (int64_t k = 0; !in_order && k < side.nnz; k++) narrow(values.get()[k], dvalues + k);
  }
  if (in_order) out_of_order(side, values.get(), dvalues, parallel);
}

template <class S>
void linear_forward(const LinearForward& a) {
  typedef Sum<S> T;
  if (few_forward_if_faster<S>(a)) return;
  const Side& side = a.plan->forward(kTiles);
  const Tiling<T> tiling(a.x.rows, side.wide);
  const ForwardValues<S> values(a.values, side, tiling, a.parallel);
  const Widened<S> bias(a.bias, side.rows);
  const RowsOut<S> y{static_cast<S*>(a.y), a.x.rows, side.rows};
  spmm(Product<S>{side, tiling, values.get(), bias.get(), y, values.in_order()}, a.x, a.parallel);
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

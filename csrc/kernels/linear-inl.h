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

// Rows of y (or dy) handled together; their tile (32 KiB with 512-bit vectors) stays in L2 while
// the column blocks pass. A multiple of 16, so that sum_rows groups the same rows for any split.
constexpr int64_t kRowChunk = 128;

// How `batch` samples fall into tiles: full ones, and a last one of fewer vectors.
template <class T>
struct Tiling {
  explicit Tiling(int64_t batch) : batch(batch), count(ceil_div(batch, kTileLanes<T>)) {}
  int samples(int64_t t) const {
    const int64_t left = batch - t * kTileLanes<T>;
    return static_cast<int>(left < kTileLanes<T> ? left : kTileLanes<T>);
  }
  int vectors(int64_t t) const { return static_cast<int>(ceil_div(samples(t), kLanes<T>)); }
  int64_t batch, count;
};

template <class F>
ST_INLINE void with_vectors(int nv, const F& f) {
  if (nv == 4) return f(std::integral_constant<int, 4>{});
  if (nv == 3) return f(std::integral_constant<int, 3>{});
  if (nv == 2) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}
template <class F>
ST_INLINE void with_index(const Side& side, const F& f) {
  if (side.index16) return f(side.index16);
  return f(side.index32);
}

template <class S>
ST_INLINE const S* row_of(const Matrix& m, int64_t r) {
  return static_cast<const S*>(m.data) + r * m.row_stride;
}

// Values as the kernels want them: in the side's order, in the type of the sums.
template <class S>
class Values {
 public:
  typedef Sum<S> T;
  Values(const Side& side, const void* values)
      : scratch_(needs_copy(side) ? side.nnz : 0),
        data_(needs_copy(side) ? scratch_.get() : static_cast<const T*>(values)) {
    if (!needs_copy(side)) return;
    const S* v = static_cast<const S*>(values);
    T* out = scratch_.get();
    if (side.perm) {
      for (int64_t k = 0; k < side.nnz; k++) out[k] = widen(v[side.perm[k]]);
    } else {
      for (int64_t k = 0; k < side.nnz; k++) out[k] = widen(v[k]);
    }
  }
  const T* get() const { return data_; }

 private:
  static bool needs_copy(const Side& side) { return side.perm || sizeof(S) != sizeof(T); }
  Scratch<T> scratch_;
  const T* data_;
};

// y[.., r0:r1] of one packed tile. chunk: (r1 - r0) x tile lanes of scratch.
template <class S>
void spmm_rows(const Side& side, const Sum<S>* tile, const Sum<S>* values, const Sum<S>* bias,
               int samples, int nv, int64_t r0, int64_t r1, Sum<S>* chunk, S* y) {
  typedef Sum<S> T;
  with_vectors(nv, [&](auto n) {
    constexpr int NV = decltype(n)::value;
    with_index(side, [&](auto* index) {
      for (int64_t b = 0; b < side.blocks; b++)
        spmm_block<T, NV>(side.begin_of(b) + r0, side.begin_of(b + 1) + r0, r1 - r0, index, values,
                          tile, chunk, bias ? bias + r0 : nullptr, b == 0);
    });
    unpack_tile<S, NV>(chunk, samples, r1 - r0, y + r0, side.rows);
  });
}

template <class S>
void pack_any(const Matrix& m, int64_t first, int samples, int nv, int64_t c0, int64_t c1,
              Sum<S>* tile) {
  with_vectors(nv, [&](auto n) {
    constexpr int NV = decltype(n)::value;
    pack_tile<S, NV>(row_of<S>(m, first) + c0, m.row_stride, samples, c1 - c0,
                     tile + c0 * NV * kLanes<Sum<S>>);
  });
}

// y = x side^T + bias, for either orientation.
template <class S>
void spmm(const Side& side, const Matrix& x, const Sum<S>* values, const Sum<S>* bias, S* y,
          const Parallel& parallel) {
  typedef Sum<S> T;
  const Tiling<T> tiling(x.rows);
  if (!tiling.count || !side.rows) return;
  const int64_t tile_size = side.cols * kTileLanes<T>;
  const int workers = worth_waking(parallel, (side.nnz + side.rows) * x.rows);
  auto out = [&](int64_t t) { return y + t * kTileLanes<T> * side.rows; };

  if (workers == 1 || tiling.count >= 4 * workers || tiling.count % workers == 0) {
    // Enough tiles: a worker packs and finishes each of its own; nothing is shared.
    Scratch<T> tiles(tile_size * workers);
    Scratch<T> chunks(kRowChunk * kTileLanes<T> * workers);
    share(parallel, workers, tiling.count, [&](int worker, int64_t t) {
      T* tile = tiles.get() + worker * tile_size;
      T* chunk = chunks.get() + worker * kRowChunk * kTileLanes<T>;
      const int samples = tiling.samples(t), nv = tiling.vectors(t);
      pack_any<S>(x, t * kTileLanes<T>, samples, nv, 0, side.cols, tile);
      for (int64_t r = 0; r < side.rows; r += kRowChunk) {
        const int64_t r1 = r + kRowChunk < side.rows ? r + kRowChunk : side.rows;
        spmm_rows<S>(side, tile, values, bias, samples, nv, r, r1, chunk, out(t));
      }
    });
    return;
  }
  // Few tiles: all are packed first, then workers share out their rows.
  int64_t step = ceil_div(side.rows * tiling.count, 4 * workers);
  step = step >= kRowChunk ? kRowChunk : ceil_div(step, 16) * 16;
  Scratch<T> tiles(tile_size * tiling.count);
  Scratch<T> chunks(kRowChunk * kTileLanes<T> * workers);
  const int64_t columns = 128, parts = ceil_div(side.cols, columns);
  share(parallel, workers, tiling.count * parts, [&](int, int64_t i) {
    const int64_t t = i / parts, c = i % parts * columns;
    const int64_t c1 = c + columns < side.cols ? c + columns : side.cols;
    pack_any<S>(x, t * kTileLanes<T>, tiling.samples(t), tiling.vectors(t), c, c1,
                tiles.get() + t * tile_size);
  });
  const int64_t groups = ceil_div(side.rows, step);
  share(parallel, workers, tiling.count * groups, [&](int worker, int64_t i) {
    const int64_t t = i / groups, r = i % groups * step;
    const int64_t r1 = r + step < side.rows ? r + step : side.rows;
    spmm_rows<S>(side, tiles.get() + t * tile_size, values, bias, tiling.samples(t),
                 tiling.vectors(t), r, r1, chunks.get() + worker * kRowChunk * kTileLanes<T>,
                 out(t));
  });
}

template <class S>
void linear_forward(const LinearForward& a) {
  typedef Sum<S> T;
  const Side& side = a.plan->forward();
  const Values<S> values(side, a.values);
  const S* bias = static_cast<const S*>(a.bias);
  Scratch<T> widened(bias ? side.rows : 0);
  if (bias)
    for (int64_t r = 0; r < side.rows; r++) widened.get()[r] = widen(bias[r]);
  spmm<S>(side, a.x, values.get(), bias ? widened.get() : nullptr, static_cast<S*>(a.y),
          a.parallel);
}

template <class S>
void linear_grad_input(const LinearGradInput& a) {
  const Side& side = a.plan->transposed();
  const Values<S> values(side, a.values);
  spmm<S>(side, a.dy, values.get(), nullptr, static_cast<S*>(a.dx), a.parallel);
}

// dvalues and dbias in the type of the sums. Samples are taken in groups of tiles: x is packed
// once for all workers, then each worker owns rows, so that no sum is ever shared.
template <class S>
void sddmm(const Side& side, const Matrix& dy, const Matrix& x, Sum<S>* dvalues, Sum<S>* dbias,
           const Parallel& parallel) {
  typedef Sum<S> T;
  const Tiling<T> tiling(x.rows);
  const int64_t tile_size = side.cols * kTileLanes<T>;
  const int workers = worth_waking(parallel, (side.nnz + side.rows) * (x.rows + 1));
  const int64_t group = workers == 1 || tiling.count < 2 ? 1 : tiling.count < 8 ? tiling.count : 8;
  int64_t step = ceil_div(side.rows, 4 * workers);
  step = workers == 1 || step >= kRowChunk ? kRowChunk : ceil_div(step, 16) * 16;
  Scratch<T> tiles(tile_size * group);
  Scratch<T> chunks(kRowChunk * kTileLanes<T> * workers);
  __builtin_memset(dvalues, 0, sizeof(T) * side.nnz);
  if (dbias) __builtin_memset(dbias, 0, sizeof(T) * side.rows);

  const int64_t columns = workers == 1 ? side.cols : 128;
  const int64_t parts = side.cols ? ceil_div(side.cols, columns) : 0;
  for (int64_t t0 = 0; t0 < tiling.count; t0 += group) {
    const int64_t n = tiling.count - t0 < group ? tiling.count - t0 : group;
    share(parallel, workers, n * parts, [&](int, int64_t i) {
      const int64_t t = t0 + i / parts, c = i % parts * columns;
      const int64_t c1 = c + columns < side.cols ? c + columns : side.cols;
      pack_any<S>(x, t * kTileLanes<T>, tiling.samples(t), tiling.vectors(t), c, c1,
                  tiles.get() + (t - t0) * tile_size);
    });
    share(parallel, workers, ceil_div(side.rows, step), [&](int worker, int64_t i) {
      T* chunk = chunks.get() + worker * kRowChunk * kTileLanes<T>;
      const int64_t r = i * step, r1 = r + step < side.rows ? r + step : side.rows;
      for (int64_t t = t0; t < t0 + n; t++) {
        with_vectors(tiling.vectors(t), [&](auto nv) {
          constexpr int NV = decltype(nv)::value;
          pack_tile<S, NV>(row_of<S>(dy, t * kTileLanes<T>) + r, dy.row_stride, tiling.samples(t),
                           r1 - r, chunk);
          if (dbias) sum_rows<T, NV>(chunk, r1 - r, dbias + r);
          with_index(side, [&](auto* index) {
            for (int64_t b = 0; b < side.blocks; b++)
              sddmm_block<T, NV>(side.begin_of(b) + r, side.begin_of(b + 1) + r, r1 - r, index,
                                 tiles.get() + (t - t0) * tile_size, chunk, dvalues);
          });
        });
      }
    });
  }
}

template <class S>
void linear_grad_values(const LinearGradValues& a) {
  typedef Sum<S> T;
  const Side& side = a.plan->forward();
  S* dvalues = static_cast<S*>(a.dvalues);
  S* dbias = static_cast<S*>(a.dbias);
  if constexpr (sizeof(S) == sizeof(T)) {
    sddmm<S>(side, a.dy, a.x, dvalues, dbias, a.parallel);
  } else {
    Scratch<T> values(side.nnz), bias(dbias ? side.rows : 0);
    sddmm<S>(side, a.dy, a.x, values.get(), dbias ? bias.get() : nullptr, a.parallel);
    for (int64_t k = 0; k < side.nnz; k++) narrow(values.get()[k], dvalues + k);
    for (int64_t r = 0; dbias && r < side.rows; r++) narrow(bias.get()[r], dbias + r);
  }
}

}  // namespace
}  // namespace sparsetrain

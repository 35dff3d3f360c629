// Between PyTorch's (batch, features) rows and the kernels' tiles.
//
// A tile of T holds `samples` <= NV * lanes samples: tile[feature][NV * lanes], so that the
// samples of one feature are NV consecutive aligned vectors. Lanes beyond `samples` are zero.
#pragma once

#include "cpu.h"
#include "simd-inl.h"

namespace sparsetrain {
namespace {

// The sum of `lanes` vectors, of each lane.
template <class T>
ST_INLINE Vec<T> sum_of(const Vec<T>* r) {
  constexpr int w = kLanes<T>;
  Vec<T> sum[w];
  ST_UNROLL
  for (int i = 0; i < w; i++) sum[i] = r[i];
  ST_UNROLL
  for (int n = w / 2; n > 0; n /= 2) {
    ST_UNROLL
    for (int i = 0; i < n; i++) sum[i] += sum[i + n];
  }
  return sum[0];
}

// One square of `lanes` features x `lanes` samples, transposed in registers. Adds each feature's
// sum to `sums`, unless it is null.
template <class S, int NV>
ST_INLINE void pack_square(const S* src, int64_t stride, int samples, int features, Sum<S>* tile,
                           Sum<S>* sums) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  Vec<T> r[w];
  if (samples >= w && features == w) {
    ST_UNROLL
    for (int i = 0; i < w; i++) r[i] = load_widened(src + i * stride);
  } else {
    for (int i = 0; i < w; i++)
      r[i] = i < samples ? load_widened_some(src + i * stride, features) : Vec<T>{};
  }
  if (sums) {
    const Vec<T> before = features == w ? loadu<T>(sums) : load_widened_some(sums, features);
    store_narrowed<T>(sums, before + sum_of<T>(r), features);
  }
  transpose<T>(r);
  if (features == w) {
    ST_UNROLL
    for (int i = 0; i < w; i++) store<T>(tile + i * NV * w, r[i]);
  } else {
    for (int i = 0; i < features; i++) store<T>(tile + i * NV * w, r[i]);
  }
}

// Bytes of a row that are asked for ahead of their use, into L2: the squares' shuffles leave too
// few loads in flight. Packing from memory 13-14 -> 18 GB/s, whole operators at 95 % 1.01-1.1; into
// L1: no win; from L2: 0.98-1.0.
constexpr int64_t kPackAhead = 512;

// Squares that are packed together, so that lines of 64 bytes are read and written whole: how many
// lie in a line of what is read, and how many vectors in a line of the tile. 256-bit vectors: 2 x
// 2, packing 1.05-1.15 times faster than square by square.
template <class S>
constexpr int kAcross = kLanes<Sum<S>> * sizeof(S) <= 32 ? 2 : 1;
template <int NV>
constexpr int kDown = SPARSETRAIN_VECTOR_BYTES <= 32 && NV % 2 == 0 ? 2 : 1;

// src: `samples` rows of `features` values, row i at src + i * stride.
// tile: features x NV * lanes, aligned to a vector, written in full.
// sums: of each feature, added to; or null. far: whether src is beyond L2.
template <class S, int NV>
void pack_tile(const S* src, int64_t stride, int samples, int64_t features, Sum<S>* tile,
               Sum<S>* sums, bool far) {
  constexpr int w = kLanes<Sum<S>>, across = kAcross<S>, down = kDown<NV>;
  // Long runs along few rows: 10 GB/s; all rows of the tile side by side: 4 GB/s, since the
  // hardware prefetcher cannot follow 64 streams.
  const bool ask = far && !is_intel();  // whose own prefetching finds these streams
  auto square = [&](int v, int64_t f, int rows, int columns) __attribute__((always_inline)) {
    pack_square<S, NV>(src + v * w * stride + f, stride, rows, columns, tile + f * NV * w + v * w,
                       sums ? sums + f : nullptr);
  };
  for (int v = 0; v < NV; v += down) {
    const int rows = samples - v * w;
    int64_t f = 0;
    for (; rows >= down * w && f + across * w <= features; f += across * w) {
      if (ask && f * sizeof(S) % 64 == 0) {
        const S* from = src + v * w * stride + f + kPackAhead / sizeof(S);
        ST_UNROLL
        for (int i = 0; i < down * w; i++) __builtin_prefetch(from + i * stride, 0, 2);
      }
      ST_UNROLL
      for (int i = 0; i < down * across; i++) square(v + i / across, f + i % across * w, w, w);
    }
    for (; f < features; f += w) {
      const int columns = static_cast<int>(features - f < w ? features - f : w);
      for (int i = 0; i < down; i++) square(v + i, f, rows - i * w, columns);
    }
  }
}

// Features of one row that are gathered before they are streamed: 512 bytes.
template <class T>
constexpr int kRun = 512 / static_cast<int>(sizeof(T));

// A square of the way back: `features` <= lanes features of vector v, one row of results each.
template <class T, int NV>
ST_INLINE void unpack_square(const T* from, int features, Vec<T>* r) {
  constexpr int w = kLanes<T>;
  if (features == w) {
    ST_UNROLL
    for (int i = 0; i < w; i++) r[i] = load<T>(from + i * NV * w);
  } else {
    for (int i = 0; i < w; i++) r[i] = i < features ? load<T>(from + i * NV * w) : Vec<T>{};
  }
  transpose<T>(r);
}

// unpack_tile past the caches: half-written lines cost a round trip to memory each, so whole runs
// of a row are written at once (256-bit vectors: 13-21 GB/s; straight from the squares: 2-4).
template <class T, int NV>
void stream_tile(const T* tile, int samples, int64_t features, T* dst, int64_t stride) {
  constexpr int w = kLanes<T>;
  alignas(64) T run[w * kRun<T>];
  for (int v = 0; v < NV; v++) {
    const int rows = samples - v * w < w ? samples - v * w : w;
    for (int64_t f = 0; f < features; f += kRun<T>) {
      const int n = static_cast<int>(features - f < kRun<T> ? features - f : kRun<T>);
      for (int g = 0; g < n; g += w) {
        Vec<T> r[w];
        unpack_square<T, NV>(tile + (f + g) * NV * w + v * w, n - g < w ? n - g : w, r);
        ST_UNROLL
        for (int i = 0; i < w; i++) store<T>(run + i * kRun<T> + g, r[i]);
      }
      for (int i = 0; i < rows; i++) {
        T* to = dst + (v * w + i) * stride + f;
        int g = 0;
        for (; g + w <= n; g += w) stream<T>(to + g, load<T>(run + i * kRun<T> + g));
        if (g < n) store_narrowed<T>(to + g, load<T>(run + i * kRun<T> + g), n - g);
      }
    }
  }
}

// The way back: dst row i gets feature values tile[..][i], i < samples. tile as above.
// past_caches: dst is written with streaming stores where it is aligned, and the packed input stays
// in L2; for outputs that do not fit the caches anyway.
template <class S, int NV>
void unpack_tile(const Sum<S>* tile, int samples, int64_t features, S* dst, int64_t stride,
                 bool past_caches) {
  typedef Sum<S> T;
  constexpr int w = kLanes<T>;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (past_caches && stride % w == 0 && reinterpret_cast<uintptr_t>(dst) % sizeof(Vec<T>) == 0)
      return stream_tile<T, NV>(tile, samples, features, dst, stride);
  }
  for (int v = 0; v < NV; v++) {
    const int rows = samples - v * w < w ? samples - v * w : w;
    for (int64_t f = 0; f < features; f += w) {
      const int n = static_cast<int>(features - f < w ? features - f : w);
      Vec<T> r[w];
      unpack_square<T, NV>(tile + f * NV * w + v * w, n, r);
      S* d = dst + v * w * stride + f;
      if (rows == w && n == w) {
        ST_UNROLL
        for (int i = 0; i < w; i++) store_narrowed<S>(d + i * stride, r[i], w);
      } else {
        for (int i = 0; i < rows; i++) store_narrowed<S>(d + i * stride, r[i], n);
      }
    }
  }
}

}  // namespace
}  // namespace sparsetrain

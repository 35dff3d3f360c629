// The cells of a sweep (see plan.h), one after the other.
#pragma once

#include "plan.h"
#include "simd-inl.h"

namespace sparsetrain {
namespace {

// Bytes of operands from which on a cell takes long enough to ask for a later one's values.
constexpr int64_t kWorthAsking = 4096;

// f(row, column numbers, values, count) for each cell, with what the next ones read asked for in
// time, as far as the CPU needs that (Sweep::ask). index, values: of the whole side; V may be
// const. `Bytes` of each row's other operand lie at rows + row * stride.
template <class T, int Bytes, int Ahead, class I, class V, class F>
ST_INLINE void for_cells(const Sweep& sweep, const I* index, V* values, const T* rows,
                         int64_t stride, const F& f) {
  const I* at = index + sweep.first;
  const uint8_t* row = sweep.row;
  const bool ask = sweep.ask;
  constexpr int64_t line = 64 / sizeof(T);
  auto touch = [&]() __attribute__((always_inline)) {
    const T* p = rows + row[kSweepAhead - 2] * stride;
    ST_UNROLL
    for (int i = 0; i < Bytes; i += 64) __builtin_prefetch(p + i / sizeof(T));
  };
  Indices<I, Ahead> following(at);
  auto first_of = [&](int64_t count) __attribute__((always_inline)) {
    const Indices<I, Ahead> first = following;
    following = Indices<I, Ahead>(at + count);
    following.keep();
    return first;
  };
  if (const int32_t* from = sweep.from) {
    for (const CellRun* run = sweep.runs; run < sweep.end; run++) {
      const int64_t count = run->nonzeros;
      for (int32_t c = run->cells; c > 0; c--, at += count) {
        if (ask) {
          touch();
          __builtin_prefetch(at + 128);
        }
        if (ask || count * Bytes >= kWorthAsking) {
          V* next = values + from[kSweepAhead - 2];
          __builtin_prefetch(next);
          __builtin_prefetch(next + line);
          for (int64_t k = 2 * line; k <= count; k += line) __builtin_prefetch(next + k);
        }
        f(*row++, first_of(count), at, values + *from++, count);
      }
    }
    return;
  }
  V* value = values + sweep.first;
  for (const CellRun* run = sweep.runs; run < sweep.end; run++) {
    const int64_t count = run->nonzeros;
    for (int32_t c = run->cells; c > 0; c--, at += count, value += count) {
      if (ask) {
        touch();
        __builtin_prefetch(at + 128);
        __builtin_prefetch(value + 6 * line);
        __builtin_prefetch(value + 7 * line);
      }
      f(*row++, first_of(count), at, value, count);
    }
  }
}

}  // namespace
}  // namespace sparsetrain
